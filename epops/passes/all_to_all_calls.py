"""An all-to-all as `fuse_transpose` sees it, whichever op it is, and the one that it writes instead."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from . import process_groups
from .axes import Dims
from .graph_facts import arguments, aten, known_equal, op_name, results, same_shape, tensor, value
from .rewriting import call, erase_unused, size

RULE = "fuse_transpose"


class Exchange(NamedTuple):
    """An all-to-all as this pass sees it: ``node`` starts it, ``result`` is what arrives.

    ``even``: this rank's parts are equal, and so are the pieces that come; whether that holds on the other ranks is for the pass to
    prove.  ``input_splits`` and ``output_splits`` are what the call was given, numbers or a tensor, even or not.  ``counted``: its
    counts, of the dim that it gathers, are used.
    """

    node: Node
    result: Node
    source: Node
    group: str
    ep_size: int
    scatter_dim: int
    gather_dim: int
    input_splits: Any
    output_splits: Any
    plan: Any
    lane: int
    scatter_size: Any
    even: bool
    counted: bool

    @property
    def torchs(self) -> bool:
        """Whether it is torch's own collective."""
        return op_name(self.node) != "all_to_all"


def read_exchange(node: Node) -> Exchange | None:
    if op_name(node) == "all_to_all":
        given = arguments(node)
        rows = results(node, 0)
        if len(rows) != 1 or tensor(given["x"]) is None:
            return None
        names = ("group", "ep_size", "scatter_dim", "gather_dim", "input_splits", "output_splits", "plan", "lane")
        facts = {name: given[name] for name in (*names, "scatter_size")}
        counted = any(item.users for item in results(node, 1))
        return Exchange(node, rows[0], given["x"], **facts, even=_even_sizes(given), counted=counted)
    schema = getattr(node.target, "_schema", None) if node.op == "call_function" else None
    if schema is None or schema.name != "_c10d_functional::all_to_all_single":
        return None
    given = arguments(node)
    waits = [user for user in node.users if _waits(user)]
    sent, came = given["input_split_sizes"], given["output_split_sizes"]
    name = process_groups.epops_name(str(given["group_name"]), len(sent))
    rows = tensor(given["input"])
    if name is None or len(waits) != 1 or len(node.users) != 1 or rows is None or rows.element_size() > 8:
        return None
    total = rows.shape[0]
    even = all(known_equal(value(item) * len(sent), total) for item in [*sent, *came])
    result = waits[0]
    while len(result.users) == 1 and _waits(next(iter(result.users))):  # torch has waited, and the program waits too
        result = next(iter(result.users))
    return Exchange(node, result, given["input"], name, len(sent), 0, 0, sent, came, None, 0, None, even, False)


def _waits(node: Node) -> bool:
    return str(node.target).startswith("_c10d_functional.wait_tensor")


def _even_sizes(given: dict[str, Any]) -> bool:
    """Whether a call of ours cuts equal parts along one dim and has room for just as many."""
    if any(given[name] is not None for name in ("input_splits", "output_splits", "plan")):
        return False
    length = tensor(given["x"]).shape[given["scatter_dim"]]
    return given["scatter_dim"] == given["gather_dim"] and known_equal(given["out_size"], length)


class Plan(NamedTuple):
    """The exchange to make instead: of ``source`` permuted and split into ``dims``, along two of them.

    ``even``: of equal parts on every rank; else the splits and sizes stay those of the call.
    """

    dims: Dims
    order: list[int] | None
    scatter_dim: int
    gather_dim: int
    target: Node
    even: bool


def split_tensors(graph: Graph, exchange: Exchange, even: bool) -> tuple[Any, Any] | None:
    """The splits as (R,) int64 tensors, or None where they are ``even`` on every rank; None at all where they cannot be had."""
    if not exchange.torchs:
        return exchange.input_splits, exchange.output_splits
    if even:
        return None, None
    made = []
    for splits in (exchange.input_splits, exchange.output_splits):
        with graph.inserting_before(exchange.node):
            one = _as_tensor(graph, list(splits), exchange)
        if one is None:
            return None
        made.append(one)
    return made[0], made[1]


def _as_tensor(graph: Graph, splits: list[Any], exchange: Exchange) -> Node | None:
    """The tensor that the splits were read from, or else one made of them, known or symbolic: another rank of the same program may
    have the other kind, and has to come to the same exchange."""
    device = tensor(exchange.source).device
    found = _read_from(splits)
    if found is not None and tensor(found).device == device:
        return found
    if not all(isinstance(value(item), (int, torch.SymInt)) for item in splits):
        return None
    fill = {"dtype": torch.int64, "device": device, "pin_memory": False}
    parts = [call(graph, aten.full.default, ([1], item), fill, like=exchange.node) for item in splits]
    return call(graph, aten.cat.default, (parts,), like=exchange.node)


def _read_from(splits: list[Any]) -> Node | None:
    """The (R,) int64 tensor whose entries the splits are, in order."""
    tensors = set()
    for place, item in enumerate(splits):
        if not isinstance(item, Node) or item.target is not aten._local_scalar_dense.default:
            return None
        entry = item.args[0]
        if entry.target is not aten.select.int or entry.args[1:] != (0, place):
            return None
        tensors.add(entry.args[0])
    found = tensors.pop() if len(tensors) == 1 else None
    right = found is not None and tensor(found).dtype == torch.int64 and same_shape(tensor(found).shape, (len(splits),))
    return found if right else None


def write_exchange(graph: Graph, exchange: Exchange, source: Node, plan: Plan, splits: tuple[Any, Any]) -> Node:
    """Put the exchange of a plan in the place of one and of what is around it; returns its node."""
    node, target = exchange.node, plan.target
    with graph.inserting_before(node):
        x = source
        if plan.order is not None:
            x = call(graph, aten.permute.default, (x, plan.order), like=node)
        if len(plan.dims) != tensor(x).dim():
            x = call(graph, aten.reshape.default, (x, _sizes(graph, x, plan.dims)), like=node)
        ranks, scatter, gather = exchange.ep_size, plan.scatter_dim, plan.gather_dim
        if plan.even:
            out = _times(graph, size(graph, x, gather), 1 if gather == scatter else ranks, node)
            share = out if gather == scatter else _share(graph, size(graph, x, scatter), ranks, node)
        else:
            out = share = _ragged_out(graph, exchange)
            if scatter != gather:
                share = exchange.scatter_size
        kwargs = {"group": exchange.group, "ep_size": ranks, "out_size": out, "scatter_size": share}
        kwargs.update({"scatter_dim": scatter, "gather_dim": gather, "lane": exchange.lane})
        made = call(graph, torch.ops.epops.all_to_all.default, (x, *splits, exchange.plan), kwargs, like=node)
        rows = call(graph, operator.getitem, (made, 0), like=node)
    with graph.inserting_before(target.next):
        shape = [length if isinstance(length, int) else -1 for length in tensor(target).shape]
        same = same_shape(tensor(rows).shape, tensor(target).shape)
        last = rows if same else call(graph, aten.reshape.default, (rows, shape), like=node)
    target.replace_all_uses_with(last)
    # What is counted is along the gathered dim, which keeps its pieces unless it is cut.
    for other in [item for index in (1, 2) for item in results(node, index)] if not exchange.torchs else []:
        other.replace_input_with(node, made)
    _remove_chain(graph, target, exchange)
    return made


def _remove_chain(graph: Graph, last: Node, exchange: Exchange) -> None:
    """Erase from ``last`` back to the exchange and what only it used."""
    node = last
    while node is not exchange.node:
        inner = node.args[0]
        if node.users:
            return
        graph.erase_node(node)
        node = inner
    erase_unused(exchange.node.users)
    inputs = exchange.node.all_input_nodes
    graph.erase_node(exchange.node)
    erase_unused(inputs)


def _sizes(graph: Graph, x: Node, dims: Dims) -> list[Any]:
    """Sizes of ``dims``, at most one of them left for the reshape to work out."""
    found: list[Any] = []
    for dim in dims:
        product: Any = 1
        for atom in dim:
            product = product * atom.size
        found.append(product if isinstance(product, int) else -1)
    return found


def _times(graph: Graph, length: Any, factor: int, like: Node) -> Any:
    if factor == 1 or isinstance(length, int):
        return length * factor if isinstance(length, int) else length
    return call(graph, operator.mul, (length, factor), like=like)


def _share(graph: Graph, length: Any, ranks: int, like: Node) -> Any:
    return length // ranks if isinstance(length, int) else call(graph, operator.floordiv, (length, ranks), like=like)


def _ragged_out(graph: Graph, exchange: Exchange) -> Any:
    if not exchange.torchs:
        return arguments(exchange.node)["out_size"]
    splits = list(exchange.output_splits)
    if all(isinstance(item, int) for item in splits):
        return sum(splits)
    total = splits[0]
    for item in splits[1:]:
        total = call(graph, operator.add, (total, item), like=exchange.node)
    return total
