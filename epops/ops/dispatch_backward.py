"""The gradient of dispatch: row gradients summed back to their tokens, as an op and as autograd's formula."""

from __future__ import annotations

from typing import Any

import torch

from ..group import ExpertGroup
from ..meta import dispatch as fakes
from ..reference.combine import reduce_rows, sum_over_ranks, weight_gradients
from ..reference.dispatch import from_bytes, row_bytes
from ..reference.quantize import dequantize_rows
from ..reference.routing import read_route
from ..transport import Call, Swap
from .answers import answer_blocks, expected_answers
from .exchange import Blocks, Halves, check_group, settle, start, status_bits, wait, whole
from .registry import bind


def full_arguments(a: dict[str, Any]) -> dict[str, Any]:
    """The dispatcher leaves out keyword arguments that equal their defaults; the real kernels want them all."""
    return {"grad_scale": 1.0, "lane": 0, **a}


def _check_backward(group: ExpertGroup, /, grad_rows: torch.Tensor, grad_w: Any, route: torch.Tensor, **a: Any) -> None:
    fakes.check_dispatch_backward("dispatch_backward", grad_rows, grad_w, route, **a)
    check_group("dispatch_backward", group, grad_rows, a["ep_size"])


def _prepare_backward(
    group: ExpertGroup, /, grad_rows: torch.Tensor, grad_w: Any, route: torch.Tensor, **a: Any
) -> Any:
    num_tokens, top_k = a["num_tokens"], a["top_k"]
    parts = read_route(route, num_tokens=num_tokens, max_tokens=a["max_tokens"], ep_size=group.size, top_k=top_k)

    def answer(recv_row: torch.Tensor) -> torch.Tensor:
        rows = reduce_rows(grad_rows, None, None, recv_row, layout=a["layout"]).to(grad_rows.dtype)
        weights = weight_gradients(grad_w, recv_row, layout=a["layout"])
        return torch.cat([row_bytes(rows), row_bytes(weights)], dim=1)

    blocks, counts = answer_blocks(group, parts.recv_row, answer, a["max_tokens"])
    tokens, expected = expected_answers(group, parts.send_slot, a)
    width = grad_rows.shape[-1] * grad_rows.element_size() + 4 * top_k
    call = Call("dispatch_backward", a["max_tokens"], top_k, width, a["num_slots"], a["num_experts"], lane=a["lane"])
    return Blocks(call, blocks, counts, status_bits(group, {}), expected), tokens


def _finish_backward(
    group: ExpertGroup,
    /,
    swap: Swap,
    tokens: list[torch.Tensor],
    sequence: int,
    grad_rows: torch.Tensor,
    *_: Any,
    **a: Any,
) -> Any:
    split = grad_rows.shape[-1] * grad_rows.element_size()
    rows = [from_bytes(block[:, :split], grad_rows.dtype) for block in swap.rows]
    weights = [from_bytes(block[:, split:], torch.float32) for block in swap.rows]
    grad_x = sum_over_ranks(rows, tokens, a["num_tokens"])
    if a["grad_scale"] != 1.0:
        grad_x = grad_x * a["grad_scale"]
    grad_weights = sum_over_ranks(weights, tokens, a["num_tokens"])
    status = settle(group, "dispatch_backward", sequence, swap.bits, device=grad_rows.device)
    return grad_x.to(grad_rows.dtype), grad_weights, status


DISPATCH_BACKWARD = Halves("dispatch_backward", _check_backward, _prepare_backward, _finish_backward)


def _dispatch_backward(grad_rows: Any, grad_w: Any, route: Any, **a: Any) -> Any:
    return whole(DISPATCH_BACKWARD, (grad_rows, grad_w, route), full_arguments(a))


def _dispatch_backward_start(grad_rows: Any, grad_w: Any, route: Any, **a: Any) -> Any:
    return start(DISPATCH_BACKWARD, (grad_rows, grad_w, route), full_arguments(a))


def _dispatch_backward_wait(ticket: Any, grad_rows: Any, grad_w: Any, route: Any, **a: Any) -> Any:
    return wait(DISPATCH_BACKWARD, ticket, (grad_rows, grad_w, route), full_arguments(a), full_arguments(a))


bind("dispatch_backward", _dispatch_backward, fakes.dispatch_backward)
bind("dispatch_backward_start", _dispatch_backward_start, fakes.dispatch_backward_start)
bind("dispatch_backward_wait", _dispatch_backward_wait, fakes.dispatch_backward_wait)


# ---- what autograd keeps of a dispatch, and makes of its results' gradients ---------------------------------------------

_SHARED = ("group", "num_experts", "num_slots", "ep_size", "max_tokens", "layout", "grad_scale", "lane")


def save(ctx: Any, x: torch.Tensor, topk_idx: torch.Tensor, settings: dict[str, Any], output: Any) -> None:
    ctx.save_for_backward(output[7], output[1])
    ctx.set_materialize_grads(False)
    ctx.num_tokens, ctx.top_k = topk_idx.shape
    ctx.x_dtype = x.dtype
    ctx.row_shape, ctx.row_dtype = output[0].shape, output[0].dtype
    ctx.settings = {name: settings[name] for name in _SHARED if name in settings}


def gradient(ctx: Any, grads: tuple[Any, ...]) -> tuple[Any, Any]:
    grad_rows, grad_row_weights = grads[0], grads[2]
    route, scales = ctx.saved_tensors
    if grad_rows is None and grad_row_weights is None:
        return None, None
    if grad_rows is None:
        grad_rows = grad_row_weights.new_zeros(ctx.row_shape, dtype=ctx.x_dtype)
    elif ctx.row_dtype != ctx.x_dtype:
        factor = dequantize_rows(torch.ones_like(grad_rows, dtype=torch.float32), scales)
        grad_rows = torch.where(factor > 0, grad_rows.float() / factor, 0.0).to(ctx.x_dtype)
    grad_x, grad_weights, _ = torch.ops.epops.dispatch_backward.default(
        grad_rows, grad_row_weights, route, num_tokens=ctx.num_tokens, top_k=ctx.top_k, **ctx.settings
    )
    return grad_x, grad_weights
