"""The call of the all_to_all kernel, and its launch plan."""

from __future__ import annotations

import math
from typing import Any

import torch

import epops._C as _C

from .. import layout as words
from .dims import Dims, dims_of
from .kernels import Plan, Tuning, address, call_hash, stream_of

MAX_DIMS: int = _C.max_dims
MOST_ELEMENTS = 1 << 32
"""Places of one tensor are counted in 32 bits."""
UNIT, LINE = 16, 512
"""Bytes that a thread moves at once; bytes that a warp takes by turns in csrc/all_to_all_small.cu."""
SMALL_STEPS = 1 << 24
"""Steps of a dim there, at most: those of all ranks are added in 32 bits."""


def is_small(tuning: Tuning, ws: Any, x_bytes: int, out_bytes: int, steps: int) -> bool:
    """Whether csrc/all_to_all_small.cu runs: whatever the splits are, all that this rank sends travels as tagged words.

    By what this rank has alone; its peers may run the other kernel.  A result with room for much more than x has is cleared
    faster by the blocks of that one.
    """
    return (
        1 < ws.num_ranks <= _C.small_ranks
        and x_bytes <= min(tuning.small_bytes, ws.tagged_bytes)
        and out_bytes <= 4 * tuning.small_bytes
        and steps <= SMALL_STEPS
    )


def whole_units(x: torch.Tensor, dims: Dims, itemsize: int) -> bool:
    """Whether every place in x and in the result, which begins at one, is a multiple of 16 bytes, whatever the splits are."""
    last = len(dims.size) - 1
    units = [dims.scatter_unit] * (dims.scatter_at == last) + [dims.gather_unit] * (dims.gather_at == last)
    widths = [*dims.x_stride[:-1], *dims.out_stride[:-1], *(units or [dims.size[-1]])]
    return x.data_ptr() % UNIT == 0 and all(width * itemsize % UNIT == 0 for width in widths)


def launch_plan(tuning: Tuning, ws: Any, x_bytes: int, out_bytes: int, num_sms: int, small: bool) -> tuple[Plan, int]:
    """The plan, and how many of its blocks receive.

    Blocks of the small kernel have a line for each of their warps.  Those of the other send first and receive then where x
    fits the ring, and nothing that they send waits for room.  Else the last blocks send, the others receive, and the ring
    between them is in use from both ends.
    """
    most = max(1, num_sms - tuning.spare_sms)
    if tuning.limit_blocks:
        most = min(most, tuning.limit_blocks)
    half = max(1, ws.ring_slots // 2) if ws.ring_slots else most  # see layout_ring in csrc/ring.cuh
    warps = _C.all_to_all_threads // 32 - 1
    if small:
        senders = receivers = blocks = max(1, min(most, half, -(-(x_bytes + out_bytes) // (LINE * warps))))
    elif x_bytes <= min(tuning.whole_bytes, ws.ring_slots * ws.slot_bytes) or ws.num_ranks == 1:
        wanted = -(-max(x_bytes, out_bytes) // max(tuning.chunk_bytes, 1))
        blocks = max(1, min(most, half, wanted))
        senders = receivers = blocks
    else:
        blocks = max(2, min(most, num_sms - tuning.spare_sms_throughput))
        senders = max(1, min(tuning.ring_senders, blocks // 2, half))
        receivers = min(blocks - senders, half)
        blocks = senders + receivers
    return Plan(blocks, senders, _C.all_to_all_threads, warps, warps, 0, tuning.pdl), receivers


def all_to_all(
    ws: Any,
    tuning: Tuning,
    num_sms: int,
    x: torch.Tensor,
    input_splits: torch.Tensor | None = None,
    output_splits: torch.Tensor | None = None,
    plan: torch.Tensor | None = None,
    *,
    out_size: int,
    scatter_size: int,
    scatter_dim: int = 0,
    gather_dim: int = 0,
    lane: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch all_to_all: rows, counts, status of the op.  ``x`` may have any strides; splits and plan are contiguous."""
    itemsize, device = x.element_size(), x.device
    shape = list(x.shape)
    shape[scatter_dim] = scatter_size
    shape[gather_dim] = out_size
    out = torch.empty(shape, dtype=x.dtype, device=device)
    for name, tensor in (("x", x), ("out_size", out)):
        if tensor.numel() >= MOST_ELEMENTS:
            raise ValueError(
                f"epops.all_to_all: {name}: expected fewer than {MOST_ELEMENTS} elements for transport 'nvlink', got shape "
                f"{tuple(tensor.shape)}; exchange it in parts, or make the group with transport='c10d'"
            )
    dims = dims_of(x.shape, x.stride(), shape, scatter_dim, gather_dim)
    if len(dims.size) > MAX_DIMS:
        x = x.contiguous()
        dims = dims_of(x.shape, x.stride(), shape, scatter_dim, gather_dim)
    p = _C.AllToAllParams()
    x_bytes, out_bytes = x.numel() * itemsize, out.numel() * itemsize
    small = is_small(tuning, ws, x_bytes, out_bytes, max(*x.shape, *shape))
    launch, p.num_receivers = launch_plan(tuning, ws, x_bytes, out_bytes, num_sms, small)
    p.ws, p.launch = ws, launch.launch()
    p.set_dims(dims.size, [s * itemsize for s in dims.x_stride], [s * itemsize for s in dims.out_stride])
    p.scatter_at, p.gather_at, p.scatter_unit, p.gather_unit = dims[3:]
    p.scatter_in, p.gather_in, p.scatter_out, p.gather_out = (
        x.shape[scatter_dim], x.shape[gather_dim], scatter_size, out_size
    )  # fmt: skip
    p.even_split = x.shape[scatter_dim] // ws.num_ranks
    p.element_bytes = itemsize
    p.whole_units = int(whole_units(x, dims, itemsize))
    p.min_chunk = min(tuning.chunk_bytes, ws.slot_bytes) if ws.slot_bytes else tuning.chunk_bytes
    counts = torch.empty(ws.num_ranks, dtype=torch.int64, device=device)
    status = torch.empty(words.STATUS_WORDS, dtype=torch.int32, device=device)
    p.x, p.out, p.counts, p.status = address(x), address(out), address(counts), address(status)
    p.input_splits, p.output_splits, p.plan = address(input_splits), address(output_splits), address(plan)
    rest = tuple(size for dim, size in enumerate(x.shape) if dim not in (scatter_dim, gather_dim))
    p.cell_bytes = math.prod(rest) * itemsize
    p.call_hash = call_hash("all_to_all", itemsize, rest, scatter_dim, gather_dim, lane, p.min_chunk)
    (_C.launch_all_to_all_small if small else _C.launch_all_to_all)(p, stream_of(x))
    return out, counts, status
