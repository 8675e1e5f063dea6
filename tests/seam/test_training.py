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


def _gradients_of_both(family: str, group: epops.ExpertGroup, backend: str | None) -> tuple[dict[str, Any], ...]:
    """Gradients of experts and of everything else with the mean and with the sum over ranks, in bf16: (mean, sum) of each."""
    experts: dict[str, Any] = {}
    others: dict[str, Any] = {}
    batch = zoo.inputs(family, zoo.tiny(family), seqlen=5 + group.rank, seed=group.rank)
    for reduce in ("mean", "sum"):
        torch.compiler.reset()
        model = epops.parallelize(zoo.tiny(family, dtype=torch.bfloat16), group, grad_reduce=reduce)
        own = {id(p) for p in epops.expert_parameters(model)}
        called = torch.compile(model, fullgraph=True, backend=backend) if backend else model
        run(called, batch)[1].backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                below = id(p) in own or "post_expert_norm" in name  # every rank has the norm, for its rows
                (experts if below else others).setdefault(name, []).append(p.grad)
    return experts, others


def _check_rows_exact(rank: int, size: int, families: list[str], backend: str | None) -> None:
    with epops.ExpertGroup(None, max_tokens=64, timeout=240.0) as group:
        for family in families:
            experts, others = _gradients_of_both(family, group, backend)
            assert others and experts, family
            for name, (mean, total) in others.items():
                assert torch.equal(mean, total), f"{family}: the number of ranks rounded what reaches {name}"
            for name, (mean, total) in experts.items():
                # both are rounded to bf16, the mean once more than the sum
                off = (mean.float() - total.float() / size).abs() / (total.float().abs() / size).clamp(min=1e-30)
                assert off.max() <= 2**-7, f"{family}: {name} is not the mean over ranks, {off.max():.1e} off"


# Experts with biases, in modules of their own, weighted before them, in the attention, as embeddings, with a norm behind them.
ROWS_EXACT = ["mixtral", "gpt_oss", "nllb_moe", "llama4", "jetmoe", "doge", "muse_spark", "dbrx"]


@pytest.mark.parametrize(("size", "families"), [(3, ROWS_EXACT), (5, ["glm5_next"])])
def test_a_number_of_ranks_that_is_no_power_of_two_rounds_no_row(size: int, families: list[str]) -> None:
    run_ranks(_check_rows_exact, size, families, None, timeout=400.0)


def test_it_rounds_no_row_of_a_compiled_model() -> None:
    run_ranks(_check_rows_exact, 3, ["gpt_oss"], "aot_eager", timeout=500.0)


def _check_foreign(rank: int, size: int) -> None:
    """An adapter of one's own that reads its parameter by itself knows nothing of `Rows.share`."""
    from epops.models.experts import exchange
    from epops.models.site import Site, facts_of, serving

    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(rank))
    idx, weights = torch.arange(4)[:, None] % size, torch.ones(4, 1)
    found = []
    with epops.ExpertGroup(None, max_tokens=4) as group:
        for reduce in ("mean", "sum"):
            factor = torch.ones(16, requires_grad=True)
            site = Site("mine", facts_of(size, 1, group, reduce), serving(group))
            exchange(site, x, idx, weights, lambda rows, factor=factor: rows.x * factor).sum().backward()
            found.append(factor.grad)
    close(found[0] * size, found[1], "gradient", 1e-6)


def test_experts_that_read_their_parameters_themselves_get_the_mean() -> None:
    run_ranks(_check_foreign, 3)


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
