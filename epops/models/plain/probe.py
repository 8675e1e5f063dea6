"""Random inputs for a block, and whether two blocks answer them alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def inputs(hidden: int) -> Iterator[Tensor]:
    """Tokens (B, S, H): first random ones; then many alike, which all go to the same experts."""
    generator = torch.Generator().manual_seed(0)
    yield torch.randn(2, 3, hidden, generator=generator)
    alike = torch.randn(1, 1, hidden, generator=generator).expand(1, 13, hidden)
    yield alike + 1e-3 * torch.randn(1, 13, hidden, generator=generator)


def hidden_sizes(module: nn.Module) -> list[int]:
    """What H may be: the widths of the block's matrices, those of its linear layers first."""
    linear = [m.in_features for m in module.modules() if isinstance(m, nn.Linear)]
    rest = [n for p in module.parameters() if p.dim() >= 2 for n in p.shape[-2:]]
    return list(dict.fromkeys(linear + rest))


def shapes(x: Tensor) -> tuple[Tensor, Tensor]:
    """What a block may take: (B, S, H) or (T, H)."""
    return x, x.reshape(-1, x.shape[-1])


def tensors(answer: Any) -> list[Tensor]:
    """All tensors of an answer, in order."""
    if isinstance(answer, Tensor):
        return [answer]
    values = answer.values() if isinstance(answer, dict) else answer if isinstance(answer, (tuple, list)) else ()
    return [t for value in values for t in tensors(value)]


def slope(like: Tensor) -> Tensor:
    """A gradient with which no two entries weigh the same."""
    return torch.linspace(-1, 1, like.numel()).view(like.shape)


def alike(got: Any, expected: Any) -> bool:
    """Whether two answers are the same up to rounding."""
    left, right = tensors(got), tensors(expected)
    return len(left) == len(right) > 0 and all(
        a.shape == b.shape
        and torch.allclose(a.float(), b.float(), rtol=1e-4, atol=1e-5 * max(1.0, float(b.abs().max())))
        for a, b in zip(left, right)
    )


def same_function(
    first: Callable[[Tensor], Any], second: Callable[[Tensor], Any], x: Tensor, parameters: list[Tensor]
) -> bool:
    """Whether both give the same answer for ``x``, and the same gradients of ``x`` and ``parameters``."""
    grads = []
    answers = []
    for call in (first, second):
        leaf = x.clone().requires_grad_()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            answer = call(leaf)
        loss = sum((t.float() * slope(t)).sum() for t in tensors(answer) if t.requires_grad)
        wanted = [leaf, *parameters]
        found = (
            torch.autograd.grad(loss, wanted, allow_unused=True) if isinstance(loss, Tensor) else [None] * len(wanted)
        )
        grads.append([torch.zeros_like(w) if g is None else g for g, w in zip(found, wanted)])
        answers.append([t.detach() for t in tensors(answer)])
    return alike(answers[1], answers[0]) and alike(grads[1], grads[0])
