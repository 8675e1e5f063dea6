"""Identities whose backward is not one: what gradients under the experts need beside the exchanges."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import epops


class _SumGradient(torch.autograd.Function):
    """Identity; the gradient is summed over the ranks of a group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return epops.all_reduce(grad, group=ctx.group), None


class _ScaleGradient(torch.autograd.Function):
    """Identity; the gradient is multiplied by a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.scale, None


def sum_gradient(x: Tensor, group: Any) -> Tensor:
    """``x``, whose gradient is summed over the group: for a parameter that every rank holds but each uses on other rows."""
    return _SumGradient.apply(x, group)


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """``x``, whose gradient is multiplied by ``scale``."""
    return x if scale == 1.0 else _ScaleGradient.apply(x, scale)


def call_replicated(module: nn.Module, group: Any, *args: Any, share: float = 1.0) -> Any:
    """``module(*args)`` on this rank's rows, of a module that all ranks hold: its gradients are summed over ranks.

    ``share`` (`Rows.share`) multiplies the sums.
    """
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not parameters or not torch.is_grad_enabled():
        return module(*args)
    summed = {name: sum_gradient(scale_gradient(p, share), group) for name, p in parameters.items()}
    return torch.func.functional_call(module, summed, args)
