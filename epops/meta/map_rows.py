"""Shapes of `map_rows`: what its program says, with the rows of its inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..row_program import Program, parse
from .checks import check_device, fail

OP = "map_rows"


def check_map_rows(inputs: Sequence[torch.Tensor], expert_ends: torch.Tensor, program: str) -> Program:
    """The parsed program, to which the inputs fit."""
    parsed = parse(program)
    if len(inputs) != len(parsed.inputs) or not any(line.by_row for line in parsed.inputs):
        fail(OP, "inputs", f"{len(parsed.inputs)} tensors, one with rows at least", len(inputs), "pass what it names")
    capacity = next(x.shape[0] if x.dim() else 0 for x, line in zip(inputs, parsed.inputs) if line.by_row)
    for place, (x, line) in enumerate(zip(inputs, parsed.inputs)):
        wanted = (capacity, *line.columns) if line.by_row else line.columns
        if x.dtype != line.dtype or x.dim() != len(wanted) or any(a != b for a, b in zip(x.shape, wanted)):
            got = f"{x.dtype} {tuple(x.shape)}"
            fail(OP, f"inputs[{place}]", f"{line.dtype} {tuple(wanted)}", got, "pass what the program names")
    if expert_ends.dtype != torch.int32 or expert_ends.dim() != 1 or expert_ends.shape[0] == 0:
        got = f"{expert_ends.dtype} {tuple(expert_ends.shape)}"
        fail(OP, "expert_ends", "int32 (L,), L at least 1", got, "pass expert_ends of a dispatch in the expert layout")
    check_device(OP, expert_ends, **{f"inputs[{place}]": x for place, x in enumerate(inputs)})
    return parsed


def map_rows(inputs: Sequence[torch.Tensor], expert_ends: torch.Tensor, *, program: str) -> list[torch.Tensor]:
    parsed = check_map_rows(inputs, expert_ends, program)
    capacity = next(x.shape[0] for x, line in zip(inputs, parsed.inputs) if line.by_row)
    return [expert_ends.new_empty((capacity, *line.columns), dtype=line.dtype) for line in parsed.results]
