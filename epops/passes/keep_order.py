"""keep_order: exchanges run in the order in which the program made them, on every rank."""

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


def _is_collective(node: Node) -> bool:
    """Whether a node begins a collective of torch.distributed; its ``wait_tensor`` keeps nobody from anything."""
    schema = getattr(node.target, "_schema", None) if node.op == "call_function" else None
    if schema is None or schema.is_mutable:
        return False
    return schema.name.startswith("_c10d_functional::") and schema.name != "_c10d_functional::wait_tensor"


def keep_order(graph: Graph) -> int:
    """Pin the order of the exchanges.

    Rewrite: a … b, exchanges next to one another with no data from a to b → b waits for a.
    Requires: nothing; always on, and never decided by a rank's own sizes.
    Guarantees: Inductor's scheduler and memory planner leave the exchanges in trace order, which is the same on every rank
    that runs the same program; those of different groups too, and the collectives of torch.distributed among them, for a rank
    that waits in one group and a rank that waits in another would wait for ever.  Exchanges that depend on one another by data
    get no pin, nor does a collective after another, whose order Inductor keeps.
    """
    pins = 0
    latest: Node | None = None
    number = begun = -1  # of the latest exchange; of the latest one that is no collective
    last: Node | None = None  # the latter
    reach: dict[Node, int] = {}  # the number of the latest exchange that a node is computed from
    for node in graph.nodes:
        seen = max((reach[source] for source in node.all_input_nodes), default=-1)
        collective = _is_collective(node)
        if collective or exchange_name(node) is not None:
            before, behind = (last, begun) if collective else (latest, number)
            if before is not None and seen < behind:
                if _is_collective(before):
                    run_after(before, before.all_input_nodes[:1])  # one in place can be waited for only if it is pinned
                run_after(node, [before])
                pins += 1
            latest, number = node, number + 1
            if not collective:
                last, begun = node, number
            seen = number
        reach[node] = seen
    return pins
