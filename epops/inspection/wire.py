"""What the exchanges of a graph move: bytes that leave a rank, and the work that runs meanwhile."""

from __future__ import annotations

import math
import operator
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from ..layout import num_scales
from ..passes.graph_facts import op_name
from ..passes.work_estimate import work_of
from ..schema import EXCHANGES
from .text import unwrap


class Overlap(NamedTuple):
    """A started exchange and the products that run before it is waited for, by their nodes."""

    start: Node
    beside: list[Node]


def exchange_of(node: Node) -> tuple[str, dict[str, Any]] | None:
    """Op and arguments of an exchange, seen through an ordering wrapper; None for other nodes and for wait halves."""
    if node.op != "call_function":
        return None
    target, args, kwargs, _ = unwrap(node)
    schema = getattr(target, "_schema", None)
    if schema is None or schema.name.split("::")[0] not in ("epops", "_c10d_functional"):
        return None
    space, name = schema.name.split("::")
    if name.endswith("_wait") or name == "wait_tensor" or (space == "epops" and name not in EXCHANGES):
        return None
    name = name.removesuffix("_start")
    given: dict[str, Any] = {}
    for index, item in enumerate(schema.arguments):
        if item.name in kwargs:
            given[item.name] = kwargs[item.name]
        else:
            given[item.name] = args[index] if not item.kwarg_only and index < len(args) else item.default_value
    return name, given


def wire_bytes(graph: Graph) -> int:
    """Bytes of rows and scales that leave a rank in one run of a graph, at most: of ``max_tokens`` tokens, each to as many other
    ranks as it may choose.  Where a size is symbolic, the one it was traced with."""
    return sum(_bytes_of(node) for node in graph.nodes)


def _bytes_of(node: Node) -> int:
    found = exchange_of(node)
    if found is None:
        return 0
    name, given = found
    ranks = given.get("ep_size")
    if name in ("dispatch", "dispatch_quant", "dispatch_backward", "combine", "combine_backward"):
        top_k = given["top_k"] if "top_k" in given else _fake(given["topk_idx"]).shape[1]
        copies = _number(given["max_tokens"]) * min(_number(top_k), given["ep_size"] - 1)
        return copies * _record(name, given)
    source = next((_fake(given[key]) for key in ("x", "input", "inputs") if isinstance(given.get(key), Node)), None)
    if source is None:
        return 0
    size = math.prod(_number(length) for length in source.shape) * source.element_size()
    if name == "all_to_all_single":
        ranks = len(given["input_split_sizes"])
        return size * (ranks - 1) // max(ranks, 1)
    if not ranks:
        return 0
    if name == "all_to_all":
        return size * (ranks - 1) // ranks
    return size * (ranks - 1) * (2 if name == "all_reduce" else 1) // (ranks if name == "all_reduce" else 1)


def _record(name: str, given: dict[str, Any]) -> int:
    """Bytes of one row on the wire, its scales included."""
    rows = _fake(
        given[{"dispatch_backward": "grad_rows", "combine": "y", "combine_backward": "grad_out"}.get(name, "x")]
    )
    hidden = _number(rows.shape[-1])
    if name == "dispatch_quant":
        width = 1 if given["scale_format"] == "ue8m0" else 4
        return hidden * given["quant_dtype"].itemsize + _number(num_scales(hidden, given["block"])) * width
    scales = _fake(given["x_scales"]) if given.get("x_scales") is not None else None
    extra = 0 if scales is None else _number(scales.shape[-1]) * scales.element_size()
    return hidden * given.get("out_dtype", rows.dtype).itemsize + extra


def overlaps(graph: Graph) -> list[Overlap]:
    """Started exchanges of a graph with what runs beside them."""
    found: list[Overlap] = []
    running: list[Overlap] = []
    for node in graph.nodes:
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        target, args, _, _ = unwrap(node)
        name = getattr(getattr(target, "_schema", None), "name", "")
        if name.startswith("epops::") and name.endswith("_start"):
            running.append(Overlap(node, []))
            found.append(running[-1])
        elif name.startswith("epops::") and name.endswith("_wait"):
            running = [one for one in running if one.start is not args[0]]
        elif running and is_product(node):
            for one in running:
                one.beside.append(node)
    return found


def is_product(node: Node) -> bool:
    """Whether a node is a matrix product, seen through an ordering wrapper."""
    if node.op != "call_function":
        return False
    target = unwrap(node)[0]
    if target is node.target:
        return work_of(node, None, 1) > 0
    word = getattr(getattr(target, "_schema", None), "name", "")
    return word.endswith(("mm", "grouped_mm_backward_weight", "baddbmm")) or op_name(node) in (
        "grouped_mm",
        "scaled_grouped_mm",
    )


def _fake(item: Any) -> torch.Tensor:
    return item.meta["val"] if isinstance(item, Node) else item


def _number(size: Any) -> int:
    if isinstance(size, Node):
        size = size.meta.get("val", 0)
    if isinstance(size, int):
        return size
    hint = getattr(getattr(size, "node", None), "hint", None)
    return 0 if hint is None else int(hint)
