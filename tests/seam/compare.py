"""A sharded model beside the one-process model: same weights, each rank its own batch, answers and gradients compared."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import epops
from epops import zoo
from epops.models.site import site_of, sites


def close(got: torch.Tensor, expected: torch.Tensor, what: str, tolerance: float, floor: float = 1e-30) -> None:
    """Within ``tolerance`` of the largest value; values below ``floor`` are rounding of what is zero."""
    got, expected = got.detach(), expected.detach()
    assert got.shape == expected.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    largest = float(expected.float().abs().max()) if expected.numel() else 0.0
    difference = float((got.float() - expected.float()).abs().max()) if expected.numel() else 0.0
    assert difference <= tolerance * max(largest, floor), f"{what}: {difference:.3e} off, largest value {largest:.3e}"


def as_near(got: torch.Tensor, expected: torch.Tensor, wide: torch.Tensor) -> bool:
    """Whether ``got`` is no farther from ``wide`` than ``expected`` is: both then differ by rounding alone."""
    return float((got.float() - wide).abs().max()) <= float((expected.float() - wide).abs().max())


def batches(family: str, model: nn.Module, size: int) -> list[dict[str, Any]]:
    """One batch a rank, all of different lengths."""
    return [zoo.inputs(family, model, batch=1 + r % 2, seqlen=5 + 3 * r, seed=r) for r in range(size)]


def run(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    answer = model(**batch)
    return zoo.output_of(answer), zoo.loss_of(answer)


def expected_gradients(model: nn.Module, everyone: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Gradients of the mean of the ranks' losses, in one process."""
    model.zero_grad()
    (sum(run(model, batch)[1] for batch in everyone) / len(everyone)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def unsharded_gradients(model: nn.Module, rank: int, size: int) -> dict[str, torch.Tensor]:
    """What this rank has of each gradient: averaged over ranks for what every rank holds; its rows for experts.

    Experts' tensors come under their names in the unsharded layout, with the rows that this rank holds: ``(rows, lo, hi)``.
    """
    found: dict[str, Any] = {}
    experts = {}
    for path, module in sites(model).items():
        for name, shard in site_of(module).shards.items():
            experts[f"{path}.{name}" if path else name] = (module, shard)
    for name, p in model.named_parameters():
        if name in experts:
            found[name] = p.grad
            continue
        grad = torch.zeros_like(p) if p.grad is None else p.grad.clone()
        dist.all_reduce(grad)
        found[name] = grad / size
    return found


def check_family(
    family: str,
    rank: int,
    size: int,
    *,
    compiled: bool = False,
    dtype: torch.dtype = torch.float32,
    overrides: dict[str, Any] | None = None,
    backend: str = "epops",
    gradients: bool = True,
) -> None:
    """Forward and gradients of a tiny model of the family, sharded, against the one-process model."""
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    whole = zoo.tiny(family, **(overrides or {})).to(dtype).eval()
    everyone = batches(family, whole, size)
    expected_out, _ = run(whole, everyone[rank])
    tokens = max(b["input_ids"].numel() for b in everyone)
    with epops.ExpertGroup(None, max_tokens=tokens, timeout=240.0) as group:
        model = epops.parallelize(copy.deepcopy(whole), group)
        called = torch.compile(model, fullgraph=True, backend=backend) if compiled else model
        out, loss = run(called, everyone[rank])
        close(out, expected_out, f"{family} output", tolerance)
        if not gradients:
            return
        loss.backward()
        wide = None if dtype == torch.float32 else expected_gradients(copy.deepcopy(whole).float(), everyone)
        check_gradients(model, whole, everyone, rank, size, tolerance, family, wide)


def check_gradients(
    model: nn.Module,
    whole: nn.Module,
    everyone: list[Any],
    rank: int,
    size: int,
    tolerance: float,
    what: str,
    wide: dict[str, torch.Tensor] | None = None,
) -> None:
    """Every gradient of the sharded model against the one-process model's; experts by the rows that this rank holds.

    ``wide``: gradients of the same weights in float32.  A gradient of a narrow dtype that misses the one-process model's by more
    than ``tolerance`` still passes when it is as near to these as the one-process model's is, and within twice ``tolerance``.
    """
    expected = expected_gradients(whole, everyone)
    state = {}
    for path, module in sites(model).items():
        prefix = f"{path}." if path else ""
        names = site_of(module).names
        for name, shard in site_of(module).shards.items():
            state[prefix + name] = (site_of(module), shard, [prefix + n for n in names.get(name, ())])
    got = unsharded_gradients(model, rank, size)
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, grad in got.items():
        if name not in state:
            if name in expected:
                allowed = tolerance
                if wide is not None and as_near(grad, expected[name], wide[name]):
                    allowed = 2 * tolerance
                close(grad, expected[name], f"{what} gradient of {name}", allowed, 1e-3 * largest)
            else:
                assert float(grad.abs().max()) <= 1e-6 * largest, f"{what}: {name} has a gradient, alone it has none"
            continue
        if grad is None:
            assert name not in expected, f"{what}: {name} has no gradient"
            continue
        site, shard, names = state[name]
        lo = min(rank * site.num_slots * shard.unit, shard.rows)
        hi = min(lo + site.num_slots * shard.unit, shard.rows)
        if names:
            full = torch.stack([expected.get(n, torch.zeros_like(grad[0])) for n in names])
        else:
            full = expected.get(name, torch.zeros(0))
        assert full.numel(), f"{what}: the one-process model has no gradient of {name}"
        scale = float(full.abs().max())
        if hi > lo:
            difference = float((grad[: hi - lo].float() - full[lo:hi].float()).abs().max())
            assert difference <= tolerance * scale, (
                f"{what} gradient of {name}: {difference:.3e} off, largest {scale:.3e}"
            )
        assert not grad[hi - lo :].any(), f"{what}: slots without an expert have a gradient in {name}"
