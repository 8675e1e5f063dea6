"""Linear layers whose heads the ranks divide between them, and the sums over ranks that this takes."""

from __future__ import annotations

from typing import Any

import torch

from ..ops.seam import all_reduce


def heads_of(num_heads: int, ep_size: int) -> list[int]:
    """Heads of each rank; the first ranks have one more where they do not divide.

    >>> heads_of(8, 3)
    [3, 3, 2]
    """
    return [num_heads // ep_size + (rank < num_heads % ep_size) for rank in range(ep_size)]


class _SumOfGradients(torch.autograd.Function):
    """What every rank holds alike and each uses a part of: its gradient is the sum over ranks."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: str) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return all_reduce(grad.contiguous(), group=ctx.group), None


class _SumOfParts(torch.autograd.Function):
    """Each rank's part of a sum → the sum on every rank; all ranks hold its gradient alike, and it is that of each part."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: str) -> torch.Tensor:
        return all_reduce(x.contiguous(), group=group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad.view_as(grad), None


def to_parts(x: torch.Tensor, group: str) -> torch.Tensor:
    """``x`` itself, on its way into what the ranks compute parts of; its gradient is summed over the ranks."""
    return _SumOfGradients.apply(x, group) if torch.is_grad_enabled() and x.requires_grad else x


def sum_of_parts(x: torch.Tensor, group: str) -> torch.Tensor:
    """The sum over the ranks of their parts ``x``."""
    return _SumOfParts.apply(x, group)


def _rows(weight: torch.Tensor, heads: list[int], rank: int) -> torch.nn.Parameter:
    width = weight.shape[0] // sum(heads)
    part = weight.detach().narrow(0, sum(heads[:rank]) * width, heads[rank] * width)
    return torch.nn.Parameter(part.clone(), requires_grad=weight.requires_grad)


class HeadsOut(torch.nn.Module):
    """A linear layer to heads, of which this rank has ``heads[rank]``; no bias."""

    def __init__(self, linear: torch.nn.Linear, heads: list[int], rank: int, group: str) -> None:
        super().__init__()
        self.weight = _rows(linear.weight, heads, rank)
        self.group = group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(to_parts(x, self.group), self.weight)


class HeadsIn(torch.nn.Module):
    """A linear layer from heads: each rank multiplies its own, and the sum over ranks is everybody's."""

    def __init__(self, linear: torch.nn.Linear, heads: list[int], rank: int, group: str) -> None:
        super().__init__()
        part = _rows(linear.weight.detach().t(), heads, rank)
        self.weight = torch.nn.Parameter(part.detach().t().contiguous(), requires_grad=linear.weight.requires_grad)
        self.bias = linear.bias
        self.group = group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = sum_of_parts(torch.nn.functional.linear(x, self.weight), self.group)
        return out if self.bias is None else out + self.bias
