"""Which formulas over rows are quantizers that `epops.dispatch_quant` has, and what they are in its words."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from .quant_terms import AMAX, ENDS, Expr, Term, X


class Quantizer(NamedTuple):
    """A quantizer in the words of `epops.dispatch_quant`, and the formula of the scale that it returns."""

    quant_dtype: torch.dtype
    block: int
    scale_format: str
    scale_math: str
    eps_on: str
    eps: float
    clamp: bool
    scale: Expr


class Unknown(Exception):
    """A formula that is none of the quantizers that the op has; the text says what is different."""


def recognize(term: Term, hidden: Any) -> Quantizer:
    """The quantizer whose fp8 rows a term is; `Unknown` says why it is none."""
    if term.expr[0] != "fp8":
        raise Unknown("it does not end in a cast to fp8")
    _, expr, dtype = term.expr
    top = torch.finfo(dtype).max
    expr, clamp = _strip_clamp(expr, top)
    if expr[0] not in ("div", "mul") or expr[1] != X:
        raise Unknown("the rows are not x / scale or x * (1 / scale) in float32")
    if not isinstance(term.width, int) or not isinstance(hidden, int) or term.width < 1:
        raise Unknown("the size of its blocks is symbolic")
    if not isinstance(term.padding, int) or (hidden + term.padding) % term.width or term.padding >= term.width:
        raise Unknown(f"blocks of {term.width} channels do not divide rows of {hidden}")
    factor = expr[2]
    if term.padding and term.row != hidden:
        raise Unknown(f"what it lengthens are parts of {term.row} channels, not the rows of {hidden}")
    block = 0 if term.width == hidden else term.width
    if expr[0] == "div":
        math_word, scale = "divide", factor
    elif factor[0] == "recip" and factor[2] == torch.float32:
        math_word, scale = "multiply", factor[1]
    else:
        math_word, eps = _read_reciprocal(factor, top)
        scale = ("recip", factor, torch.float32)
        return Quantizer(dtype, block, "float32", math_word, "amax", eps, clamp, scale)
    scale_format, rounding, eps_on, eps = _read_scale(scale, top)
    return Quantizer(dtype, block, scale_format, math_word + rounding, eps_on, eps, clamp, scale)


def variants(found: Quantizer) -> tuple[Quantizer, ...]:
    """A quantizer, and those with the same rows but scales by another formula."""
    if found.scale_math != "reciprocal":
        return (found,)
    _, (_, (_, amax, _), top, dtype), _ = found.scale
    return found, found._replace(scale_math="reciprocal_amax", scale=("div", amax, top, dtype))


def _strip_clamp(expr: Expr, top: float) -> tuple[Expr, bool]:
    bounds = {}
    while expr[0] in ("max", "min"):
        if expr[0] in bounds:
            raise Unknown("it clamps the rows twice")
        bounds[expr[0]] = expr[2]
        expr = expr[1]
    if bounds and bounds != {"max": -top, "min": top}:
        raise Unknown(f"it clamps the rows to other bounds than ±{top:g}")
    return expr, bool(bounds)


def _read_amax(expr: Expr) -> float | None:
    """The eps of ``max(amax, eps)``; None for the bare amax."""
    if expr == AMAX:
        return None
    if expr[0] == "max" and (expr[1] == AMAX or (expr[1] == ENDS and expr[2] > 0)):
        return float(expr[2])
    if expr == ENDS:
        raise Unknown("the scale of a block of zeros would be -0, the op has 0")
    raise Unknown("what it scales by is not the largest magnitude of a block")


def _read_reciprocal(expr: Expr, top: float) -> tuple[str, float]:
    """``top / max(amax, eps)`` of a tensor amax: in float32 (the reciprocal, then the product) or rounded once from float64.

    Returns the ``scale_math`` and the eps.
    """
    unknown = Unknown("the factor of the rows is none of 1 / scale and top / amax")
    dtype = torch.float32
    if expr[0] == "to" and expr[2] == torch.float32:
        expr, dtype = expr[1], torch.float64
    if expr[0] == "rdiv" and expr[2:] == (top, dtype):
        amax, math_word = expr[1], "reciprocal_exact"
    elif expr[0] == "mul" and expr[2:] == (top, dtype) and expr[1][0] == "recip" and expr[1][2] == dtype:
        amax, math_word = expr[1][1], "reciprocal" if dtype == torch.float32 else "reciprocal_exact"
    else:
        raise unknown
    eps = _read_amax(amax)
    if eps is None or dtype == torch.float32:
        return math_word, 0.0 if eps is None else eps
    # The graph limits amax in float64, the op in float32: take the float32 beside eps that gives the same factor.
    want = torch.tensor(top / eps, dtype=torch.float64).float()
    near = torch.tensor(eps, dtype=torch.float32)
    for candidate in (near, *(torch.nextafter(near, torch.tensor(end)) for end in (0.0, math.inf))):
        if (candidate.double().reciprocal() * top).float() == want and abs(float(candidate) - eps) <= eps * 2.0**-23:
            return math_word, float(candidate)
    raise unknown


def _read_scale(expr: Expr, top: float) -> tuple[str, str, str, float]:
    """Format, rounding, eps_on and eps of ``round(max(max(amax, eps) / top, eps))``; at most one of the two eps."""
    scale_format, rounding = "float32", ""
    if expr[0] == "exp2":
        inner = expr[1]
        if (
            inner[0] != "ceil"
            or inner[1][0] != "log2"
            or any(part[2] != torch.float32 for part in (expr, inner, inner[1]))
        ):
            raise Unknown("its scales are powers of two by another rule than 2 ** ceil(log2(scale)) in float32")
        scale_format, rounding, expr = "float32_pow2", "_log2", inner[1][1]
    elif expr[0] == "as":
        scale_format, expr = "float32_pow2", _read_bits(expr)
    on_scale = None
    if expr[0] == "max" and expr[1] not in (AMAX, ENDS):
        on_scale, expr = float(expr[2]), expr[1]
    if expr[0] != "div" or expr[2] != top or expr[3] != torch.float32:
        raise Unknown(f"its scale is not amax / {top:g} in float32")
    on_amax = _read_amax(expr[1])
    if on_amax is not None and on_scale is not None:
        raise Unknown("it has an eps for amax and another for the scale")
    if on_scale is not None:
        return scale_format, rounding, "scale", on_scale
    return scale_format, rounding, "amax", 0.0 if on_amax is None else on_amax


def _read_bits(expr: Expr) -> Expr:
    """The scale inside the exponent arithmetic of rounding up to a power of two, as `reference.quantize` does it."""
    try:
        scale = expr[1][1][1][1]
        while scale[0] != "as":
            scale = next(part for part in scale[1:] if isinstance(part, tuple))
    except (IndexError, TypeError, StopIteration):
        raise Unknown("its scales are rounded in a way that epops does not know") from None
    if expr != ceil_bits(scale[1]):
        raise Unknown("its scales are rounded in a way that epops does not know")
    return scale[1]


def ceil_bits(scale: Expr) -> Expr:
    """Term of a float32 ``scale`` rounded up to a power of two by its bits, exponents 1 … 254."""
    i32 = torch.int32
    bits = ("as", scale, i32)
    exponent = ("and", ("shr", bits, 23.0, i32), 255.0, i32)
    fraction = ("to", ("ne", ("and", bits, 8388607.0, i32), 0.0), i32)
    total = ("add", *sorted((exponent, fraction), key=repr))
    return ("as", ("shl", ("min", ("max", total, 1.0), 254.0), 23.0, i32), torch.float32)
