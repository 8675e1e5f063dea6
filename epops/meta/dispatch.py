"""Shapes of dispatch, the quantizing dispatch and their gradient."""

from __future__ import annotations

from typing import Any

import torch

from .. import layout as words
from .checks import PAYLOADS, check_device, check_dim, check_route, check_rows, check_settings, check_tokens, fail


def check_dispatch(
    op: str,
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    x_scales: torch.Tensor | None,
    *,
    num_experts: int,
    num_slots: int,
    ep_size: int,
    max_tokens: Any,
    capacity: Any,
    layout: str,
    alignment: int,
    **_: Any,
) -> None:
    check_settings(op, num_experts, num_slots, ep_size, max_tokens, layout)
    check_dim(op, "x", x, 2, "(T, H)")
    check_dim(op, "topk_idx", topk_idx, 2, "(T, K)")
    if topk_idx.dtype not in (torch.int32, torch.int64):
        fail(op, "topk_idx", "int32 or int64", topk_idx.dtype, "cast it")
    if topk_weights.dtype != torch.float32:
        fail(op, "topk_weights", "float32", topk_weights.dtype, "cast it with .float()")
    check_rows(op, "topk_idx", topk_idx.shape[0], "x", x.shape[0], "pass one row of experts a token")
    if topk_weights.shape != topk_idx.shape:
        got, expected = tuple(topk_weights.shape), tuple(topk_idx.shape)
        fail(op, "topk_weights", f"shape {expected} like topk_idx", got, "pass one weight a selection")
    if x_scales is not None:
        check_dim(op, "x_scales", x_scales, 2, "(T, number of blocks)")
        check_rows(op, "x_scales", x_scales.shape[0], "x", x.shape[0], "pass one row of scales a token")
    check_device(op, x, topk_idx=topk_idx, topk_weights=topk_weights, x_scales=x_scales)
    check_tokens(op, "x", x.shape[0], max_tokens)
    if alignment < 1:
        fail(op, "alignment", "at least 1", alignment, "pass the row alignment of the grouped GEMM")
    if (
        layout == "rank"
        and isinstance(capacity, int)
        and isinstance(max_tokens, int)
        and capacity > ep_size * max_tokens
    ):
        fail(op, "capacity", f"at most {ep_size * max_tokens} (R * M)", capacity, "leave it out for the worst case")
    if layout == "batched" and isinstance(capacity, int) and isinstance(max_tokens, int):
        exact = num_slots * ep_size * max_tokens
        if capacity != exact:
            fail(op, "capacity", f"{exact} (L * R * M) in the batched layout", capacity, "leave it out")


def _dispatched(
    x: torch.Tensor, topk_idx: torch.Tensor, row_dtype: torch.dtype, scales: torch.Tensor, a: dict[str, Any]
) -> tuple[torch.Tensor, ...]:
    num_tokens, top_k = topk_idx.shape
    layout, ep_size, num_slots, max_tokens = a["layout"], a["ep_size"], a["num_slots"], a["max_tokens"]
    lead = (num_slots, ep_size * max_tokens) if layout == "batched" else (a["capacity"],)
    per_row = (*lead, top_k) if layout == "rank" else lead
    ends = {"expert": num_slots, "rank": ep_size, "batched": 0}[layout]

    def int32(*shape: Any) -> torch.Tensor:
        return x.new_empty(shape, dtype=torch.int32)

    return (
        x.new_empty((*lead, x.shape[1]), dtype=row_dtype),
        scales,
        x.new_empty(per_row, dtype=torch.float32),
        int32(*per_row),
        int32(*lead),
        int32(num_slots),
        int32(ends),
        int32(words.route_size(num_tokens, max_tokens, ep_size, top_k)),
        int32(words.STATUS_WORDS),
    )


def _lead(a: dict[str, Any]) -> tuple[Any, ...]:
    if a["layout"] == "batched":
        return (a["num_slots"], a["ep_size"] * a["max_tokens"])
    return (a["capacity"],)


def dispatch(
    x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, x_scales: torch.Tensor | None = None, **a: Any
) -> tuple[torch.Tensor, ...]:
    check_dispatch("dispatch", x, topk_idx, topk_weights, x_scales, **a)
    if x_scales is None:
        scales = x.new_empty(0, dtype=torch.float32)
    else:
        scales = x_scales.new_empty((*_lead(a), x_scales.shape[1]))
    return _dispatched(x, topk_idx, x.dtype, scales, a)


def dispatch_start(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return ticket(x)


def dispatch_wait(ticket: torch.Tensor, *args: Any, **a: Any) -> tuple[torch.Tensor, ...]:
    return dispatch(*args, **a)


def check_quant(op: str, x: torch.Tensor, a: dict[str, Any]) -> None:
    if x.dtype not in PAYLOADS:
        fail(op, "x", "float32, float16 or bfloat16", x.dtype, "quantized rows go to epops.dispatch with x_scales")
    if a["quant_dtype"] not in (torch.float8_e4m3fn, torch.float8_e5m2):
        fail(op, "quant_dtype", "torch.float8_e4m3fn or torch.float8_e5m2", a["quant_dtype"], "pass one of them")
    if a["block"] < 0:
        fail(op, "block", "0 (per token) or channels a scale", a["block"], "pass 0 or 128")
    for name, known in (
        ("scale_format", words.SCALE_FORMATS),
        ("scale_layout", words.SCALE_LAYOUTS),
        ("scale_math", words.SCALE_MATHS),
        ("eps_on", ("amax", "scale")),
    ):
        if a[name] not in known:
            fail(op, name, "one of " + ", ".join(known), repr(a[name]), "pass one of them")


def dispatch_quant(
    x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, **a: Any
) -> tuple[torch.Tensor, ...]:
    check_dispatch("dispatch_quant", x, topk_idx, topk_weights, None, **a)
    check_quant("dispatch_quant", x, a)
    scale_dtype = torch.float8_e8m0fnu if a["scale_format"] == "ue8m0" else torch.float32
    blocks = words.num_scales(x.shape[1], a["block"])
    lead = _lead(a)
    if a["scale_layout"] == "column" and len(lead) == 1:
        scales = x.new_empty((blocks, *lead), dtype=scale_dtype).t()
    else:
        scales = x.new_empty((*lead, blocks), dtype=scale_dtype)
    return _dispatched(x, topk_idx, a["quant_dtype"], scales, a)


def dispatch_quant_start(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return ticket(x)


def dispatch_quant_wait(ticket: torch.Tensor, *args: Any, **a: Any) -> tuple[torch.Tensor, ...]:
    return dispatch_quant(*args, **a)


def check_dispatch_backward(
    op: str,
    grad_rows: torch.Tensor,
    grad_row_weights: torch.Tensor | None,
    route: torch.Tensor,
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
    check_dim(op, "grad_rows", grad_rows, 3 if layout == "batched" else 2, "the shape of rows")
    check_route(op, route, num_tokens, max_tokens, ep_size, top_k)
    check_device(op, grad_rows, route=route, grad_row_weights=grad_row_weights)


def dispatch_backward(
    grad_rows: torch.Tensor, grad_row_weights: torch.Tensor | None, route: torch.Tensor, **a: Any
) -> tuple[torch.Tensor, ...]:
    check_dispatch_backward("dispatch_backward", grad_rows, grad_row_weights, route, **a)
    return (
        grad_rows.new_empty((a["num_tokens"], grad_rows.shape[-1])),
        grad_rows.new_empty((a["num_tokens"], a["top_k"]), dtype=torch.float32),
        grad_rows.new_empty(words.STATUS_WORDS, dtype=torch.int32),
    )


def dispatch_backward_start(grad_rows: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return ticket(grad_rows)


def dispatch_backward_wait(ticket: torch.Tensor, *args: Any, **a: Any) -> tuple[torch.Tensor, ...]:
    return dispatch_backward(*args, **a)


def ticket(like: torch.Tensor) -> torch.Tensor:
    return like.new_empty(words.TICKET_WORDS, dtype=torch.int64)
