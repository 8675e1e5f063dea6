"""How long a node takes, and an exchange, of a batch of M tokens a rank: from sizes that are equal on all ranks.

A rank's own token count T never enters: what grows with T is taken for M, the most tokens of any rank, whatever T is here.
So every rank comes to the same figures, whatever batch it has.  The figures are of an H200 of which either has about half
(benchmarks/results); only how they compare with one another matters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from .graph_facts import CASTS, COPIES, PERMUTES, arguments, aten, is_reshape, known_equal, op_name, tensor

FLOPS = 300e6
"""Floating-point operations of a product in a microsecond."""

WEIGHT_BYTES = 2.5e6
"""Bytes of weights that a product reads in a microsecond."""

WIRE_BYTES = 150e3
"""Bytes of an exchange in a microsecond, regrouping included."""

EXCHANGE_START = 15.0
"""Microseconds of an exchange of nothing."""

MANY_TOKENS = 4096
"""M where the graph does not know it."""

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


def batch_of(given: dict[str, Any]) -> int:
    """M of an exchange."""
    tokens = given.get("max_tokens")
    return tokens if isinstance(tokens, int) else MANY_TOKENS


def exchange_time(given: dict[str, Any], sent: torch.Tensor) -> float | None:
    """Microseconds of an exchange of rows like ``sent`` (…, H); None where sizes say nothing.

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
    return EXCHANGE_START + batch_of(given) * copies * hidden * itemsize / WIRE_BYTES


def work_of(node: Node, tokens: Any, top_k: int, batch: int = MANY_TOKENS) -> float:
    """Microseconds of a node in which ``tokens`` tokens stand for ``batch``; 0 for what is small or has sizes that ranks may
    not share.

    ``tokens`` None: 1 for whatever is large.
    """
    if node.op != "call_function":
        return 0.0
    if node.target in GROUPED or op_name(node) in ("grouped_mm", "grouped_mm_backward_weight", "scaled_grouped_mm"):
        return _grouped(node, top_k, batch) if all(tensor(item) is not None for item in node.args[:2]) else 0.0
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
    squared = known_equal(sizes[-1], tokens) and not _is_given(node.args[places[1]])  # tokens times tokens
    if growing is None or (growing < left.dim() - 1 and squared):
        return 0.0
    rest = [size for index, size in enumerate(sizes) if index != growing]
    if not all(isinstance(size, int) for size in rest):
        return 0.0
    return _product(batch, torch.Size(rest).numel(), torch.Size(rest).numel() * right.element_size())


def _is_given(node: Any) -> bool:
    """Whether a factor is an input of the program: weights are, and one that has as many columns as there are tokens here has not
    on other ranks.  What a backward graph is given besides are results of its forward, which have other names."""
    while node.target in (*PERMUTES, *COPIES, *CASTS) or is_reshape(node):
        node = node.args[0]
    return node.op == "get_attr" or (node.op == "placeholder" and str(node.target).startswith(("primals", "arg")))


def _product(rows: int, each: int, weight_bytes: int) -> float:
    """Microseconds of a product of ``rows`` rows with ``each`` weights: what is slower, to multiply or to read them."""
    return max(2.0 * rows * each / FLOPS, weight_bytes / WEIGHT_BYTES)


def _grouped(node: Node, top_k: int, batch: int) -> float:
    """A grouped product has K rows a token, however many rows there is room for, and weights of every expert."""
    left, right = (tensor(item) for item in node.args[:2])
    if op_name(node) == "grouped_mm_backward_weight":
        sizes, ends = [left.shape[-1], right.shape[-1]], arguments(node)["expert_ends"]
    elif left.dim() == 3:
        return 0.0  # groups of tokens' columns
    elif right.dim() == 2:  # the same, of torch's own
        sizes, ends = [left.shape[0], right.shape[-1]], arguments(node).get("offs")
    else:
        sizes, ends = [right.shape[-2], right.shape[-1]], None
    experts = right.shape[0] if right.dim() == 3 else tensor(ends).shape[0] if tensor(ends) is not None else 1
    itemsize = right.element_size()
    if not all(isinstance(size, int) for size in [*sizes, experts]):
        return 0.0
    each = torch.Size(sizes).numel()
    return _product(batch * top_k, each, experts * each * itemsize)
