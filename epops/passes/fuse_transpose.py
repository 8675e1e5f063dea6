"""Transposes around an all-to-all become the dims that it scatters and gathers."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from . import axes, pieces, token_order
from .all_to_all_calls import RULE, Exchange, Plan, read_exchange, split_tensors, write_exchange
from .axes import Atom, Dims
from .decline_log import declined
from .graph_facts import (
    COPIES,
    PERMUTES,
    is_reshape,
    known_equal,
    nothing_written_between,
    tensor,
)


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
        exchange = read_exchange(node)
        if exchange is not None:
            count += _fuse(graph, exchange)
    return count


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
    splits = split_tensors(graph, exchange)
    if splits is None:
        declined(RULE, exchange.node, "its splits are neither numbers nor the entries of one tensor")
        return 0
    write_exchange(graph, exchange, source, plan, splits)
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
