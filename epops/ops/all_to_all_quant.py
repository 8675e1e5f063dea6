"""all_to_all_quant: rows are cast to fp8 before they are sent, and their scales travel in front of them, in one exchange.

It is made of others: quantizing in plain torch, which a compiler fuses with what packs the bytes, and one `all_to_all` of bytes.
So it goes over every transport, and passes see the exchange that they know.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .. import layout as words
from ..group import get_group
from ..meta.checks import fail
from ..meta.dispatch import check_quant
from ..reference.pack_rows import pack, unpack
from ..reference.quantize import quantize_rows
from .all_to_all import all_to_all_arguments, goes_back_ragged, way_back
from .registry import call

DEFAULTS: dict[str, Any] = {
    "quant_dtype": torch.float8_e4m3fn,
    "block": 128,
    "scale_format": "float32",
    "scale_math": "divide",
    "eps_on": "amax",
    "eps": 1e-12,
    "clamp": True,
}


class AllToAllQuantResult(NamedTuple):
    """What `all_to_all_quant` returns: ``rows`` fp8, and ``scales`` (…, blocks) of them, both zero after the last received element
    along ``gather_dim``; ``counts`` and ``status`` as of `all_to_all`."""

    rows: torch.Tensor
    scales: torch.Tensor
    counts: torch.Tensor
    status: torch.Tensor


def all_to_all_quant(
    x: torch.Tensor,
    input_splits: torch.Tensor | None = None,
    output_splits: torch.Tensor | None = None,
    plan: torch.Tensor | None = None,
    **settings: Any,
) -> AllToAllQuantResult:
    """`all_to_all` of fp8: rows (the last dim of ``x``) are quantized before they are sent, and their scales come with them.

    Beside the arguments of `all_to_all`, of which ``scatter_dim`` and ``gather_dim`` are not the last dim: ``quant_dtype``
    (float8_e4m3fn), ``block`` channels a scale (128; 0: a row), ``scale_format`` "float32", "ue8m0" or "float32_pow2", and the
    arithmetic: ``scale_math``, ``eps_on``, ``eps``, ``clamp``; `epops.reference.quantize.quantize_rows` has the formulas.

    The gradient is straight-through: ``x`` gets the gradient of the dequantized rows (that of ``rows`` divided by their scales).

    >>> import torch, epops
    >>> with epops.ExpertGroup(None, "docs") as group:
    ...     got = epops.all_to_all_quant(torch.tensor([[448.0, -224.0]]), group=group, block=0)
    >>> got.rows.float().tolist(), got.scales.tolist(), got.counts.tolist()
    ([[448.0, -224.0]], [[1.0]], [1])
    """
    a, quant = _checked("all_to_all_quant", x, input_splits, output_splits, plan, settings)
    return _result(x, None, None, input_splits, output_splits, plan, a, quant)


class StartedQuant(NamedTuple):
    """What `all_to_all_quant_start` returns: the ticket of the exchange, and the bytes that it reads until it is waited for."""

    ticket: torch.Tensor
    packed: torch.Tensor


def all_to_all_quant_start(
    x: torch.Tensor,
    input_splits: torch.Tensor | None = None,
    output_splits: torch.Tensor | None = None,
    plan: torch.Tensor | None = None,
    **settings: Any,
) -> StartedQuant:
    """Begin an `all_to_all_quant`; hand what this returns to `all_to_all_quant_wait`."""
    a, quant = _checked("all_to_all_quant_start", x, input_splits, output_splits, plan, settings)
    packed = _packed(x.detach(), quant)
    ticket = torch.ops.epops.all_to_all_start.default(packed, input_splits, output_splits, plan, **a)
    return StartedQuant(ticket, packed)


def all_to_all_quant_wait(
    started: StartedQuant,
    x: torch.Tensor,
    input_splits: torch.Tensor | None = None,
    output_splits: torch.Tensor | None = None,
    plan: torch.Tensor | None = None,
    **settings: Any,
) -> AllToAllQuantResult:
    """Result of the `all_to_all_quant` that was ``started`` with the same arguments; the gradient goes to this ``x``."""
    a, quant = _checked("all_to_all_quant_wait", x, input_splits, output_splits, plan, settings)
    return _result(x, *started, input_splits, output_splits, plan, a, quant)


def _checked(
    op: str, x: torch.Tensor, ins: Any, outs: Any, plan: Any, settings: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of the exchange of bytes, and the quantizer's.  Peers are told of what is refused here, so that none waits."""
    quant = {name: settings.pop(name, default) for name, default in DEFAULTS.items()}
    try:
        a = all_to_all_arguments(op, x, ins, outs, plan, **settings)
        check_quant(op, x, {**quant, "scale_layout": "row"})
        for name in ("scatter_dim", "gather_dim"):
            if a[name] == x.dim() - 1:
                expected = "a dim before the last, whose numbers share scales"
                fail(op, name, expected, a[name], "permute x, or quantize it yourself")
        return a, quant
    except ValueError:
        if not torch.compiler.is_compiling() and settings.get("group") is not None:
            group = settings["group"]
            (get_group(group) if isinstance(group, str) else group).abort("all_to_all")
        raise


def _result(
    x: torch.Tensor, ticket: Any, packed: Any, ins: Any, outs: Any, plan: Any, a: dict[str, Any], quant: dict[str, Any]
) -> AllToAllQuantResult:
    given = (x, ticket, packed, ins, outs, plan)
    if torch.is_grad_enabled() and x.requires_grad:
        return AllToAllQuantResult(*_Straight.apply(*given, tuple(a.items()), tuple(quant.items())))
    return AllToAllQuantResult(*_exchange(*given, a, quant))


def _packed(x: torch.Tensor, quant: dict[str, Any]) -> torch.Tensor:
    rows, scales = quantize_rows(x.reshape(-1, x.shape[-1]), **quant)
    return pack(rows, scales).unflatten(0, x.shape[:-1])


def _exchange(
    x: torch.Tensor, ticket: Any, packed: Any, ins: Any, outs: Any, plan: Any, a: dict[str, Any], quant: dict[str, Any]
) -> Any:
    """The exchange, or what is left of it where it was started."""
    if ticket is None:
        packed = _packed(x, quant)
        got, counts, status = call(torch.ops.epops.all_to_all.default, packed, ins, outs, plan, **a)
    else:
        got, counts, status = torch.ops.epops.all_to_all_wait.default(ticket, packed, ins, outs, plan, **a)
    dtype = torch.float8_e8m0fnu if quant["scale_format"] == "ue8m0" else torch.float32
    blocks = words.num_scales(x.shape[-1], quant["block"])
    return *unpack(got, x.shape[-1], blocks, quant["quant_dtype"], dtype), counts, status


class _Straight(torch.autograd.Function):
    """The exchange with a straight-through gradient; settings come as pairs."""

    @staticmethod
    def forward(ctx: Any, x: Any, ticket: Any, packed: Any, ins: Any, outs: Any, plan: Any, a: Any, quant: Any) -> Any:
        ctx.a, quant = dict(a), dict(quant)
        rows, scales, counts, status = _exchange(x, ticket, packed, ins, outs, plan, ctx.a, quant)
        ctx.x_shape, ctx.x_dtype, ctx.block = x.shape, x.dtype, quant["block"]
        ctx.ragged = goes_back_ragged(x, ins, outs, plan, ctx.a)
        ctx.save_for_backward(scales, counts, ins, plan)
        ctx.mark_non_differentiable(scales, counts, status)
        return rows, scales, counts, status

    @staticmethod
    def backward(ctx: Any, grad_rows: torch.Tensor, *_: Any) -> Any:
        scales, counts, ins, plan = ctx.saved_tensors
        hidden = grad_rows.shape[-1]
        factor = scales.float().repeat_interleave(ctx.block or hidden, dim=-1)[..., :hidden]
        grad = torch.where(factor > 0, grad_rows.float() / factor, 0.0).to(ctx.x_dtype)
        grad_x = way_back(grad, counts if ctx.ragged else None, ins, plan, ctx.x_shape, ctx.a)
        return grad_x, *[None] * 7
