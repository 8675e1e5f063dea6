"""Checks and sizes of `scaled_grouped_mm`."""

from __future__ import annotations

import torch

from .checks import check_device, fail, is_int

OP = "grouped_mm"
ROW = torch.float8_e4m3fn
WIDTH = 16
"""What the kernel wants both sizes of a matrix to be a multiple of."""


def check_scaled_grouped_mm(
    rows: torch.Tensor,
    weight: torch.Tensor,
    expert_ends: torch.Tensor,
    row_scales: torch.Tensor,
    weight_scales: torch.Tensor,
) -> None:
    """The same on every device: what runs on a CPU runs on a GPU."""
    if rows.dim() != 2 or weight.dim() != 3 or rows.dtype != ROW or weight.dtype != ROW:
        got = f"{rows.dtype} {tuple(rows.shape)} and {weight.dtype} {tuple(weight.shape)}"
        remedy = "take rows of epops.dispatch_quant(…, block=0), and a weight of epops.quantize(…, block=0), transposed"
        fail(OP, "rows, weight", f"{ROW} (C, in) and (L, in, out) beside scales", got, remedy)
    if is_int(rows.shape[1]) and is_int(weight.shape[1]) and rows.shape[1] != weight.shape[1]:
        fail(OP, "weight", f"in = {rows.shape[1]} as rows", weight.shape[1], "transpose the weight")
    if weight.shape[1] % WIDTH or weight.shape[2] % WIDTH:
        fail(
            OP, "weight", f"in and out multiples of {WIDTH}", tuple(weight.shape[1:]), "pad the weight, or use bfloat16"
        )
    if weight.stride(1) != 1:
        remedy = "quantize it as (L, out, in) and pass weight.transpose(1, 2)"
        fail(OP, "weight", "the values of one output beside each other in memory", f"strides {weight.stride()}", remedy)
    if expert_ends.dtype != torch.int32 or tuple(expert_ends.shape) != (weight.shape[0],):
        got = f"{expert_ends.dtype} {tuple(expert_ends.shape)}"
        fail(OP, "expert_ends", f"int32 ({weight.shape[0]},)", got, "pass expert_ends of the dispatch")
    wanted = (
        ("row_scales", row_scales, (rows.shape[0],)),
        ("weight_scales", weight_scales, (weight.shape[0], weight.shape[2])),
    )
    for name, scales, shape in wanted:
        if scales.dtype != torch.float32 or tuple(scales.shape) != shape:
            remedy = "quantize with block=0 and float32 scales: one a row, and one an output of each expert"
            fail(OP, name, f"float32 {shape}", f"{scales.dtype} {tuple(scales.shape)}", remedy)
    check_device(OP, rows, weight=weight, expert_ends=expert_ends, row_scales=row_scales, weight_scales=weight_scales)


def scaled_grouped_mm(
    rows: torch.Tensor,
    weight: torch.Tensor,
    expert_ends: torch.Tensor,
    row_scales: torch.Tensor,
    weight_scales: torch.Tensor,
) -> torch.Tensor:
    check_scaled_grouped_mm(rows, weight, expert_ends, row_scales, weight_scales)
    return rows.new_empty(rows.shape[0], weight.shape[2], dtype=torch.bfloat16)
