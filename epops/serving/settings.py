"""What an engine is made with: whether it fits, and what it is where nothing was said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..models.site import site_of, sites

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)
"""Batch sizes of decode steps, as far as the group's ``max_tokens`` allows."""


def check_sharded(model: Any, group: Any) -> None:
    found = sites(model) if isinstance(model, torch.nn.Module) else {}
    over = {site.group.name for module in found.values() if (site := site_of(module)) is not None}
    if over != {group.name}:
        got = f"experts over {sorted(over)}" if over else f"{type(model).__name__} with no sharded experts"
        raise ValueError(
            f"epops.serving.Engine: model: expected experts sharded over group {group.name!r}, got {got}; call "
            "epops.parallelize(model, group), or epops.serving.load(folder, group)"
        )
    if not hasattr(model, "get_input_embeddings") or not hasattr(model, "config"):
        raise ValueError(
            f"epops.serving.Engine: model: expected a transformers causal language model, got {type(model).__name__}; "
            "models of your own decode by a loop of their own, with epops.join"
        )


def check_buckets(buckets: Sequence[int] | None, group: Any) -> tuple[int, ...]:
    if buckets is None:
        return tuple(size for size in BUCKETS if size <= group.max_tokens)
    chosen = tuple(buckets)
    if not chosen or list(chosen) != sorted(set(chosen)) or chosen[0] < 1 or chosen[-1] > group.max_tokens:
        raise ValueError(
            f"epops.serving.Engine: buckets: expected rising sizes from 1 to the group's max_tokens {group.max_tokens}, got "
            f"{chosen}; make the group with a larger max_tokens, or take smaller buckets"
        )
    return chosen


def check_length(max_length: int | None, config: Any) -> int:
    most = getattr(config, "max_position_embeddings", None) or 4096
    length = min(most, 4096) if max_length is None else max_length
    if not 2 <= length <= most:
        raise ValueError(
            f"epops.serving.Engine: max_length: expected 2 to {most} (the model's max_position_embeddings), got {length}; "
            "choose a length that the model has positions for"
        )
    return length
