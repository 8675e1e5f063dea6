"""`scaled_grouped_mm`: each expert's fp8 rows times its fp8 weight, for rows that a quantizing dispatch brought."""

from __future__ import annotations

import torch

from .. import torch_private
from ..meta import scaled_grouped_mm as fakes
from ..reference.scaled_grouped_mm import scaled_grouped_mm as reference
from .registry import bind


def scaled_grouped_mm(
    rows: torch.Tensor,
    weight: torch.Tensor,
    expert_ends: torch.Tensor,
    row_scales: torch.Tensor | None,
    weight_scales: torch.Tensor | None,
) -> torch.Tensor:
    """What `grouped_mm` does with scales; those that come as (…, 1), as quantizing with ``block=0`` gives them, lose that 1."""
    if row_scales is None or weight_scales is None:
        missing = "row_scales" if row_scales is None else "weight_scales"
        raise ValueError(f"epops.grouped_mm: {missing}: expected scales of both factors, got None; pass both or none")
    if row_scales.dim() == 2 and row_scales.shape[1] == 1:
        row_scales = row_scales[:, 0]
    if weight_scales.dim() == 3 and weight_scales.shape[2] == 1:
        weight_scales = weight_scales[..., 0]
    return torch.ops.epops.scaled_grouped_mm.default(rows, weight, expert_ends, row_scales, weight_scales)


def _scaled_grouped_mm(
    rows: torch.Tensor,
    weight: torch.Tensor,
    expert_ends: torch.Tensor,
    row_scales: torch.Tensor,
    weight_scales: torch.Tensor,
) -> torch.Tensor:
    fakes.check_scaled_grouped_mm(rows, weight, expert_ends, row_scales, weight_scales)
    if rows.device.type == "cpu":
        return reference(rows, weight, expert_ends, row_scales, weight_scales)
    given = (rows.contiguous(), weight, expert_ends, row_scales.contiguous(), weight_scales.contiguous())
    return torch_private.scaled_grouped_mm(*given)


bind("scaled_grouped_mm", _scaled_grouped_mm, fakes.scaled_grouped_mm)
