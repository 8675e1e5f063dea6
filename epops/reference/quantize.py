"""The quantizer of the quantizing dispatch: fp8 rows with one scale a token or a block of channels."""

from __future__ import annotations

import torch

EPS_ON = ("amax", "scale")


def quantize_rows(
    x: torch.Tensor,
    *,
    quant_dtype: torch.dtype = torch.float8_e4m3fn,
    block: int = 128,
    scale_format: str = "float32",
    scale_math: str = "divide",
    eps_on: str = "amax",
    eps: float = 1e-12,
    clamp: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each row of ``x`` (T, H), ``block`` channels to a scale (0: the whole row).

    Arithmetic in float32, with ``top`` the largest finite value of ``quant_dtype`` and a = max |x| over the block, raised to
    ``eps`` when ``eps_on`` is "amax"; ``scale_math`` as in `layout.SCALE_MATHS`.  ``eps_on`` "scale" raises s to ``eps``.  The
    formats ``ue8m0`` and ``float32_pow2`` round s up to a power of two before q is computed.  ``clamp`` limits q to ±top before
    the cast, which rounds to nearest even.

    Returns (T, H) ``quant_dtype`` and (T, H / block rounded up) scales: float32, or ``torch.float8_e8m0fnu`` for ``ue8m0``.

    >>> q, s = quantize_rows(torch.tensor([[448.0, -224.0]]), block=0)
    >>> q.float().tolist(), s.tolist()
    ([[448.0, -224.0]], [[1.0]])
    """
    top = torch.finfo(quant_dtype).max
    tokens, hidden = x.shape
    width = hidden if block == 0 else block
    blocks = 1 if block == 0 else -(-hidden // block)
    wide = x.float()
    if blocks * width != hidden:
        wide = torch.nn.functional.pad(wide, (0, blocks * width - hidden))
    wide = wide.reshape(tokens, blocks, width)
    amax = wide.abs().amax(dim=-1) if width else wide.new_zeros(tokens, blocks)
    if eps_on == "amax":
        amax = amax.clamp(min=eps)
    inverse = None
    if scale_math in ("reciprocal", "reciprocal_amax"):
        inverse = amax.reciprocal() * top
    elif scale_math == "reciprocal_exact":
        inverse = (amax.double().reciprocal() * top).float()
    scale = amax / top if inverse is None or scale_math == "reciprocal_amax" else inverse.reciprocal()
    if eps_on == "scale":
        scale = scale.clamp(min=eps)
        inverse = None if inverse is None else scale.reciprocal()
    if scale_format != "float32":
        by_log2 = scale_math.endswith("_log2")
        scale = torch.exp2(torch.ceil(torch.log2(scale))) if by_log2 else ceil_to_power_of_two(scale)
        inverse = None if inverse is None else scale.reciprocal()
    if scale_math.startswith("divide"):
        quotient = wide / scale.unsqueeze(-1)
    else:
        quotient = wide * (scale.reciprocal() if inverse is None else inverse).unsqueeze(-1)
    if clamp:
        quotient = quotient.clamp(-top, top)
    rows = quotient.reshape(tokens, blocks * width)[:, :hidden].to(quant_dtype)
    if scale_format == "ue8m0":
        scale = scale.to(torch.float8_e8m0fnu)
    return rows.contiguous(), scale


def ceil_to_power_of_two(scale: torch.Tensor) -> torch.Tensor:
    """Smallest power of two that is at least ``scale`` (positive float32), within the range of UE8M0 (2^-127 … 2^127)."""
    bits = scale.contiguous().view(torch.int32)
    exponent = (bits >> 23) & 0xFF
    exponent = exponent + ((bits & 0x7FFFFF) != 0).to(torch.int32)
    exponent = exponent.clamp(1, 254)
    return (exponent << 23).view(torch.float32)


def dequantize_rows(rows: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Float32 values of ``rows`` (…, H) with ``scales`` (…, number of blocks); blocks are H / number of blocks rounded up."""
    if scales.numel() == 0 or rows.numel() == 0:
        return rows.float()
    hidden = rows.shape[-1]
    blocks = scales.shape[-1]
    width = -(-hidden // blocks)
    if blocks > 1 and hidden % blocks:
        width = next(w for w in (32, 64, 128, 256, width) if -(-hidden // w) == blocks)
    factor = scales.float().repeat_interleave(width, dim=-1)[..., :hidden]
    return rows.float() * factor
