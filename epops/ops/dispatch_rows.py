"""The two halves that dispatch and the quantizing dispatch share: records out, and received records into rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .. import layout as words
from ..group import ExpertGroup
from ..reference.dispatch import Grouped, pack, record_width, send_order, unpack
from ..reference.routing import choose_slots, write_route
from ..transport import Call, Swap
from .exchange import Blocks, settle, sources, status_bits, token_lists


class Sent(NamedTuple):
    """What the sending half keeps for the local half."""

    send_slot: torch.Tensor
    mask: torch.Tensor
    num_bad: torch.Tensor
    num_repeated: torch.Tensor
    row_dtype: torch.dtype
    scale_dtype: torch.dtype | None
    num_scales: int


def send(
    group: ExpertGroup,
    op: str,
    rows: torch.Tensor,
    scales: torch.Tensor | None,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    a: dict[str, Any],
) -> tuple[Blocks, Sent]:
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
        a.get("grad_scale") or 1.0,
    )
    found = {words.STATUS_BAD_INDEX: choice.num_bad, words.STATUS_DUPLICATE: choice.num_repeated}
    sent = Sent(
        choice.send_slot,
        mask,
        choice.num_bad,
        choice.num_repeated,
        rows.dtype,
        None if scales is None else scales.dtype,
        0 if scales is None else scales.shape[1],
    )
    return Blocks(call, blocks, counts, status_bits(group, found)), sent


def receive(
    group: ExpertGroup, op: str, swap: Swap, sent: Sent, sequence: int, x: torch.Tensor, a: dict[str, Any]
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


def results(grouped: Grouped, route: torch.Tensor, status: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (*grouped[:7], route, status)
