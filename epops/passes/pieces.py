"""Tensors that are cut up and put together again, next to an exchange, written as the views and permutes that they are.

``torch.cat(x.chunk(R, d), k)`` moves elements as a permute does; written as one it can be followed by `fuse_transpose`.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from .graph_facts import (
    COPIES,
    PERMUTES,
    arguments,
    aten,
    is_exchange,
    known_equal,
    nothing_written_between,
    op_name,
    reshapes_on_all_ranks,
    tensor,
)
from .rewriting import call, erase_unused

FURTHEST = 8
"""Views and permutes that are looked through on the way to an exchange."""


class Cut(NamedTuple):
    """``parts`` equal pieces of ``source`` along ``dim``, in order; each of them without that dim when ``single``.

    ``place``: which of them this is.  ``stacked``: they are put together along a new dim.
    """

    source: Node
    dim: int
    parts: int
    single: bool
    place: int
    stacked: bool = False


JOINS = (aten.cat.default, aten.stack.default)


def join_pieces(graph: Graph) -> int:
    """Rewrite ``cat`` and ``stack`` of all the pieces of one tensor, in order, next to an exchange; returns how many.

    One behind another is next to the exchange when that is rewritten.
    """
    count = joined = _join_next(graph)
    while joined:
        joined = _join_next(graph)
        count += joined
    return count


def _join_next(graph: Graph) -> int:
    count = 0
    for node in [node for node in graph.nodes if node.target in JOINS]:
        found = _cut(node)
        if found is None or not nothing_written_between(found.source, node):
            continue
        if _comes_from_exchange(found.source) or _goes_to_exchange(node):
            _join(graph, node, found)
            count += 1
    return count


def _cut(node: Node) -> Cut | None:
    pieces = node.args[0]
    shape = tensor(node).shape if tensor(node) is not None else ()
    if not isinstance(pieces, (list, tuple)) or len(pieces) < 2 or not all(isinstance(size, int) for size in shape):
        return None
    found = [_piece(item, len(pieces), node) for item in pieces]
    first = found[0]
    if first is None or any(one != first._replace(place=place) for place, one in enumerate(found)):
        return None
    return first


def _dim(node: Node) -> int:
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return int(dim) % tensor(node).dim()


def _original(item: Any) -> Any:
    while isinstance(item, Node) and item.target in COPIES:
        item = item.args[0]
    return item


def _piece(item: Any, parts: int, join: Node) -> Cut | None:
    """What an operand of ``join`` is, if it is one of ``parts`` equal pieces of something."""
    item = _original(item)
    stacked = join.target is aten.stack.default
    if isinstance(item, Node) and item.target is aten.unsqueeze.default and not stacked:
        if item.args[1] % tensor(item).dim() != _dim(join):
            return None
        item, stacked = _original(item.args[0]), True
    if not isinstance(item, Node) or item.op != "call_function":
        return None
    if item.target is operator.getitem:
        found = _split(item.args[0], parts, item.args[1])
    elif item.target is aten.slice.Tensor:
        found = _slice(arguments(item), parts, item)
    elif item.target is aten.select.int:
        found = _selected(arguments(item), parts)
    else:
        return None
    return None if found is None else found._replace(stacked=stacked)


def _slice(given: dict[str, Any], parts: int, item: Node) -> Cut | None:
    source, start = given["self"], given["start"] or 0
    dim = given["dim"] % tensor(source).dim()
    size = tensor(source).shape[dim]
    if not isinstance(size, int) or not isinstance(start, int) or size % parts or not size or given["step"] != 1:
        return None
    width = size // parts
    if start < 0 or start % width or not known_equal(tensor(item).shape[dim], width):
        return None
    return Cut(source, dim, parts, False, start // width)


def _split(split: Any, parts: int, place: Any) -> Cut | None:
    if not isinstance(split, Node) or split.target not in SPLITS:
        return None
    given = arguments(split)
    source, widths = given["self"], given.get("split_size", given.get("split_sizes", 1))
    dim = given["dim"] % tensor(source).dim()
    size = tensor(source).shape[dim]
    widths = widths if isinstance(widths, (list, tuple)) else [widths]
    if not isinstance(size, int) or size % parts or any(width != size // parts for width in widths):
        return None
    return Cut(source, dim, parts, split.target is aten.unbind.int, place)


SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int)


def _selected(given: dict[str, Any], parts: int) -> Cut | None:
    source, place = given["self"], given["index"]
    dim = given["dim"] % tensor(source).dim()
    if not isinstance(place, int) or not known_equal(tensor(source).shape[dim], parts):
        return None
    return Cut(source, dim, parts, True, place % parts)


def _moves(node: Any) -> bool:
    return reshapes_on_all_ranks(node) or (isinstance(node, Node) and node.target in PERMUTES)


def _comes_from_exchange(node: Any) -> bool:
    for _ in range(FURTHEST):
        if isinstance(node, Node) and node.target is operator.getitem:
            node = node.args[0]
        if op_name(node) is not None or is_exchange(node):
            return is_exchange(node)
        if not _moves(node):
            return False
        node = node.args[0]
    return False


def _goes_to_exchange(node: Node) -> bool:
    for _ in range(FURTHEST):
        if len(node.users) != 1:
            return False
        node = next(iter(node.users))
        if is_exchange(node):
            return True
        if not _moves(node):
            return False
    return False


def _join(graph: Graph, node: Node, cut: Cut) -> None:
    """Split the dim of the pieces in two, move its outer half in front of the dim that they are put together along, and merge."""
    source, joined = cut.source, _dim(node)
    shape = list(tensor(source).shape)
    with graph.inserting_before(node):
        x = source
        if not cut.single:
            split = [*shape[: cut.dim], cut.parts, shape[cut.dim] // cut.parts, *shape[cut.dim + 1 :]]
            x = call(graph, aten.reshape.default, (x, split), like=node)
        order = [place for place in range(tensor(x).dim()) if place != cut.dim]
        order.insert(joined, cut.dim)
        if order != sorted(order):
            x = call(graph, aten.permute.default, (x, order), like=node)
        x = call(graph, aten.clone.default, (x,), {"memory_format": torch.contiguous_format}, like=node)
        if not cut.stacked:
            x = call(graph, aten.reshape.default, (x, list(tensor(node).shape)), like=node)
    node.replace_all_uses_with(x)
    erase_unused([node])
