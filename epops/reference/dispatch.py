"""dispatch in plain torch: pack the records that a rank sends, and group those that it received.

One record a (token, rank): row bytes, scale bytes, token (int32), K local slots (int32, -1 = another rank's), K weights
(float32).  Records of one source arrive in token order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import layout as words
from .routing import DROPPED, sends


class Grouped(NamedTuple):
    """What `unpack` makes of received records; shapes as in `epops.dispatch`, ``recv_row`` (R, M, K) int64."""

    rows: torch.Tensor
    scales: torch.Tensor
    row_weights: torch.Tensor
    row_expert: torch.Tensor
    row_source: torch.Tensor
    expert_counts: torch.Tensor
    expert_ends: torch.Tensor
    recv_row: torch.Tensor
    num_rows: torch.Tensor
    num_dropped: torch.Tensor


def row_bytes(rows: torch.Tensor) -> torch.Tensor:
    """(N, bytes) uint8 copy or view of ``rows`` (N, width)."""
    return rows.contiguous().reshape(-1).view(torch.uint8).reshape(rows.shape[0], rows.shape[1] * rows.element_size())


def from_bytes(part: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(N, width) ``dtype`` of bytes (N, width * itemsize) that may lie anywhere, also at an address that ``dtype`` cannot have."""
    flat = part.reshape(-1)
    if flat.storage_offset() % dtype.itemsize:
        flat = flat.clone()
    return flat.view(dtype).reshape(part.shape[0], part.shape[1] // dtype.itemsize)


def take_rows(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``rows[index]``; on CPU whole rows are copied at once, where indexing goes from element to element."""
    if rows.element_size() == 1 and rows.dtype != torch.uint8:  # float8 has no such kernel everywhere
        return rows.view(torch.uint8).index_select(0, index).view(rows.dtype)
    return rows.index_select(0, index)


def record_width(hidden_bytes: int, scale_bytes: int, top_k: int) -> int:
    """Bytes of one record."""
    return hidden_bytes + scale_bytes + 4 + 8 * top_k


def send_order(send_slot: torch.Tensor, *, ep_size: int, num_slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``order`` (R, T): for each rank the tokens that it gets, ascending, before those that it does not; ``counts`` (R,)."""
    wanted = sends(send_slot, ep_size, num_slots)
    return torch.argsort(~wanted, dim=1, stable=True), wanted.sum(dim=1)


def pack(
    x: torch.Tensor,
    scales: torch.Tensor | None,
    topk_weights: torch.Tensor,
    send_slot: torch.Tensor,
    tokens: torch.Tensor,
    ranks: torch.Tensor,
    *,
    num_slots: int,
) -> torch.Tensor:
    """Records (N, bytes) uint8 for ``tokens`` (N,) bound for ``ranks`` (N,)."""
    parts = [take_rows(row_bytes(x), tokens)]
    if scales is not None:
        parts.append(take_rows(row_bytes(scales), tokens))
    slots = send_slot[tokens]
    here = (slots >= 0) & (slots // num_slots == ranks.unsqueeze(1))
    parts.append(row_bytes(tokens.to(torch.int32).unsqueeze(1)))
    parts.append(row_bytes(torch.where(here, slots % num_slots, -1).to(torch.int32)))
    parts.append(row_bytes(topk_weights.to(torch.float32)[tokens]))
    return torch.cat(parts, dim=1)


def unpack(
    records: torch.Tensor,
    source: torch.Tensor,
    valid: torch.Tensor | None,
    *,
    row_dtype: torch.dtype,
    hidden: int,
    scale_dtype: torch.dtype | None,
    num_scales: int,
    layout: str,
    alignment: int,
    capacity: int,
    max_tokens: int,
    top_k: int,
    num_slots: int,
    ep_size: int,
) -> Grouped:
    """Group ``records`` (N, bytes), from rank ``source`` (N,), ordered by (source, token); ``valid`` (N,) masks padding."""
    device = records.device
    num = records.shape[0]
    hidden_bytes = hidden * row_dtype.itemsize
    scale_bytes = num_scales * scale_dtype.itemsize if scale_dtype is not None else 0
    data, scale_part, meta = records.split([hidden_bytes, scale_bytes, 4 + 8 * top_k], dim=1)
    token, slots, weights = (
        from_bytes(meta[:, :4], torch.int32).reshape(num).to(torch.int64),
        from_bytes(meta[:, 4 : 4 + 4 * top_k], torch.int32).to(torch.int64),
        from_bytes(meta[:, 4 + 4 * top_k :], torch.float32),
    )
    # What a peer wrote is data, not an address: anything out of range counts as absent.
    token = token.clamp(0, max(max_tokens - 1, 0))
    slots = torch.where((slots >= 0) & (slots < num_slots), slots, -1)
    if valid is not None:
        slots = slots.masked_fill(~valid.unsqueeze(1), -1)
    pair = source * max_tokens + token
    flat = slots.reshape(-1)
    key = torch.where(flat >= 0, flat, num_slots)
    counts = torch.zeros(num_slots + 1, dtype=torch.int64, device=device).index_add_(0, key, torch.ones_like(key))
    true_counts = counts[:num_slots]

    if layout == "rank":
        present = (slots >= 0).any(dim=1)
        place = torch.cumsum(present.to(torch.int64), 0) - 1
        dest = torch.where(present & (place < capacity), place, capacity)
        total = present.sum()
        rows_kept = total.clamp(max=capacity)
        per_source = torch.zeros(ep_size, dtype=torch.int64, device=device).index_add_(
            0, source, present.to(torch.int64)
        )
        ends = torch.cumsum(per_source, 0).clamp(max=capacity)
        dest_k = torch.where(slots >= 0, dest.unsqueeze(1), capacity)
        row_dest = dest
        limit = capacity
    else:
        order = torch.argsort(key, stable=True)
        first = torch.cumsum(counts, 0) - counts
        inside = torch.arange(order.numel(), device=device) - first[key[order]]
        if layout == "batched":
            stride = ep_size * max_tokens
            starts = torch.arange(num_slots + 1, device=device) * stride
            limit = num_slots * stride
            ends = torch.zeros(0, dtype=torch.int64, device=device)
        else:
            padded = words.align_up(true_counts, alignment)
            ends = torch.cumsum(padded, 0)
            starts = torch.cat([ends - padded, ends.new_full((1,), 0)])
            limit = capacity
            ends = ends.clamp(max=capacity)
        sorted_dest = starts[key[order]] + inside
        sorted_dest = torch.where((key[order] < num_slots) & (sorted_dest < limit), sorted_dest, limit)
        row_dest = torch.empty_like(sorted_dest).scatter_(0, order, sorted_dest)
        dest_k = row_dest.view(num, top_k)
        total = true_counts.sum()
        rows_kept = (row_dest < limit).sum()
        if layout == "expert":
            true_counts = torch.minimum(true_counts, (limit - starts[:num_slots]).clamp(min=0))

    recv_row = torch.full((ep_size * max_tokens + 1, top_k), -1, dtype=torch.int64, device=device)
    pair_dest = pair if valid is None else torch.where(valid, pair, ep_size * max_tokens)
    recv_row[pair_dest] = torch.where(slots < 0, -1, torch.where(dest_k < limit, dest_k, DROPPED))
    recv_row = recv_row[:-1].view(ep_size, max_tokens, top_k)

    # Which entry of the flattened (N, K) choices, or which record, a row comes from; `entries` for a row that is empty.
    entries = row_dest.numel()
    came_from = row_dest.new_full((limit + 1,), entries)
    came_from[row_dest] = torch.arange(entries, device=device)
    came_from = came_from[:limit]
    record = came_from if layout == "rank" else torch.where(came_from == entries, num, came_from // max(top_k, 1))

    def laid(values: torch.Tensor, rows: torch.Tensor, empty: float | int) -> torch.Tensor:
        """``values[rows]``, with ``empty`` where a row has no origin."""
        return take_rows(torch.cat([values, values.new_full((1, *values.shape[1:]), empty)]), rows)

    lead = (num_slots, ep_size * max_tokens) if layout == "batched" else (limit,)
    rows = laid(data, record, 0).view(row_dtype).reshape(*lead, hidden)
    if scale_dtype is not None:
        scales = laid(scale_part, record, 0).view(scale_dtype).reshape(*lead, num_scales)
    else:
        scales = torch.empty(0, dtype=torch.float32, device=device)
    if layout != "rank":
        row_weights = laid(weights.reshape(-1), came_from, 0.0).reshape(lead)
        row_expert = laid(flat.to(torch.int32), came_from, -1).reshape(lead)
        row_source = laid(pair.to(torch.int32), record, -1).reshape(lead)
    else:
        row_weights = laid(weights.masked_fill(slots < 0, 0.0), record, 0.0)
        row_expert = laid(slots.to(torch.int32), record, -1)
        row_source = laid(pair.to(torch.int32), record, -1)
    return Grouped(
        rows,
        scales,
        row_weights,
        row_expert,
        row_source,
        true_counts.to(torch.int32),
        ends.to(torch.int32),
        recv_row,
        rows_kept,
        total - rows_kept,
    )
