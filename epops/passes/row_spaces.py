"""Which nodes are read at valid rows only: by a grouped product, an exchange, or what such nodes alone read.

A row space is named by what its rows end at: ``expert_ends`` of a dispatch, or an input of the graph that holds them.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch.fx import Graph, Node
from torch.fx.node import map_arg

from ..row_program import parse
from .graph_facts import arguments, aten, epops_calls, is_cast, is_reshape, op_name, results, tensor
from .row_steps import SPLITS, Step, by_row, filled, same_rows, step_of

DISPATCHES = ("dispatch", "dispatch_wait", "dispatch_quant", "dispatch_quant_wait")
ROW_EXPERT, ENDS, ROUTE = 3, 6, 7
GROUPED_MM = getattr(getattr(aten, "_grouped_mm", None), "default", None)

TURNS = (aten.t.default, aten.permute.default, aten.transpose.int)

ROW_ARGUMENTS = {
    "combine": ("y", "row_weights", "y_scales"),
    "combine_start": ("y", "row_weights", "y_scales"),
    "combine_wait": ("y", "row_weights", "y_scales"),
    "combine_backward": ("y", "row_weights", "y_scales"),
    "combine_backward_start": ("y", "row_weights", "y_scales"),
    "combine_backward_wait": ("y", "row_weights", "y_scales"),
    "dispatch_backward": ("grad_rows", "grad_row_weights"),
    "dispatch_backward_start": ("grad_rows", "grad_row_weights"),
    "dispatch_backward_wait": ("grad_rows", "grad_row_weights"),
}
"""Exchanges that find the rows they read by the route, and so read none after the last end."""


class Space(NamedTuple):
    """Rows that end at ``ends``, of which there is room for ``rows``."""

    ends: Node
    rows: Any


def ends_of(node: Any) -> Node | None:
    """One node for the ends of a dispatch, however often they are taken."""
    if isinstance(node, Node) and node.target is operator.getitem and op_name(node.args[0]) in DISPATCHES:
        if node.args[1] == ENDS:
            return results(node.args[0], ENDS)[0]
    return node if isinstance(node, Node) else None


def row_reads(node: Node) -> Iterator[tuple[Node, Node]]:
    """(ends, tensor) for each argument of which a node reads the rows before ``ends`` and no others."""
    name = op_name(node)
    if GROUPED_MM is not None and node.target is GROUPED_MM:
        yield from _grouped_mm(node)
    elif name == "grouped_mm":
        yield from _pairs(node.args[2], node.args[:1])
    elif name == "scaled_grouped_mm":
        yield from _pairs(node.args[2], [node.args[0], node.args[3]])
    elif name == "grouped_mm_backward_weight":
        yield from _pairs(node.args[2], node.args[:2])
    elif name == "map_rows":
        inputs = parse(node.kwargs["program"]).inputs
        yield from _pairs(node.args[1], [item for item, line in zip(node.args[0], inputs) if line.by_row])
    elif node.target is aten.index_put.default:
        ends = _ends_of_sum(node)
        if ends is not None:
            yield from _pairs(ends, node.args[2:3])
    elif name in ROW_ARGUMENTS:
        given = arguments(node)
        route = given["route"]
        if given["layout"] != "expert" or not isinstance(route, Node) or route.target is not operator.getitem:
            return
        sent = route.args[0]
        if op_name(sent) in DISPATCHES and route.args[1] == ROUTE and results(sent, ENDS):
            yield from _pairs(results(sent, ENDS)[0], [given.get(word) for word in ROW_ARGUMENTS[name]])


def _pairs(ends: Any, tensors: Any) -> Iterator[tuple[Node, Node]]:
    found = ends_of(ends)
    if found is not None:
        yield from ((found, item) for item in tensors if isinstance(item, Node))


def _grouped_mm(node: Node) -> Iterator[tuple[Node, Node]]:
    """``rows @ weight``, or the weight's gradient, ``rows.t() @ rows``; a bias would be of all rows."""
    given = arguments(node)
    left, right, ends = given["self"], given["mat2"], given["offs"]
    if ends is None or given.get("bias") is not None or tensor(left) is None or tensor(right) is None:
        return
    ranks = (tensor(left).dim(), tensor(right).dim())
    if ranks == (2, 3):
        yield from _pairs(ends, [left])
    elif ranks == (2, 2):
        yield from _pairs(ends, [right])


def _ends_of_sum(node: Node) -> Node | None:
    """``expert_ends`` of the dispatch whose ``row_expert`` says where ``index_put`` adds rows up, as a gathered bias's gradient
    does, with what padding adds thrown away; None when it is not proved.
    """
    total = tensor(node)
    if (
        len(node.args) < 4
        or node.args[3] is not True
        or len(node.args[1]) != 1
        or total is None
        or node.args[0] is node.args[2]
    ):
        return None
    last = total.shape[0] - 1
    # Row numbers of padding are -1 in row_expert, and here the last row, which everybody cuts off.
    drops = [0] * (2 * total.dim() - 1) + [-1]
    if not isinstance(last, int) or not all(
        user.target is aten.constant_pad_nd.default and list(user.args[1]) == drops for user in node.users
    ):
        return None
    index = node.args[1][0]
    while is_cast(index) or is_reshape(index):
        index = index.args[0]
    if (
        not isinstance(index, Node)
        or index.target not in (aten.where.self, aten.where.ScalarSelf)
        or len(index.args) != 3
    ):
        return None
    negative, filler, expert = index.args
    number = filled(filler) if isinstance(filler, Node) else filler
    if number != last or not isinstance(negative, Node) or negative.target is not aten.lt.Scalar:
        return None
    if tuple(negative.args) != (expert, 0) or not isinstance(expert, Node) or expert.target is not operator.getitem:
        return None
    sent = expert.args[0]
    if op_name(sent) not in DISPATCHES or expert.args[1] != ROW_EXPERT or arguments(sent)["layout"] != "expert":
        return None
    found = results(sent, ENDS)
    return found[0] if found else None


def turned(node: Node, user: Node) -> Iterator[tuple[Node, Node]]:
    """(ends, ``node``) where ``user`` is its transpose and only weights' gradients take that, as their first factor."""
    if user.target not in TURNS or tensor(user).dim() != 2:
        return
    for product in user.users:
        given = arguments(product) if GROUPED_MM is not None and product.target is GROUPED_MM else {}
        ends = ends_of(given.get("offs"))
        whole = ends is None or given["self"] is not user or given["mat2"] is user or given.get("bias") is not None
        if whole or tensor(given["mat2"]) is None or tensor(given["mat2"]).dim() != 2:
            return
        yield ends, node


class Needs:
    """Of a graph: the nodes of which valid rows alone are read, each with its space."""

    def __init__(self, graph: Graph) -> None:
        self.rows: dict[Node, Any] = {}
        for node in graph.nodes:
            for ends, item in [*row_reads(node), *(pair for user in node.users for pair in turned(node, user))]:
                if tensor(item) is not None:
                    self.rows.setdefault(ends, tensor(item).shape[0])
        self.space: dict[Node, Space] = {}
        self.step: dict[Node, Step] = {}
        self.why_not: dict[Node, str] = {}
        for node in reversed(graph.nodes):
            self._visit(node)

    def _visit(self, node: Node) -> None:
        if node.op != "call_function" or not node.users:
            return
        spaces = [self._of_use(node, user) for user in node.users]
        known = [space for space in spaces if space is not None]
        if not known:
            return
        space = known[0]
        if len(known) != len(spaces):
            others = [user.name for user, found in zip(node.users, spaces) if found is None]
            others = ["the graph's caller" if name == "output" else name for name in others]
            self.why_not[node] = f"{', '.join(others)} may read rows of it that no expert has"
        elif any(other.ends is not space.ends for other in known):
            self.why_not[node] = "its readers end at different expert_ends"
        elif node.target in SPLITS:
            if same_rows(node.args[0], space.rows):
                self.space[node] = space
        else:
            step = step_of(node, space.rows)
            if isinstance(step, str):
                self.why_not[node] = step
            else:
                self.space[node], self.step[node] = space, step

    def _of_use(self, node: Node, user: Node) -> Space | None:
        """The space whose rows a user reads of a node; None when it may read others."""
        pairs = [pair for pair in [*row_reads(user), *turned(node, user)] if pair[1] is node]
        if pairs:
            times = times_read(node, user)
            one = all(ends is pairs[0][0] for ends, _ in pairs)
            enough = times == len(pairs) or user.target in TURNS
            return Space(pairs[0][0], self.rows[pairs[0][0]]) if one and enough else None
        space = self.space.get(user)
        if space is None or user.target in SPLITS:
            return space
        step = self.step[user]
        if user.target is operator.getitem:
            return space
        return space if by_row(node, step, user, space.rows) else None

    def outputs(self) -> list[Node]:
        """Nodes that something outside reads at valid rows, in graph order."""
        found = [
            node for node in self.step if any(user not in self.space for user in node.users)
        ]  # everyone who is not in the space reads valid rows
        return sorted(found)


def times_read(node: Node, user: Node) -> int:
    """How often a node stands among the arguments of another."""
    found: list[Node] = []
    map_arg((user.args, user.kwargs), found.append)
    return sum(item is node for item in found)


def has_grouped(graph: Graph) -> bool:
    """Whether a graph has rows grouped by expert at all."""
    return bool(epops_calls(graph, ("grouped_mm", "grouped_mm_backward_weight", "scaled_grouped_mm"))) or any(
        node.target is GROUPED_MM for node in graph.nodes
    )
