"""What `scaled_grouped_mm` means: products of fp8 rows and fp8 matrices, multiplied by what both were divided by."""

from __future__ import annotations

import torch


def scaled_grouped_mm(
    rows: torch.Tensor,
    weight: torch.Tensor,
    expert_ends: torch.Tensor,
    row_scales: torch.Tensor,
    weight_scales: torch.Tensor,
) -> torch.Tensor:
    """(C, out) bfloat16: rows of expert e times ``weight[e]`` in float32, times ``row_scales`` (C,) and ``weight_scales[e]``.

    >>> rows = torch.tensor([[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]]).to(torch.float8_e4m3fn)
    >>> weight = torch.tensor([[[1.0], [1.0]]]).to(torch.float8_e4m3fn)
    >>> ends, scales = torch.tensor([2], dtype=torch.int32), torch.tensor([10.0, 1.0, 1.0])
    >>> scaled_grouped_mm(rows, weight, ends, scales, torch.tensor([[2.0]])).tolist()
    [[60.0], [14.0], [0.0]]
    """
    out = rows.new_zeros(rows.shape[0], weight.shape[2], dtype=torch.bfloat16)
    start = 0
    for expert, end in enumerate(expert_ends.tolist()):
        end = min(end, rows.shape[0])
        if end > start:
            product = rows[start:end].float() @ weight[expert].float()
            out[start:end] = product * row_scales[start:end, None] * weight_scales[expert]
            start = end
    return out
