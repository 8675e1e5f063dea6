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
    read_by_strides,
    reshapes_on_all_ranks,
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

    **Requires**: parts that are even on every rank, because a reshape cut them out as R, axes that can be followed atom by atom
    from the tensor before the transposes to the one behind them, and fewer copies than before; or dimensions that stay whole
    (sizes and splits may then differ from rank to rank, and none of them decides anything; torch's own collective of such parts
    stays on CUDA, where ours would pad them).  Nobody else who sees what lies between.
    Of a dispatch: everything between the transposition and the one back is known to treat tokens alike (`token_axes`), nothing
    else sees the received rows, and there is room for the worst case: which rows a smaller ``capacity`` drops depends on their
    order.

    The ranks have to run the same program, as for every collective: a folded ``all_to_all_single`` goes over the communicator of
    the epops group, so that ranks whose graphs differ would wait for one another, until the group's timeout names the rank that
    did not come.  Cutting or padding rows before the exchange is such a difference where it changes nothing on one rank: torch
    drops it from the graph of that rank before any pass sees it.

    **Guarantees**: the same elements at the same places; the exchange stays where it was among the others.  Tokens that are
    dispatched in another order get the values that they had; sums over tokens may be rounded in another order.
    """
    pieces.join_pieces(graph)
    count = token_order.untranspose(graph)
    fused = _fuse_all(graph)
    count += fused
    while fused:  # the transpose in front of one may be behind another: it goes further up, and is counted once
        fused = _fuse_all(graph)
    return count


def _fuse_all(graph: Graph) -> int:
    count = 0
    for node in list(graph.nodes):
        fused, made = 0, _fuse(graph, node)
        while made is not None:  # what is left around it may be of dims that stay whole
            fused, made = 1, _fuse(graph, made)
        count += fused
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
    if chain and read_by_strides(exchange.result):
        declined(RULE, exchange.node, "what arrives is read by strides, so it has to lie as it does")
        return []
    return chain


def _moves_axes(node: Any) -> bool:
    return isinstance(node, Node) and (reshapes_on_all_ranks(node) or node.target in PERMUTES)


# ---- the rewrite -------------------------------------------------------------------------------------------------------


def _fuse(graph: Graph, node: Node) -> Node | None:
    """The exchange in place of a node and of what is around it; None where it stays as it is."""
    exchange = read_exchange(node)
    if exchange is None:
        return None
    source, before = _chain_before(exchange)
    after = _chain_after(exchange)
    if not before and not after:
        return None
    plan = _best_plan(exchange, source, before, after) if exchange.even else None
    if plan is not None and exchange.counted:
        declined(RULE, exchange.node, "its counts are used, and they are of the dim that it gathers")
        plan = None
    if plan is None:
        source, plan = _whole_dims_plan(exchange, source, before, after)
    if plan is None:
        return None
    if not plan.even and exchange.torchs and tensor(source).device.type != "cpu":
        declined(
            RULE, exchange.node, "its parts may differ from rank to rank, and over nccl all would be padded to one size"
        )
        return None
    if not nothing_written_between(source, exchange.node) or not nothing_written_between(exchange.node, plan.target):
        declined(RULE, exchange.node, "memory is written in place between it and the transposes around it")
        return None
    splits = split_tensors(graph, exchange, plan.even)
    if splits is None:
        declined(RULE, exchange.node, "its splits are neither numbers nor the entries of one tensor")
        return None
    return write_exchange(graph, exchange, source, plan, splits)


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


def _whole_dims_plan(
    exchange: Exchange, source: Node, before: list[Node], after: list[Node]
) -> tuple[Node, Plan | None]:
    """Permutes and copies next to the exchange, of dims that stay whole; also the tensor in front of them.

    Sizes and splits may differ from rank to rank here, and all ranks have to come to the same exchange.  So which dims it has is
    decided by none of them, nor by whether there is a copy: of a transposed dim of size 1 there is none on this rank, and there may
    be on others.
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
    plain = list(range(rank))
    if first is None or last is None:
        return source, None
    # With nothing behind it, ours keeps its dims: then a copy in front is all that there is to save.
    if last == plain and (first == plain if exchange.torchs else not any(node.target in COPIES for node in before)):
        return source, None
    order = [first[place] for place in last]
    plan = Plan(
        axes.of_shape(tensor(source).shape),
        order if order != plain else None,
        last.index(exchange.scatter_dim),
        last.index(exchange.gather_dim),
        target,
        even=False,
    )
    return source, plan


class Unfollowed(Exception):
    """A chain whose axes cannot be followed."""


def _plan(exchange: Exchange, source: Node, before: list[Node], after: list[Node]) -> Plan | None:
    """What to do instead, of parts that are equal on every rank; None where that would save nothing."""
    dims = axes.of_shape(tensor(source).shape)
    own = [atom for dim in dims for atom in dim]
    current = dims
    for node in before:
        current = _follow(node, current)
    scattered = _scattered_atom(exchange, current, own)
    if scattered is None:
        raise Unfollowed
    gathered = Atom(exchange.ep_size, whole=True)
    came = [[atom for atom in dim if atom is not scattered] for dim in axes.resolved(current)]
    came[exchange.gather_dim] = [gathered, *came[exchange.gather_dim]]
    gathered.whole = False
    result = came
    for node in after:
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


def _keeps_dims(node: Node) -> bool:
    return node.target in PERMUTES or node.target in COPIES


def _scattered_atom(exchange: Exchange, dims: Dims, own: list[Atom]) -> Atom | None:
    """What the ranks divide between them: the outermost stretch of the dim that is scattered, of just R.

    One that a reshape cut out as R, so that it is R on every rank.  That a size of the source, or how many tokens there are, can be
    divided by R says nothing of the other ranks, whose splits may be uneven.
    """
    dim = axes.resolved(dims)[exchange.scatter_dim]
    if exchange.ep_size == 1 or not dim or not known_equal(dim[0].size, exchange.ep_size):
        return None
    return None if any(dim[0] is atom for atom in own) else dim[0]


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
    if any(sum(not isinstance(s, int) for s in shape) > 1 for shape in shapes):
        return None
    return Plan(boundaries, order, scatter, gather, target, even=True)


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
