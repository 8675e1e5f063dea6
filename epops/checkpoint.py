"""Activation checkpointing that does not repeat exchanges: a policy for torch's selective checkpointing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from .schema import EXCHANGES


def save_exchanges(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Policy: results of epops exchanges are kept for the backward, everything else is computed again.

    Use it as ``checkpoint(fn, x, use_reentrant=False, context_fn=epops.checkpoint_contexts())``.
    """
    return CheckpointPolicy.MUST_SAVE if op in _exchanges() else CheckpointPolicy.PREFER_RECOMPUTE


def checkpoint_contexts(policy: Callable[..., CheckpointPolicy] | None = None) -> Callable[[], Any]:
    """``context_fn`` for ``torch.utils.checkpoint.checkpoint``: exchanges are saved, ``policy`` decides about the rest."""
    if policy is None:
        return functools.partial(create_selective_checkpoint_contexts, save_exchanges)

    def both(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op in _exchanges():
            return CheckpointPolicy.MUST_SAVE
        return policy(ctx, op, *args, **kwargs)

    return functools.partial(create_selective_checkpoint_contexts, both)


@functools.cache
def _exchanges() -> frozenset[Any]:
    return frozenset(getattr(torch.ops.epops, name).default for name in EXCHANGES)
