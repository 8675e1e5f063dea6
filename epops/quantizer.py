"""`quantize`: fp8 rows with scales in plain torch, the spelling that the compiler is sure to fuse into a dispatch."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .reference.quantize import dequantize_rows, quantize_rows


class Quantized(NamedTuple):
    """``rows`` (…, H) fp8 and ``scales`` (…, H / block rounded up), one scale a row when ``block`` is 0."""

    rows: torch.Tensor
    scales: torch.Tensor


def quantize(
    x: torch.Tensor,
    *,
    block: int = 128,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale_format: str = "float32",
    scale_math: str = "divide",
    eps_on: str = "amax",
    eps: float = 1e-12,
    clamp: bool = True,
) -> Quantized:
    """Quantize each row of ``x`` (…, H) to fp8, ``block`` channels to a scale; ``block=0``: one scale a row.

    Compiled with ``backend="epops"``, ``quantize`` of the rows of a dispatch, or of the rows that go into one, becomes part of
    the exchange: fp8 and scales cross the wire, with the same bits.  Arguments as in `epops.dispatch_quant`; the arithmetic is
    that of `reference.quantize.quantize_rows`.

    Raises:
        ValueError: ``x`` is not a float tensor, or has no dimension.

    >>> rows, scales = quantize(torch.tensor([[448.0, -224.0]]), block=0)
    >>> rows.float().tolist(), scales.tolist()
    ([[448.0, -224.0]], [[1.0]])
    """
    if not x.is_floating_point() or x.dim() < 1:
        raise ValueError(
            f"epops.quantize: x: expected float rows (…, H), got {x.dtype} of shape {tuple(x.shape)}; pass the rows before "
            "they are cast"
        )
    flat = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
    rows, scales = quantize_rows(
        flat,
        quant_dtype=dtype,
        block=block,
        scale_format=scale_format,
        scale_math=scale_math,
        eps_on=eps_on,
        eps=eps,
        clamp=clamp,
    )
    if x.dim() == 2:
        return Quantized(rows, scales)
    return Quantized(rows.reshape(x.shape), scales.reshape(*x.shape[:-1], scales.shape[-1]))


def dequantize(rows: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Float32 values of quantized ``rows`` (…, H)."""
    return dequantize_rows(rows, scales)
