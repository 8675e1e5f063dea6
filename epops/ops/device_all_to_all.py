"""all_to_all over a transport that moves equal parts and reads nothing on the host (c10d on nccl).

Every pair exchanges a part padded to the largest that its splits could name, so that a CUDA graph can hold it.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import layout as words
from ..group import ExpertGroup
from ..reference.all_to_all import read_plan, running
from ..transport import Swap, all_to_all_call
from .exchange import Blocks, settle, status_bits

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Elements of each size as integers, so that whatever moves and clears them does it for fp8 and bool too."""


def prepare_on_device(group: ExpertGroup, x: torch.Tensor, ins: Any, outs: Any, plan: Any, a: dict[str, Any]) -> Any:
    x = x.view(BITS[x.element_size()])
    scatter_dim, gather_dim = a["scatter_dim"], a["gather_dim"]
    size = x.shape[scatter_dim]
    if plan is not None:
        ins, offsets, outs, _ = read_plan(plan, group.size)
    elif ins is None:
        ins = torch.full((group.size,), size // group.size, dtype=torch.int64, device=x.device)
        offsets = running(ins)
    else:
        ins = ins.clamp(0, size)
        offsets = running(ins)
    same = scatter_dim == gather_dim
    part = size if same else a["scatter_size"]
    index = offsets.unsqueeze(1) + torch.arange(part, device=x.device)
    front = x.movedim(scatter_dim, 0)
    if size:
        # What a split names beyond the end of x is not there: zero, never another row.
        there = ((index >= 0) & (index < size)).view(group.size, part, *[1] * (front.dim() - 1))
        blocks = torch.where(there, front[index.clamp(0, size - 1)], 0)
    else:
        blocks = front.new_zeros((group.size, part, *front.shape[1:]))
    missing = ((ins > 0) & ((offsets < 0) | (offsets + ins > size))).any()
    mine = x.new_full((), x.shape[gather_dim], dtype=torch.int64)
    if not same:
        dim = 2 + (gather_dim if gather_dim < scatter_dim else gather_dim - 1)
        bound = a["out_size"] if outs is not None else x.shape[gather_dim]
        if outs is not None:
            mine = outs[group.rank].clamp(0, x.shape[gather_dim])
        blocks = blocks.movedim(dim, 2)
        blocks = torch.nn.functional.pad(blocks, (0, 0) * (blocks.dim() - 3) + (0, bound - blocks.shape[2]))
    flat = list(blocks.contiguous().view(group.size, -1).view(torch.uint8).unsqueeze(2).unbind(0))
    call = all_to_all_call(x.shape, scatter_dim, gather_dim, flat[0].shape[0], a["lane"])
    # One count a pair: the split along the ragged dim, and the contribution along the gathered one.
    counts = ins if same else ins * (1 << 31) + mine
    return Blocks(call, flat, counts, status_bits(group, {words.STATUS_OVERFLOW: missing})), (
        ins,
        outs,
        tuple(blocks.shape[1:]),
    )


def finish_on_device(
    group: ExpertGroup, swap: Swap, keep: Any, sequence: int, x: torch.Tensor, a: dict[str, Any]
) -> Any:
    ins, outs, shape = keep
    scatter_dim, gather_dim = a["scatter_dim"], a["gather_dim"]
    same = scatter_dim == gather_dim
    # Put together as bytes: a block may lie where no element of x's dtype may begin.
    received = torch.stack(swap.rows).view(-1).view(BITS[x.element_size()]).view(group.size, *shape)
    split, gathered = (swap.counts, None) if same else (swap.counts >> 31, swap.counts & 0x7FFFFFFF)
    came = split if gathered is None else gathered
    bits = swap.bits
    wrong = torch.zeros_like(came, dtype=torch.bool)
    if outs is not None:
        wrong = wrong | (came != outs)
    if gathered is not None:
        wrong = wrong | (split != ins[group.rank])
    bits = bits | wrong.any().to(torch.int64) * words.STATUS_DISAGREE
    placed = came if outs is None else outs
    usable = torch.where(wrong, 0, came)
    out_size = a["out_size"]
    axis = 1 if same else 2
    moved = received.movedim(axis, 1)
    limit = moved.shape[1]
    position = torch.arange(limit, device=x.device)
    dest = running(placed).unsqueeze(1) + position
    inside = position < usable.unsqueeze(1)
    dest = torch.where(inside & (dest < out_size), dest, out_size).reshape(-1)
    out = moved.new_zeros((out_size + 1, *moved.shape[2:]))
    out[dest] = moved.reshape(-1, *moved.shape[2:])
    out = out[:out_size]
    if same:
        out = out.movedim(0, scatter_dim)
    else:
        rows = torch.arange(out.shape[1], device=x.device) < ins[group.rank]
        out = torch.where(rows.view(1, -1, *[1] * (out.dim() - 2)), out, 0)
        order = [dim for dim in range(x.dim()) if dim not in (scatter_dim, gather_dim)]
        places = [gather_dim, scatter_dim, *order]
        out = out.permute([places.index(dim) for dim in range(x.dim())])
    lost = (placed.sum() - out_size).clamp(min=0)
    status = settle(group, "all_to_all", sequence, bits, num_rows=came.sum(), num_dropped=lost, device=x.device)
    return out.contiguous().view(x.dtype), came.clone(), status
