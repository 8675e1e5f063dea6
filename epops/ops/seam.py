"""Ops that the model seam needs beside the exchanges: a grouped GEMM for every dtype, a sum and a gather over ranks."""

from __future__ import annotations

from typing import Any

import torch

from ..group import get_group
from ..meta import all_to_all as fakes
from ..reference import all_to_all as reference
from ..reference.dispatch import from_bytes, row_bytes
from ..transport import Call
from . import map_rows as map_rows  # registers the op, which passes use
from .arguments import common_arguments
from .exchange import Blocks, check_group, exchange, settle, status_bits
from .registry import bind, differentiate
from .scaled_grouped_mm import scaled_grouped_mm


def grouped_mm(
    rows: torch.Tensor,
    weight: torch.Tensor,
    expert_ends: torch.Tensor,
    *,
    row_scales: torch.Tensor | None = None,
    weight_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each expert's rows times its weight: (C, in), (L, in, out), int32 (L,) → (C, out); differentiable.

    bfloat16 goes to ``torch._grouped_mm``; other dtypes have no kernel there that a compiler or a CUDA graph can hold.
    Rows after the last end are zero on CPU and unspecified on CUDA.

    With ``row_scales`` (C,) or (C, 1) and ``weight_scales`` (L, out) or (L, out, 1), both float32, the factors are float8_e4m3fn,
    the result is bfloat16, and there is no gradient: for rows of `epops.dispatch_quant` with ``block=0`` and weights of
    `epops.quantize` with ``block=0``, which takes them as (L, out, in).  Sizes are multiples of 16.  On CUDA it is torch's scaled
    grouped GEMM, which scales by row; blocks of 128 channels have no kernel there on Hopper.
    """
    if row_scales is not None or weight_scales is not None:
        return scaled_grouped_mm(rows, weight, expert_ends, row_scales, weight_scales)
    if rows.dtype == torch.bfloat16 and weight.dtype == torch.bfloat16 and _has_kernel(rows, weight):
        return torch._grouped_mm(rows, weight, offs=expert_ends)
    return torch.ops.epops.grouped_mm.default(rows, weight, expert_ends)


def _has_kernel(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    # The kernel wants 16-byte rows; a shape that is not so goes through our own op.
    return rows.device.type == "cuda" and rows.shape[1] % 8 == 0 and weight.shape[2] % 8 == 0


def _grouped_mm(
    rows: torch.Tensor, weight: torch.Tensor, expert_ends: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    fakes.check_grouped_mm("grouped_mm", rows, weight, expert_ends, bias)
    if rows.device.type == "cpu":
        return reference.grouped_mm(rows, weight, expert_ends, bias)
    # Every expert runs over all rows and keeps its own: no count is read on the host, at L times the arithmetic.
    expert = torch.searchsorted(
        expert_ends, torch.arange(rows.shape[0], device=rows.device, dtype=torch.int32), right=True
    )
    out = rows.new_zeros(rows.shape[0], weight.shape[2])
    for slot in range(weight.shape[0]):
        product = rows @ weight[slot] if bias is None else torch.addmm(bias[slot], rows, weight[slot])
        out = torch.where((expert == slot).unsqueeze(1), product, out)
    return out


def _grouped_mm_backward_weight(grad: torch.Tensor, rows: torch.Tensor, expert_ends: torch.Tensor) -> torch.Tensor:
    if rows.device.type == "cpu":
        return reference.grouped_mm_backward_weight(grad, rows, expert_ends)
    expert = torch.searchsorted(
        expert_ends, torch.arange(rows.shape[0], device=rows.device, dtype=torch.int32), right=True
    )
    parts = []
    for slot in range(expert_ends.shape[0]):
        own = (expert == slot).unsqueeze(1)
        parts.append(rows.masked_fill(~own, 0).t() @ grad.masked_fill(~own, 0))
    return torch.stack(parts)


def _setup_mm(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:3])


def _backward_mm(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    rows, weight, expert_ends = ctx.saved_tensors
    grad = grad.contiguous()
    grad_rows = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_rows = torch.ops.epops.grouped_mm.default(grad, weight.transpose(1, 2), expert_ends)
    if ctx.needs_input_grad[1]:
        grad_weight = torch.ops.epops.grouped_mm_backward_weight.default(grad, rows, expert_ends)
    if any(ctx.needs_input_grad[3:]):
        ones = grad.new_ones(grad.shape[0], 1)
        grad_bias = torch.ops.epops.grouped_mm_backward_weight.default(grad, ones, expert_ends).squeeze(1)
    return (grad_rows, grad_weight, None, grad_bias)[: len(ctx.needs_input_grad)]


bind("grouped_mm", _grouped_mm, fakes.grouped_mm)
bind("grouped_mm_backward_weight", _grouped_mm_backward_weight, fakes.grouped_mm_backward_weight)
differentiate("grouped_mm", _backward_mm, _setup_mm)


def all_reduce(x: torch.Tensor, *, group: Any) -> torch.Tensor:
    """Sum of ``x`` over the ranks of the group, in rank order and float32 accumulation; the same bits on every rank.

    The gradient is the sum over ranks of the gradients.
    """
    facts, _ = common_arguments("all_reduce", group, 1, None, None)
    return torch.ops.epops.all_reduce.default(x, group=facts.name, ep_size=facts.size)


def _swap_all(op: str, x: torch.Tensor, a: dict[str, Any], finish: Any) -> torch.Tensor:
    """Send ``x`` (N, W) to every rank; ``finish`` makes the result of the blocks (N_r, W) that came."""
    group = get_group(a["group"])
    check_group(op, group, x, a["ep_size"])

    def run(sequence: int) -> torch.Tensor:
        flat = row_bytes(x)
        call = Call(op, row_bytes=flat.shape[1])
        counts = torch.full((group.size,), flat.shape[0], dtype=torch.int64, device=x.device)
        out = Blocks(call, [flat] * group.size, counts, status_bits(group, {}))
        swap = exchange(group, out, sequence)
        settle(group, op, sequence, swap.bits, device=x.device)
        return finish([from_bytes(block, x.dtype) for block in swap.rows])

    return group.run(op, run)


def _all_reduce(x: torch.Tensor, **a: Any) -> torch.Tensor:
    def finish(parts: list[torch.Tensor]) -> torch.Tensor:
        # One rank: the part is the input itself, and a result must be fresh.
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        total = torch.zeros_like(parts[0], dtype=wide)
        for part in parts:
            total = total + part.to(wide)
        return total.to(x.dtype).view(x.shape)

    return _swap_all("all_reduce", x.contiguous().view(1, -1), a, finish)


def _setup_reduce(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    ctx.settings = keyword_only_inputs


def _backward_reduce(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
    return torch.ops.epops.all_reduce.default(grad, **ctx.settings)


bind("all_reduce", _all_reduce, fakes.all_reduce)
differentiate("all_reduce", _backward_reduce, _setup_reduce)


def gather_tokens(x: torch.Tensor, *, group: Any, num_tokens: Any) -> torch.Tensor:
    """Slices of one batch put together again: (ceil(T / R), H) on each rank, the last ones padded, → (T, H) on all.

    ``num_tokens`` is T.  The gradient of each rank's slice is its slice of the result's gradient, which all ranks hold alike.
    """
    facts, _ = common_arguments("gather_tokens", group, 1, None, None)
    return torch.ops.epops.gather_tokens.default(x, group=facts.name, ep_size=facts.size, num_tokens=num_tokens)


def _gather_tokens(x: torch.Tensor, **a: Any) -> torch.Tensor:
    def finish(parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(parts)[: a["num_tokens"]].clone()

    return _swap_all("gather_tokens", x.contiguous(), a, finish)


def _setup_gather(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    ctx.settings = keyword_only_inputs
    ctx.slice = inputs[0].shape[0]


def _backward_gather(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
    a = ctx.settings
    # An exchange, not an index of this rank: the rank must not be written into a graph that all ranks share.
    padded = torch.nn.functional.pad(grad, (0, 0, 0, ctx.slice * a["ep_size"] - grad.shape[0]))
    mine, _, _ = torch.ops.epops.all_to_all.default(
        padded.contiguous(),
        group=a["group"],
        ep_size=a["ep_size"],
        out_size=padded.shape[0],
        scatter_size=padded.shape[0],
    )
    return mine.view(a["ep_size"], ctx.slice, grad.shape[1]).mean(dim=0)


bind("gather_tokens", _gather_tokens, fakes.gather_tokens)
differentiate("gather_tokens", _backward_gather, _setup_gather)
