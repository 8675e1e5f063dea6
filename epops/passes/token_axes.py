"""Where tokens are in what a node computes, when the tokens of its inputs stand in another order.

`place` answers for one node: its result holds the same tokens in the other order along one axis (or two neighbouring ones, a
batch and its positions), rows of a dispatch of them, or nothing that depends on their order.  None: no rule proves it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from .. import layout
from . import axes
from .axes import Atom
from .graph_facts import (
    COPIES,
    PERMUTES,
    arguments,
    aten,
    is_cast,
    is_random,
    is_reshape,
    known_equal,
    op_name,
    tensor,
    value,
    writes,
)


class Place(NamedTuple):
    """``kind``: "tokens" in the other order, "rows" of a dispatch of them, its "route", or "same": what it would be anyway.

    ``axis``: where they are; ``spread``: along ``axis`` and ``axis + 1``, unmerged.  ``strided``: a view of what was transposed,
    not copied yet.  ``parts``: one place a result of an op with several.  ``routing``: of which dispatch rows, a route and ends
    are; rows of another one are elsewhere.
    """

    kind: str
    axis: int = 0
    spread: bool = False
    strided: bool = False
    parts: tuple[Place | None, ...] | None = None
    routing: Any = None


Known = Callable[[Any], Place | None]
SAME = Place("same")
ROWS = Place("rows")
TOKENS = Place("tokens")


class Sizes(NamedTuple):
    """The two dims that were exchanged, in the order that the program has now."""

    outer: Any
    inner: Any


def place(node: Node, known: Known, sizes: Sizes) -> Place | None:
    """Where tokens are in the result of ``node``; ``known`` has the places of its inputs, None for what is from elsewhere."""
    if node.op != "call_function" or writes(node):
        return None
    if node.target is operator.getitem:
        found = known(node.args[0])
        if found is None or found.parts is None or node.args[1] >= len(found.parts):
            return None
        return found.parts[node.args[1]]
    if op_name(node) is not None:
        return _exchange(node, known)
    if node.target in GROUPED:
        return _grouped(node, known)
    if is_random(node):
        return None
    inputs = {item: found for item in node.all_input_nodes if (found := known(item)) is not None}
    if any(found.parts is not None or found.kind == "route" for found in inputs.values()):
        return None
    moving = {item: found for item, found in inputs.items() if found.kind != "same"}
    if not moving:  # ends and counts, brought into the form that a product wants
        result = tensor(node)
        routings = {found.routing for found in inputs.values()}
        same = SAME._replace(routing=routings.pop() if len(routings) == 1 else None)
        return same if inputs and result is not None and result.dim() < 2 else None
    if node.target is aten.sym_size.int:
        return None if moving[node.args[0]].spread else SAME
    if len({found.kind for found in moving.values()}) > 1:
        return None
    rule = _rule(node)
    return None if rule is None else rule(node, moving, sizes)


Moving = dict[Node, Place]
Rule = Callable[[Node, Moving, Sizes], Place | None]


def _rule(node: Node) -> Rule | None:
    if node.target in PERMUTES:
        return _permute
    if is_reshape(node):
        return _reshape
    if node.target in RULES:
        return RULES[node.target]
    if is_cast(node) or torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return _pointwise
    return None


# ---- the same elements in other shapes -----------------------------------------------------------------------------------


def _permute(node: Node, moving: Moving, sizes: Sizes) -> Place | None:
    found = moving[node.args[0]]
    order = axes.permutation(node, tensor(node).dim())
    if order is None:
        return None
    axis = order.index(found.axis)
    if found.spread and order[axis + 1 : axis + 2] != [found.axis + 1]:
        return None  # transposed back, or torn apart
    return found._replace(axis=axis)


VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def _reshape(node: Node, moving: Moving, sizes: Sizes) -> Place | None:
    found = moving[node.args[0]]
    if node.target in COPIES:
        return found._replace(strided=False)
    moved = _reshaped(node, found, sizes)
    # What merges or splits the tokens' dims by any other name has arguments that are of the dims as they are.
    return moved if moved is not None and (moved.spread == found.spread or node.target in VIEWS) else None


def _reshaped(node: Node, found: Place, sizes: Sizes) -> Place | None:
    before, after = tensor(node.args[0]), tensor(node)
    dims = axes.of_shape(before.shape)
    if found.kind == "rows":
        tokens = [Atom(before.shape[found.axis], whole=True)]
        dims[found.axis] = tokens
    else:
        tokens = [Atom(sizes.outer, whole=True), Atom(sizes.inner, whole=True)]
        if found.spread:
            dims[found.axis : found.axis + 2] = [tokens[:1], tokens[1:]]
        else:
            dims[found.axis] = tokens
    result = axes.reshaped(dims, list(after.shape))
    if result is None:
        return None
    if tokens in result:
        copied = found.strided and found.spread
        return found._replace(axis=result.index(tokens), spread=False, strided=found.strided and not copied)
    if found.kind == "tokens" and tokens[:1] in result:
        axis = result.index(tokens[:1])
        return found._replace(axis=axis, spread=True) if result[axis + 1 : axis + 2] == [tokens[1:]] else None
    return None


def _expand(node: Node, moving: Moving, sizes: Sizes) -> Place | None:
    found = moving[node.args[0]]
    before, after = tensor(node.args[0]), tensor(node)
    axis = found.axis + after.dim() - before.dim()
    width = 2 if found.spread else 1
    kept = all(known_equal(before.shape[found.axis + step], after.shape[axis + step]) for step in range(width))
    return found._replace(axis=axis) if kept else None


# ---- element by element, and along other dims ----------------------------------------------------------------------------


def _pointwise(node: Node, moving: Moving, sizes: Sizes) -> Place | None:
    result = tensor(node)
    if result is None:
        return None
    places = {
        found._replace(axis=found.axis + result.dim() - tensor(item).dim(), strided=False)
        for item, found in moving.items()
    }
    if len(places) != 1:
        return None
    found = places.pop()._replace(strided=any(item.strided for item in moving.values()))
    return (
        found if all(item in moving or _without(item, result.dim(), found) for item in node.all_input_nodes) else None
    )


def _without(item: Node, rank: int, found: Place) -> bool:
    """Whether an input has one value for all tokens: by its shape, or because it is filled with one number."""
    given = tensor(item)
    if given is None:
        return not isinstance(item.meta.get("val"), (tuple, list))
    dims = [found.axis + step + given.dim() - rank for step in range(2 if found.spread else 1)]
    return all(dim < 0 or known_equal(given.shape[dim], 1) for dim in dims) or (
        item.target is aten.full.default and not found.spread
    )


def _reduce(node: Node, moving: Moving, sizes: Sizes) -> Place | None:
    given = tensor(node.args[0])
    found = moving[node.args[0]]
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", [])
    dims = [dims] if isinstance(dims, int) else list(dims or range(given.dim()))
    keepdim = bool(node.args[2]) if len(node.args) > 2 else bool(node.kwargs.get("keepdim", False))
    dims = [dim % given.dim() for dim in dims]
    mine = [found.axis, found.axis + 1] if found.spread else [found.axis]
    gone = [dim in dims for dim in mine]
    if all(gone):
        return SAME if node.target in ORDERLESS and found.kind == "tokens" else None
    if any(gone):
        return None
    moved = found._replace(axis=found.axis - (0 if keepdim else sum(dim < found.axis for dim in dims)), strided=False)
    return moved._replace(parts=(moved, moved)) if isinstance(node.meta["val"], (tuple, list)) else moved


def _sum_all(node: Node, moving: Moving, sizes: Sizes) -> Place | None:
    return SAME if moving[node.args[0]].kind == "tokens" else None


def _along(position: int, default: int | None = None) -> Rule:
    """An op that works along one dim, whose number is the argument at ``position``; tokens have to be along another."""

    def rule(node: Node, moving: Moving, sizes: Sizes) -> Place | None:
        given = tensor(node.args[0])
        names = [argument.name for argument in node.target._schema.arguments]
        dim = node.args[position] if len(node.args) > position else node.kwargs.get(names[position], default)
        if not isinstance(dim, int) or given is None:
            return None
        found = _pointwise_of_tensors(node, moving)
        if found is None or dim % given.dim() in ((found.axis, found.axis + 1) if found.spread else (found.axis,)):
            return None
        if node.target is aten.select.int and dim % given.dim() < found.axis:
            found = found._replace(axis=found.axis - 1)
        several = node.meta["val"]
        return found._replace(parts=(found,) * len(several)) if isinstance(several, (tuple, list)) else found

    return rule


def _pointwise_of_tensors(node: Node, moving: Moving) -> Place | None:
    """The one place that all tensors of a call share; those from elsewhere have to be filled with one number."""
    if len({found._replace(strided=False) for found in moving.values()}) != 1:
        return None
    found = next(iter(moving.values()))._replace(strided=False)
    for item in node.all_input_nodes:
        given = tensor(item)
        if item in moving or given is None:
            continue
        if item.target is not aten.full.default or found.spread or not _as_many(given, found, moving):
            return None
    return found


def _as_many(given: torch.Tensor, found: Place, moving: Moving) -> bool:
    """Whether an input has an entry for every token: with fewer, a gather or scatter is of the first ones."""
    tokens = tensor(next(iter(moving)))
    return given.dim() == tokens.dim() and known_equal(given.shape[found.axis], tokens.shape[found.axis])


def _cat(node: Node, moving: Moving, sizes: Sizes) -> Place | None:
    found = _pointwise_of_tensors(node, moving)
    rank = tensor(node).dim()
    dim = (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % rank
    return None if found is None or dim in ((found.axis, found.axis + 1) if found.spread else (found.axis,)) else found


def _lookup(node: Node, moving: Moving, sizes: Sizes) -> Place | None:
    """A table's rows, by number: ``table[numbers]`` or an embedding."""
    table, numbers = node.args[:2]
    if node.target is aten.index.Tensor:
        numbers = numbers[0] if len(numbers) == 1 else None
    if table in moving or numbers not in moving or len(moving) != 1 or tensor(numbers).dtype == torch.bool:
        return None
    return moving[numbers]._replace(strided=False)


# ---- products ----------------------------------------------------------------------------------------------------------


def _product(node: Node, moving: Moving, sizes: Sizes) -> Place | None:
    *bias, left, right = node.args
    if any(found.spread for found in moving.values()) or any(item in moving for item in bias):
        return None
    if bias and tensor(bias[0]).dim() > 1 and not known_equal(tensor(bias[0]).shape[0], 1):
        return None
    places = (moving.get(left), moving.get(right))
    match [found and (found.kind, found.axis) for found in places]:
        case [(_, 0), None]:
            return moving[left]._replace(strided=False)
        case [None, (_, 1)] if not bias:
            return moving[right]._replace(strided=False)
        case [("tokens", 1), ("tokens", 0)] if not bias:
            return SAME
    return None


def _grouped(node: Node, known: Known) -> Place | None:
    """Rows times the matrix of their expert, or the gradient of the matrices; the ends have to be those of the dispatch."""
    left, right, ends = (*node.args, node.kwargs.get("offs"))[:3]
    one, other, found = known(left), known(right), known(ends)
    if found is None or found.routing is None or set(node.all_input_nodes) - {left, right, ends}:
        return None
    rows = ROWS._replace(routing=found.routing)
    if found.kind != "same":
        return None
    if one == rows and other is None and tensor(right).dim() == 3:
        return rows
    summed = (rows, rows) if op_name(node) == "grouped_mm_backward_weight" else (rows._replace(axis=1), rows)
    return SAME if (one, other) == summed and tensor(right).dim() == 2 else None


# ---- exchanges ---------------------------------------------------------------------------------------------------------


def _exchange(node: Node, known: Known) -> Place | None:
    name = str(op_name(node))
    if name in ("grouped_mm", "grouped_mm_backward_weight"):
        return _grouped(node, known)
    given = arguments(node)
    if given.get("layout") != "expert":
        return None
    tokens, rows = EXCHANGES.get(name, ((), ()))
    if not tokens and not rows:
        return None
    if name.startswith("dispatch") and "topk_idx" in given:
        choices = tensor(given["topk_idx"])
        settings = (value(given["max_tokens"]), given["ep_size"], choices.shape[1], given["num_slots"])
        room = layout.capacity("expert", *settings, given["alignment"])
        if known(given["x"]) is None or not known_equal(given["capacity"], room):
            return None  # with less room than the worst case, which rows are dropped depends on their order
        names = ("topk_idx", "group", "num_experts", "num_slots", "max_tokens", "capacity", "alignment")
        routing = tuple(given[name] for name in names)
    else:
        route = known(given["route"])
        if route is None or route.kind != "route":
            return None
        routing = route.routing
    mine = ROWS._replace(routing=routing)
    for word, wanted in [*((word, TOKENS) for word in tokens), *((word, mine) for word in rows)]:
        found = known(given[word]) if isinstance(given[word], Node) else wanted
        outside = found is None and wanted == TOKENS and "topk_idx" in given
        if not outside and (found is None or found._replace(strided=False) != wanted):
            return None
    return Place("same", parts=tuple(part and _routed(part, routing) for part in RESULTS[name]))


def _routed(part: Place, routing: Any) -> Place:
    """A result of an exchange, with the routing that it goes by."""
    return part if part.kind == "tokens" else part._replace(routing=routing)


EXCHANGES = {
    "dispatch": (("x", "topk_idx", "topk_weights", "x_scales"), ()),
    "dispatch_quant": (("x", "topk_idx", "topk_weights"), ()),
    "combine": (("addend",), ("y", "row_weights", "y_scales")),
    "combine_backward": (("grad_out",), ("y", "row_weights", "y_scales")),
    "dispatch_backward": ((), ("grad_rows", "grad_row_weights")),
}
"""Exchange → which arguments hold tokens, and which rows."""

_DISPATCHED = (ROWS, ROWS, ROWS, ROWS, None, SAME, SAME, Place("route"), SAME)  # row_source names tokens by their place

RESULTS: dict[str, tuple[Place | None, ...]] = {
    "dispatch": _DISPATCHED,
    "dispatch_quant": _DISPATCHED,
    "combine": (TOKENS, SAME),
    "combine_backward": (ROWS, ROWS, SAME),
    "dispatch_backward": (TOKENS, TOKENS, SAME),
}

GROUPED = (aten._grouped_mm.default,) if hasattr(aten, "_grouped_mm") else ()

ORDERLESS = (aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default)

_REDUCING = (
    *(*ORDERLESS, aten.max.dim, aten.min.dim, aten.any.dim, aten.logsumexp.default),
    *(aten.var_mean.correction, aten.argmax.default),
)

_ALONG_THE_FIRST_NUMBER = (
    *(aten._softmax.default, aten._log_softmax.default, aten.cumsum.default, aten.gather.default, aten.scatter.src),
    *(aten.scatter.value, aten.scatter_add.default, aten.slice.Tensor, aten.select.int),
)

RULES: dict[Any, Rule] = {
    aten.expand.default: _expand,
    aten.cat.default: _cat,
    aten.index.Tensor: _lookup,
    aten.embedding.default: _lookup,
    aten.mm.default: _product,
    aten.addmm.default: _product,
    aten.sum.default: _sum_all,
    aten.mean.default: _sum_all,
    **dict.fromkeys(_REDUCING, _reduce),
    **dict.fromkeys(_ALONG_THE_FIRST_NUMBER, _along(1, 0)),
    aten.topk.default: _along(2, -1),
    aten.sort.default: _along(1, -1),
    aten.split_with_sizes.default: _along(2, 0),
    aten.split.Tensor: _along(2, 0),
    aten._softmax_backward_data.default: _along(2),
}
