"""Which experts a model's routers choose: comparing two models in bf16 means little where a near tie went the other way."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

ROUTER = re.compile(r"Router|Gating")
"""Class names of routers in families that do not use the experts interface."""


@contextlib.contextmanager
def watch(model: Any) -> Iterator[list[Tensor]]:
    """Every choice of experts that the model makes, call by call: what experts modules are asked for, or what routers say."""
    heard: list[Tensor] = []

    def asked(_: Any, args: tuple[Any, ...]) -> None:
        heard.append(args[1].detach().sort(dim=-1).values)

    def said(_: Any, __: Any, answer: Any) -> None:
        # Ids and masks as they are; of weights, which are zero: routers that return (T, E) weights zero what is not chosen.
        leaves = [t.detach() for t in torch.utils._pytree.tree_leaves(answer) if isinstance(t, Tensor)]
        heard.extend(t == 0 if t.dtype.is_floating_point else t.clone() for t in leaves)

    handles = [m.register_forward_pre_hook(asked) for m in model.modules() if hasattr(type(m), "_apply_gate")]
    if not handles:
        routers = [m for m in model.modules() if ROUTER.search(type(m).__name__)]
        handles = [m.register_forward_hook(said) for m in routers]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def flips(one: list[Tensor], other: list[Tensor]) -> int:
    """Choices in which two runs differ; those that only one of them shows are not known to differ."""
    return sum(int((a != b).sum()) for a, b in zip(one, other) if a.shape == b.shape)
