"""keep_order: exchanges of one group run in the order in which the program made them, on every rank."""

from __future__ import annotations

from torch.fx import Graph, Node

from ..schema import EXCHANGES
from .ordering import run_after


def exchange_name(node: Node) -> str | None:
    """Op name of an epops exchange, or None."""
    if node.op != "call_function":
        return None
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.name.startswith("epops::"):
        return None
    name = schema.name.removeprefix("epops::")
    return name if name in EXCHANGES else None


def keep_order(graph: Graph) -> int:
    """Pin the order of each group's exchanges.

    Rewrite: a … b, exchanges of one group with no data from a to b → b waits for a.
    Requires: nothing; always on, and never decided by a rank's own sizes.
    Guarantees: Inductor's scheduler and memory planner leave the exchanges of a group in trace order, which is the same on
    every rank that runs the same program; exchanges that depend on one another by data get no pin.
    """
    pins = 0
    latest: dict[str, tuple[int, Node]] = {}
    reach: dict[Node, dict[str, int]] = {}
    for node in graph.nodes:
        seen: dict[str, int] = {}
        for source in node.all_input_nodes:
            for group, index in reach[source].items():
                if index > seen.get(group, -1):
                    seen[group] = index
        if exchange_name(node) is not None:
            group = str(node.kwargs.get("group"))
            if group in latest:
                index, before = latest[group]
                if seen.get(group, -1) < index:
                    run_after(node, [before])
                    pins += 1
            index = latest[group][0] + 1 if group in latest else 0
            latest[group] = (index, node)
            seen = {**seen, group: index}
        reach[node] = seen
    return pins
