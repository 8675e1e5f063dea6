"""Training a sharded model: FSDP2 around it, plain averaging, gradient norms, what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import epops
from epops import zoo

from ..ranks import run_ranks
from .compare import batches, close, run


def _whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _reference(family: str, size: int, steps: int, clip: float) -> tuple[torch.nn.Module, list[float], list]:
    model = zoo.tiny(family)
    everyone = batches(family, model, size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    norms = []
    for _ in range(steps):
        optimizer.zero_grad()
        (sum(run(model, batch)[1] for batch in everyone) / size).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip)))
        optimizer.step()
    return model, norms, everyone


def _same_weights(model: torch.nn.Module, expected: torch.nn.Module) -> None:
    wanted = expected.state_dict()
    for name, value in model.state_dict().items():
        close(_whole(value), wanted[name], name, 1e-5)


def _check_fsdp(rank: int, size: int, family: str) -> None:
    expected, norms, everyone = _reference(family, size, steps=3, clip=0.05)
    mesh = init_device_mesh("cpu", (size,))
    with epops.ExpertGroup(None, max_tokens=64) as group:
        model = epops.parallelize(zoo.tiny(family), group)
        ignored = set(epops.expert_parameters(model))
        layers = list(model.model.layers)
        for layer in layers:
            fully_shard(layer, mesh=mesh, ignored_params=ignored)
        fully_shard(model, mesh=mesh, ignored_params=ignored)
        layers[0].set_modules_to_forward_prefetch(layers[1:])
        layers[-1].set_modules_to_backward_prefetch(layers[:-1])
        assert sum(isinstance(p, DTensor) for p in model.parameters()) > 0
        assert not any(isinstance(p, DTensor) for p in epops.expert_parameters(model))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for norm in norms:
            optimizer.zero_grad()
            run(model, everyone[rank])[1].backward()
            got = epops.clip_grad_norm_(model.parameters(), 0.05, group)
            assert abs(float(got) - norm) < 1e-5 * norm
            optimizer.step()
        _same_weights(model, expected)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_fsdp2_with_prefetch_trains_the_one_process_model(family: str) -> None:
    run_ranks(_check_fsdp, 2, family)


def _check_averaged(rank: int, size: int, family: str) -> None:
    expected, norms, everyone = _reference(family, size, steps=3, clip=0.05)
    with epops.ExpertGroup(None, max_tokens=64) as group:
        model = epops.parallelize(zoo.tiny(family), group)
        experts = {id(p) for p in epops.expert_parameters(model)}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for norm in norms:
            optimizer.zero_grad()
            run(model, everyone[rank])[1].backward()
            for p in model.parameters():
                if id(p) not in experts and p.grad is not None:
                    dist.all_reduce(p.grad)
                    p.grad /= size
            got = epops.clip_grad_norm_(model, 0.05, group)
            assert abs(float(got) - norm) < 1e-5 * norm
            optimizer.step()
        _same_weights(model, expected)


# muse_spark has a norm below its experts, which every rank holds and uses on its own experts' rows.
@pytest.mark.parametrize("family", ["deepseek_v3", "muse_spark"])
def test_plain_averaging_trains_the_one_process_model(family: str) -> None:
    run_ranks(_check_averaged, 3, family)


def _check_not_ignored(rank: int, size: int) -> None:
    mesh = init_device_mesh("cpu", (size,))
    with epops.ExpertGroup(None, max_tokens=64) as group:
        model = epops.parallelize(zoo.tiny("mixtral"), group)
        fully_shard(model, mesh=mesh)
        with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.experts.*ignored_params"):
            model(**zoo.inputs("mixtral", model))


def test_fsdp_over_the_experts_is_refused() -> None:
    run_ranks(_check_not_ignored, 2)


def _check_sum(rank: int, size: int) -> None:
    batch = zoo.inputs("mixtral", zoo.tiny("mixtral"), seed=rank)
    grads = {}
    with epops.ExpertGroup(None, max_tokens=64) as group:
        for reduce in ("mean", "sum"):
            model = epops.parallelize(zoo.tiny("mixtral"), group, grad_reduce=reduce)
            run(model, batch)[1].backward()
            grads[reduce] = [p.grad for p in model.parameters()]
            own = {id(p) for p in epops.expert_parameters(model)}
            expert = [id(p) in own for p in model.parameters()]
    for mean, total, is_expert in zip(grads["mean"], grads["sum"], expert):
        close(mean * (size if is_expert else 1), total, "gradient", 1e-5)


def test_sum_reduction_leaves_out_the_division() -> None:
    run_ranks(_check_sum, 2)


def _check_unequal(rank: int, size: int, settings: list[dict[str, Any]], said: str) -> None:
    batch = zoo.inputs("mixtral", zoo.tiny("mixtral"), seed=rank)
    with epops.ExpertGroup(None, max_tokens=64, timeout=30) as group:
        model = epops.parallelize(zoo.tiny("mixtral", dtype=torch.bfloat16), group, **settings[rank])
        with pytest.raises(epops.DisagreementError, match=said):
            model(**batch)


def test_unequal_settings_of_parallelize_are_told_at_the_first_forward() -> None:
    reduce: list[dict[str, Any]] = [{"grad_reduce": "mean"}, {"grad_reduce": "sum"}]
    run_ranks(_check_unequal, 2, reduce, r"epops\.dispatch.*grad_scale: expected .*grad_reduce of epops\.parallelize")
    rounding: list[dict[str, Any]] = [{"exact": True}, {"exact": False}]
    run_ranks(_check_unequal, 2, rounding, r"epops\.combine.*bytes a row: expected")


def _check_token_mask(rank: int, size: int) -> None:
    whole = zoo.tiny("mixtral")
    batch = zoo.inputs("mixtral", whole, batch=1, seqlen=6, seed=rank)
    with epops.ExpertGroup(None, max_tokens=16) as group:
        model = epops.parallelize(copy.deepcopy(whole), group)
        group.token_mask = torch.tensor([1, 1, 1, 1, 0, 0], dtype=torch.bool)
        # Attention is causal, so that the tokens before the padding do not see it.
        close(model(**batch).logits[:, :4], whole(**batch).logits[:, :4], "logits", 1e-5)
        group.token_mask = torch.ones(5, dtype=torch.bool)
        with pytest.raises(ValueError, match=r"token_mask has 5 entries but the layer got 6 tokens"):
            model(**batch)
        group.token_mask = None
        close(model(**batch).logits, whole(**batch).logits, "logits", 1e-5)


def test_padding_is_masked_by_the_group() -> None:
    run_ranks(_check_token_mask, 2)
