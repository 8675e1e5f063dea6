"""How a pass changes a graph: new nodes with their recorded values, moved nodes, and no dead ones left behind."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from ..torch_private import traced
from .graph_facts import (
    COPIES,
    arguments,
    aten,
    between,
    is_exchange,
    is_random,
    is_reshape,
    known_equal,
    same_shape,
    tensor,
    value,
    writes,
)

PASSED_ON = (
    *("stack_trace", "nn_module_stack", "source_fn_stack", "seq_nr", "custom"),
    # of joint graphs: forward or backward, and what activation checkpointing decided
    *("partitioner_tag", "autograd_backward", "recompute", "ac_graph_id"),
)
"""Notes on a node that say where in the model it comes from; they stay right for what replaces it."""


def call(
    graph: Graph,
    target: Any,
    args: Sequence[Any],
    kwargs: dict[str, Any] | None = None,
    *,
    like: Node,
    same_value: bool = False,
) -> Node:
    """Insert a call at the graph's insertion point, with the value that fakes give it and the origin of ``like``.

    ``same_value``: what it computes is what ``like`` computes.
    """
    node = graph.call_function(target, tuple(args), kwargs or {})
    for note in PASSED_ON:
        if note in like.meta:
            node.meta[note] = like.meta[note]
    if same_value:
        node.meta["val"] = like.meta["val"]
    else:
        record_value(node, like)
    return node


def record_value(node: Node, like: Node) -> None:
    """Run a node on the fake values of its arguments, among the fakes that ``like`` is of, and keep the result in its meta."""
    args, kwargs = map_arg((node.args, node.kwargs), value)
    mode = torch._guards.detect_fake_mode((args, kwargs, like.meta.get("val")))
    if mode is None:
        node.meta["val"] = node.target(*args, **kwargs)
        return
    with mode:
        node.meta["val"] = node.target(*args, **kwargs)


def write(graph: Graph, function: Any, nodes: Sequence[Node], *, like: Node) -> list[Node]:
    """Insert what ``function``, of tensors, computes of the values of ``nodes``, with the origin of ``like``; its results."""
    plain = traced(function, [tensor(node) for node in nodes])
    inputs = iter(nodes)
    made: dict[Node, Any] = {}
    found: Any = ()
    for node in plain.nodes:
        if node.op == "placeholder":
            made[node] = next(inputs)
        elif node.op == "output":
            found = map_arg(node.args[0], made.__getitem__)
        else:
            assert node.op == "call_function", f"{node.op} in a computation of tensors alone"
            copy = made[node] = graph.node_copy(node, made.__getitem__)
            copy.meta = {note: like.meta[note] for note in PASSED_ON if note in like.meta}
            copy.meta["val"] = node.meta["val"]
    return list(found) if isinstance(found, (list, tuple)) else [found]


def size(graph: Graph, node: Node, dim: int) -> int | Node:
    """One size of a tensor as an argument: a number where it is one, else a node that computes it."""
    length = tensor(node).shape[dim]
    return length if isinstance(length, int) else call(graph, aten.sym_size.int, (node, dim), like=node)


def reshape_like(graph: Graph, node: Node, shape_of: Node) -> Node:
    """``node`` with the shape of ``shape_of``, which has as many elements; an earlier node of its reshapes may have it."""
    want = tensor(shape_of).shape
    earlier = node
    while not same_shape(tensor(earlier).shape, want):
        if not is_reshape(earlier) or earlier.target in COPIES or tensor(earlier.args[0]) is None:
            return _reshape(graph, node, shape_of)
        earlier = earlier.args[0]
    return earlier


def _reshape(graph: Graph, node: Node, shape_of: Node) -> Node:
    want = tensor(shape_of).shape
    unknown = [dim for dim, length in enumerate(want) if not isinstance(length, int)]
    if len(unknown) <= 1 and all(length != 0 for length in want if isinstance(length, int)):
        sizes: list[Any] = [-1 if dim in unknown else length for dim, length in enumerate(want)]
    else:
        sizes = [_size(graph, node, length) for length in want]
        if sizes.count(None) == 1 and 0 not in sizes:
            sizes[sizes.index(None)] = -1
        sizes = [size(graph, shape_of, dim) if length is None else length for dim, length in enumerate(sizes)]
    return call(graph, aten.reshape.default, (node, sizes), like=node)


def _size(graph: Graph, node: Node, length: Any) -> Any:
    """A size as an argument for what reshapes ``node``, from what is there already: a number, or a size of ``node`` or of an input
    of the graph; None where neither has it."""
    if isinstance(length, int):
        return length
    for given in (node, *graph.find_nodes(op="placeholder")):
        if isinstance(value(given), torch.SymInt) and known_equal(given, length):
            return given
        for dim, other in enumerate(tensor(given).shape if tensor(given) is not None else ()):
            if not isinstance(other, int) and known_equal(other, length):  # most inputs are parameters
                return size(graph, given, dim)
    return None


def hoist(nodes: Iterable[Node], before: Node) -> None:
    """Move ``nodes``, given in graph order, to just before ``before``."""
    for node in nodes:
        before.prepend(node)


def closure_after(anchor: Node, node: Node) -> list[Node] | None:
    """What has to move up so that ``node`` can stand before ``anchor``, in graph order.

    None when it cannot: something in it needs ``anchor`` itself, talks to other ranks, writes in place, or draws random numbers
    before others that the program draws first.
    """
    found: dict[Node, None] = {}
    stack = [node]
    while stack:
        current = stack.pop()
        if current is anchor:
            return None
        if current in found or current < anchor:
            continue
        if is_exchange(current) or writes(current):
            return None
        found[current] = None
        stack.extend(current.all_input_nodes)
    drawn = [current for current in found if is_random(current)]
    if drawn and any(is_random(other) and other not in found for other in between(anchor, max(drawn))):
        return None
    return sorted(found)


def erase_unused(nodes: Iterable[Node]) -> None:
    """Erase those of ``nodes``, and of what they alone used, that nobody uses any more; exchanges and writes stay."""
    stack = list(nodes)
    erased: set[Node] = set()
    while stack:
        node = stack.pop()
        if (
            node in erased
            or node.users
            or node.op not in ("call_function", "get_attr")
            or writes(node)
            or is_exchange(node)
        ):
            continue
        inputs = node.all_input_nodes
        node.graph.erase_node(node)
        erased.add(node)
        stack.extend(inputs)


def through_reshapes(node: Node) -> list[Node]:
    """The chain of reshapes that ends in ``node``, first one first; empty when it is none."""
    chain: list[Node] = []
    while is_reshape(node):
        chain.append(node)
        node = node.args[0]
    return chain[::-1]


def set_arguments(node: Node, changes: dict[str, Any]) -> None:
    """Give an operator call other arguments, by name; those behind the ``*`` of the schema stay keywords."""
    schema = node.target._schema
    bound = {**arguments(node), **changes}
    node.args = tuple(bound[item.name] for item in schema.arguments if not item.kwarg_only)
    node.kwargs = {
        item.name: bound[item.name]
        for item in schema.arguments
        if item.kwarg_only and (item.name in node.kwargs or item.name in changes or not item.has_default_value())
    }
    if "eager_input_vals" in node.meta:  # what Inductor lays the inputs out by: it pairs them with the arguments
        node.meta["eager_input_vals"] = map_arg((node.args, node.kwargs), value)
