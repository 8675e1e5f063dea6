"""`inspect`: the graphs of a model before and after the passes, what each pass did, left alone, and saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..backend import read_options
from ..passes.decline_log import Declined
from .capture import PassedGraph, capture
from .text import graph_text, names_of
from .wire import overlaps, wire_bytes


class Inspection:
    """What the compiler did with a model.  ``str()`` is stable text; `save` writes a page for a person."""

    def __init__(self, graphs: list[PassedGraph]) -> None:
        self.graphs = graphs

    @property
    def rewrites(self) -> dict[str, int]:
        """Rewrites of each pass in all graphs."""
        total: dict[str, int] = {}
        for graph in self.graphs:
            for name, count in graph.rewrites.items():
                total[name] = total.get(name, 0) + count
        return total

    def summary(self) -> str:
        """What happened, without the graphs."""
        return "\n\n".join([*pieces(self.graphs), *("\n".join(summary_lines(graph)) for graph in self.graphs)])

    def __str__(self) -> str:
        parts = pieces(self.graphs)
        for graph in self.graphs:
            parts.append("\n".join(summary_lines(graph)))
            before, after = headings(graph)
            parts.append(f"{before}:\n{_indented(graph_text(graph.before))}")
            parts.append(f"{after}:\n{_indented(graph_text(graph.after))}")
        return "\n\n".join(parts)

    def __repr__(self) -> str:
        return f"<epops.Inspection of {len(self.graphs)} graphs: {self.rewrites}>"

    def save(self, path: str | Path) -> Path:
        """Write the page: one HTML file that needs nothing else.  Returns its path."""
        from .page import page

        path = Path(path)
        path.write_text(page(self.graphs), encoding="utf-8")
        return path


def inspect(
    model: Callable[..., Any],
    *args: Any,
    options: dict[str, Any] | None = None,
    dynamic: bool | None = None,
    fullgraph: bool = False,
    **kwargs: Any,
) -> Inspection:
    """What ``torch.compile(model, backend="epops")`` does with ``model(*args, **kwargs)``.

    Nothing of a graph runs: no code is generated, no exchange takes place, so that one rank alone may ask; what stands between the
    graphs of a model that breaks does run, on zeros.  What `torch.compile` made before in this process is forgotten, and is made
    anew when it is called.  Where a result needs gradients
    there are three graphs: the joint graph, as the program wrote it and as the passes over it left it, and the forward and the
    backward graph that it is then divided into, which so begin with its rewrites in them (`headings` says so).

    Args:
        model: a module or function; its expert group is open.
        options: as for the backend: ``{"passes": …}``, and settings of Inductor.
        dynamic, fullgraph: as for ``torch.compile``.

    Raises: what compiling the model raises.
    """
    from torch._inductor import config

    passes, _, settings = read_options(options)
    with config.patch(settings):
        graphs, _ = capture(model, *args, passes=passes, dynamic=dynamic, fullgraph=fullgraph, **kwargs)
    return Inspection(graphs)


def pieces(graphs: list[PassedGraph]) -> list[str]:
    """What there is to say of how many graphs a model became, if it is not one."""
    count = sum(graph.kind in ("joint", "inference") for graph in graphs)
    if count == 0:
        return ["no graph was compiled, and the call ran as it is; with fullgraph=True torch.compile says why"]
    if count > 1:
        return [
            f"{count} graphs: torch.compile breaks the model between them; with fullgraph=True it says where and why"
        ]
    return []


def headings(graph: PassedGraph) -> tuple[str, str]:
    """What a graph's ``before`` and ``after`` are: only a graph that no pass saw earlier is called plainly "before"."""
    if graph.kind == "joint":
        return "before any pass", "after the passes over the joint graph"
    if graph.kind in ("forward", "backward"):
        return "before its own passes, after the joint graph's rewrites", "after"
    return "before", "after"


def summary_lines(graph: PassedGraph) -> list[str]:
    """Rewrites, bytes, overlaps and declined places of one graph."""
    lines = [f"{graph.kind} graph"]
    counts = ", ".join(f"{name} {count}" for name, count in graph.rewrites.items())
    lines.append(f"  rewrites: {counts or 'no pass ran'}")
    moved = wire_bytes(graph.before.graph), wire_bytes(graph.after.graph)
    divided = graph.kind in ("forward", "backward")
    words = ("after the joint graph's rewrites", "after all") if divided else ("before", "after")
    lines.append(f"  bytes that leave a rank, at most: {moved[0]} {words[0]}, {moved[1]} {words[1]}")
    if graph.kind == "joint":
        lines.append("  what runs are its two parts, the forward and the backward graph")
    names = names_of(graph.after)
    for one in overlaps(graph.after.graph):
        beside = ", ".join(names[node] for node in one.beside) or "no product"
        lines.append(f"  {names[one.start]} runs beside {beside}")
    return [*lines, *(f"  {entry}" for entry in declined(graph))]


def declined(graph: PassedGraph) -> list[Declined]:
    """What the passes left alone in one graph, in the names of its text; what a pass made is named as in the graph after."""
    names = {node.name: f"{name} (after)" for node, name in names_of(graph.after).items()}
    names |= {node.name: name for node, name in names_of(graph.before).items()}
    return [
        entry._replace(node=names.get(entry.node, entry.node), reason=renamed(entry.reason, names))
        for entry in graph.declined
    ]


def renamed(reason: str, names: dict[str, str]) -> str:
    """A reason with the graph's node names in place of those that FX made up."""
    return " ".join(
        names.get(word.rstrip(",;"), word.rstrip(",;")) + word[len(word.rstrip(",;")) :] for word in reason.split(" ")
    )


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
