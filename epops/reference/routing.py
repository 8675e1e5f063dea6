"""Selections to slots, and the route: who sends what where, written down once and read by combine and the backward."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from .. import layout as words


class Choice(NamedTuple):
    """Where a rank's selections go.  ``send_slot`` (T, K) int64 global slots, -1 = none; the rest are 0-d int64 counts."""

    send_slot: torch.Tensor
    num_bad: torch.Tensor
    num_repeated: torch.Tensor


def choose_slots(
    topk_idx: torch.Tensor, expert_slot: torch.Tensor, mask: torch.Tensor, *, num_experts: int, num_slots: int
) -> Choice:
    """Global slots of ``topk_idx`` (T, K).  Bad indices, repeats and experts of ranks outside ``mask`` (R,) become -1."""
    idx = topk_idx.to(torch.int64)
    bad = (idx < -1) | (idx >= num_experts)
    idx = idx.masked_fill(bad, -1)
    same = (idx.unsqueeze(2) == idx.unsqueeze(1)) & (idx >= 0).unsqueeze(2)
    repeated = torch.tril(same, diagonal=-1).any(dim=2)
    slot = expert_slot[idx.clamp(min=0)]
    alive = mask[slot.clamp(min=0) // num_slots] != 0
    keep = (idx >= 0) & ~repeated & alive & (slot >= 0)
    return Choice(torch.where(keep, slot, -1), bad.sum(), repeated.sum())


def sends(send_slot: torch.Tensor, ep_size: int, num_slots: int) -> torch.Tensor:
    """(R, T) bool: token t has a row for rank r."""
    rank = torch.where(send_slot >= 0, send_slot // num_slots, -1)
    ranks = torch.arange(ep_size, device=send_slot.device)
    return (rank.unsqueeze(0) == ranks.view(-1, 1, 1)).any(dim=2)


class Route(NamedTuple):
    """Sections of a route tensor; `words.ROUTE_HEADER` says what they hold."""

    header: torch.Tensor
    mask: torch.Tensor
    send_slot: torch.Tensor
    recv_row: torch.Tensor


DROPPED = -2
"""In ``recv_row``: the record arrived, but its row found no room; the pair still answers, with zeros."""


def write_route(
    *,
    layout: str,
    alignment: int,
    capacity: int,
    num_experts: int,
    num_slots: int,
    rank: int,
    lane: int,
    num_rows: torch.Tensor,
    num_dropped: torch.Tensor,
    mask: torch.Tensor,
    send_slot: torch.Tensor,
    recv_row: torch.Tensor,
) -> torch.Tensor:
    """One int32 tensor of `words.route_size` words."""
    ep_size, max_tokens, top_k = recv_row.shape
    facts = (
        words.ROUTE_MAGIC,
        words.ROUTE_VERSION,
        words.LAYOUTS.index(layout),
        send_slot.shape[0],
        max_tokens,
        top_k,
        ep_size,
        num_slots,
        capacity,
        alignment,
        rank,
        0,
        0,
        lane,
        num_experts,
    )
    header = _header(facts, mask.device).clone()
    header[12] = num_rows
    header[15] = num_dropped
    parts = [header, mask.reshape(-1), send_slot.reshape(-1), recv_row.reshape(-1)]
    return torch.cat([part.to(torch.int32) for part in parts])


@functools.lru_cache(maxsize=256)
def _header(facts: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Made once: a CUDA graph cannot hold the copy of a list to the device."""
    return torch.tensor([*facts, *[0] * (words.ROUTE_HEADER - len(facts))], dtype=torch.int32, device=device)


def read_route(route: torch.Tensor, *, num_tokens: int, max_tokens: int, ep_size: int, top_k: int) -> Route:
    """Split a route tensor into its sections (views, int32)."""
    sizes = [words.ROUTE_HEADER, ep_size, num_tokens * top_k, ep_size * max_tokens * top_k]
    header, mask, send_slot, recv_row = route.split(sizes)
    return Route(header, mask, send_slot.view(num_tokens, top_k), recv_row.view(ep_size, max_tokens, top_k))
