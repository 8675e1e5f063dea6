"""How much work a node is, for one token of the busiest rank: from sizes that are equal on all ranks.

A rank's own token count T never enters: work that grows with T is counted for one token, whatever T is here.  So every rank
comes to the same figures, whatever batch it has.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from .graph_facts import arguments, aten, known_equal, op_name, tensor

FLOPS_A_BYTE = 2000
"""Floating-point operations that a GPU does while its link moves one byte (Hopper: 600 TFLOP/s beside 300 GB/s)."""

PRODUCTS = {
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.baddbmm.default: (1, 2),
    aten._scaled_mm.default: (0, 1),
    aten._int_mm.default: (0, 1),
}
"""Matrix products, and the places of their factors."""

GROUPED = tuple(
    getattr(aten, name).default
    for name in ("_grouped_mm", "_scaled_grouped_mm")
    if hasattr(getattr(aten, name, None), "default")
)


def exchange_budget(given: dict[str, Any], sent: torch.Tensor) -> float | None:
    """Work that fits beside an exchange of rows like ``sent`` (…, H), for one token; None where sizes say nothing.

    A token's row goes to at most K other ranks and R - 1.
    """
    top_k = given.get("top_k")
    if top_k is None and given.get("topk_idx") is not None:
        top_k = tensor(given["topk_idx"]).shape[1]
    hidden = sent.shape[-1]
    if not isinstance(top_k, int) or not isinstance(hidden, int):
        return None
    copies = min(top_k, max(given["ep_size"] - 1, 1))
    itemsize = given.get("quant_dtype", given.get("out_dtype", sent.dtype)).itemsize
    return float(copies * hidden * itemsize * FLOPS_A_BYTE)


def work_of(node: Node, tokens: Any, top_k: int) -> float:
    """Floating-point operations of a node for one of ``tokens`` tokens; 0 for what is small or has sizes that ranks may not
    share.

    ``tokens`` None: 1 for whatever is large.
    """
    if node.op != "call_function":
        return 0.0
    if node.target in GROUPED or op_name(node) in ("grouped_mm", "grouped_mm_backward_weight", "scaled_grouped_mm"):
        return _grouped(node, top_k)
    places = PRODUCTS.get(node.target)
    if places is None:
        return 0.0
    left, right = (tensor(node.args[place]) for place in places)
    if left is None or right is None:
        return 0.0
    sizes = [*left.shape, right.shape[-1]]
    if tokens is None:
        return 1.0
    growing = next((index for index, size in enumerate(sizes) if known_equal(size, tokens)), None)
    if growing is None:
        return 0.0
    rest = [size for index, size in enumerate(sizes) if index != growing]
    if not all(isinstance(size, int) for size in rest):
        return 0.0
    return 2.0 * torch.Size(rest).numel()


def _grouped(node: Node, top_k: int) -> float:
    """A grouped product has K rows a token, however many rows there is room for."""
    if op_name(node) == "grouped_mm_backward_weight":
        given = arguments(node)
        sizes = [tensor(given["grad"]).shape[-1], tensor(given["rows"]).shape[-1]]
    else:
        factors = [tensor(item) for item in node.args[:2]]
        if any(item is None for item in factors):
            return 0.0
        sizes = [factors[1].shape[-2], factors[1].shape[-1]]
    if not all(isinstance(size, int) for size in sizes):
        return 0.0
    return 2.0 * top_k * torch.Size(sizes).numel()
