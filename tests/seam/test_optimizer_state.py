"""An optimizer's state for sharded experts is saved and loaded in the unsharded layout."""

from __future__ import annotations

import copy
import os
import tempfile
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

import epops
from epops import zoo
from epops.models.shard import slice_of
from epops.models.site import site_of, sites

from ..ranks import run_ranks

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "groups": lambda p: torch.optim.SGD(
        [{"params": p[::-2], "lr": 0.1}, {"params": p[-2::-2], "lr": 0.2}], momentum=0.9
    ),
}


def _optimizer(kind: str, model: torch.nn.Module) -> Any:
    return OPTIMIZERS[kind](list(model.parameters()))


def _step(model: torch.nn.Module, optimizer: Any, whole: torch.nn.Module, rank: int, seed: int) -> None:
    """A step with gradients that are the same for the whole model, cut to this rank's experts where ``model`` is sharded."""
    torch.manual_seed(seed)
    gradients = {name: torch.randn_like(p) for name, p in whole.named_parameters()}
    cut = {
        f"{name}.{path}": (shard, site_of(module))
        for name, module in sites(model).items()
        for path, shard in site_of(module).shards.items()
    }
    for name, p in model.named_parameters():
        p.grad = slice_of(gradients[name], *cut[name], rank) if name in cut else gradients[name].clone()
    optimizer.step()
    optimizer.zero_grad()


def _full(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _same_state(got: Any, expected: Any) -> None:
    got, expected = got.state_dict()["state"], expected.state_dict()["state"]
    assert got.keys() == expected.keys() and expected
    for key, entries in expected.items():
        assert got[key].keys() == entries.keys()
        for name, value in entries.items():
            torch.testing.assert_close(_full(got[key][name]), value, rtol=0, atol=0)


def _check(rank: int, size: int, kind: str, family: str, experts: int, folder: str) -> None:
    def tiny(seed: int) -> torch.nn.Module:
        return zoo.tiny(family, seed=seed, **({"num_local_experts": experts} if experts else {}))

    whole = tiny(0)
    with epops.ExpertGroup(None, max_tokens=4) as group:
        model = epops.parallelize(copy.deepcopy(whole), group)
        ours, plain = _optimizer(kind, model), _optimizer(kind, whole)
        epops.parallelize_optimizer(ours, model)
        epops.parallelize_optimizer(ours, model)
        for seed in range(2):
            _step(model, ours, whole, rank, seed)
            _step(whole, plain, whole, rank, seed)
        if kind != "adafactor":  # which divides by the norm of the whole tensor, and has only its own
            _same_state(ours, plain)
        assert all(not isinstance(v, DTensor) for entry in ours.state.values() for v in entry.values()), "in place"

        # A fresh optimizer of as many ranks, before its first step; then both go on alike.
        again = epops.parallelize(tiny(3), group)
        again.load_state_dict(model.state_dict())
        fresh = _optimizer(kind, again)
        epops.parallelize_optimizer(fresh, again)
        fresh.load_state_dict(copy.deepcopy(ours.state_dict()))  # torch shares what it loads
        _step(model, ours, whole, rank, 5)
        _step(again, fresh, whole, rank, 5)
        for (name, p), (_, q) in zip(again.named_parameters(), model.named_parameters()):
            assert torch.equal(p, q), name

        # Through a distributed checkpoint, into as many ranks …
        state, moments = get_state_dict(model, ours)
        dcp.save({"model": state, "optimizer": moments}, checkpoint_id=folder)
        third = epops.parallelize(tiny(4), group)
        other = _optimizer(kind, third)
        epops.parallelize_optimizer(other, third)
        _load(third, other, folder)
        _step(third, other, whole, rank, 6)
        _step(model, ours, whole, rank, 6)
        for (name, p), (_, q) in zip(third.named_parameters(), model.named_parameters()):
            assert torch.equal(p, q), name
    if kind == "adafactor":
        return
    # … and into one process.
    _step(whole, plain, whole, rank, 5)
    one = tiny(5)
    last = _optimizer(kind, one)
    _load(one, last, folder)
    _same_state(last, plain)


def _load(model: torch.nn.Module, optimizer: Any, folder: str) -> None:
    state, moments = get_state_dict(model, optimizer)
    dcp.load({"model": state, "optimizer": moments}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state, optim_state_dict=moments)


CASES = [("adamw", "mixtral", 6), ("groups", "mixtral", 5), ("adafactor", "mixtral", 6), ("adamw", "dbrx", 0)]
"""dbrx: 6 experts of several rows each, which no DTensor over four ranks describes."""


@pytest.mark.parametrize("kind,family,experts", CASES)
def test_state_is_that_of_the_one_process_optimizer(kind: str, family: str, experts: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(_check, 4 if family == "dbrx" else 3, kind, family, experts, os.path.join(folder, "saved"))


def _check_modules(rank: int, size: int, folder: str) -> None:
    """Experts that are modules of their own: their state stands under the one tensor that holds them."""
    with epops.ExpertGroup(None, max_tokens=4) as group:
        results = []
        for seed in (1, 2):
            model = epops.parallelize(zoo.tiny("switch_transformers", seed=1), group)
            optimizer = _optimizer("adamw", model)
            epops.parallelize_optimizer(optimizer, model)
            if seed == 1:
                for p in model.parameters():
                    p.grad = torch.rand_like(p) + (rank if p.dim() == 3 else 0)
                optimizer.step()
                dcp.save(get_optimizer_state_dict(model, optimizer), checkpoint_id=folder)
            else:
                moments = get_optimizer_state_dict(model, optimizer)
                dcp.load(moments, checkpoint_id=folder)
                set_optimizer_state_dict(model, optimizer, moments)
            results.append([optimizer.state[p]["exp_avg"].clone() for p in epops.expert_parameters(model)])
        for a, b in zip(*results):
            assert torch.equal(a, b) and a.abs().sum() > 0


def test_state_of_experts_that_were_modules() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(_check_modules, 2, os.path.join(folder, "saved"))


def test_an_optimizer_without_experts_is_refused() -> None:
    with epops.ExpertGroup(None, max_tokens=4) as group:
        model = zoo.tiny("mixtral")
        before = torch.optim.AdamW([p for n, p in model.named_parameters() if "experts" not in n])
        epops.parallelize(model, group)
        with pytest.raises(ValueError, match="none of its 4 expert parameters; call epops.parallelize"):
            epops.parallelize_optimizer(before, model)


class _Blocks(torch.optim.SGD):
    """An optimizer whose state has a form of its own."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["scales"] = torch.zeros(7)


def test_state_of_another_form_is_refused() -> None:
    with epops.ExpertGroup(None, max_tokens=4) as group:
        model = epops.parallelize(zoo.tiny("mixtral"), group)
        optimizer = _Blocks(model.parameters(), lr=0.1)
        epops.parallelize_optimizer(optimizer, model)
        optimizer.step()
        with pytest.raises(
            ValueError, match=r"state 'scales' of model.layers.0.mlp.experts.\w+: expected a scalar or \d+ rows"
        ):
            optimizer.state_dict()
