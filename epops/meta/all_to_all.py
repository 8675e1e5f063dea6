"""Shapes of the ragged all-to-all, and of the small ops that the model seam needs beside the exchanges."""

from __future__ import annotations

from typing import Any

import torch

from .. import layout as words
from .checks import check_device, fail, is_int
from .dispatch import ticket as new_ticket


def check_splits(op: str, name: str, splits: torch.Tensor | None, ep_size: int) -> None:
    if splits is None:
        return
    if splits.dtype != torch.int64:
        fail(op, name, "int64", splits.dtype, "cast it")
    if tuple(splits.shape) != (ep_size,):
        fail(op, name, f"shape ({ep_size},), one split a rank", tuple(splits.shape), "pass one split a rank")


def check_all_to_all(
    op: str,
    x: torch.Tensor,
    input_splits: torch.Tensor | None,
    output_splits: torch.Tensor | None,
    plan: torch.Tensor | None,
    *,
    ep_size: int,
    out_size: Any,
    scatter_size: Any,
    scatter_dim: int,
    gather_dim: int,
    **_: Any,
) -> None:
    check_splits(op, "input_splits", input_splits, ep_size)
    check_splits(op, "output_splits", output_splits, ep_size)
    if plan is not None:
        if plan.dtype != torch.int64 or tuple(plan.shape) != (words.plan_size(ep_size),):
            got = f"{plan.dtype} {tuple(plan.shape)}"
            fail(op, "plan", f"int64 ({words.plan_size(ep_size)},)", got, "pass the plan of epops.plan_all_to_all")
        if input_splits is not None or output_splits is not None:
            fail(op, "plan", "no splits beside it", "both", "pass either a plan or splits")
    for name, dim in (("scatter_dim", scatter_dim), ("gather_dim", gather_dim)):
        if not 0 <= dim < x.dim():
            fail(op, name, f"0 … {x.dim() - 1}", dim, "name a dimension of x")
    if x.element_size() not in (1, 2, 4, 8):
        fail(op, "x", "elements of 1, 2, 4 or 8 bytes", x.dtype, "view it as such")
    along = x.shape[scatter_dim]
    if input_splits is None and plan is None and is_int(along) and along % ep_size:
        fail(
            op,
            "x",
            f"a size of dim {scatter_dim} that {ep_size} ranks divide, as input_splits is None",
            along,
            "pass input_splits",
        )
    check_device(op, x, input_splits=input_splits, output_splits=output_splits, plan=plan)


def _out_shape(x: torch.Tensor, a: dict[str, Any]) -> list[Any]:
    shape = list(x.shape)
    shape[a.get("scatter_dim", 0)] = a["scatter_size"]
    shape[a.get("gather_dim", 0)] = a["out_size"]
    return shape


def all_to_all(
    x: torch.Tensor,
    input_splits: torch.Tensor | None = None,
    output_splits: torch.Tensor | None = None,
    plan: torch.Tensor | None = None,
    **a: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    a = {"scatter_dim": 0, "gather_dim": 0, **a}
    check_all_to_all("all_to_all", x, input_splits, output_splits, plan, **a)
    return (
        x.new_empty(_out_shape(x, a)),
        x.new_empty(a["ep_size"], dtype=torch.int64),
        x.new_empty(words.STATUS_WORDS, dtype=torch.int32),
    )


def all_to_all_start(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return new_ticket(x)


def all_to_all_wait(ticket: torch.Tensor, *args: Any, **a: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return all_to_all(*args, **a)


def plan_all_to_all(
    input_splits: torch.Tensor, output_splits: torch.Tensor | None = None, **a: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    check_splits("plan_all_to_all", "input_splits", input_splits, a["ep_size"])
    check_splits("plan_all_to_all", "output_splits", output_splits, a["ep_size"])
    return (
        input_splits.new_empty(words.plan_size(a["ep_size"])),
        input_splits.new_empty(words.STATUS_WORDS, dtype=torch.int32),
    )


def check_grouped_mm(
    op: str, rows: torch.Tensor, weight: torch.Tensor, expert_ends: torch.Tensor, bias: torch.Tensor | None = None
) -> None:
    if rows.dim() != 2 or weight.dim() != 3:
        got = f"{tuple(rows.shape)} and {tuple(weight.shape)}"
        fail(op, "rows, weight", "(C, in) and (L, in, out)", got, "pass rows of the expert layout")
    if is_int(rows.shape[1]) and is_int(weight.shape[1]) and rows.shape[1] != weight.shape[1]:
        fail(op, "weight", f"in = {rows.shape[1]} as rows", weight.shape[1], "transpose the weight")
    if rows.dtype != weight.dtype:
        fail(op, "weight", f"{rows.dtype} as rows", weight.dtype, "cast one of them")
    if expert_ends.dtype != torch.int32 or tuple(expert_ends.shape) != (weight.shape[0],):
        got = f"{expert_ends.dtype} {tuple(expert_ends.shape)}"
        fail(op, "expert_ends", f"int32 ({weight.shape[0]},)", got, "pass expert_ends of the dispatch")
    wanted = (weight.shape[0], weight.shape[2])
    if bias is not None and (bias.dtype != rows.dtype or tuple(bias.shape) != wanted):
        got = f"{bias.dtype} {tuple(bias.shape)}"
        fail(op, "bias", f"{rows.dtype} {wanted}, a row an expert", got, "cast it, or stack the experts' biases")


def grouped_mm(
    rows: torch.Tensor, weight: torch.Tensor, expert_ends: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    check_grouped_mm("grouped_mm", rows, weight, expert_ends, bias)
    return rows.new_empty(rows.shape[0], weight.shape[2])


def grouped_mm_backward_weight(grad: torch.Tensor, rows: torch.Tensor, expert_ends: torch.Tensor) -> torch.Tensor:
    return rows.new_empty(expert_ends.shape[0], rows.shape[1], grad.shape[1])


def all_reduce(x: torch.Tensor, **_: Any) -> torch.Tensor:
    return x.new_empty(x.shape)


def gather_tokens(x: torch.Tensor, **a: Any) -> torch.Tensor:
    return x.new_empty((a["num_tokens"], *x.shape[1:]))
