"""How far the sharded model is from the one-process model: along the way, and at the end with equal weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .recipe import Curve

EARLY = 10
"""Steps in which two runs of one model agree to rounding.  Later they drift apart: the last bits of a router's logits decide
now and then which expert a token gets, and from there on the runs differ, as two runs of the one-process model do."""


class Differences(NamedTuple):
    """Largest relative differences from the one-process model."""

    early_loss: float
    early_norm: float
    """Loss and gradient norm of the first `EARLY` steps."""
    loss: float
    """Loss of all steps."""
    logits: float
    gradients: float
    """On held-out text after training, when the one-process model is given the sharded model's weights."""


def differences(
    model: nn.Module,
    forward: Any,
    reference: nn.Module | None,
    ids: Tensor,
    every: Tensor,
    curve: Curve,
    expected: Curve | None,
) -> Differences | None:
    """Collective.  The rank that has the ``reference`` gets the result, and the reference the sharded model's weights.

    ``ids`` (N, length) are this rank's windows of ``every``.  The compiled training step is used as it is.
    """
    from ..zoo.check import full_gradients

    answer = forward(input_ids=ids, labels=ids, use_cache=False)
    answer.loss.backward()
    logits = _gather(answer.logits.detach())
    gradients = full_gradients(model, dist.get_world_size())
    model.zero_grad(set_to_none=True)
    weights = {name: _whole(value) for name, value in model.state_dict().items()}
    if reference is None or expected is None:
        return None
    reference.load_state_dict(weights)
    alone = reference(input_ids=every, labels=every, use_cache=False)
    alone.loss.backward()
    found = Differences(
        _curve(curve.losses[:EARLY], expected.losses[:EARLY]),
        _curve(curve.norms[:EARLY], expected.norms[:EARLY]),
        _curve(curve.losses, expected.losses),
        relative(torch.cat(logits), alone.logits.detach()),
        _gradients(gradients, {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}),
    )
    reference.zero_grad(set_to_none=True)
    return found


def relative(value: Tensor, reference: Tensor) -> float:
    """Largest difference over the reference's largest value.

    >>> relative(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 4.0]))
    0.25
    """
    return float((value - reference).abs().max() / reference.abs().max().clamp(min=1e-30))


def _curve(got: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(got, expected, strict=True))


def _gradients(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The worst tensor, each relative to the largest of its own gradients."""
    return max(relative(got[name], grad) for name, grad in expected.items())


def _whole(value: Any) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _gather(part: Tensor) -> list[Tensor]:
    """Every rank's part, by rank; all of one shape."""
    received = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(received, part.contiguous())
    return received
