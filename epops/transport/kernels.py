"""Calls of the CUDA kernels: tensors and settings to parameter structs, and the launch plan that a shape gets.

Nothing here knows of groups or processes: ranks are addresses.  Tests run many ranks on one GPU through it.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

import epops._C as _C

from .. import layout as words
from . import room
from .plans import COUNTED, LINES, STREAMED
from .plans import Plan as Plan
from .plans import Tuning as Tuning

DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
BYTES = 3
MAX_RANKS, MAX_TOP_K = _C.max_ranks, _C.max_top_k
ARCHS = [name for name in _C.cuda_archs.split(";") if name]
QUANT_MATHS = {"divide": 0, "multiply": 1, "reciprocal": 2, "reciprocal_exact": 3, "reciprocal_amax": 4}
TABLE_BYTES = 100 << 10  # of shared memory that a dispatch of many tokens has for tables, where it has a choice
BOARD_TOKENS = 1024  # tokens a rank whose selections have room
LINE_TOKENS = 1024  # tokens a rank whose records have room as lines
TABLE_WORDS = 16 << 10  # of counts, which every block of a dispatch reads
QUANT_BLOCKS = words.QUANT_BLOCKS


class Sizes(NamedTuple):
    """What a rank's memory is laid out for; ``row_bytes`` is the largest record, ``ring_bytes`` are all_to_all's, 0 without."""

    max_tokens: int
    top_k: int
    num_slots: int
    row_bytes: int
    ring_bytes: int = 0

    def covers(self, other: Sizes) -> bool:
        return all(mine >= theirs for mine, theirs in zip(self, other, strict=True))

    def join(self, other: Sizes) -> Sizes:
        return Sizes(*(max(pair) for pair in zip(self, other, strict=True)))


def lay_out(rank: int, num_ranks: int, sizes: Sizes, timeout: float) -> tuple[Any, int]:
    """A workspace description without addresses, and the bytes of one rank's memory."""
    ws = _C.Workspace()
    ws.rank, ws.num_ranks = rank, num_ranks
    ws.max_tokens, ws.max_top_k, ws.max_slots = sizes.max_tokens, sizes.top_k, sizes.num_slots
    peers = num_ranks - 1
    ws.board_tokens = min(sizes.max_tokens, BOARD_TOKENS)
    # Records of one op, or of two where they are small: ops that share the room wait for one another.
    copies = 2 if sizes.max_tokens <= 1024 else 1
    ws.data_bytes = copies * peers * sizes.max_tokens * sizes.row_bytes
    ws.line_tokens = min(sizes.max_tokens, LINE_TOKENS) if peers else 0
    ws.line_bytes = _C.lines_bytes(sizes.row_bytes + room.beside_bytes(sizes.top_k))
    ws.ring_bytes = sizes.ring_bytes
    ws.timeout_ns = int(timeout * 1e9)
    return ws, ws.layout()


class QuantSettings(NamedTuple):
    """Arguments of the quantizing dispatch that the kernel needs."""

    quant_dtype: torch.dtype = torch.float8_e4m3fn
    block: int = 128
    scale_format: str = "float32"
    scale_layout: str = "row"
    scale_math: str = "divide"
    eps_on: str = "amax"
    eps: float = 1e-12
    clamp: bool = True


def error_words() -> torch.Tensor:
    """Pinned memory for a workspace's ``error_host``."""
    return torch.zeros(_C.error_words, dtype=torch.int32).pin_memory()


class Error(NamedTuple):
    """What a kernel told the host of: bits of `layout.STATUS_BITS`, and the first one's peer (or -1), phase and epoch."""

    bits: int
    peer: int
    phase: int
    epoch: int


def take_error(words_of_errors: torch.Tensor) -> Error | None:
    """What has been told since the last call.  A bit that comes meanwhile is there for the next one."""
    told = words_of_errors.tolist()
    bits = [bit for bit, seen in enumerate(told[4:]) if seen]
    if not bits:
        return None
    for bit in bits:
        words_of_errors[4 + bit] = 0
    words_of_errors[0] = 0
    return Error(sum(1 << bit for bit in bits), *told[1:4])


def num_chunks(num_ranks: int, num_slots: int) -> int:
    """Chunks that a rank's tokens are counted in, so that all ranks' counts fit a table."""
    return max(1, min(_C.max_chunks(num_ranks), TABLE_WORDS // (num_ranks * (num_slots + _C.count_words))))


def call_hash(*facts: Any) -> int:
    """What ranks compare: 32 bits of an op and the settings that must be equal."""
    return zlib.crc32(repr(facts).encode())


class _Beside(threading.local):
    """Where this thread launches kernels: on ``side``, or where it is None on the current stream."""

    side: torch.cuda.Stream | None = None
    held: list[torch.Tensor] | None = None


_beside = _Beside()


@contextlib.contextmanager
def launched_beside(side: torch.cuda.Stream) -> Iterator[list[torch.Tensor]]:
    """Kernels are launched on ``side``, behind what the current stream has been given so far.

    Yields a list that gets every tensor whose address a kernel has: keep it until the current stream waits for ``side``.
    """
    held: list[torch.Tensor] = []
    _beside.side, _beside.held = side, held
    try:
        yield held
    finally:
        _beside.side = _beside.held = None


def is_beside() -> bool:
    """Whether kernels are being launched on a second stream."""
    return _beside.side is not None


def stream_of(tensor: torch.Tensor) -> int:
    """The stream for a kernel, all of whose tensors have been made."""
    current = torch.cuda.current_stream(tensor.device)
    if _beside.side is None:
        return current.cuda_stream
    _beside.side.wait_stream(current)
    return _beside.side.cuda_stream


def scale_bytes(num_scales: int, itemsize: int) -> int:
    return -(-num_scales * itemsize // 16) * 16


def address(tensor: torch.Tensor | None) -> int:
    if tensor is None or tensor.numel() == 0:
        return 0
    if _beside.held is not None:
        _beside.held.append(tensor)
    return tensor.data_ptr()


class Dispatched(NamedTuple):
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
    ws: Any,
    plan: Plan,
    expert_slot: torch.Tensor,
    mask: torch.Tensor,
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    x_scales: torch.Tensor | None = None,
    *,
    num_experts: int,
    num_slots: int,
    max_tokens: int,
    capacity: int,
    layout: str,
    alignment: int,
    lane: int = 0,
    quant: QuantSettings | None = None,
) -> Dispatched:
    """Launch dispatch on the current stream of x's device.  Tensors must be contiguous, but for ``x_scales``."""
    num_tokens, top_k = topk_idx.shape
    hidden, num_ranks, device = x.shape[1], ws.num_ranks, x.device
    p = _C.DispatchParams()
    p.ws, p.launch = ws, plan.launch()
    p.hidden, p.num_tokens, p.max_tokens, p.top_k = hidden, num_tokens, max_tokens, top_k
    p.num_experts, p.num_slots, p.alignment, p.lane = num_experts, num_slots, alignment, lane
    p.layout = words.LAYOUTS.index(layout)
    if layout == "batched":
        capacity = num_slots * num_ranks * max_tokens
    p.capacity = capacity
    lead = (num_slots, num_ranks * max_tokens) if layout == "batched" else (capacity,)
    scales = torch.empty(0, dtype=torch.float32, device=device)
    if quant is not None:
        p.x_dtype, row_dtype = DTYPES[x.dtype], quant.quant_dtype
        q = _C.Quant()
        q.block, q.format = quant.block, words.SCALE_FORMATS.index(quant.scale_format)
        q.math, q.eps_on_scale, q.clamp = QUANT_MATHS[quant.scale_math], int(quant.eps_on == "scale"), int(quant.clamp)
        q.e5m2, q.eps = int(quant.quant_dtype == torch.float8_e5m2), quant.eps
        q.top = torch.finfo(quant.quant_dtype).max
        q.top_inverse = _rounded_inverse(q.top)
        usual = quant._replace(scale_layout="row", eps=0.0) == QuantSettings(eps=0.0, clamp=quant.clamp)
        q.usual = int(usual)
        p.quant = q
        p.num_scales, p.wire_scale_bytes = words.num_scales(hidden, quant.block), 4
        scale_dtype = torch.float8_e8m0fnu if quant.scale_format == "ue8m0" else torch.float32
        scales = _empty_scales(lead, p.num_scales, scale_dtype, quant.scale_layout, device)
    else:
        p.x_dtype, row_dtype = BYTES, x.dtype
        if x_scales is not None:
            p.num_scales, p.wire_scale_bytes = x_scales.shape[1], x_scales.element_size()
            p.x_scales = address(x_scales)
            p.scale_token_stride, p.scale_block_stride = x_scales.stride()
            scales = _empty_scales(lead, p.num_scales, x_scales.dtype, "row", device)
    p.row_bytes = hidden * row_dtype.itemsize
    p.record_bytes = p.row_bytes + scale_bytes(p.num_scales, p.wire_scale_bytes)
    p.out_scale_bytes = scales.element_size()
    if scales.numel():
        p.out_scale_row_stride, p.out_scale_block_stride = scales.stride()[-2:]
    wide = (*lead, top_k) if layout == "rank" else lead
    rows = torch.empty((*lead, hidden), dtype=row_dtype, device=device)
    row_weights = torch.empty(wide, dtype=torch.float32, device=device)
    row_expert = torch.empty(wide, dtype=torch.int32, device=device)
    row_source = torch.empty(lead, dtype=torch.int32, device=device)
    expert_counts = torch.empty(num_slots, dtype=torch.int32, device=device)
    num_ends = {"expert": num_slots, "rank": num_ranks, "batched": 0}[layout]
    expert_ends = torch.empty(num_ends, dtype=torch.int32, device=device)
    route = torch.empty(words.route_size(num_tokens, max_tokens, num_ranks, top_k), dtype=torch.int32, device=device)
    status = torch.empty(words.STATUS_WORDS, dtype=torch.int32, device=device)
    p.x, p.topk_idx, p.topk_weights = address(x), address(topk_idx), address(topk_weights)
    p.idx64 = int(topk_idx.dtype == torch.int64)
    p.expert_slot, p.mask = address(expert_slot), address(mask)
    p.rows, p.scales, p.row_weights, p.row_expert = (
        address(rows),
        address(scales),
        address(row_weights),
        address(row_expert),
    )
    p.row_source, p.expert_counts, p.expert_ends = address(row_source), address(expert_counts), address(expert_ends)
    p.route, p.status = address(route), address(status)
    p.num_chunks, p.chunk_tokens = 1, max(1, max_tokens)
    shared = shared_bytes(device.index)
    p.launch.rows_as = rows_as = room.rows_as(p, plan, shared)
    if rows_as == COUNTED:
        p.chunk_tokens = -(-p.chunk_tokens // num_chunks(num_ranks, num_slots))
        p.num_chunks = -(-max(1, max_tokens) // p.chunk_tokens)
        p.tiles = 4
        if p.shared_bytes() > TABLE_BYTES:
            p.tiles = 1
        room.lay_out_stages(p, shared)
    p.call_hash = call_hash(
        "dispatch", max_tokens, top_k, p.record_bytes, p.row_bytes, num_slots, num_experts, p.layout, lane, alignment,
        capacity, rows_as,
    )  # fmt: skip
    _C.launch_dispatch(p, stream_of(x))
    return Dispatched(rows, scales, row_weights, row_expert, row_source, expert_counts, expert_ends, route, status)


@functools.cache
def shared_bytes(device: int | None) -> int:
    """Shared memory that a block of the exchange kernels may take; the rest is left to what the compiler puts there."""
    properties = torch.cuda.get_device_properties(torch.device("cuda", device))
    return getattr(properties, "shared_memory_per_block_optin", 99 << 10) - (6 << 10)


@functools.cache
def has_bulk_copies(device: int | None) -> bool:
    """Whether the GPU has the instructions of sm_90 that csrc/combine_streams.cu is made of."""
    return torch.cuda.get_device_properties(torch.device("cuda", device)).major >= 9


@functools.cache
def _rounded_inverse(value: float) -> float:
    """1 / value, in float32."""
    return float(torch.tensor(1.0) / torch.tensor(value))


def _empty_scales(
    lead: tuple[int, ...], num: int, dtype: torch.dtype, layout: str, device: torch.device
) -> torch.Tensor:
    if layout == "column":
        return torch.empty((*lead[:-1], num, lead[-1]), dtype=dtype, device=device).transpose(-1, -2)
    return torch.empty((*lead, num), dtype=dtype, device=device)


def _check_route(op: str, route: torch.Tensor, num_tokens: int, max_tokens: int, num_ranks: int, top_k: int) -> None:
    """The kernels check what a route says; how long it is, only the host knows."""
    expected = words.route_size(num_tokens, max_tokens, num_ranks, top_k)
    if route.numel() != expected or route.dtype != torch.int32 or not route.is_contiguous():
        raise ValueError(
            f"epops.{op}: route: expected {expected} contiguous int32 words for {num_tokens} tokens, top_k {top_k}, max_tokens "
            f"{max_tokens} and {num_ranks} ranks, got {route.numel()} of {route.dtype}; pass the route of the dispatch"
        )


def combine(
    ws: Any,
    plan: Plan,
    y: torch.Tensor,
    route: torch.Tensor,
    row_weights: torch.Tensor | None = None,
    addend: torch.Tensor | None = None,
    grad_row_weights: torch.Tensor | None = None,
    *,
    num_experts: int,
    num_slots: int,
    max_tokens: int,
    num_tokens: int,
    top_k: int,
    layout: str,
    out_dtype: torch.dtype,
    out_scale: float = 1.0,
    addend_scale: float = 1.0,
    lane: int = 0,
    op: str = "combine",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch combine; with ``grad_row_weights`` the gradients of the routing weights travel along (``dispatch_backward``).

    Returns out (T, H), grad_topk_weights (T, K) or empty, status.
    """
    hidden, device = y.shape[-1], y.device
    _check_route("combine", route, num_tokens, max_tokens, ws.num_ranks, top_k)
    p = _C.CombineParams()
    p.ws, p.launch = ws, plan.launch()
    p.out_scale, p.addend_scale = out_scale, addend_scale
    p.in_dtype, p.out_dtype = DTYPES[y.dtype], DTYPES[out_dtype]
    p.num_tokens, p.max_tokens, p.top_k, p.hidden = num_tokens, max_tokens, top_k, hidden
    p.num_experts, p.num_slots = num_experts, num_slots
    p.num_rows, p.rank_layout = y.numel() // hidden, int(layout == "rank")
    p.record_bytes = hidden * out_dtype.itemsize
    out = torch.empty((num_tokens, hidden), dtype=out_dtype, device=device)
    with_grads = grad_row_weights is not None and grad_row_weights.numel() > 0
    grad_weights = torch.empty((num_tokens, top_k) if with_grads else 0, dtype=torch.float32, device=device)
    status = torch.empty(words.STATUS_WORDS, dtype=torch.int32, device=device)
    p.y, p.route, p.row_weights, p.addend = address(y), address(route), address(row_weights), address(addend)
    p.grad_row_weights, p.grad_topk_weights = address(grad_row_weights), address(grad_weights)
    p.out, p.status = address(out), address(status)
    p.launch.rows_as = COUNTED
    p.sent_bytes = p.record_bytes + (room.beside_bytes(top_k) if with_grads else 0)
    if plan.rows_as == LINES:
        room.answer_lines(p, plan, shared_bytes(device.index))
    elif plan.rows_as == STREAMED and not with_grads and has_bulk_copies(device.index):
        room.stream_rows(p, shared_bytes(device.index))
        if p.launch.rows_as == STREAMED and plan.stream_senders:
            p.launch.num_senders = min(plan.stream_senders, plan.num_blocks)
    p.call_hash = call_hash(
        op, max_tokens, top_k, p.record_bytes, num_slots, num_experts, p.rank_layout, lane, p.launch.rows_as == LINES
    )  # fmt: skip
    _C.launch_combine(p, stream_of(y))
    return out, grad_weights, status


def combine_backward(
    ws: Any,
    plan: Plan,
    grad_out: torch.Tensor,
    y: torch.Tensor,
    route: torch.Tensor,
    row_weights: torch.Tensor | None = None,
    *,
    num_experts: int,
    num_slots: int,
    max_tokens: int,
    top_k: int,
    layout: str,
    out_scale: float = 1.0,
    grad_scale: float = 1.0,
    lane: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the gradient of combine: grad_y like y, grad_row_weights like row_weights (or empty), status."""
    _check_route("combine_backward", route, grad_out.shape[0], max_tokens, ws.num_ranks, top_k)
    p = _C.ScatterParams()
    p.ws, p.launch = ws, plan.launch()
    p.out_scale, p.grad_scale = out_scale, grad_scale
    p.grad_dtype, p.y_dtype = DTYPES[grad_out.dtype], DTYPES[y.dtype]
    p.num_tokens, p.hidden = grad_out.shape
    p.max_tokens, p.top_k, p.num_experts, p.num_slots = max_tokens, top_k, num_experts, num_slots
    p.num_rows, p.rank_layout = y.numel() // y.shape[-1], int(layout == "rank")
    p.record_bytes = p.hidden * grad_out.element_size()
    grad_y = torch.zeros_like(y)  # rows that no token owns, alignment gaps among them
    empty = torch.empty(0, dtype=torch.float32, device=y.device)
    grad_weights = empty if row_weights is None else torch.zeros_like(row_weights)
    status = torch.empty(words.STATUS_WORDS, dtype=torch.int32, device=y.device)
    p.grad_out, p.y, p.route, p.row_weights = address(grad_out), address(y), address(route), address(row_weights)
    p.grad_y, p.grad_row_weights, p.status = address(grad_y), address(grad_weights), address(status)
    p.call_hash = call_hash(
        "combine_backward", max_tokens, top_k, p.record_bytes, num_slots, num_experts, p.rank_layout, lane
    )
    _C.launch_scatter(p, stream_of(y))
    return grad_y, grad_weights, status
