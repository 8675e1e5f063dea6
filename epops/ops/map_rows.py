"""`map_rows`: a pointwise computation over the received rows that there are, not over the room for them.

A pass makes it (`passes/skip_padding.py`), so it has no public function and no gradient: gradients are nodes of the graph already.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..meta import map_rows as fakes
from ..reference.map_rows import map_rows as reference
from .registry import bind
from .row_kernel import launch


def _map_rows(inputs: Sequence[torch.Tensor], expert_ends: torch.Tensor, *, program: str) -> list[torch.Tensor]:
    fakes.check_map_rows(inputs, expert_ends, program)
    if expert_ends.device.type == "cpu":
        return reference(inputs, expert_ends, program=program)
    return launch(inputs, expert_ends, program)


bind("map_rows", _map_rows, fakes.map_rows)
