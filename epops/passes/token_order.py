"""Takes a batch-first / sequence-first transposition of tokens off a dispatch, and the transposition back off its combine."""

from __future__ import annotations

import heapq
from typing import Any, NamedTuple

from torch.fx import Graph, Node
from torch.fx.node import map_arg

from . import axes
from .decline_log import declined
from .graph_facts import (
    COPIES,
    PERMUTES,
    aten,
    epops_calls,
    is_reshape,
    is_whole_slice,
    known_equal,
    op_name,
    read_by_strides,
    tensor,
    writes,
)
from .rewriting import call, erase_unused, size
from .token_axes import VIEWS, Place, Sizes, place

RULE = "fuse_transpose"
DISPATCHES = ("dispatch", "dispatch_quant")
LARGEST = 1000
"""Nodes of the largest region that is looked at: a few layers."""


def untranspose(graph: Graph) -> int:
    """Dispatches that now send their tokens in the order in which they lie in memory; see `fuse_transpose`.

    A region of nodes that treat every token alike is grown from a transposition, through router, dispatch, experts and combine.  If
    the region runs on the tokens as they were, each of its results is the same up to the order of tokens, and where the program
    transposes back there is nothing to do.
    """
    if not epops_calls(graph, DISPATCHES):
        return 0
    written = [node for node in graph.nodes if writes(node)]
    return sum(_move(graph, node, written) for node in list(graph.nodes) if _is_swap(node) and node.users)


def _is_swap(node: Any) -> bool:
    """A permute of the first two of three or more dims, neither of which is 1."""
    if not isinstance(node, Node) or node.target not in PERMUTES or tensor(node) is None or tensor(node).dim() < 3:
        return False
    shape = tensor(node).shape
    order = axes.permutation(node, len(shape))
    return order == [1, 0, *range(2, len(shape))] and not any(known_equal(size, 1) for size in shape[:2])


# ---- the region --------------------------------------------------------------------------------------------------------


def _grow(seed: Node) -> tuple[dict[Node, Place], Sizes]:
    """Every node, from the transposition ``seed`` on, whose result is known to be the same up to the order of tokens."""
    shape = tensor(seed).shape
    sizes = Sizes(shape[0], shape[1])
    places = {seed: Place("tokens", spread=True, strided=True)}
    waiting = list(seed.users)
    heapq.heapify(waiting)
    while waiting and len(places) < LARGEST:
        node = heapq.heappop(waiting)
        if node in places or node.op != "call_function":
            continue
        fresh = [item for operand in node.all_input_nodes for item in _chain(operand, places, sizes)]
        for item in fresh:
            found = Place("tokens", spread=True, strided=True) if _is_swap(item) else place(item, places.get, sizes)
            if found is None:
                break
            places[item] = found
        found = place(node, places.get, sizes)
        if found is not None:
            places[node] = found
            fresh.append(node)
        for item in fresh:
            for user in item.users:
                if user not in places and item in places:
                    heapq.heappush(waiting, user)
    return places, sizes


def _chain(node: Node, places: dict[Node, Place], sizes: Sizes) -> list[Node]:
    """From another transposition of the same two dims to ``node``, when only views and copies lie between; else nothing."""
    found: list[Node] = []
    while node not in places and len(found) < 6:
        found.append(node)
        if _is_swap(node):
            same = all(known_equal(*pair) for pair in zip(tensor(node).shape[:2], sizes))
            return found[::-1] if same and node.args[0] not in places else []
        if not is_reshape(node) or not isinstance(node.args[0], Node):
            return []
        node = node.args[0]
    return []


# ---- what it costs -----------------------------------------------------------------------------------------------------


class Exits(NamedTuple):
    """Where results leave a region: ``back``, transpositions that undo its own; ``others``, nodes that want the order as it was."""

    back: list[tuple[Node, Node]]
    others: list[tuple[Node, Node]]


class Stays(Exception):
    """Why a region is left alone."""


def _exits(places: dict[Node, Place]) -> Exits:
    found = Exits([], [])
    for node, where in places.items():
        for user in node.users:
            if user in places or (where.parts is not None and not user.users):
                continue
            if where.parts is not None or where.kind in ("rows", "route"):
                raise Stays(f"{user.name} uses {node.name}, which is in the order of the received rows")
            if where.kind == "tokens":
                if read_by_strides(node):
                    raise Stays(f"its tokens are transposed, and {node.name} is read by strides, where it lies")
                (found.back if _order_back(user, where) is not None else found.others).append((node, user))
    return found


def _order_back(user: Node, where: Place) -> list[int] | None:
    """The order of dims that a permute leaves to do when the tokens were never transposed; None when it transposes nothing back."""
    if user.target not in PERMUTES or not where.spread:
        return None
    order = axes.permutation(user, tensor(user).dim()) or []
    for first in range(len(order) - 1):
        if order[first : first + 2] == [where.axis + 1, where.axis]:
            return [*order[:first], where.axis, where.axis + 1, *order[first + 2 :]]
    return None


def _bytes(node: Node, where: Place | None) -> int:
    """Bytes of one token; a great number where they are not known."""
    given = tensor(node)
    spread = where is not None and where.spread
    axis = 0 if where is None else where.axis
    others = [size for dim, size in enumerate(given.shape) if dim not in ((axis, axis + 1) if spread else (axis,))]
    if not all(isinstance(size, int) for size in others):
        return 1 << 40
    product = given.element_size()
    for length in others:
        product *= length
    return product


def _worth(places: dict[Node, Place], exits: Exits, entries: list[Node]) -> None:
    """Raises `Stays` unless fewer bytes are copied than before."""
    saved = 0
    for node, where in places.items():
        before = places.get(node.args[0]) if node.args and isinstance(node.args[0], Node) else None
        if where.kind == "tokens" and is_reshape(node) and before is not None and before.strided and not where.strided:
            saved += _bytes(node, where)
    for node, user in exits.back:
        if any(other.target in COPIES or _merges(other, user) for other in user.users):
            saved += _bytes(node, places[node])
    spent = sum(_bytes(node, places[node]) for node in dict.fromkeys(node for node, _ in exits.others))
    spent += sum(_bytes(node, None) for node in entries)
    if spent >= saved:
        names = ", ".join(dict.fromkeys(node.name for node, _ in exits.others)) or "what else it reads"
        raise Stays(f"its tokens are transposed, and as many bytes would have to be transposed elsewhere ({names})")


def _merges(node: Node, of: Node) -> bool:
    return is_reshape(node) and tensor(node).dim() < tensor(of).dim()


# ---- the rewrite -------------------------------------------------------------------------------------------------------


def _move(graph: Graph, seed: Node, written: list[Node]) -> int:
    places, sizes = _grow(seed)
    dispatches = [node for node in places if op_name(node) in DISPATCHES]
    if not dispatches:
        return 0
    region = sorted(places)
    entries = list(dict.fromkeys(
        item for node in dispatches for item in node.args if isinstance(item, Node) and item not in places
    ))  # fmt: skip
    try:
        if len(places) >= LARGEST:
            raise Stays("its tokens are transposed, and too much depends on their order")
        if any(region[0] < node < region[-1] for node in written):
            raise Stays("its tokens are transposed, and memory is written in place before they are transposed back")
        if any(_is_swap(node) and node.args[0] in places for node in region):
            raise Stays("its tokens are transposed twice")
        exits = _exits(places)
        _worth(places, exits, entries)
    except Stays as reason:
        for node in dispatches:
            declined(RULE, node, str(reason))
        return 0
    twins: dict[Node, Node] = {}
    source = seed.args[0]
    assert isinstance(source, Node)
    with graph.inserting_before(region[0]):
        sizes = Sizes(size(graph, source, 1), size(graph, source, 0))
    for node in region:
        _twin(graph, node, places, twins, sizes)
    for node, user in exits.back:
        order = _order_back(user, places[node])
        with graph.inserting_before(user):
            result = twins[node]
            if order != list(range(len(order or ()))):
                result = call(graph, aten.permute.default, (result, order), like=user)
        user.replace_all_uses_with(result)
        graph.erase_node(user)
    for node in dict.fromkeys(node for node, _ in exits.others):
        with graph.inserting_before(node):
            result = _transposed(graph, twins[node], places[node], sizes)
        _hand_over(node, result, places)
    for node in region:
        if places[node].kind == "same" and places[node].parts is None:
            _hand_over(node, twins[node], places)
    inputs = [item for node in region for item in node.all_input_nodes if item not in places]
    for node in reversed(region):
        for user in list(node.users):  # results that nobody takes
            graph.erase_node(user)
        graph.erase_node(node)
    erase_unused(inputs)
    return len(dispatches)


def _hand_over(node: Node, result: Node, places: dict[Node, Place]) -> None:
    for user in list(node.users):
        if user not in places:
            user.replace_input_with(node, result)


def _twin(graph: Graph, node: Node, places: dict[Node, Place], twins: dict[Node, Node], sizes: Sizes) -> None:
    """Add what ``node`` computes when the tokens stand as they were before the transposition."""
    where = places[node]
    if _is_swap(node) and node.args[0] not in places:
        twins[node] = node.args[0]
        return
    if node.target in COPIES and places[node.args[0]].strided:
        twins[node] = twins[node.args[0]]
        return
    if node.args[0] in twins and is_whole_slice(node):  # its end is of the dim as it is
        twins[node] = twins[node.args[0]]
        return
    with graph.inserting_before(node):
        back = Sizes(sizes.inner, sizes.outer)
        mine = {
            item: twins[item] if item in twins else _transposed(graph, item, Place("tokens"), back)
            for item in node.all_input_nodes
            if item in twins or (op_name(node) in DISPATCHES and tensor(item) is not None)
        }
        args, kwargs = map_arg((node.args, node.kwargs), lambda item: mine.get(item, item))
        target = node.target
        if where.kind == "tokens" and (target in VIEWS or target is aten.expand.default):
            shape = list(args[1])
            if where.spread:
                shape[where.axis], shape[where.axis + 1] = shape[where.axis + 1], shape[where.axis]
            args = (args[0], shape, *args[2:])
            target = aten.reshape.default if target in VIEWS else target
        twins[node] = call(graph, target, args, kwargs, like=node)


def _transposed(graph: Graph, node: Node, where: Place, sizes: Sizes) -> Node:
    """``node``, whose tokens lie by (inner, outer), with them by (outer, inner)."""
    rank = tensor(node).dim()
    order = list(range(rank + (0 if where.spread else 1)))
    order[where.axis], order[where.axis + 1] = where.axis + 1, where.axis
    if where.spread:
        return call(graph, aten.permute.default, (node, order), like=node)
    shape = [size(graph, node, dim) for dim in range(rank)]
    before, after = shape[: where.axis], shape[where.axis + 1 :]
    split = call(graph, aten.reshape.default, (node, [*before, sizes.inner, sizes.outer, *after]), like=node)
    moved = call(graph, aten.permute.default, (split, order), like=node)
    return call(graph, aten.reshape.default, (moved, shape), like=node)
