"""What dispatch and combine mean, written down a second time as plain loops over all ranks; shares no code with epops."""

from __future__ import annotations

import torch


def chosen(idx: torch.Tensor, experts: int) -> list[list[tuple[int, int]]]:
    """For each token its (k, expert) selections that count: in range, and not chosen before by the token."""
    kept = []
    for row in idx.tolist():
        seen: set[int] = set()
        token = []
        for k, expert in enumerate(row):
            if 0 <= expert < experts and expert not in seen:
                seen.add(expert)
                token.append((k, expert))
        kept.append(token)
    return kept


def arrivals(idxs: list[torch.Tensor], rank: int, experts: int) -> list[tuple[int, int, int, int]]:
    """(source, token, k, slot) of every selection that rank ``rank`` serves, in (source, token, k) order."""
    block = -(-experts // len(idxs))
    return [
        (source, token, k, expert % block)
        for source, idx in enumerate(idxs)
        for token, picks in enumerate(chosen(idx, experts))
        for k, expert in picks
        if expert // block == rank
    ]


def expert_layout(
    xs: list[torch.Tensor], ws: list[torch.Tensor], idxs: list[torch.Tensor], rank: int, experts: int, alignment: int
) -> tuple[list[tuple[torch.Tensor, float, int, int, int] | None], list[int], list[int]]:
    """Rows as (values, weight, slot, source, token) or None for padding; counts and ends of each slot."""
    block = -(-experts // len(idxs))
    came = arrivals(idxs, rank, experts)
    rows: list[tuple[torch.Tensor, float, int, int, int] | None] = []
    counts, ends = [], []
    for slot in range(block):
        own = [(xs[s][t], float(ws[s][t, k]), slot, s, t) for s, t, k, e in came if e == slot]
        rows.extend(own)
        rows.extend([None] * (-len(own) % alignment))
        counts.append(len(own))
        ends.append(len(rows))
    return rows, counts, ends


def layer(x: torch.Tensor, idx: torch.Tensor, w: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """One-process result of experts that multiply a row by ``factors[expert]``."""
    out = torch.zeros_like(x)
    for token, picks in enumerate(chosen(idx, factors.shape[0])):
        for k, expert in picks:
            out[token] += w[token, k] * factors[expert] * x[token]
    return out
