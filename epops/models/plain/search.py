"""Which of a forward's variables are the tokens, the experts chosen and their weights: found by trying on a probe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from . import probe
from .loop import Loop


class Experts(Protocol):
    """One reading of what the experts compute."""

    def one(self, module: nn.Module, expert: int, x: Tensor) -> Tensor:
        """Expert ``expert`` on rows ``x``, from the unsharded module."""


class Reading(NamedTuple):
    """Names of the variables that the loop takes, and the reading of the experts that fits."""

    x: str
    idx: str
    weights: str | None
    experts: Any


def local(module: nn.Module, experts: Experts, x: Tensor, idx: Tensor, weights: Tensor | None) -> Tensor:
    """The meaning of routed experts, in one process: what the exchange does over ranks."""
    x = x.reshape(-1, x.shape[-1])
    idx = idx.reshape(x.shape[0], -1)
    scale = torch.ones(idx.shape) if weights is None else weights.reshape(idx.shape)
    out: Tensor | None = None
    for expert in sorted(set(idx.flatten().tolist()) - {-1}):
        token, place = torch.where(idx == expert)
        y = experts.one(module, expert, x[token]) * scale[token, place, None]
        out = torch.zeros(x.shape[0], y.shape[1]) if out is None else out
        out = out.index_add(0, token, y)
    return torch.zeros_like(x) if out is None else out


def readings_of(module: nn.Module, loop: Loop, readings: Sequence[Experts]) -> Iterator[tuple[Reading, Tensor]]:
    """Readings of the loop that explain what it adds to its result, each with the probe that the block took.

    There may be several: weights of a meta module are made up, and cheaply, so that two readings can agree on them.
    """
    for hidden in probe.hidden_sizes(module):
        for x in probe.shapes(next(probe.inputs(hidden))):
            state = _run(module, loop, x)
            if state is not None:
                yield from ((found, x) for found in _matches(module, *state, readings))
                return


def _run(module: nn.Module, loop: Loop, x: Tensor) -> tuple[dict[str, Any], Tensor] | None:
    """Variables before the loop, and what it added; None for an input that the block does not take."""
    try:
        before = dict(loop.before()(module, x.clone()))
        start = before[loop.out].detach().clone() if isinstance(before.get(loop.out), Tensor) else 0.0
        after = loop.after()(module, x.clone())[loop.out]
    except Exception:  # any error of the user's code: this input is not what it takes
        return None
    return (before, (after - start).detach()) if isinstance(after, Tensor) else None


def _matches(
    module: nn.Module, before: dict[str, Any], added: Tensor, readings: Sequence[Experts]
) -> Iterator[Reading]:
    values = {name: v for name, v in before.items() if isinstance(v, Tensor)}
    floats = {name: v for name, v in values.items() if v.is_floating_point() and v.dim() >= 1}
    whole = {name: v for name, v in values.items() if v.dtype in (torch.int64, torch.int32) and v.dim() >= 1}
    for x_name, x in floats.items():
        tokens = x.numel() // max(1, x.shape[-1])
        for idx_name, idx in whole.items():
            if x.dim() < 2 or idx.numel() % tokens or int(idx.min()) < -1:
                continue
            fitting = [n for n, v in floats.items() if v.numel() == idx.numel() and n != x_name]
            # A variable that carries a gradient is the weight; a detached one of the same value is only like it.
            fitting.sort(key=lambda n: not floats[n].requires_grad)
            for weights_name in [*fitting, None]:
                weight = None if weights_name is None else floats[weights_name]
                for experts in readings:
                    if _explains(module, experts, x, idx, weight, added):
                        yield Reading(x_name, idx_name, weights_name, experts)


def _explains(
    module: nn.Module, experts: Experts, x: Tensor, idx: Tensor, weights: Tensor | None, added: Tensor
) -> bool:
    try:
        with torch.no_grad():
            got = local(module, experts, x, idx, weights)
    except (RuntimeError, IndexError, KeyError, ValueError):  # this reading does not even fit the shapes
        return False
    return got.numel() == added.numel() and probe.alike(got.view(added.shape), added)


def proved(module: nn.Module, original: Callable[..., Any], replaced: Callable[..., Any], x: Tensor) -> bool:
    """Whether the replaced forward is the original one, with gradients, on every probe."""
    shape = (lambda p: p) if x.dim() == 3 else (lambda p: p.reshape(-1, p.shape[-1]))
    parameters = [p for p in module.parameters() if p.requires_grad]
    probes = [shape(p) for p in probe.inputs(x.shape[-1])]
    return all(
        probe.same_function(lambda t: original(module, t), lambda t: replaced(module, t), p, parameters) for p in probes
    )
