"""The way back over a route: who answers whom, for combine and for the gradient of dispatch."""

from __future__ import annotations

from typing import Any

import torch

from ..group import ExpertGroup
from ..reference.combine import answered_pairs
from ..reference.routing import sends
from .exchange import token_lists


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
