"""dispatch and the quantizing dispatch: token rows to the ranks of their experts."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .. import layout as words
from ..group import ExpertGroup, Settings, get_group, parse_tag
from ..meta import dispatch as fakes
from ..reference.combine import answered_pairs, reduce_rows, sum_over_ranks, weight_gradients
from ..reference.dispatch import Grouped, from_bytes, pack, record_width, row_bytes, send_order, unpack
from ..reference.quantize import dequantize_rows, quantize_rows
from ..reference.routing import choose_slots, read_route, sends, write_route
from ..transport import Call, Swap
from .exchange import Blocks, Halves, check_group, settle, sources, start, status_bits, token_lists, wait, whole
from .registry import bind, differentiate

_QUANT = ("quant_dtype", "block", "scale_format", "scale_layout", "scale_math", "eps_on", "eps", "clamp")


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


# ---- the public functions ------------------------------------------------------------------------------------------


def common_arguments(
    op: str, group: Any, num_experts: int | None, num_slots: int | None, max_tokens: Any
) -> tuple[Settings, dict[str, Any]]:
    """The arguments that every exchange takes, from a group (or its settings, or its name) and what the call overrides."""
    if isinstance(group, str):
        group = get_group(group)
    if isinstance(group, Settings):
        facts = group
    elif hasattr(group, "tag"):
        facts = parse_tag(group.tag)
    else:
        raise ValueError(
            f"epops.{op}: group: expected an ExpertGroup, its settings or its name, got {type(group).__name__}; create one with "
            "epops.ExpertGroup(...)"
        )
    if num_experts is None:
        num_experts, default_slots = facts.num_experts, facts.num_slots
    else:
        default_slots = words.num_slots_for(num_experts, facts.size)
    return facts, {
        "group": facts.name,
        "num_experts": num_experts,
        "num_slots": default_slots if num_slots is None else num_slots,
        "ep_size": facts.size,
        "max_tokens": facts.max_tokens if max_tokens is None else max_tokens,
    }


def dispatch_arguments(
    op: str,
    topk_idx: torch.Tensor,
    *,
    group: Any,
    layout: str,
    alignment: int | None,
    max_tokens: Any,
    capacity: Any,
    num_experts: int | None,
    num_slots: int | None,
    grad_scale: float | None,
    lane: int,
) -> dict[str, Any]:
    facts, a = common_arguments(op, group, num_experts, num_slots, max_tokens)
    if alignment is None:
        alignment = facts.alignment if layout == "expert" else 1
    if capacity is None:
        capacity = words.capacity(layout, a["max_tokens"], a["ep_size"], topk_idx.shape[-1], a["num_slots"], alignment)
    # Defaults are None and become numbers here: Dynamo makes graph inputs of float defaults under dynamic=True.
    grad_scale = 1.0 if grad_scale is None else grad_scale
    return {**a, "capacity": capacity, "layout": layout, "alignment": alignment, "grad_scale": grad_scale, "lane": lane}


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
    return DispatchResult(*torch.ops.epops.dispatch.default(x, topk_idx, topk_weights, x_scales, **a))


def dispatch_start(
    x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, x_scales: torch.Tensor | None = None, **settings: Any
) -> torch.Tensor:
    """Begin a `dispatch` (same arguments) and return its ticket (4,) int64; `dispatch_wait` gives the result."""
    a = dispatch_arguments("dispatch_start", topk_idx, **{**_DEFAULTS, **settings})
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
    a = dispatch_arguments("dispatch_wait", topk_idx, **{**_DEFAULTS, **settings})
    return DispatchResult(*torch.ops.epops.dispatch_wait.default(ticket, x, topk_idx, topk_weights, x_scales, **a))


_DEFAULTS: dict[str, Any] = {
    "layout": "expert",
    "alignment": None,
    "max_tokens": None,
    "capacity": None,
    "num_experts": None,
    "num_slots": None,
    "grad_scale": None,
    "lane": 0,
}


def _quant_arguments(op: str, topk_idx: torch.Tensor, settings: dict[str, Any]) -> dict[str, Any]:
    quant = {
        "quant_dtype": settings.pop("quant_dtype", torch.float8_e4m3fn),
        "block": settings.pop("block", 128),
        "scale_format": settings.pop("scale_format", "float32"),
        "scale_layout": settings.pop("scale_layout", "row"),
        "scale_math": settings.pop("scale_math", "divide"),
        "eps_on": settings.pop("eps_on", "amax"),
        "eps": settings.pop("eps", 1e-12),
        "clamp": settings.pop("clamp", True),
    }
    return {**dispatch_arguments(op, topk_idx, **{**_DEFAULTS, **settings}), **quant}


def dispatch_quant(x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, **settings: Any) -> DispatchResult:
    """`dispatch` that quantizes each row while sending it: the wire and ``rows`` are fp8, ``scales`` come with them.

    Beside the arguments of `dispatch`: ``quant_dtype`` (float8_e4m3fn), ``block`` channels a scale (128; 0: per token),
    ``scale_format`` "float32", "ue8m0" or "float32_pow2", ``scale_layout`` "row" or "column" (strides (1, C)), and the arithmetic:
    ``scale_math``, ``eps_on``, ``eps``, ``clamp``; `epops.reference.quantize.quantize_rows` has the formulas.

    The gradient is straight-through: ``x`` gets the gradient of the dequantized rows (that of ``rows`` divided by their scales).
    """
    a = _quant_arguments("dispatch_quant", topk_idx, settings)
    return DispatchResult(*torch.ops.epops.dispatch_quant.default(x, topk_idx, topk_weights, **a))


def dispatch_quant_start(x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, **settings: Any) -> torch.Tensor:
    """Begin a `dispatch_quant` and return its ticket."""
    a = _quant_arguments("dispatch_quant_start", topk_idx, settings)
    return torch.ops.epops.dispatch_quant_start.default(x, topk_idx, topk_weights, **a)


def dispatch_quant_wait(
    ticket: torch.Tensor, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, **settings: Any
) -> DispatchResult:
    """Result of the `dispatch_quant` that ``ticket`` began."""
    a = _quant_arguments("dispatch_quant_wait", topk_idx, settings)
    return DispatchResult(*torch.ops.epops.dispatch_quant_wait.default(ticket, x, topk_idx, topk_weights, **a))


# ---- the real kernels ----------------------------------------------------------------------------------------------


class _Sent(NamedTuple):
    """What the sending half keeps for the local half."""

    send_slot: torch.Tensor
    mask: torch.Tensor
    num_bad: torch.Tensor
    num_repeated: torch.Tensor
    row_dtype: torch.dtype
    scale_dtype: torch.dtype | None
    num_scales: int


def _send(
    group: ExpertGroup,
    op: str,
    rows: torch.Tensor,
    scales: torch.Tensor | None,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    a: dict[str, Any],
) -> tuple[Blocks, _Sent]:
    num_experts, num_slots, max_tokens = a["num_experts"], a["num_slots"], a["max_tokens"]
    expert_slot, mask = group.maps(num_experts, num_slots, rows.device)
    choice = choose_slots(topk_idx, expert_slot, mask, num_experts=num_experts, num_slots=num_slots)
    order, counts = send_order(choice.send_slot, ep_size=group.size, num_slots=num_slots)
    num_tokens, top_k = topk_idx.shape
    scale_bytes = 0 if scales is None else scales.shape[1] * scales.element_size()
    width = record_width(rows.shape[1] * rows.element_size(), scale_bytes, top_k)
    blocks = []
    for rank, tokens in enumerate(token_lists(group, order, counts, max_tokens)):
        if num_tokens == 0:
            blocks.append(rows.new_zeros((tokens.shape[0], width), dtype=torch.uint8))
            continue
        inside = tokens if group.transport.host_counts else tokens.clamp(max=num_tokens - 1)
        ranks = torch.full_like(inside, rank)
        blocks.append(pack(rows, scales, topk_weights, choice.send_slot, inside, ranks, num_slots=num_slots))
    call = Call(
        op,
        max_tokens,
        top_k,
        width,
        num_slots,
        num_experts,
        words.LAYOUTS.index(a["layout"]),
        a["alignment"],
        a["capacity"],
        a["lane"],
    )
    found = {words.STATUS_BAD_INDEX: choice.num_bad, words.STATUS_DUPLICATE: choice.num_repeated}
    sent = _Sent(
        choice.send_slot,
        mask,
        choice.num_bad,
        choice.num_repeated,
        rows.dtype,
        None if scales is None else scales.dtype,
        0 if scales is None else scales.shape[1],
    )
    return Blocks(call, blocks, counts, status_bits(group, found)), sent


def _receive(
    group: ExpertGroup, op: str, swap: Swap, sent: _Sent, sequence: int, x: torch.Tensor, a: dict[str, Any]
) -> tuple[Grouped, torch.Tensor, torch.Tensor]:
    source, valid = sources(group, swap)
    top_k = sent.send_slot.shape[1]
    grouped = unpack(
        torch.cat(swap.rows),
        source,
        valid,
        row_dtype=sent.row_dtype,
        hidden=x.shape[1],
        scale_dtype=sent.scale_dtype,
        num_scales=sent.num_scales,
        layout=a["layout"],
        alignment=a["alignment"],
        capacity=a["capacity"],
        max_tokens=a["max_tokens"],
        top_k=top_k,
        num_slots=a["num_slots"],
        ep_size=group.size,
    )
    route = write_route(
        layout=a["layout"],
        alignment=a["alignment"],
        capacity=a["capacity"],
        num_experts=a["num_experts"],
        num_slots=a["num_slots"],
        rank=group.rank,
        lane=a["lane"],
        num_rows=grouped.num_rows,
        num_dropped=grouped.num_dropped,
        mask=sent.mask,
        send_slot=sent.send_slot,
        recv_row=grouped.recv_row,
    )
    status = settle(
        group,
        op,
        sequence,
        swap.bits,
        num_rows=grouped.num_rows,
        num_dropped=grouped.num_dropped,
        num_bad=sent.num_bad,
        num_repeated=sent.num_repeated,
        device=x.device,
    )
    return grouped, route, status


def _results(grouped: Grouped, route: torch.Tensor, status: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (*grouped[:7], route, status)


def _check(group: ExpertGroup, /, x: torch.Tensor, idx: torch.Tensor, w: torch.Tensor, scales: Any = None, **a: Any) -> None:
    fakes.check_dispatch("dispatch", x, idx, w, scales, **a)
    check_group("dispatch", group, x, a["ep_size"])


def _check_quant(group: ExpertGroup, /, x: torch.Tensor, idx: torch.Tensor, w: torch.Tensor, **a: Any) -> None:
    fakes.check_dispatch("dispatch_quant", x, idx, w, None, **a)
    fakes.check_quant("dispatch_quant", x, a)
    check_group("dispatch_quant", group, x, a["ep_size"])


def _prepare(group: ExpertGroup, /, x: torch.Tensor, idx: torch.Tensor, w: torch.Tensor, scales: Any = None, **a: Any) -> Any:
    return _send(group, "dispatch", x, scales, idx, w, a)


def _prepare_quant(group: ExpertGroup, /, x: torch.Tensor, idx: torch.Tensor, w: torch.Tensor, **a: Any) -> Any:
    quant = {name: a[name] for name in _QUANT if name != "scale_layout"}
    rows, scales = quantize_rows(x, **quant)
    return _send(group, "dispatch_quant", rows, scales, idx, w, a)


def _finish(group: ExpertGroup, /, swap: Swap, sent: _Sent, sequence: int, x: torch.Tensor, *_: Any, **a: Any) -> Any:
    return _results(*_receive(group, "dispatch", swap, sent, sequence, x, a))


def _finish_quant(group: ExpertGroup, /, swap: Swap, sent: _Sent, sequence: int, x: torch.Tensor, *_: Any, **a: Any) -> Any:
    grouped, route, status = _receive(group, "dispatch_quant", swap, sent, sequence, x, a)
    if a["scale_layout"] == "column" and grouped.scales.dim() == 2:
        grouped = grouped._replace(scales=grouped.scales.t().contiguous().t())
    return _results(grouped, route, status)


DISPATCH = Halves("dispatch", _check, _prepare, _finish)
DISPATCH_QUANT = Halves("dispatch_quant", _check_quant, _prepare_quant, _finish_quant)


def _dispatch(x: Any, idx: Any, w: Any, scales: Any = None, **a: Any) -> Any:
    return whole(DISPATCH, (x, idx, w, scales), _full(a))


def _dispatch_start(x: Any, idx: Any, w: Any, scales: Any = None, **a: Any) -> Any:
    return start(DISPATCH, (x, idx, w, scales), _full(a))


def _dispatch_wait(ticket: Any, x: Any, idx: Any, w: Any, scales: Any = None, **a: Any) -> Any:
    return wait(DISPATCH, ticket, (x, idx, w, scales), _full(a), _full(a))


def _dispatch_quant(x: Any, idx: Any, w: Any, **a: Any) -> Any:
    return whole(DISPATCH_QUANT, (x, idx, w), _full(a))


def _dispatch_quant_start(x: Any, idx: Any, w: Any, **a: Any) -> Any:
    return start(DISPATCH_QUANT, (x, idx, w), _full(a))


def _dispatch_quant_wait(ticket: Any, x: Any, idx: Any, w: Any, **a: Any) -> Any:
    return wait(DISPATCH_QUANT, ticket, (x, idx, w), _full(a), _full(a))


def _full(a: dict[str, Any]) -> dict[str, Any]:
    """The dispatcher leaves out keyword arguments that equal their defaults; the real kernels want them all."""
    return {"grad_scale": 1.0, "lane": 0, **a}


# ---- the gradient: dispatch_backward ---------------------------------------------------------------------------------


def _check_backward(group: ExpertGroup, /, grad_rows: torch.Tensor, grad_w: Any, route: torch.Tensor, **a: Any) -> None:
    fakes.check_dispatch_backward("dispatch_backward", grad_rows, grad_w, route, **a)
    check_group("dispatch_backward", group, grad_rows, a["ep_size"])


def answer_blocks(
    group: ExpertGroup, recv_row: torch.Tensor, answer: Any, max_tokens: int
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Blocks of answers to each source, in token order: ``answer(recv_row rows (N, K))`` gives (N, W) uint8."""
    owed = answered_pairs(recv_row)
    order = torch.argsort(~owed, dim=1, stable=True)
    counts = owed.sum(dim=1)
    blocks = []
    for source, tokens in enumerate(token_lists(group, order, counts, max_tokens)):
        inside = tokens if group.transport.host_counts else tokens.clamp(max=max_tokens - 1)
        blocks.append(answer(recv_row[source][inside]))
    return blocks, counts


def expected_answers(group: ExpertGroup, send_slot: torch.Tensor, a: dict[str, Any]) -> tuple[list[torch.Tensor], Any]:
    """Tokens that each rank answers, and how many (host transports only)."""
    wanted = sends(send_slot.to(torch.int64), group.size, a["num_slots"])
    order, counts = torch.argsort(~wanted, dim=1, stable=True), wanted.sum(dim=1)
    tokens = token_lists(group, order, counts, a["max_tokens"])
    return tokens, [part.shape[0] for part in tokens] if group.transport.host_counts else None


def _prepare_backward(group: ExpertGroup, /, grad_rows: torch.Tensor, grad_w: Any, route: torch.Tensor, **a: Any) -> Any:
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
    group: ExpertGroup, /, swap: Swap, tokens: list[torch.Tensor], sequence: int, grad_rows: torch.Tensor, *_: Any, **a: Any
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
    return whole(DISPATCH_BACKWARD, (grad_rows, grad_w, route), _full(a))


def _dispatch_backward_start(grad_rows: Any, grad_w: Any, route: Any, **a: Any) -> Any:
    return start(DISPATCH_BACKWARD, (grad_rows, grad_w, route), _full(a))


def _dispatch_backward_wait(ticket: Any, grad_rows: Any, grad_w: Any, route: Any, **a: Any) -> Any:
    return wait(DISPATCH_BACKWARD, ticket, (grad_rows, grad_w, route), _full(a), _full(a))


bind("dispatch", _dispatch, fakes.dispatch)
bind("dispatch_start", _dispatch_start, fakes.dispatch_start)
bind("dispatch_wait", _dispatch_wait, fakes.dispatch_wait)
bind("dispatch_quant", _dispatch_quant, fakes.dispatch_quant)
bind("dispatch_quant_start", _dispatch_quant_start, fakes.dispatch_quant_start)
bind("dispatch_quant_wait", _dispatch_quant_wait, fakes.dispatch_quant_wait)
bind("dispatch_backward", _dispatch_backward, fakes.dispatch_backward)
bind("dispatch_backward_start", _dispatch_backward_start, fakes.dispatch_backward_start)
bind("dispatch_backward_wait", _dispatch_backward_wait, fakes.dispatch_backward_wait)


# ---- autograd ----------------------------------------------------------------------------------------------------------

_SHARED = ("group", "num_experts", "num_slots", "ep_size", "max_tokens", "layout", "grad_scale", "lane")


def _save(ctx: Any, x: torch.Tensor, topk_idx: torch.Tensor, settings: dict[str, Any], output: Any) -> None:
    ctx.save_for_backward(output[7], output[1])
    ctx.set_materialize_grads(False)
    ctx.num_tokens, ctx.top_k = topk_idx.shape
    ctx.x_dtype = x.dtype
    ctx.row_shape, ctx.row_dtype = output[0].shape, output[0].dtype
    ctx.settings = {name: settings[name] for name in _SHARED if name in settings}


def _gradient(ctx: Any, grads: tuple[Any, ...]) -> tuple[Any, Any]:
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


def _setup(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    _save(ctx, inputs[0], inputs[1], keyword_only_inputs, output)


def _setup_wait(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    _save(ctx, inputs[1], inputs[2], keyword_only_inputs, output)


def _backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    grad_x, grad_weights = _gradient(ctx, grads)
    return grad_x, None, grad_weights, None


def _backward_wait(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    grad_x, grad_weights = _gradient(ctx, grads)
    return None, grad_x, None, grad_weights, None


def _backward_quant(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    grad_x, grad_weights = _gradient(ctx, grads)
    return grad_x, None, grad_weights


def _backward_quant_wait(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    grad_x, grad_weights = _gradient(ctx, grads)
    return None, grad_x, None, grad_weights


differentiate("dispatch", _backward, _setup)
differentiate("dispatch_wait", _backward_wait, _setup_wait)
differentiate("dispatch_quant", _backward_quant, _setup)
differentiate("dispatch_quant_wait", _backward_quant_wait, _setup_wait)
