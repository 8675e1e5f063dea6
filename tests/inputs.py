"""Inputs that tests and benchmarks share: token rows, routings of ugly shapes, and the one-process meaning of an MoE layer."""

from __future__ import annotations

import torch


def routing(kind: str, tokens: int, top_k: int, experts: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``topk_idx`` (T, K) int64 and ``topk_weights`` (T, K) float32.

    ``kind``: "random"; "one" (all to expert 0, the rest -1); "holes" (a third -1); "skewed" (low experts preferred); "none".
    """
    make = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, experts, generator=make)
    if kind == "skewed":
        scores = scores + torch.linspace(1, 0, experts)
    idx = scores.topk(min(top_k, experts), dim=1).indices if tokens else torch.zeros(0, top_k, dtype=torch.int64)
    if top_k > experts:
        idx = torch.nn.functional.pad(idx[:, :experts], (0, top_k - experts), value=-1)
    if kind == "one":
        idx = torch.full_like(idx, -1)
        idx[:, 0] = 0
    elif kind == "holes":
        idx = idx.masked_fill(torch.rand(tokens, top_k, generator=make) < 0.34, -1)
    elif kind == "none":
        idx = torch.full_like(idx, -1)
    # Eighths are exact in every float dtype, so that sums can be compared for equality.
    weights = torch.randint(1, 9, (tokens, top_k), generator=make).float() / 8
    return idx, weights


def rows(tokens: int, hidden: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """(T, H) small integers in floats."""
    make = torch.Generator().manual_seed(seed + 1000)
    return torch.randint(-4, 5, (tokens, hidden), generator=make).to(dtype)
