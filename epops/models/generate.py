"""Generation over ranks."""

from __future__ import annotations

from typing import Any

from torch import nn


def synchronize_generate(model: nn.Module, group: Any) -> None:
    """Make ``generate`` stop when all ranks have."""
