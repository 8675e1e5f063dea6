"""Eager calls skip the autograd key; whoever listens below it still hears the op, and gradients are the op's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import epops
from epops.ops.arguments import dispatch_arguments, dispatch_defaults


@pytest.fixture
def group() -> Iterator[epops.ExpertGroup]:
    with epops.ExpertGroup(None, "call", max_tokens=5, num_experts=3) as made:
        yield made


class Heard(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


def tokens(grad: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.arange(10.0).reshape(5, 2).requires_grad_(grad)
    weights = torch.arange(1.0, 11.0).reshape(5, 2).requires_grad_(grad)
    return x, torch.tensor([[0, 1], [2, 0], [-1, 1], [1, 2], [2, -1]]), weights


@pytest.mark.parametrize("grad", [False, True])
def test_a_dispatch_mode_hears_the_ops_once(group: epops.ExpertGroup, grad: bool) -> None:
    x, idx, weights = tokens(grad)
    with Heard() as heard:
        sent = epops.dispatch(x, idx, weights, group=group)
        epops.combine(sent.rows, sent.route, sent.row_weights, group=group, num_tokens=5, top_k=2)
    assert [op for op in heard.ops if op.startswith("epops.")] == ["epops.dispatch.default", "epops.combine.default"]


def test_gradients_are_those_of_the_op_itself(group: epops.ExpertGroup) -> None:
    found = []
    for direct in (False, True):
        x, idx, weights = tokens(True)
        if direct:
            a = dispatch_arguments("dispatch", idx, **dispatch_defaults({"group": group, "grad_scale": 3.0}))
            sent = epops.DispatchResult(*torch.ops.epops.dispatch.default(x, idx, weights, None, **a))
        else:
            sent = epops.dispatch(x, idx, weights, group=group, grad_scale=3.0)
        assert sent.rows.requires_grad and sent.row_weights.requires_grad and not sent.route.requires_grad
        slope = torch.arange(sent.rows.numel()).reshape(sent.rows.shape)
        ((sent.rows * slope).sum() + (sent.row_weights**2).sum()).backward()
        found.append((x.grad, weights.grad))
    for ours, expected in zip(*found):
        assert torch.equal(ours, expected) and expected.any()


def test_nothing_is_recorded_where_nothing_needs_a_gradient(group: epops.ExpertGroup) -> None:
    x, idx, weights = tokens(True)
    with torch.no_grad():
        assert not epops.dispatch(x, idx, weights, group=group).rows.requires_grad
    with torch.inference_mode():
        assert epops.dispatch(x, idx, weights, group=group).rows.is_inference()
    assert not epops.dispatch(x.detach(), idx, weights.detach(), group=group).rows.requires_grad


def test_transforms_of_torch_func_meet_the_op_and_its_own_answer(group: epops.ExpertGroup) -> None:
    _, idx, weights = tokens(False)

    def total(x: torch.Tensor) -> torch.Tensor:
        return epops.dispatch(x, idx, weights, group=group).rows.sum()

    with pytest.raises(RuntimeError):
        torch.func.grad(total)(torch.ones(5, 2))
