"""The page that `Inspection.save` writes: each graph as a picture, before and after side by side.

One file without network: data as JSON inside it, drawn by the script in `page_template`.  Every string from a graph enters the
page as text, never as markup.
"""

from __future__ import annotations

import json
from typing import Any

from torch.fx import Node

from .capture import PassedGraph
from .page_template import TEMPLATE
from .report import headings, summary_lines
from .text import Line, graph_lines, names_of
from .wire import exchange_of, is_product


def page(graphs: list[PassedGraph], title: str = "epops.inspect") -> str:
    """The whole page as text."""
    data = {"title": title, "graphs": [_graph(graph) for graph in graphs]}
    return TEMPLATE.replace("__DATA__", for_script(data))


def for_script(data: Any) -> str:
    """JSON that may stand inside a script element: nothing in it can end the element or begin another."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _graph(graph: PassedGraph) -> dict[str, Any]:
    kind, *facts = summary_lines(graph)
    old = {node.name: _call(node) for node in graph.before.graph.nodes}
    new = {node.name: _call(node) for node in graph.after.graph.nodes}
    return {
        "kind": kind,
        "headings": [heading[0].upper() + heading[1:] for heading in headings(graph)],
        "facts": [fact.strip() for fact in facts],
        "before": _side(graph.before, new),
        "after": _side(graph.after, old),
    }


def _side(module: Any, other: dict[str, str]) -> list[dict[str, Any]]:
    """Nodes of one graph; those that the other graph has not, or calls differently where it is an exchange, are marked."""
    by_name = {name: node for node, name in names_of(module).items()}
    nodes = []
    for line in graph_lines(module):
        node = by_name.get(line.name)
        kind = _kind(line, node)
        marked = node is not None and kind not in ("input", "output") and node.name not in other
        if node is not None and kind == "exchange" and other.get(node.name) not in (None, _call(node)):
            marked = True
        nodes.append(
            {
                "name": line.name,
                "twin": line.name if node is None else node.name,
                "op": line.op,
                "shape": line.shape,
                "text": line.text,
                "kind": kind,
                "marked": marked,
                "inputs": [_owner(name, by_name) for name in line.inputs],
                "after": [_owner(name, by_name) for name in line.after],
            }
        )
    return nodes


def _kind(line: Line, node: Node | None) -> str:
    if line.op in ("input", "constant"):
        return "input"
    if line.op == "return" or node is None:
        return "output"
    if exchange_of(node) is not None or line.op.endswith(("_wait", ".wait_tensor")):
        return "exchange"
    return "product" if is_product(node) else "other"


def _owner(name: str, known: dict[str, Node]) -> str:
    """The node that a result such as ``%dispatch.rows`` is one of."""
    base = name.partition("[")[0]
    node = known.get(name)
    if node is not None and node.target is not None and getattr(node.target, "__name__", "") == "getitem":
        return base.rpartition(".")[0] if base == name else base
    return name


def _call(node: Node) -> str:
    return f"{node.target} {node.args} {node.kwargs}"
