"""The arguments that exchanges share, from a group and what a call overrides."""

from __future__ import annotations

from typing import Any

import torch

from .. import layout as words
from ..group import Settings, get_group, parse_tag


def common_arguments(
    op: str, group: Any, num_experts: int | None, num_slots: int | None, max_tokens: Any
) -> tuple[Settings, dict[str, Any]]:
    """The arguments that every exchange takes, from a group (or its settings, or its name) and what the call overrides."""
    if isinstance(group, str):
        group = get_group(group)
    if isinstance(group, Settings):
        facts = group
    elif hasattr(group, "tag"):
        facts = parse_tag(group.tag) if torch.compiler.is_compiling() else group.settings
    else:
        raise ValueError(
            f"epops.{op}: group: expected an ExpertGroup, its settings or its name, got {type(group).__name__}; create one with "
            "epops.ExpertGroup(...)"
        )
    if num_experts is None:
        num_experts, default_slots = facts.num_experts, facts.num_slots
    else:
        default_slots = words.num_slots_for(num_experts, facts.size)
    return facts, {
        "group": facts.name,
        "num_experts": num_experts,
        "num_slots": default_slots if num_slots is None else num_slots,
        "ep_size": facts.size,
        "max_tokens": facts.max_tokens if max_tokens is None else max_tokens,
    }


def dispatch_arguments(
    op: str,
    topk_idx: torch.Tensor,
    *,
    group: Any,
    layout: str,
    alignment: int | None,
    max_tokens: Any,
    capacity: Any,
    num_experts: int | None,
    num_slots: int | None,
    grad_scale: float | None,
    lane: int,
) -> dict[str, Any]:
    facts, a = common_arguments(op, group, num_experts, num_slots, max_tokens)
    if alignment is None:
        alignment = facts.alignment if layout == "expert" else 1
    if capacity is None:
        capacity = words.capacity(layout, a["max_tokens"], a["ep_size"], topk_idx.shape[-1], a["num_slots"], alignment)
    # Defaults are None and become numbers here: Dynamo makes graph inputs of float defaults under dynamic=True.
    grad_scale = 1.0 if grad_scale is None else grad_scale
    return {**a, "capacity": capacity, "layout": layout, "alignment": alignment, "grad_scale": grad_scale, "lane": lane}


def dispatch_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """``settings`` with what was left out, for the functions that take any of them."""
    return {
        "layout": "expert",
        "alignment": None,
        "max_tokens": None,
        "capacity": None,
        "num_experts": None,
        "num_slots": None,
        "grad_scale": None,
        "lane": 0,
        **settings,
    }
