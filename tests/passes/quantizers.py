"""fp8 quantizers as people write them: each takes rows (…, H) and returns fp8 rows and scales."""

from __future__ import annotations

import importlib.util

import torch

import epops

if importlib.util.find_spec("einops"):
    from einops import rearrange, reduce

FP8 = torch.float8_e4m3fn
TOP = 448.0


def blocks_of_128(x):
    """The spelling of fine-grained fp8 GEMM libraries: eps on amax, multiply by the inverse."""
    tokens, hidden = x.shape
    view = x.view(tokens, -1, 128)
    amax = view.abs().float().amax(dim=2).view(tokens, -1).clamp(1e-4)
    scale = amax / TOP
    return (view * (1.0 / scale.unsqueeze(2))).to(FP8).view(tokens, hidden), scale


def blocks_of_128_powers_of_two(x):
    """The same with scales rounded up to powers of two by their bits."""
    tokens, hidden = x.shape
    view = x.view(tokens, -1, 128)
    scale = view.abs().float().amax(dim=2).view(tokens, -1).clamp(1e-4) / TOP
    bits = scale.abs().float().view(torch.int)
    exponent = ((bits >> 23) & 0xFF) + (bits & 0x7FFFFF).bool().int()
    scale = (exponent.clamp(1, 254) << 23).view(torch.float)
    return (view * (1.0 / scale.unsqueeze(2))).to(FP8).view(tokens, hidden), scale


def per_token(x):
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-10) / TOP
    return (x.float() / scale).clamp(-TOP, TOP).to(FP8), scale


def per_token_scaled(x):
    """A reciprocal as Python divides by a tensor."""
    inverse = TOP / x.float().abs().amax(-1, keepdim=True).clamp(min=1e-12)
    return (x * inverse).clamp(-TOP, TOP).to(FP8), inverse.reciprocal()


def per_token_in_float64(x):
    """The dynamic row-wise quantizer of torchao's float8 training."""
    amax = torch.amax(torch.abs(x.abs().float()), dim=-1, keepdim=True).to(torch.float64)
    inverse = (TOP / torch.clamp(amax, min=1e-12)).to(torch.float32)
    return (x * inverse).clamp(min=-TOP, max=TOP).to(FP8), inverse.reciprocal()


def repeated_scales(x):
    """Blocks by repeat_interleave, no eps, no clamp."""
    scale = x.reshape(-1, x.shape[-1] // 128, 128).abs().amax(-1).float() / TOP
    return (x / scale.repeat_interleave(128, -1)).to(FP8), scale


def log2_of_a_minimum(x):
    """Powers of two by log2, eps on the scale by maximum, UE8M0 out, unflatten and flatten."""
    wide = x.float().unflatten(-1, (-1, 64))
    scale = torch.maximum(wide.abs().max(-1, keepdim=True)[0] / TOP, torch.tensor(1e-8))
    scale = torch.pow(2, torch.ceil(torch.log2(scale)))
    return torch.clip(wide / scale, -TOP, TOP).flatten(-2).to(FP8), scale.squeeze(-1).to(torch.float8_e8m0fnu)


def aten_spelling(x):
    aten = torch.ops.aten
    wide = aten._to_copy.default(x, dtype=torch.float32)
    amax = aten.unsqueeze.default(aten.amax.default(aten.abs.default(wide), [1]), 1)
    scale = aten.div.Tensor(aten.clamp_min.default(amax, 1e-6), 448)
    return aten._to_copy.default(aten.clamp.default(aten.div.Tensor(wide, scale), -448, 448), dtype=FP8), scale


def of_the_amax_twice(x):
    """Rows by a reciprocal, scales by a quotient: what is returned is not the inverse of what was multiplied by."""
    tokens, hidden = x.shape
    view = x.view(tokens, -1, 128)
    amax = view.abs().float().amax(dim=2).view(tokens, -1).clamp(1e-4)
    return (view * (TOP / amax.unsqueeze(2))).to(FP8).view(tokens, hidden), (amax / TOP).view(tokens, -1)


def eps_in_the_dtype_of_the_rows(x):
    groups = x.reshape(-1, 128)
    amax = groups.abs().max(dim=-1, keepdim=True)[0].clamp(min=1e-10).to(torch.float32)
    scale = amax / TOP
    rows = (groups / scale).clamp(min=-TOP, max=TOP).to(FP8)
    return rows.reshape(x.shape), scale.reshape(*x.shape[:-1], -1)


def magnitude_in_the_rows_dtype(x):
    """A limit that is a number of bfloat16 too."""
    amax = x.abs().amax(dim=-1, keepdim=True).clamp(min=2.0**-20).to(torch.float32)
    scale = amax / TOP
    return (x.float() / scale).clamp(-TOP, TOP).to(FP8), scale


def max_of_dim(x):
    scale = torch.max(torch.abs(x.float()), dim=-1)[0].unsqueeze(-1).clamp(1e-12) / TOP
    return (x.float() / scale).clamp(-TOP, TOP).to(FP8), scale


def infinity_norm(x):
    scale = torch.linalg.vector_norm(x.float(), float("inf"), -1, keepdim=True).clamp_min(1e-6).div(TOP)
    return x.float().div(scale).clamp_max(TOP).clamp_min(-TOP).to(FP8), scale


def both_ends(x):
    low, high = x.float().aminmax(dim=-1, keepdim=True)
    scale = torch.maximum(-low, high).clamp(min=1e-6) / TOP
    return torch.nn.functional.hardtanh(x.float() / scale, -TOP, TOP).to(FP8), scale


def magnitudes_of_both_ends(x):
    wide = x.float()
    scale = torch.maximum(wide.amin(-1, keepdim=True).abs(), wide.amax(-1, keepdim=True).abs()) / torch.tensor(TOP)
    limits = torch.finfo(FP8)
    return torch.clamp(wide / scale, min=limits.min, max=limits.max).to(FP8), scale


def bounds_as_tensors(x):
    scale = torch.maximum(x.float().abs().amax(-1, keepdim=True), torch.full((1,), 1e-4)) / TOP
    return torch.minimum(torch.maximum(x.float() / scale, torch.tensor(-TOP)), torch.tensor(TOP)).to(FP8), scale


def multiplied_by_the_reciprocal(x):
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-4).true_divide(TOP)
    return (x.float() * scale.reciprocal()).to(FP8), scale


def e5m2(x):
    top = torch.finfo(torch.float8_e5m2).max
    scale = x.float().abs().amax(-1, keepdim=True) / top
    return (x.float() / scale).clamp(-top, top).to(torch.float8_e5m2), scale


def of_einops(x):
    wide = rearrange(x, "t (b c) -> t b c", c=128).float()
    scale = reduce(wide.abs(), "t b c -> t b 1", "max").clamp(1e-4) / TOP
    return rearrange((wide / scale).to(FP8), "t b c -> t (b c)"), scale[..., 0]


def of_epops(x):
    return epops.quantize(x, scale_format="ue8m0")


def of_epops_padded(x):
    return epops.quantize(x, block=96, scale_math="reciprocal")


KNOWN = {
    blocks_of_128: {
        "block": 128,
        "scale_math": "multiply",
        "scale_format": "float32",
        "eps_on": "amax",
        "clamp": False,
    },
    blocks_of_128_powers_of_two: {
        "block": 128,
        "scale_math": "multiply",
        "scale_format": "float32_pow2",
        "clamp": False,
    },
    per_token: {"block": 0, "scale_math": "divide", "scale_format": "float32", "eps_on": "amax", "clamp": True},
    per_token_scaled: {"block": 0, "scale_math": "reciprocal", "scale_format": "float32", "clamp": True},
    per_token_in_float64: {"block": 0, "scale_math": "reciprocal_exact", "scale_format": "float32", "clamp": True},
    repeated_scales: {"block": 128, "scale_math": "divide", "eps": 0.0, "clamp": False},
    of_the_amax_twice: {"block": 128, "scale_math": "reciprocal_amax", "scale_format": "float32", "clamp": False},
    eps_in_the_dtype_of_the_rows: {"block": 128, "scale_math": "divide", "eps_on": "amax", "clamp": True},
    magnitude_in_the_rows_dtype: {"block": 0, "scale_math": "divide", "eps_on": "amax", "clamp": True},
    log2_of_a_minimum: {
        "block": 64,
        "scale_math": "divide_log2",
        "scale_format": "ue8m0",
        "eps_on": "scale",
        "clamp": True,
    },
    aten_spelling: {"block": 0, "scale_math": "divide", "clamp": True},
    max_of_dim: {"block": 0, "scale_math": "divide", "eps_on": "amax", "clamp": True},
    infinity_norm: {"block": 0, "scale_math": "divide", "eps_on": "amax", "clamp": True},
    both_ends: {"block": 0, "scale_math": "divide", "eps_on": "amax", "clamp": True},
    magnitudes_of_both_ends: {"block": 0, "scale_math": "divide", "eps": 0.0, "clamp": True},
    bounds_as_tensors: {"block": 0, "scale_math": "divide", "eps_on": "amax", "clamp": True},
    multiplied_by_the_reciprocal: {"block": 0, "scale_math": "multiply", "eps_on": "amax", "clamp": False},
    e5m2: {"block": 0, "quant_dtype": torch.float8_e5m2, "clamp": True},
    of_epops: {"block": 128, "scale_math": "divide", "scale_format": "ue8m0", "clamp": True},
    of_epops_padded: {"block": 96, "scale_math": "reciprocal", "clamp": True},
}
"""What `fuse_quant` has to read out of each."""

if importlib.util.find_spec("einops"):
    KNOWN[of_einops] = {"block": 128, "scale_math": "divide", "eps_on": "amax", "clamp": False}


# ---- near misses: arithmetic that the op does not have ---------------------------------------------------------------


def in_bfloat16(x):
    scale = x.bfloat16().abs().amax(-1, keepdim=True) / TOP
    return (x.bfloat16() / scale).to(FP8), scale.float()


def by_the_product_with_an_inverse_constant(x):
    scale = x.float().abs().amax(-1, keepdim=True) * (1 / TOP)
    return (x.float() / scale).to(FP8), scale


def to_another_top(x):
    scale = x.float().abs().amax(-1, keepdim=True) / 240.0
    return (x.float() / scale).clamp(-TOP, TOP).to(FP8), scale


def clamped_on_one_side(x):
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-6) / TOP
    return (x.float() / scale).clamp(max=TOP).to(FP8), scale


def of_a_whole_tensor(x):
    scale = x.float().abs().amax() / TOP
    return (x.float() / scale).to(FP8), scale.expand(x.shape[0], 1).contiguous()


def of_columns(x):
    scale = x.float().abs().amax(0, keepdim=True) / TOP
    return (x.float() / scale).to(FP8), scale.expand(x.shape[0], -1).contiguous()


def of_the_mean(x):
    scale = x.float().abs().mean(-1, keepdim=True) / TOP
    return (x.float() / scale).clamp(-TOP, TOP).to(FP8), scale


def of_the_maximum_without_abs(x):
    scale = x.float().amax(-1, keepdim=True) / TOP
    return (x.float() / scale).clamp(-TOP, TOP).to(FP8), scale


def rounded_down(x):
    scale = torch.exp2(torch.floor(torch.log2(x.float().abs().amax(-1, keepdim=True) / TOP)))
    return (x.float() / scale).clamp(-TOP, TOP).to(FP8), scale


def two_eps(x):
    scale = (x.float().abs().amax(-1, keepdim=True).clamp(min=1e-4) / TOP).clamp(min=1e-5)
    return (x.float() / scale).to(FP8), scale


def scaled_twice(x):
    scale = x.float().abs().amax(-1, keepdim=True) / TOP
    return (x.float() * 2 / scale).clamp(-TOP, TOP).to(FP8), scale


def other_scales_returned(x):
    rows, scale = per_token(x)
    return rows, scale * 2


def both_ends_without_eps(x):
    """A block of zeros has the scale -0 here, and 0 in the op."""
    low, high = x.float().aminmax(dim=-1, keepdim=True)
    scale = torch.maximum(-low, high) / TOP
    return (x.float() / scale).to(FP8), scale


def sum_of_both_ends(x):
    scale = (x.float().amax(-1, keepdim=True) - x.float().amin(-1, keepdim=True)) / TOP
    return (x.float() / scale).clamp(-TOP, TOP).to(FP8), scale


def one_where_zero(x):
    scale = x.float().abs().amax(-1, keepdim=True) / TOP
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (x.float() / scale).to(FP8), scale


def of_blocks_that_are_shifted(x):
    scale = x.float().roll(1, -1).unflatten(-1, (-1, 128)).abs().amax(-1) / TOP
    return (x.float() / scale.repeat_interleave(128, -1)).clamp(-TOP, TOP).to(FP8), scale


def blocks_spread_by_the_wrong_width(x):
    """Scales of 128 channels, given in turn to one channel each."""
    scale = x.float().unflatten(-1, (-1, 128)).abs().amax(-1) / TOP
    return (x.float() / scale.repeat(1, 128)).clamp(-TOP, TOP).to(FP8), scale


def rounded_before_the_cast(x):
    scale = x.float().abs().amax(-1, keepdim=True) / TOP
    return (x.float() / scale).round().clamp(-TOP, TOP).to(FP8), scale


def by_way_of_bfloat16(x):
    scale = x.float().abs().amax(-1, keepdim=True) / TOP
    return (x.float() / scale).bfloat16().clamp(-TOP, TOP).to(FP8), scale


def of_other_rows(x):
    scale = x.float().relu().amax(-1, keepdim=True).clamp(min=1e-6) / TOP
    return (x.float() / scale).clamp(-TOP, TOP).to(FP8), scale


def scales_in_bfloat16(x):
    scale = (x.float().abs().amax(-1, keepdim=True) / TOP).bfloat16().float()
    return (x.float() / scale).clamp(-TOP, TOP).to(FP8), scale


def clamped_to_less(x):
    scale = x.float().abs().amax(-1, keepdim=True) / TOP
    return (x.float() / scale).clamp(-447.0, 447.0).to(FP8), scale


def eps_added(x):
    scale = (x.float().abs().amax(-1, keepdim=True) + 1e-6) / TOP
    return (x.float() / scale).clamp(-TOP, TOP).to(FP8), scale


def scales_of_the_neighbours(x):
    scale = x.float().abs().amax(-1, keepdim=True) / TOP
    return (x.float() / scale.roll(1, 0)).clamp(-TOP, TOP).to(FP8), scale.roll(1, 0)


def magnitude_of_the_exponent(x):
    scale = torch.exp2((x.float().abs().amax(-1, keepdim=True).clamp(1e-4) / TOP).log2().ceil().abs())
    return (x.float() / scale).clamp(-TOP, TOP).to(FP8), scale


def magnitude_of_the_logarithm(x):
    scale = torch.exp2((x.float().abs().amax(-1, keepdim=True).clamp(1e-4) / TOP).log2().abs().ceil())
    return (x.float() / scale).clamp(-TOP, TOP).to(FP8), scale


def limited_by_nan(x):
    """What a kernel makes of such a limit is its own business."""
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=float("nan")) / TOP
    return (x.float() / scale).clamp(-TOP, TOP).to(FP8), scale


UNKNOWN = [
    magnitude_of_the_exponent,
    magnitude_of_the_logarithm,
    limited_by_nan,
    both_ends_without_eps,
    sum_of_both_ends,
    one_where_zero,
    of_blocks_that_are_shifted,
    blocks_spread_by_the_wrong_width,
    rounded_before_the_cast,
    by_way_of_bfloat16,
    of_other_rows,
    scales_in_bfloat16,
    clamped_to_less,
    eps_added,
    scales_of_the_neighbours,
    in_bfloat16,
    by_the_product_with_an_inverse_constant,
    to_another_top,
    clamped_on_one_side,
    of_a_whole_tensor,
    of_columns,
    of_the_mean,
    of_the_maximum_without_abs,
    rounded_down,
    two_eps,
    scaled_twice,
]
