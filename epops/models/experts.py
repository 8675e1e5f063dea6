"""The internal contract of every adapter: ``(x, topk_idx, topk_weights) → y`` over the ranks of a group.

``exchange`` brings rows to their experts and results back; what runs on the rows in between is the caller's. The
pieces that such a computation is made of (`linear`, `bias`) take rows as they arrive: grouped by expert, not sorted again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import epops

from .autograd import scale_gradient
from .site import Site


class Rows(NamedTuple):
    """What arrived on this rank: (C, H) rows grouped by expert slot, and where the groups lie."""

    x: Tensor
    weights: Tensor
    """(C,) float32 router weights, 0 at padding."""
    expert: Tensor
    """(C,) slot of each row, -1 at padding."""
    ends: Tensor
    """(L,) int32 running ends of the groups."""
    scales: Tensor | None = None
    """(C, 1) float32 scales, where the rows are fp8 (`Site.quantized`)."""
    share: float = 1.0
    """What gradients of parameters are still to be multiplied by: rows' gradients were divided by a power of two only."""


def exchange(
    site: Site,
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    compute: Callable[[Rows], Tensor],
    *,
    weight_on: str = "output",
    loop: bool = False,
    shares: bool = False,
) -> Tensor:
    """Run ``compute`` on the rows of this rank's experts and sum its results back to the tokens.

    ``weight_on``: "output" multiplies results by the router weight while they are summed; "rows" leaves the weight to
    ``compute`` (which finds it in ``Rows.weights``), for models that weight an expert's input.  ``loop``: the model adds one
    expert after another to a result in ``x``'s dtype, so that weighted rows are rounded to it before they are added
    (where `Site.exact`).  ``shares``: ``compute`` reads parameters through `linear`, `bias` and `call_replicated` only, which
    multiply their gradients by `Rows.share`.  Rows' gradients are then never divided by a number of ranks that would round them,
    as 1 / 3 rounds bf16, and are the one-process model's; what is rounded once more are the gradients of parameters.
    """
    scale = site.power if shares else site.scale
    shape = x.shape
    x = x.reshape(-1, shape[-1])
    topk_idx = topk_idx.reshape(x.shape[0], -1)
    max_tokens = x.shape[0] if site.serving.padded else None
    settings: dict[str, Any] = {
        "group": site.group,
        "num_experts": site.num_experts,
        "num_slots": site.num_slots,
        "max_tokens": max_tokens,
        "grad_scale": scale,
    }
    given = (x, participating(site, topk_idx), topk_weights.reshape(topk_idx.shape).float())
    if site.quantized:
        _no_gradient(site, x)
        received = epops.dispatch_quant(*given, block=0, **settings)
    else:
        received = epops.dispatch(*given, **settings)
    weights = received.row_weights
    if weight_on == "rows":
        # These weights' gradient comes with the rows', which is the token's divided by the scale.
        weights = scale_gradient(weights, scale)
    rows = Rows(received.rows, weights, received.row_expert, received.expert_ends, received.scales, scale / site.scale)
    y = compute(rows)
    applied: Tensor | None = weights if weight_on == "output" else None
    if site.exact and applied is not None:
        wide = torch.promote_types(y.dtype, topk_weights.dtype)
        rounded = x.dtype if loop else wide
        if rounded != torch.float32:
            y = (y.to(wide) * scale_gradient(applied, scale).to(wide)[:, None]).to(rounded)
            applied = None
    combined = epops.combine(
        y,
        received.route,
        applied,
        group=site.group,
        num_experts=site.num_experts,
        num_slots=site.num_slots,
        max_tokens=max_tokens,
        num_tokens=x.shape[0],
        top_k=topk_idx.shape[1],
        out_dtype=torch.promote_types(x.dtype, torch.float32) if site.exact else x.dtype,
        grad_scale=1.0 / scale,
    )
    out = combined.out.to(x.dtype)
    return out.reshape(*shape[:-1], out.shape[-1])


def _no_gradient(site: Site, x: Tensor) -> None:
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError(
            f"epops experts {site.name!r}: expected inference, got tokens that require a gradient, and epops.quantize_experts made "
            "these experts fp8; run it under torch.no_grad(), or train the model that was not quantized"
        )


def participating(site: Site, topk_idx: Tensor) -> Tensor:
    """``topk_idx`` with -1 for tokens that do not take part: padding, or all of them on a rank that is only serving."""
    mask = site.serving.active
    token_mask = site.serving.group.token_mask
    if token_mask is not None:
        if token_mask.numel() != topk_idx.shape[0]:
            raise ValueError(
                f"epops experts {site.name!r}: the group's token_mask has {token_mask.numel()} entries but the layer got "
                f"{topk_idx.shape[0]} tokens; set group.token_mask to one entry a token of this batch, or to None"
            )
        mask = token_mask.reshape(-1, 1) & mask
    return torch.where(mask, topk_idx, -1)


def _autocast(rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype that autocast asks for, or the rows in the weight's: grouped GEMMs know nothing of autocast."""
    kind = rows.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    return rows.to(dtype), weight.to(dtype)


def linear(
    rows: Rows,
    x: Tensor,
    weight: Tensor,
    bias_of: Tensor | None = None,
    *,
    transposed: bool = False,
    fused: bool = False,
) -> Tensor:
    """``x @ weight[expert].T + bias[expert]`` row by row; ``weight`` is (L, out, in), or (L, in, out) if ``transposed``.

    ``fused``: in bf16 and fp16 the bias is added before the product is rounded, as in nn.Linear; grouped GEMMs of GPUs cannot.
    """
    x, weight = _autocast(x, scale_gradient(weight, rows.share))
    if not transposed:
        weight = weight.transpose(-2, -1)
    if fused and bias_of is not None and x.device.type == "cpu" and x.element_size() == 2:
        offset = scale_gradient(bias_of, rows.share).to(x.dtype)
        return torch.ops.epops.grouped_mm.default(x, weight, rows.ends, offset)
    y = epops.grouped_mm(x, weight, rows.ends)
    return y if bias_of is None else y + bias(rows, bias_of).to(y.dtype)


def bias(rows: Rows, values: Tensor) -> Tensor:
    """(L, N) values of an expert to (C, N) rows; padding reads a row of zeros, so that it never reaches a gradient.

    Gathered in float32, since the gradient of a gather adds up in the dtype of what was gathered.
    """
    padded = F.pad(scale_gradient(values.float(), rows.share), [0] * (2 * (values.dim() - 1)) + [0, 1])
    return padded[torch.where(rows.expert < 0, values.shape[0], rows.expert).long()].to(values.dtype)


def routed(site: Site, compute: Callable[[Rows], Tensor], *, weight_on: str = "output") -> Callable[..., Tensor]:
    """A function ``(x, topk_idx, topk_weights) → y`` around ``compute``."""

    def call(x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Any:
        return exchange(site, x, topk_idx, topk_weights, compute, weight_on=weight_on)

    return call
