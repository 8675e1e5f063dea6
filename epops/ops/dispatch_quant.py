"""dispatch_quant: casts rows while sending them, so that the wire carries fp8 and scales."""

from __future__ import annotations

from typing import Any

import torch

from ..group import ExpertGroup
from ..meta import dispatch as fakes
from ..reference.quantize import quantize_rows
from ..transport import Swap
from .arguments import dispatch_arguments, dispatch_defaults
from .dispatch import DispatchResult
from .dispatch_backward import full_arguments, gradient, save
from .dispatch_rows import Sent, receive, results, send
from .exchange import Halves, check_group, start, wait, whole
from .known_calls import once
from .registry import bind, call, differentiate

_ARITHMETIC = ("quant_dtype", "block", "scale_format", "scale_math", "eps_on", "eps", "clamp")


def _quant_arguments(op: str, topk_idx: torch.Tensor, settings: dict[str, Any]) -> dict[str, Any]:
    quant = {
        "quant_dtype": settings.pop("quant_dtype", torch.float8_e4m3fn),
        "block": settings.pop("block", 128),
        "scale_format": settings.pop("scale_format", "float32"),
        "scale_layout": settings.pop("scale_layout", "row"),
        "scale_math": settings.pop("scale_math", "divide"),
        "eps_on": settings.pop("eps_on", "amax"),
        "eps": settings.pop("eps", 1e-12),
        "clamp": settings.pop("clamp", True),
    }
    return {**dispatch_arguments(op, topk_idx, **dispatch_defaults(settings)), **quant}


def dispatch_quant(
    x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, **settings: Any
) -> DispatchResult:
    """`dispatch` that quantizes each row while sending it: the wire and ``rows`` are fp8, ``scales`` come with them.

    Beside the arguments of `dispatch`: ``quant_dtype`` (float8_e4m3fn), ``block`` channels a scale (128; 0: per token),
    ``scale_format`` "float32", "ue8m0" or "float32_pow2", ``scale_layout`` "row" or "column" (strides (1, C)), and the arithmetic:
    ``scale_math``, ``eps_on``, ``eps``, ``clamp``; `epops.reference.quantize.quantize_rows` has the formulas.

    The gradient is straight-through: ``x`` gets the gradient of the dequantized rows (that of ``rows`` divided by their scales).
    """
    a = _quant_arguments("dispatch_quant", topk_idx, settings)
    return DispatchResult(*call(torch.ops.epops.dispatch_quant.default, x, topk_idx, topk_weights, **a))


def dispatch_quant_start(
    x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, **settings: Any
) -> torch.Tensor:
    """Begin a `dispatch_quant` and return its ticket."""
    a = _quant_arguments("dispatch_quant_start", topk_idx, settings)
    return torch.ops.epops.dispatch_quant_start.default(x, topk_idx, topk_weights, **a)


def dispatch_quant_wait(
    ticket: torch.Tensor, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, **settings: Any
) -> DispatchResult:
    """Result of the `dispatch_quant` that ``ticket`` began."""
    a = _quant_arguments("dispatch_quant_wait", topk_idx, settings)
    return DispatchResult(*torch.ops.epops.dispatch_quant_wait.default(ticket, x, topk_idx, topk_weights, **a))


# ---- the real kernels ----------------------------------------------------------------------------------------------


@once
def _check(group: ExpertGroup, /, x: torch.Tensor, idx: torch.Tensor, w: torch.Tensor, **a: Any) -> None:
    fakes.check_dispatch("dispatch_quant", x, idx, w, None, **a)
    fakes.check_quant("dispatch_quant", x, a)
    check_group("dispatch_quant", group, x, a["ep_size"])


def _prepare(group: ExpertGroup, /, x: torch.Tensor, idx: torch.Tensor, w: torch.Tensor, **a: Any) -> Any:
    rows, scales = quantize_rows(x, **{name: a[name] for name in _ARITHMETIC})
    return send(group, "dispatch_quant", rows, scales, idx, w, a)


def _finish(group: ExpertGroup, /, swap: Swap, sent: Sent, sequence: int, x: torch.Tensor, *_: Any, **a: Any) -> Any:
    grouped, route, status = receive(group, "dispatch_quant", swap, sent, sequence, x, a)
    if a["scale_layout"] == "column" and grouped.scales.dim() == 2:
        grouped = grouped._replace(scales=grouped.scales.t().contiguous().t())
    return results(grouped, route, status)


DISPATCH_QUANT = Halves("dispatch_quant", _check, _prepare, _finish)


def _dispatch_quant(x: Any, idx: Any, w: Any, **a: Any) -> Any:
    return whole(DISPATCH_QUANT, (x, idx, w), full_arguments(a))


def _dispatch_quant_start(x: Any, idx: Any, w: Any, **a: Any) -> Any:
    return start(DISPATCH_QUANT, (x, idx, w), full_arguments(a))


def _dispatch_quant_wait(ticket: Any, x: Any, idx: Any, w: Any, **a: Any) -> Any:
    full = full_arguments(a)
    return wait(DISPATCH_QUANT, ticket, (x, idx, w), full, full)


bind("dispatch_quant", _dispatch_quant, fakes.dispatch_quant)
bind("dispatch_quant_start", _dispatch_quant_start, fakes.dispatch_quant_start)
bind("dispatch_quant_wait", _dispatch_quant_wait, fakes.dispatch_quant_wait)


# ---- autograd ------------------------------------------------------------------------------------------------------


def _setup(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    save(ctx, inputs[0], inputs[1], keyword_only_inputs, output)


def _setup_wait(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    save(ctx, inputs[1], inputs[2], keyword_only_inputs, output)


def _backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    grad_x, grad_weights = gradient(ctx, grads)
    return grad_x, None, grad_weights


def _backward_wait(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    return (None, *_backward(ctx, *grads))


differentiate("dispatch_quant", _backward, _setup)
differentiate("dispatch_quant_wait", _backward_wait, _setup_wait)
