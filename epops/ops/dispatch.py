"""dispatch: token rows to the ranks of their experts."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..group import ExpertGroup
from ..meta import dispatch as fakes
from ..transport import Swap
from .arguments import dispatch_arguments, dispatch_defaults
from .dispatch_backward import full_arguments, gradient, save
from .dispatch_rows import Sent, receive, results, send
from .exchange import Halves, check_group, start, wait, whole
from .known_calls import once
from .registry import bind, call, differentiate


class DispatchResult(NamedTuple):
    """What `dispatch` returns.  See `epops.layout` for the words.

    * ``rows`` (C, H), or (L, R * M, H) in the ``batched`` layout: the received rows; alignment gaps are zero, rows after the
      last expert's end are zero on CPU and unspecified on CUDA.
    * ``scales`` (C, blocks) of quantized rows, else empty.
    * ``row_weights`` float32: the routing weight of each row, 0 in padding; (C,), in ``rank`` (C, K), in ``batched`` (L, R * M).
    * ``row_expert`` int32, shaped alike: the local slot of each row, -1 in padding.
    * ``row_source`` int32 (C,) or (L, R * M): source rank * M + token, -1 in padding.
    * ``expert_counts`` int32 (L,): true rows of each slot.
    * ``expert_ends`` int32: ``expert``: (L,) aligned running ends, what a grouped GEMM takes as ``offs``; ``rank``: (R,) running
      ends of the source ranks; ``batched``: empty.
    * ``route`` int32: what combine needs; opaque.
    * ``status`` int32 (8,): see `epops.layout.STATUS_WORDS`.
    """

    rows: torch.Tensor
    scales: torch.Tensor
    row_weights: torch.Tensor
    row_expert: torch.Tensor
    row_source: torch.Tensor
    expert_counts: torch.Tensor
    expert_ends: torch.Tensor
    route: torch.Tensor
    status: torch.Tensor


def dispatch(
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    x_scales: torch.Tensor | None = None,
    *,
    group: Any,
    layout: str = "expert",
    alignment: int | None = None,
    max_tokens: Any = None,
    capacity: Any = None,
    num_experts: int | None = None,
    num_slots: int | None = None,
    grad_scale: float | None = None,
    lane: int = 0,
) -> DispatchResult:
    """Send each token's row to the ranks of its experts: one row a (token, rank), whatever K is.

    Args:
        x: (T, H) rows, any dtype; packed 4-bit rows are uint8.  Differentiable.
        topk_idx: (T, K) int32 or int64, experts of each token; -1 = not selected.
        topk_weights: (T, K) float32 routing weights; they travel along.  Differentiable.
        x_scales: (T, blocks), scales of rows that are quantized already; they travel with their rows.
        group: the `ExpertGroup`, or its name.
        layout: "expert", "rank" or "batched"; see `epops.layout.LAYOUTS`.
        alignment: each expert's rows start at a multiple of it; default the group's.
        max_tokens: M of this call, equal on all ranks, at least any rank's T; default the group's.
        capacity: C; default the worst case.  Below it, rows that do not fit are dropped in row order, and counted.
        grad_scale: factor on the gradient that reaches ``x``; default 1.
        lane: exchanges of different lanes may be in flight at once.

    Raises:
        ValueError: arguments that do not fit each other or the group; on all ranks, before any is left waiting.
        RoutingError: what an earlier op of the group found in its routing.
        DisagreementError, PeerError: a rank that does something else, or does not come.

    >>> import torch, epops
    >>> with epops.ExpertGroup(None, "docs", max_tokens=2, num_experts=2) as group:
    ...     x = torch.tensor([[1.0, 1.0], [2.0, 2.0]])
    ...     got = epops.dispatch(x, torch.tensor([[1], [0]]), torch.ones(2, 1), group=group)
    >>> got.rows.tolist(), got.expert_ends.tolist(), got.row_source.tolist()
    ([[2.0, 2.0], [1.0, 1.0]], [1, 2], [1, 0])
    """
    a = dispatch_arguments(
        "dispatch",
        topk_idx,
        group=group,
        layout=layout,
        alignment=alignment,
        max_tokens=max_tokens,
        capacity=capacity,
        num_experts=num_experts,
        num_slots=num_slots,
        grad_scale=grad_scale,
        lane=lane,
    )
    return DispatchResult(*call(torch.ops.epops.dispatch.default, x, topk_idx, topk_weights, x_scales, **a))


def dispatch_start(
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    x_scales: torch.Tensor | None = None,
    **settings: Any,
) -> torch.Tensor:
    """Begin a `dispatch` (same arguments) and return its ticket (4,) int64; `dispatch_wait` gives the result."""
    a = dispatch_arguments("dispatch_start", topk_idx, **dispatch_defaults(settings))
    return torch.ops.epops.dispatch_start.default(x, topk_idx, topk_weights, x_scales, **a)


def dispatch_wait(
    ticket: torch.Tensor,
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    x_scales: torch.Tensor | None = None,
    **settings: Any,
) -> DispatchResult:
    """Result of the `dispatch` that ``ticket`` began; the arguments are those of the start."""
    a = dispatch_arguments("dispatch_wait", topk_idx, **dispatch_defaults(settings))
    return DispatchResult(*torch.ops.epops.dispatch_wait.default(ticket, x, topk_idx, topk_weights, x_scales, **a))


# ---- the real kernels ----------------------------------------------------------------------------------------------


@once
def _check(
    group: ExpertGroup, /, x: torch.Tensor, idx: torch.Tensor, w: torch.Tensor, scales: Any = None, **a: Any
) -> None:
    fakes.check_dispatch("dispatch", x, idx, w, scales, **a)
    check_group("dispatch", group, x, a["ep_size"])


def _prepare(
    group: ExpertGroup, /, x: torch.Tensor, idx: torch.Tensor, w: torch.Tensor, scales: Any = None, **a: Any
) -> Any:
    return send(group, "dispatch", x, scales, idx, w, a)


def _finish(group: ExpertGroup, /, swap: Swap, sent: Sent, sequence: int, x: torch.Tensor, *_: Any, **a: Any) -> Any:
    return results(*receive(group, "dispatch", swap, sent, sequence, x, a))


DISPATCH = Halves("dispatch", _check, _prepare, _finish)


def _dispatch(x: Any, idx: Any, w: Any, scales: Any = None, **a: Any) -> Any:
    return whole(DISPATCH, (x, idx, w, scales), full_arguments(a))


def _dispatch_start(x: Any, idx: Any, w: Any, scales: Any = None, **a: Any) -> Any:
    return start(DISPATCH, (x, idx, w, scales), full_arguments(a))


def _dispatch_wait(ticket: Any, x: Any, idx: Any, w: Any, scales: Any = None, **a: Any) -> Any:
    full = full_arguments(a)
    return wait(DISPATCH, ticket, (x, idx, w, scales), full, full)


bind("dispatch", _dispatch, fakes.dispatch)
bind("dispatch_start", _dispatch_start, fakes.dispatch_start)
bind("dispatch_wait", _dispatch_wait, fakes.dispatch_wait)


# ---- autograd ------------------------------------------------------------------------------------------------------


def _setup(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    save(ctx, inputs[0], inputs[1], keyword_only_inputs, output)


def _setup_wait(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    save(ctx, inputs[1], inputs[2], keyword_only_inputs, output)


def _backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    grad_x, grad_weights = gradient(ctx, grads)
    return grad_x, None, grad_weights, None


def _backward_wait(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    return (None, *_backward(ctx, *grads))


differentiate("dispatch", _backward, _setup)
differentiate("dispatch_wait", _backward_wait, _setup_wait)
