"""A sharded model's state dict is the unsharded model's: saved, loaded, from memory, from meta, from a checkpoint."""

from __future__ import annotations

import copy
import os
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import epops
from epops import zoo
from epops.models.site import sites

from ..ranks import run_ranks


def _whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _same(a: torch.nn.Module, b: torch.nn.Module) -> None:
    for (name, p), (_, q) in zip(a.named_parameters(), b.named_parameters()):
        assert torch.equal(p, q), name


def _check_save(rank: int, size: int, family: str, experts: int) -> None:
    whole = zoo.tiny(family, **({"num_local_experts": experts} if experts else {}))
    expected = whole.state_dict()
    with epops.ExpertGroup(None, max_tokens=4) as group:
        model = epops.parallelize(copy.deepcopy(whole), group)
        got = {name: _whole(value) for name, value in model.state_dict().items()}
        for name, value in expected.items():
            if name in got:
                assert got[name].shape == value.shape, name
                # Of LongCat's gate_up_proj also the rows for experts that compute nothing, which nobody reads.
                assert torch.equal(got[name], value), name
            else:
                assert "expert_" in name, f"{name} is missing"
        everyone = [None] * size
        dist.all_gather_object(everyone, sorted(got))
        assert set().union(*everyone) == set(expected)


SAVED = [("mixtral", 5), ("dbrx", 0), ("longcat_flash", 0), ("switch_transformers", 0), ("gpt_oss", 0)]


@pytest.mark.parametrize("family,experts", SAVED)
def test_saved_tensors_are_the_unsharded_ones(family: str, experts: int) -> None:
    run_ranks(_check_save, 3, family, experts)


def _check_load(rank: int, size: int, family: str, how: str) -> None:
    source, target = zoo.tiny(family, seed=1), zoo.tiny(family, seed=2)
    with epops.ExpertGroup(None, max_tokens=4) as group:
        expected = epops.parallelize(copy.deepcopy(source), group)
        if how == "meta":
            target = target.to("meta")
        model = epops.parallelize(target, group)
        if how == "meta":
            assert all(p.is_meta for p in model.parameters())
            model.load_state_dict(source.state_dict(), assign=True)
            model.tie_weights()  # assigning unties, in any torch model
        elif how == "one by one":
            for name, value in source.state_dict().items():
                model.load_state_dict({name: value}, strict=False)
        elif how == "sharded":
            model.load_state_dict(expected.state_dict())
        else:
            model.load_state_dict(source.state_dict())
        _same(model, expected)
        if family == "longcat_flash":
            for name, value in source.state_dict().items():
                assert torch.equal(_whole(model.state_dict()[name]), value), name
        ids = {id(p) for p in epops.expert_parameters(model)}
        assert ids and ids <= {id(p) for p in model.parameters()}


@pytest.mark.parametrize("how", ["whole", "one by one", "sharded", "meta"])
@pytest.mark.parametrize("family", ["mixtral", "switch_transformers", "longcat_flash"])
def test_loads_the_unsharded_layout(family: str, how: str) -> None:
    if (family, how) == ("switch_transformers", "sharded"):
        how = "whole"
    run_ranks(_check_load, 3, family, how)


def _check_checkpoint(rank: int, size: int, family: str, folder: str) -> None:
    source = zoo.tiny(family, seed=1)
    with epops.ExpertGroup(None, max_tokens=4) as group:
        model = epops.parallelize(copy.deepcopy(source), group)
        dcp.save(model.state_dict(), checkpoint_id=os.path.join(folder, "sharded"))
        again = epops.parallelize(zoo.tiny(family, seed=2), group)
        state = again.state_dict()
        dcp.load(state, checkpoint_id=os.path.join(folder, "sharded"))
        again.load_state_dict(state, strict=family != "switch_transformers")
        _same(again, model)
    # What was saved by sharded ranks loads into the whole model, and the other way round.
    plain = zoo.tiny(family, seed=3)
    state = plain.state_dict()
    dcp.load(state, checkpoint_id=os.path.join(folder, "sharded"))
    plain.load_state_dict(state)
    _same(plain, source)


@pytest.mark.parametrize("family", ["mixtral", "switch_transformers", "longcat_flash"])
def test_distributed_checkpoint_round_trip(family: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(_check_checkpoint, 2, family, folder)


class _Allocated(TorchDispatchMode):
    """The largest tensor storage, in bytes, that any op made on a real device, beside those of ``given`` tensors."""

    largest = 0

    def __init__(self, given: list[torch.Tensor]) -> None:
        super().__init__()
        self.given = {t.untyped_storage().data_ptr() for t in given}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if not isinstance(value, torch.Tensor) or value.is_meta:
                continue
            if value.untyped_storage().data_ptr() not in self.given:
                self.largest = max(self.largest, value.untyped_storage().nbytes())
        return out


def _check_memory(rank: int, size: int) -> None:
    whole = zoo.tiny("mixtral", hidden_size=64, intermediate_size=128, num_local_experts=8)
    expert = max(p.nbytes for n, p in whole.named_parameters() if "experts" in n)
    target = copy.deepcopy(whole).to("meta")
    with epops.ExpertGroup(None, max_tokens=4) as group:
        with _Allocated(list(whole.state_dict().values())) as counted:
            model = epops.parallelize(target, group)
            assert counted.largest < 4096, "sharding a meta model must allocate nothing"
            for name, value in whole.state_dict().items():
                model.load_state_dict({name: value}, strict=False, assign=True)
        # One tensor at a time: nothing larger than a shard is made beside the tensor that was given.
        others = max(p.nbytes for n, p in whole.named_parameters() if "experts" not in n)
        assert counted.largest <= max(expert // size, others), (counted.largest, expert)
        held = sum(p.nbytes for p in epops.expert_parameters(model))
        assert held * size == sum(p.nbytes for n, p in whole.named_parameters() if "experts" in n)
        assert all(p.untyped_storage().nbytes() == p.nbytes for p in epops.expert_parameters(model)), (
            "a shard keeps the whole alive"
        )


def test_meta_model_is_loaded_with_one_shard_and_one_tensor_in_memory() -> None:
    run_ranks(_check_memory, 2)


def _check_tied(rank: int, size: int) -> None:
    whole = zoo.tiny("mixtral", tie_word_embeddings=True)
    layers = whole.model.layers
    layers[1].mlp.experts = layers[0].mlp.experts  # one module under two names
    with epops.ExpertGroup(None, max_tokens=64) as group:
        model = epops.parallelize(copy.deepcopy(whole), group)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.model.layers[0].mlp.experts is model.model.layers[1].mlp.experts
        assert len(sites(model)) == 1
        batch = zoo.inputs("mixtral", whole)
        torch.testing.assert_close(model(**batch).logits, whole(**batch).logits, rtol=1e-5, atol=1e-5)


def _check_tied_parameters(rank: int, size: int) -> None:
    whole = zoo.tiny("mixtral")
    first, second = (layer.mlp.experts for layer in whole.model.layers[:2])
    second.gate_up_proj, second.down_proj = first.gate_up_proj, first.down_proj
    with epops.ExpertGroup(None, max_tokens=64) as group:
        model = epops.parallelize(copy.deepcopy(whole), group)
        first, second = (layer.mlp.experts for layer in model.model.layers[:2])
        assert first.gate_up_proj is second.gate_up_proj and first.down_proj is second.down_proj
        assert len(epops.expert_parameters(model)) == 2


@pytest.mark.parametrize("check", [_check_tied, _check_tied_parameters])
def test_tied_modules_and_tensors_are_sharded_once(check) -> None:  # type: ignore[no-untyped-def]
    run_ranks(check, 2)
