"""The call of the all_to_all kernel: a tensor's dims as the kernel takes them, and its launch plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

import epops._C as _C

from .. import layout as words
from .kernels import Plan, Tuning, address, call_hash, stream_of

MAX_DIMS: int = _C.max_dims
MOST_ELEMENTS = 1 << 32
"""Places of one tensor are counted in 32 bits."""


class Dims(NamedTuple):
    """Dims of x from outermost to innermost, those that lie in one piece counted as one; strides in elements.

    ``scatter_at`` and ``gather_at`` are the places of the two dims, whose steps have ``scatter_unit`` and ``gather_unit`` elements.
    The last dim has stride 1.
    """

    size: tuple[int, ...]
    x_stride: tuple[int, ...]
    out_stride: tuple[int, ...]
    scatter_at: int
    gather_at: int
    scatter_unit: int
    gather_unit: int


def dims_of(
    shape: Sequence[int], stride: Sequence[int], out_shape: Sequence[int], scatter_dim: int, gather_dim: int
) -> Dims:
    """Merge dims of an x of ``shape`` and ``stride`` whose result is contiguous, of ``out_shape``.

    >>> dims_of((6, 4, 8), (32, 8, 1), (9, 4, 8), 0, 0)
    Dims(size=(192,), x_stride=(1,), out_stride=(1,), scatter_at=0, gather_at=0, scatter_unit=32, gather_unit=32)
    >>> dims_of((6, 4, 8), (64, 8, 1), (3, 9, 8), 0, 1)  # every other four of eight rows
    Dims(size=(6, 32), x_stride=(64, 1), out_stride=(72, 1), scatter_at=0, gather_at=1, scatter_unit=1, gather_unit=8)
    """
    out_strides = [1] * len(shape)
    for dim in reversed(range(len(shape) - 1)):
        out_strides[dim] = out_strides[dim + 1] * out_shape[dim + 1]
    # Each kept dim: size, stride in x, stride in out, the dims of x whose steps it counts and elements a step.
    kept: list[list[Any]] = []
    for dim, (size, step, out_step) in enumerate(zip(shape, stride, out_strides, strict=True)):
        special = dim in (scatter_dim, gather_dim)
        if size == 1 and not special:
            continue
        if kept and not special and kept[-1][1] == size * step:
            last = kept[-1]
            last[0], last[1], last[2], last[4] = last[0] * size, step, out_step, last[4] * size
        else:
            kept.append([size, step, out_step, dim if special else -1, 1])
    if not kept or kept[-1][1] != 1:
        kept.append([1, 1, 1, -1, 1])
    places = [entry[3] for entry in kept]
    scatter_at, gather_at = places.index(scatter_dim), places.index(gather_dim)
    return Dims(
        tuple(entry[0] for entry in kept),
        tuple(entry[1] for entry in kept),
        tuple(entry[2] for entry in kept),
        scatter_at,
        gather_at,
        kept[scatter_at][4],
        kept[gather_at][4],
    )


def launch_plan(tuning: Tuning, ws: Any, x_bytes: int, out_bytes: int, num_sms: int) -> tuple[Plan, int]:
    """The plan, and how many of its blocks receive.

    Where x is small its blocks send first and receive then: nothing that they send waits for room.  Else the last
    blocks send, the others receive, and the ring between them is in use from both ends.
    """
    most = max(1, num_sms - tuning.spare_sms)
    if tuning.limit_blocks:
        most = min(most, tuning.limit_blocks)
    half = max(1, ws.ring_slots // 2) if ws.ring_slots else most  # see layout_ring in csrc/ring.cuh
    if x_bytes <= min(tuning.whole_bytes, ws.ring_slots * ws.slot_bytes) or ws.num_ranks == 1:
        wanted = -(-max(x_bytes, out_bytes) // max(tuning.chunk_bytes, 1))
        blocks = max(1, min(most, half, wanted))
        senders = receivers = blocks
    else:
        blocks = max(2, min(most, num_sms - tuning.spare_sms_throughput))
        senders = max(1, min(tuning.ring_senders, blocks // 2, half))
        receivers = min(blocks - senders, half)
        blocks = senders + receivers
    warps = _C.all_to_all_threads // 32 - 1
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
    launch, p.num_receivers = launch_plan(tuning, ws, x.numel() * itemsize, out.numel() * itemsize, num_sms)
    p.ws, p.launch = ws, launch.launch()
    p.set_dims(dims.size, [s * itemsize for s in dims.x_stride], [s * itemsize for s in dims.out_stride])
    p.scatter_at, p.gather_at, p.scatter_unit, p.gather_unit = dims[3:]
    p.scatter_in, p.gather_in, p.scatter_out, p.gather_out = (
        x.shape[scatter_dim], x.shape[gather_dim], scatter_size, out_size
    )  # fmt: skip
    p.element_bytes = itemsize
    p.min_chunk = min(tuning.chunk_bytes, ws.slot_bytes) if ws.slot_bytes else tuning.chunk_bytes
    counts = torch.empty(ws.num_ranks, dtype=torch.int64, device=device)
    status = torch.empty(words.STATUS_WORDS, dtype=torch.int32, device=device)
    p.x, p.out, p.counts, p.status = address(x), address(out), address(counts), address(status)
    p.input_splits, p.output_splits, p.plan = address(input_splits), address(output_splits), address(plan)
    rest = tuple(size for dim, size in enumerate(x.shape) if dim not in (scatter_dim, gather_dim))
    p.call_hash = call_hash("all_to_all", itemsize, rest, scatter_dim, gather_dim, lane, p.min_chunk)
    _C.launch_all_to_all(p, stream_of(x))
    return out, counts, status
