"""Loops over uneven data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def join(model: nn.Module, group: Any, optimizer: Any = None) -> Iterator[None]:
    """Keep serving until all ranks are done."""
    yield
