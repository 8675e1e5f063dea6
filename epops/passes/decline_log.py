"""What the passes left alone and why, for whoever listens; `epops.inspect` does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import NamedTuple

from torch.fx import Node


class Declined(NamedTuple):
    """One place in a graph that a pass looked at and left alone."""

    rule: str
    node: str
    reason: str

    def __str__(self) -> str:
        return f"{self.rule} left {self.node} alone: {self.reason}"


_listener: ContextVar[list[Declined] | None] = ContextVar("epops_declined", default=None)


def declined(rule: str, node: Node, reason: str) -> None:
    """Note that a pass left ``node`` alone; costs nothing when nobody listens."""
    heard = _listener.get()
    if heard is not None:
        entry = Declined(rule, node.name, reason)
        if entry not in heard:
            heard.append(entry)


@contextlib.contextmanager
def listen() -> Iterator[list[Declined]]:
    """Collect what passes decline inside the block."""
    heard: list[Declined] = []
    token = _listener.set(heard)
    try:
        yield heard
    finally:
        _listener.reset(token)
