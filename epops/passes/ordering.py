"""Orders that the compiler must keep: passes say them with `run_after`, and `pin` writes them all into the graph at once.

Inductor's ordering wrapper hides the node that it wraps, so it is put on last, after every pass has seen the plain nodes.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Graph, Node

from ..torch_private import preserve_node_ordering

_NOTE = "epops_after"


def run_after(node: Node, before: Iterable[Node]) -> None:
    """Ask that ``node`` run after each of ``before`` (nodes that stand before it in the graph)."""
    wanted = node.meta.setdefault(_NOTE, [])
    wanted.extend(other for other in before if other not in wanted and other is not node)


def asked(graph: Graph) -> dict[Node, list[Node]]:
    """All orders asked for so far, in graph order; nodes that a later pass removed are left out."""
    alive = set(graph.nodes)
    found = {node: [other for other in node.meta.get(_NOTE, ()) if other in alive] for node in graph.nodes}
    return {node: before for node, before in found.items() if before}


def pin(graph: Graph) -> int:
    """Write every order that was asked for into the graph; returns how many nodes got one."""
    wanted = asked(graph)
    for node in wanted:
        del node.meta[_NOTE]
    if wanted:
        preserve_node_ordering(graph, wanted)
    return len(wanted)
