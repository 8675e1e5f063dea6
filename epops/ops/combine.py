"""combine: weighted rows back to their tokens, plus an addend, and its gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..group import ExpertGroup
from ..meta import combine as fakes
from ..reference.combine import answered_pairs, finish, reduce_rows, scatter_gradients, sum_over_ranks
from ..reference.dispatch import from_bytes, row_bytes
from ..reference.routing import read_route, sends
from ..transport import Call, Swap
from .answers import answer_blocks, expected_answers
from .arguments import common_arguments
from .exchange import Blocks, Halves, check_group, settle, start, status_bits, token_lists, wait, whole
from .known_calls import once
from .registry import bind, call, differentiate


class CombineResult(NamedTuple):
    """What `combine` returns: ``out`` (T, H) ``out_dtype``; ``status`` int32 (8,), see `epops.layout.STATUS_WORDS`."""

    out: torch.Tensor
    status: torch.Tensor


def _arguments(
    op: str,
    y: torch.Tensor,
    *,
    group: Any,
    num_tokens: Any,
    top_k: int,
    layout: str = "expert",
    max_tokens: Any = None,
    num_experts: int | None = None,
    num_slots: int | None = None,
    out_dtype: torch.dtype | None = None,
    out_scale: float | None = None,
    grad_scale: float | None = None,
    lane: int = 0,
) -> dict[str, Any]:
    _, a = common_arguments(op, group, num_experts, num_slots, max_tokens)
    if out_dtype is None:
        out_dtype = torch.bfloat16 if y.element_size() == 1 else y.dtype
    return {
        **a,
        "num_tokens": num_tokens,
        "top_k": top_k,
        "layout": layout,
        "out_dtype": out_dtype,
        "out_scale": 1.0 if out_scale is None else out_scale,
        "grad_scale": 1.0 if grad_scale is None else grad_scale,
        "lane": lane,
    }


def combine(
    y: torch.Tensor,
    route: torch.Tensor,
    row_weights: torch.Tensor | None = None,
    addend: torch.Tensor | None = None,
    y_scales: torch.Tensor | None = None,
    *,
    addend_scale: float | None = None,
    **settings: Any,
) -> CombineResult:
    """Bring expert rows back to their tokens: ``out_scale * sum of weight * row, + addend_scale * addend``.

    Rows of a token are weighted and summed on the experts' rank first, in float32 over k, so that one row a (token, rank) goes
    back, as ``out_dtype``; then summed over ranks in rank order, in float32, with the addend in the same pass.

    Args:
        y: rows in the shape of `dispatch`'s ``rows``; fp8 rows come with ``y_scales``.  Differentiable.
        route: of the dispatch that this answers.
        row_weights: float32, one weight a row (not in the ``rank`` layout's (C, K): pass (C,) or None).  Differentiable.
        addend: (T, H), a residual or a shared expert's output.  Differentiable.
        group, layout, max_tokens, num_experts, num_slots, lane: as in the dispatch.
        num_tokens, top_k: T and K of the dispatch.
        out_dtype: dtype of the wire and of ``out``; default that of ``y`` (bfloat16 for fp8 rows).
        grad_scale: factor on the gradient that reaches ``y``.

    Raises: as `dispatch`.

    >>> import torch, epops
    >>> with epops.ExpertGroup(None, "docs", max_tokens=2, num_experts=2) as group:
    ...     x = torch.tensor([[1.0], [2.0]])
    ...     sent = epops.dispatch(x, torch.tensor([[1, 0], [0, -1]]), torch.tensor([[3.0, 4.0], [5.0, 0.0]]), group=group)
    ...     back = epops.combine(sent.rows, sent.route, sent.row_weights, addend=x, group=group, num_tokens=2, top_k=2)
    >>> back.out.tolist()
    [[8.0], [12.0]]
    """
    a = _arguments("combine", y, **settings)
    a["addend_scale"] = 1.0 if addend_scale is None else addend_scale
    return CombineResult(*call(torch.ops.epops.combine.default, y, route, row_weights, addend, y_scales, **a))


def combine_start(
    y: torch.Tensor,
    route: torch.Tensor,
    row_weights: torch.Tensor | None = None,
    y_scales: torch.Tensor | None = None,
    **settings: Any,
) -> torch.Tensor:
    """Begin a `combine` and return its ticket; the addend is given to `combine_wait`."""
    a = _arguments("combine_start", y, **settings)
    return torch.ops.epops.combine_start.default(y, route, row_weights, y_scales, **a)


def combine_wait(
    ticket: torch.Tensor,
    y: torch.Tensor,
    route: torch.Tensor,
    row_weights: torch.Tensor | None = None,
    addend: torch.Tensor | None = None,
    y_scales: torch.Tensor | None = None,
    *,
    addend_scale: float | None = None,
    **settings: Any,
) -> CombineResult:
    """Result of the `combine` that ``ticket`` began."""
    a = _arguments("combine_wait", y, **settings)
    a["addend_scale"] = 1.0 if addend_scale is None else addend_scale
    return CombineResult(*torch.ops.epops.combine_wait.default(ticket, y, route, row_weights, addend, y_scales, **a))


# ---- the real kernels ----------------------------------------------------------------------------------------------


@once
def _check(
    group: ExpertGroup, /, y: Any, route: Any, w: Any = None, y_scales: Any = None, addend: Any = None, **a: Any
) -> None:
    fakes.check_combine("combine", y, route, w, addend, y_scales, **a)
    check_group("combine", group, y, a["ep_size"])


def _prepare(
    group: ExpertGroup, /, y: torch.Tensor, route: torch.Tensor, w: Any = None, y_scales: Any = None, **a: Any
) -> Any:
    parts = read_route(
        route, num_tokens=a["num_tokens"], max_tokens=a["max_tokens"], ep_size=group.size, top_k=a["top_k"]
    )

    def answer(recv_row: torch.Tensor) -> torch.Tensor:
        return row_bytes(reduce_rows(y, y_scales, w, recv_row, layout=a["layout"]).to(a["out_dtype"]))

    blocks, counts = answer_blocks(group, parts.recv_row, answer, a["max_tokens"])
    tokens, expected = expected_answers(group, parts.send_slot, a)
    width = y.shape[-1] * a["out_dtype"].itemsize
    call = Call("combine", a["max_tokens"], a["top_k"], width, a["num_slots"], a["num_experts"], lane=a["lane"])
    return Blocks(call, blocks, counts, status_bits(group, {}), expected), tokens


def _finish(
    group: ExpertGroup,
    /,
    swap: Swap,
    tokens: list[torch.Tensor],
    sequence: int,
    y: torch.Tensor,
    route: torch.Tensor,
    w: Any = None,
    y_scales: Any = None,
    addend: Any = None,
    **a: Any,
) -> Any:
    answers = [from_bytes(block, a["out_dtype"]) for block in swap.rows]
    total = sum_over_ranks(answers, tokens, a["num_tokens"])
    out = finish(total, addend, out_dtype=a["out_dtype"], out_scale=a["out_scale"], addend_scale=a["addend_scale"])
    return out, settle(group, "combine", sequence, swap.bits, device=y.device)


def _add_late(result: tuple[torch.Tensor, torch.Tensor], addend: Any = None, **a: Any) -> Any:
    """A started combine of a transport's own has rounded its sum to ``out_dtype`` before the addend comes."""
    out, status = result
    if addend is not None:
        # One kernel, in float32 inside.
        out = torch.add(out, addend, alpha=a["addend_scale"]).to(a["out_dtype"])
    return out, status


COMBINE = Halves("combine", _check, _prepare, _finish, _add_late)


def _full(a: dict[str, Any]) -> dict[str, Any]:
    return {"out_scale": 1.0, "addend_scale": 1.0, "grad_scale": 1.0, "lane": 0, **a}


def _started(a: dict[str, Any]) -> dict[str, Any]:
    """The arguments that the start half has too."""
    return {name: value for name, value in a.items() if name != "addend_scale"}


def _combine(y: Any, route: Any, w: Any = None, addend: Any = None, y_scales: Any = None, **a: Any) -> Any:
    return whole(COMBINE, (y, route, w, y_scales), _full(a), (addend,))


def _combine_start(y: Any, route: Any, w: Any = None, y_scales: Any = None, **a: Any) -> Any:
    return start(COMBINE, (y, route, w, y_scales), _started(_full(a)))


def _combine_wait(
    ticket: Any, y: Any, route: Any, w: Any = None, addend: Any = None, y_scales: Any = None, **a: Any
) -> Any:
    full = _full(a)
    return wait(COMBINE, ticket, (y, route, w, y_scales), full, _started(full), (addend,))


# ---- the gradient: combine_backward ----------------------------------------------------------------------------------


@once
def _check_backward(
    group: ExpertGroup, /, grad: Any, y: Any, route: Any, w: Any = None, y_scales: Any = None, **a: Any
) -> None:
    fakes.check_combine_backward("combine_backward", grad, y, route, w, y_scales, **a)
    check_group("combine_backward", group, y, a["ep_size"])


def _prepare_backward(
    group: ExpertGroup,
    /,
    grad: torch.Tensor,
    y: torch.Tensor,
    route: torch.Tensor,
    w: Any = None,
    y_scales: Any = None,
    **a: Any,
) -> Any:
    num_tokens, max_tokens, top_k = grad.shape[0], a["max_tokens"], a["top_k"]
    parts = read_route(route, num_tokens=num_tokens, max_tokens=max_tokens, ep_size=group.size, top_k=top_k)
    wanted = sends(parts.send_slot.to(torch.int64), group.size, a["num_slots"])
    order, counts = torch.argsort(~wanted, dim=1, stable=True), wanted.sum(dim=1)
    rows = row_bytes(grad)
    blocks = []
    for tokens in token_lists(group, order, counts, max_tokens):
        if num_tokens == 0:
            blocks.append(rows.new_zeros(tokens.shape[0], rows.shape[1]))
        else:
            blocks.append(rows[tokens if group.transport.host_counts else tokens.clamp(max=num_tokens - 1)])
    owed = answered_pairs(parts.recv_row)
    owed_order, owed_counts = torch.argsort(~owed, dim=1, stable=True), owed.sum(dim=1)
    pairs = token_lists(group, owed_order, owed_counts, max_tokens)
    expected = [part.shape[0] for part in pairs] if group.transport.host_counts else None
    call = Call("combine_backward", max_tokens, top_k, rows.shape[1], a["num_slots"], a["num_experts"], lane=a["lane"])
    return Blocks(call, blocks, counts, status_bits(group, {}), expected), (parts.recv_row, pairs)


def _finish_backward(
    group: ExpertGroup,
    /,
    swap: Swap,
    keep: Any,
    sequence: int,
    grad: torch.Tensor,
    y: torch.Tensor,
    route: torch.Tensor,
    w: Any = None,
    y_scales: Any = None,
    **a: Any,
) -> Any:
    recv_row, pairs = keep
    grads = torch.cat([from_bytes(block, grad.dtype) for block in swap.rows])
    # One spare token of no rows takes the padding of device transports.
    spare = torch.nn.functional.pad(recv_row, (0, 0, 0, 1), value=-1)
    rows = torch.cat([spare[source][tokens] for source, tokens in enumerate(pairs)])
    grad_y, grad_w = scatter_gradients(
        grads, rows, y, y_scales, w, layout=a["layout"], out_scale=a["out_scale"], grad_scale=a["grad_scale"]
    )
    return grad_y, grad_w, settle(group, "combine_backward", sequence, swap.bits, device=y.device)


COMBINE_BACKWARD = Halves("combine_backward", _check_backward, _prepare_backward, _finish_backward)


def _full_backward(a: dict[str, Any]) -> dict[str, Any]:
    return {"out_scale": 1.0, "grad_scale": 1.0, "lane": 0, **a}


def _combine_backward(grad: Any, y: Any, route: Any, w: Any = None, y_scales: Any = None, **a: Any) -> Any:
    return whole(COMBINE_BACKWARD, (grad, y, route, w, y_scales), _full_backward(a))


def _combine_backward_start(grad: Any, y: Any, route: Any, w: Any = None, y_scales: Any = None, **a: Any) -> Any:
    return start(COMBINE_BACKWARD, (grad, y, route, w, y_scales), _full_backward(a))


def _combine_backward_wait(
    ticket: Any, grad: Any, y: Any, route: Any, w: Any = None, y_scales: Any = None, **a: Any
) -> Any:
    full = _full_backward(a)
    return wait(COMBINE_BACKWARD, ticket, (grad, y, route, w, y_scales), full, full)


bind("combine", _combine, fakes.combine)
bind("combine_start", _combine_start, fakes.combine_start)
bind("combine_wait", _combine_wait, fakes.combine_wait)
bind("combine_backward", _combine_backward, fakes.combine_backward)
bind("combine_backward_start", _combine_backward_start, fakes.combine_backward_start)
bind("combine_backward_wait", _combine_backward_wait, fakes.combine_backward_wait)


# ---- autograd ----------------------------------------------------------------------------------------------------------

_SHARED = (
    "group",
    "num_experts",
    "num_slots",
    "ep_size",
    "max_tokens",
    "top_k",
    "layout",
    "out_scale",
    "grad_scale",
    "lane",
)


def _save(ctx: Any, y: Any, route: Any, w: Any, addend: Any, y_scales: Any, settings: dict[str, Any]) -> None:
    ctx.save_for_backward(y, route, w, y_scales)
    ctx.settings = {name: settings[name] for name in _SHARED if name in settings}
    ctx.addend_dtype = None if addend is None else addend.dtype
    ctx.addend_scale = settings.get("addend_scale", 1.0)


def _setup(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    y, route, w, addend, y_scales = inputs
    _save(ctx, y, route, w, addend, y_scales, keyword_only_inputs)
    ctx.first = ()


def _setup_wait(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    _, y, route, w, addend, y_scales = inputs
    _save(ctx, y, route, w, addend, y_scales, keyword_only_inputs)
    ctx.first = (None,)


def _backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[Any, ...]:
    y, route, w, y_scales = ctx.saved_tensors
    grad_y, grad_w, _status = torch.ops.epops.combine_backward.default(grad, y, route, w, y_scales, **ctx.settings)
    grad_addend = None
    if ctx.addend_dtype is not None:
        grad_addend = (grad if ctx.addend_scale == 1.0 else grad * ctx.addend_scale).to(ctx.addend_dtype)
    return (*ctx.first, grad_y, None, None if w is None else grad_w, grad_addend, None)


differentiate("combine", _backward, _setup)
differentiate("combine_wait", _backward, _setup_wait)
