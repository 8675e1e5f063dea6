"""Shapes of combine and its gradient."""

from __future__ import annotations

from typing import Any

import torch

from .. import layout as words
from .checks import check_device, check_dim, check_route, check_settings, check_tokens, fail, is_int
from .dispatch import ticket as new_ticket


def check_combine(
    op: str,
    y: torch.Tensor,
    route: torch.Tensor,
    row_weights: torch.Tensor | None,
    addend: torch.Tensor | None,
    y_scales: torch.Tensor | None,
    *,
    num_experts: int,
    num_slots: int,
    ep_size: int,
    max_tokens: Any,
    num_tokens: Any,
    top_k: int,
    layout: str,
    **_: Any,
) -> None:
    check_settings(op, num_experts, num_slots, ep_size, max_tokens, layout)
    check_tokens(op, "num_tokens", num_tokens, max_tokens)
    check_dim(op, "y", y, 3 if layout == "batched" else 2, "(L, R * M, H)" if layout == "batched" else "(C, H)")
    lead = tuple(y.shape[:-1])
    if row_weights is not None:
        if row_weights.dtype != torch.float32:
            fail(op, "row_weights", "float32", row_weights.dtype, "cast it with .float()")
        if len(row_weights.shape) != len(lead) or any(
            is_int(a) and is_int(b) and a != b for a, b in zip(row_weights.shape, lead, strict=True)
        ):
            fail(op, "row_weights", f"shape {lead}, one weight a row of y", tuple(row_weights.shape), "reshape it")
    if addend is not None:
        check_dim(op, "addend", addend, 2, "(T, H)")
        for got, expected in zip(addend.shape, (num_tokens, y.shape[-1]), strict=True):
            if is_int(got) and is_int(expected) and got != expected:
                shape = (num_tokens, y.shape[-1])
                fail(op, "addend", f"shape {shape}, one row a token", tuple(addend.shape), "reshape it")
    if y_scales is not None and y_scales.dim() != y.dim():
        fail(op, "y_scales", f"{y.dim()} dimensions like y", tuple(y_scales.shape), "pass the scales of y's rows")
    if y.element_size() == 1 and y_scales is None:
        fail(op, "y_scales", f"scales for rows of {y.dtype}", None, "pass them, or dequantize y")
    check_route(op, route, num_tokens, max_tokens, ep_size, top_k)
    check_device(op, y, route=route, row_weights=row_weights, addend=addend, y_scales=y_scales)


def combine(
    y: torch.Tensor,
    route: torch.Tensor,
    row_weights: torch.Tensor | None = None,
    addend: torch.Tensor | None = None,
    y_scales: torch.Tensor | None = None,
    **a: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_combine("combine", y, route, row_weights, addend, y_scales, **a)
    return (
        y.new_empty((a["num_tokens"], y.shape[-1]), dtype=a["out_dtype"]),
        y.new_empty(words.STATUS_WORDS, dtype=torch.int32),
    )


def combine_start(y: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return new_ticket(y)


def combine_wait(ticket: torch.Tensor, *args: Any, **a: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return combine(*args, **a)


def check_combine_backward(
    op: str,
    grad_out: torch.Tensor,
    y: torch.Tensor,
    route: torch.Tensor,
    row_weights: torch.Tensor | None,
    y_scales: torch.Tensor | None,
    *,
    num_experts: int,
    num_slots: int,
    ep_size: int,
    max_tokens: Any,
    top_k: int,
    layout: str,
    **_: Any,
) -> None:
    check_settings(op, num_experts, num_slots, ep_size, max_tokens, layout)
    check_dim(op, "grad_out", grad_out, 2, "(T, H)")
    check_tokens(op, "grad_out", grad_out.shape[0], max_tokens)
    check_route(op, route, grad_out.shape[0], max_tokens, ep_size, top_k)
    check_device(op, y, grad_out=grad_out, route=route, row_weights=row_weights, y_scales=y_scales)


def combine_backward(
    grad_out: torch.Tensor,
    y: torch.Tensor,
    route: torch.Tensor,
    row_weights: torch.Tensor | None = None,
    y_scales: torch.Tensor | None = None,
    **a: Any,
) -> tuple[torch.Tensor, ...]:
    check_combine_backward("combine_backward", grad_out, y, route, row_weights, y_scales, **a)
    weights = y.new_empty(0, dtype=torch.float32) if row_weights is None else row_weights.new_empty(row_weights.shape)
    return (
        y.new_empty(y.shape, dtype=grad_out.dtype if y.element_size() == 1 else y.dtype),
        weights,
        y.new_empty(words.STATUS_WORDS, dtype=torch.int32),
    )


def combine_backward_start(grad_out: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return new_ticket(grad_out)


def combine_backward_wait(ticket: torch.Tensor, *args: Any, **a: Any) -> tuple[torch.Tensor, ...]:
    return combine_backward(*args, **a)
