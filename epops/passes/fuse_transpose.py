"""Transposes around an all-to-all become the dims that it scatters and gathers."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from . import axes, pieces, process_groups, token_order
from .axes import Atom, Dims
from .decline_log import declined
from .graph_facts import (
    COPIES,
    PERMUTES,
    arguments,
    aten,
    is_reshape,
    known_equal,
    nothing_written_between,
    op_name,
    results,
    same_shape,
    tensor,
    value,
)
from .rewriting import call, erase_unused, size

RULE = "fuse_transpose"


def fuse_transpose(graph: Graph) -> int:
    """**Rewrite**::

        x.view(S, R, h, D).transpose(0, 1).contiguous() -> all_to_all -> view(R * S, h, D)
            -> all_to_all(x, scatter_dim=1, gather_dim=0)

    and whatever else views, permutes, copies, cuts up and puts together again (`pieces`) around `epops.all_to_all`, or around
    ``_c10d_functional.all_to_all_single`` and its wait when the process group is that of an epops group; and around a dispatch and
    its combine (`token_order`)::

        x.transpose(0, 1).reshape(-1, H) -> router -> dispatch … combine -> view(B, S, H).transpose(0, 1)
            -> x.view(-1, H) -> router -> dispatch … combine -> view(S, B, H)

    **Requires**: even splits, or splits along dimensions that stay whole; axes that can be followed atom by atom from
    the tensor before the transposes to the one behind them; nobody else who sees what lies between; fewer copies than before.
    Of a dispatch: everything between the transposition and the one back is known to treat tokens alike (`token_axes`), nothing
    else sees the received rows, and there is room for the worst case: which rows a smaller ``capacity`` drops depends on their
    order.

    The ranks have to run the same program, as for every collective: a folded ``all_to_all_single`` goes over the communicator of
    the epops group, so that ranks whose graphs differ would wait for one another, until the group's timeout names the rank that
    did not come.

    **Guarantees**: the same elements at the same places; the exchange stays where it was among the others.  Tokens that are
    dispatched in another order get the values that they had; sums over tokens may be rounded in another order.
    """
    pieces.join_pieces(graph)
    count = token_order.untranspose(graph)
    for node in list(graph.nodes):
        exchange = _read(node)
        if exchange is not None:
            count += _fuse(graph, exchange)
    return count


class Exchange(NamedTuple):
    """An all-to-all as this pass sees it: ``node`` starts it, ``result`` is what arrives."""

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
    scatter_size: Any = None

    @property
    def even(self) -> bool:
        return self.input_splits is None and self.output_splits is None and self.plan is None


def _read(node: Node) -> Exchange | None:
    if op_name(node) == "all_to_all":
        given = arguments(node)
        rows = results(node, 0)
        if len(rows) != 1 or tensor(given["x"]) is None:
            return None
        if any(item.users for item in results(node, 1)):
            declined(RULE, node, "its counts are used, and they are of the dim that it gathers")
            return None
        names = ("group", "ep_size", "scatter_dim", "gather_dim", "input_splits", "output_splits", "plan", "lane")
        return Exchange(node, rows[0], given["x"], *(given[name] for name in (*names, "scatter_size")))
    schema = getattr(node.target, "_schema", None) if node.op == "call_function" else None
    if schema is None or schema.name != "_c10d_functional::all_to_all_single":
        return None
    given = arguments(node)
    waits = [user for user in node.users if str(user.target).startswith("_c10d_functional.wait_tensor")]
    sent, came = given["input_split_sizes"], given["output_split_sizes"]
    name = process_groups.epops_name(str(given["group_name"]), len(sent))
    rows = tensor(given["input"])
    if name is None or len(waits) != 1 or len(node.users) != 1 or rows is None or rows.element_size() > 8:
        return None
    total = rows.shape[0]
    even = all(known_equal(value(item) * len(sent), total) for item in [*sent, *came])
    if even:
        sent = came = None
    return Exchange(node, waits[0], given["input"], name, len(given["input_split_sizes"]), 0, 0, sent, came, None, 0)


# ---- the chains on both sides ------------------------------------------------------------------------------------------


def _chain_before(exchange: Exchange) -> tuple[Node, list[Node]]:
    """The tensor before the transposes, and the nodes from it to the exchange."""
    chain: list[Node] = []
    node = exchange.source
    while _moves_axes(node) and len(node.users) == 1 and tensor(node.args[0]) is not None:
        chain.append(node)
        node = node.args[0]
    return node, chain[::-1]


def _chain_after(exchange: Exchange) -> list[Node]:
    chain: list[Node] = []
    node = exchange.result
    while len(node.users) == 1 and _moves_axes(next(iter(node.users))):
        node = next(iter(node.users))
        chain.append(node)
    return chain


def _moves_axes(node: Any) -> bool:
    return isinstance(node, Node) and (is_reshape(node) or node.target in PERMUTES)


# ---- the rewrite -------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """The exchange to make instead: of ``source`` permuted and split into ``dims``, along two of them."""

    dims: Dims
    order: list[int] | None
    scatter_dim: int
    gather_dim: int
    target: Node


def _fuse(graph: Graph, exchange: Exchange) -> int:
    source, before = _chain_before(exchange)
    after = _chain_after(exchange)
    if not before and not after:
        return 0
    if exchange.even or exchange.scatter_dim == exchange.gather_dim:
        plan = _best_plan(exchange, source, before, after)
    else:
        source, plan = _ragged_plan(exchange, source, before, after)
    if plan is None:
        return 0
    if not nothing_written_between(source, exchange.node) or not nothing_written_between(exchange.node, plan.target):
        declined(RULE, exchange.node, "memory is written in place between it and the transposes around it")
        return 0
    splits = _split_tensors(graph, exchange)
    if splits is None:
        declined(RULE, exchange.node, "its splits are neither numbers nor the entries of one tensor")
        return 0
    _write(graph, exchange, source, plan, splits)
    return 1


def _best_plan(exchange: Exchange, source: Node, before: list[Node], after: list[Node]) -> Plan | None:
    """The plan for the longest chain behind the exchange that needs no permute of the source, or else for all of it."""
    plans: list[Plan] = []
    for length in range(len(after), -1, -1):
        try:
            plan = _plan(exchange, source, before, after[:length])
        except Unfollowed:
            continue
        if plan is None:
            break
        plans.append(plan)
    return next((plan for plan in plans if plan.order is None), plans[0] if plans else None)


def _ragged_plan(exchange: Exchange, source: Node, before: list[Node], after: list[Node]) -> tuple[Node, Plan | None]:
    """Ragged splits of one dim gathered along another: permutes and copies next to the exchange, of dims that stay whole.

    Also the tensor in front of them.  A view further away does not matter.
    """
    while before and not all(map(_keeps_dims, before)):
        source, before = before[0], before[1:]
    target, kept = exchange.result, list[Node]()
    for node in after:
        if not _keeps_dims(node):
            break
        target, kept = node, [*kept, node]
    rank = tensor(source).dim()
    first, last = axes.permuted_by(before, rank), axes.permuted_by(kept, rank)
    saves = _copies(exchange.source, source) or _copies(target, exchange.result)
    if first is None or last is None or not saves:
        return source, None
    order = [first[place] for place in last]
    plan = Plan(
        axes.of_shape(tensor(source).shape),
        order if order != list(range(rank)) else None,
        last.index(exchange.scatter_dim),
        last.index(exchange.gather_dim),
        target,
    )
    return source, plan


class Unfollowed(Exception):
    """A chain whose axes cannot be followed."""


def _plan(exchange: Exchange, source: Node, before: list[Node], after: list[Node]) -> Plan | None:
    """What to do instead; None where that would save nothing."""
    dims = axes.of_shape(tensor(source).shape)
    if not exchange.even and not _mark_ragged(exchange, source, before, dims):
        raise Unfollowed
    current = dims
    for node in before:
        current = _follow(node, current)
    scattered = _scattered_atom(exchange, current)
    if scattered is None:
        raise Unfollowed
    gathered = Atom(exchange.ep_size, whole=True)
    came = [[atom for atom in dim if atom is not scattered] for dim in axes.resolved(current)]
    came[exchange.gather_dim] = [gathered, *came[exchange.gather_dim]]
    if exchange.even:
        gathered.whole = False
    result = came
    if not exchange.even:
        gathered.size = tensor(exchange.result).shape[exchange.gather_dim]
    for node in after:
        if not exchange.even and not _keeps_dims(node):
            raise Unfollowed
        result = _follow(node, result)
    if gathered.parts is not None:
        raise Unfollowed
    return _choose(
        exchange, source, dims, current, came, result, scattered, gathered, after[-1] if after else exchange.result
    )


def _follow(node: Node, dims: Dims) -> Dims:
    found = axes.through(node, dims)
    if found is None:
        raise Unfollowed
    return found


def _mark_ragged(exchange: Exchange, source: Node, before: list[Node], dims: Dims) -> bool:
    """Find the one dim that splits lie along; it must stay whole, so no view may touch it.  Sizes may differ from rank to
    rank here, so nothing may depend on them."""
    if exchange.scatter_dim != exchange.gather_dim or not all(map(_keeps_dims, before)):
        return False
    place = exchange.scatter_dim
    for node in reversed(before):
        if node.target in PERMUTES:
            order = axes.permutation(node, len(dims))
            if order is None:
                return False
            place = order[place]
    dims[place] = [Atom(tensor(source).shape[place], whole=True)]
    return True


def _keeps_dims(node: Node) -> bool:
    return node.target in PERMUTES or node.target in COPIES


def _scattered_atom(exchange: Exchange, dims: Dims) -> Atom | None:
    """What the ranks divide between them: the outermost stretch of R of the dim that is scattered."""
    dim = axes.resolved(dims)[exchange.scatter_dim]
    if not exchange.even:
        return dim[0] if len(dim) == 1 and dim[0].whole else None
    if exchange.ep_size == 1 or not dim:
        return None
    first = dim[0]
    if known_equal(first.size, exchange.ep_size):
        return first
    if first.split(exchange.ep_size):
        return first.parts[0]  # type: ignore[index]
    return None


def _choose(
    exchange: Exchange,
    source: Node,
    dims: Dims,
    sent: Dims,
    came: Dims,
    result: Dims,
    scattered: Atom,
    gathered: Atom,
    target: Node,
) -> Plan | None:
    """An exchange of the source itself that gives ``result``; None when it saves no copy."""
    start, there, arrived, end = (axes.flat(item) for item in (dims, sent, came, result))
    rest = [atom for atom in start if atom is not scattered]
    wanted = [atom for atom in end if atom is not gathered]
    if len(wanted) + 1 != len(end) or (start == there and arrived == end):
        return None
    follower = end[end.index(gathered) + 1] if end[-1] is not gathered else None
    order = None
    if wanted != rest:
        # The exchange reads the source by its strides: that is worth it in place of a copy, not of a mere view.
        if not _copies(exchange.source, source) and not _copies(target, exchange.result):
            return None
        order = _permuted(dims, wanted, scattered)
        if order is None:
            return None
        dims = [axes.resolved(dims)[place] for place in order]
    boundaries = axes.boundary(axes.boundary(dims, scattered), follower)
    scatter = next(place for place, dim in enumerate(boundaries) if scattered in dim)
    behind = boundaries[scatter][1:2]
    if follower is None:
        if not behind and not any(boundaries[scatter + 1 :]):
            gather = scatter
        else:
            boundaries, gather = [*boundaries, []], len(boundaries)
    elif behind == [follower] or (not behind and _next_atom(boundaries, scatter) is follower):
        gather = scatter  # the pieces go where the ranks' share was
    else:
        gather = next(place for place, dim in enumerate(boundaries) if follower in dim)
    split = len(boundaries) != len(dims)
    shapes = [tensor(target).shape, *([tensor(source).shape] if split else [])]
    if (not exchange.even and gather != scatter) or any(
        sum(not isinstance(s, int) for s in shape) > 1 for shape in shapes
    ):
        return None
    return Plan(boundaries, order, scatter, gather, target)


def _copies(end: Node, start: Node) -> bool:
    """Whether the chain from ``start`` to ``end`` copies: by name, or by a reshape that no view can be."""
    node = end
    while node is not start:
        if node.target in COPIES or (is_reshape(node) and not _is_view(tensor(node.args[0]), tensor(node))):
            return True
        node = node.args[0]
    return False


def _is_view(before: torch.Tensor, after: torch.Tensor) -> bool:
    if not all(isinstance(number, int) for number in (*before.shape, *before.stride(), *after.shape)):
        return True
    try:
        torch.empty_strided(before.shape, before.stride(), device="meta").view(after.shape)
    except RuntimeError:
        return False
    return True


def _next_atom(dims: Dims, place: int) -> Atom | None:
    return next((dim[0] for dim in dims[place + 1 :] if dim), None)


def _permuted(dims: Dims, wanted: list[Atom], scattered: Atom) -> list[int] | None:
    """The order of whole dims of the source in which its atoms come as ``wanted``, with the scattered one in its dim."""
    whole = axes.resolved(dims)
    places = {id(atom): place for place, dim in enumerate(whole) for atom in dim}
    order: list[int] = []
    for atom in wanted:
        place = places[id(atom)]
        if not order or order[-1] != place:
            order.append(place)
    order += [place for place in range(len(whole)) if place not in order and scattered not in whole[place]]
    if places[id(scattered)] not in order:
        order.insert(0, places[id(scattered)])
    if len(set(order)) != len(order) or len(order) != len(whole):
        return None
    got = [atom for place in order for atom in whole[place] if atom is not scattered]
    return order if got == wanted else None


def _split_tensors(graph: Graph, exchange: Exchange) -> tuple[Any, Any] | None:
    """The splits as (R,) int64 tensors, or None where they are even."""
    if exchange.even or exchange.plan is not None or isinstance(exchange.input_splits, Node):
        return exchange.input_splits, exchange.output_splits
    if op_name(exchange.node) == "all_to_all":
        return exchange.input_splits, exchange.output_splits
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


def _write(graph: Graph, exchange: Exchange, source: Node, plan: Plan, splits: tuple[Any, Any]) -> None:
    node, target = exchange.node, plan.target
    with graph.inserting_before(node):
        x = source
        if plan.order is not None:
            x = call(graph, aten.permute.default, (x, plan.order), like=node)
        if len(plan.dims) != tensor(x).dim():
            x = call(graph, aten.reshape.default, (x, _sizes(graph, x, plan.dims)), like=node)
        ranks, scatter, gather = exchange.ep_size, plan.scatter_dim, plan.gather_dim
        if exchange.even:
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
    for status in results(node, 2) if op_name(node) == "all_to_all" else []:
        status.replace_input_with(node, made)
    _remove_chain(graph, target, exchange)


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
    if op_name(exchange.node) == "all_to_all":
        return arguments(exchange.node)["out_size"]
    splits = list(exchange.output_splits)
    if all(isinstance(item, int) for item in splits):
        return sum(splits)
    total = splits[0]
    for item in splits[1:]:
        total = call(graph, operator.add, (total, item), like=exchange.node)
    return total
