"""fp8 rows and their scales as rows of bytes, which one exchange moves."""

from __future__ import annotations

from typing import Any

import torch

WHOLE = 16
"""Packed rows are a multiple of this many bytes, so that kernels move them in their largest steps."""


def pack(rows: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """(T, H) fp8 and (T, blocks) scales as (T, W) bytes: the scales, the rows, and zeros up to a multiple of `WHOLE`."""
    # A copy, for a quotient of no rows may have a stride of 0, which is no view of bytes.
    parts = scales.clone(memory_format=torch.contiguous_format).view(torch.uint8), rows.view(torch.uint8)
    used = parts[0].shape[1] + parts[1].shape[1]
    return torch.cat([*parts, rows.new_zeros((rows.shape[0], -used % WHOLE), dtype=torch.uint8)], dim=1)


def unpack(
    packed: torch.Tensor, hidden: Any, blocks: Any, row_dtype: torch.dtype, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(…, H) rows and (…, blocks) scales of what `pack` made, in tensors of their own."""
    width = blocks * scale_dtype.itemsize
    rows = packed.narrow(-1, width, hidden).clone(memory_format=torch.contiguous_format).view(row_dtype)
    scales = packed.narrow(-1, 0, width).clone(memory_format=torch.contiguous_format)
    if scale_dtype != torch.float8_e8m0fnu:
        return rows, scales.view(scale_dtype)
    # Inductor writes no code that takes bytes for UE8M0, but it casts to it.
    return rows, powers_of_two(scales).to(scale_dtype)


def powers_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """Float32 numbers of bytes of UE8M0; infinity in place of its NaN, which a cast makes of it again.

    >>> powers_of_two(torch.tensor([0, 127, 128, 255], dtype=torch.uint8)).tolist()
    [5.877471754111438e-39, 1.0, 2.0, inf]
    """
    return torch.where(exponents == 0, 1 << 22, exponents.to(torch.int32) << 23).view(torch.float32)
