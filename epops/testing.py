"""What our own tests use, for the tests of models and passes built on epops.

>>> from epops.testing import assert_fused, captured, count_ops
>>> graphs = captured(model, x)                                             # doctest: +SKIP
>>> assert_fused(graphs, fuse_add=2, overlap=4)                             # doctest: +SKIP
>>> count_ops(graphs, "epops.combine")                                      # doctest: +SKIP
2
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from .inspection.capture import Pass, PassedGraph, capture
from .inspection.report import Inspection, declined, headings
from .inspection.text import graph_lines, graph_near, graph_text


def captured(
    model: Callable[..., Any],
    *args: Any,
    passes: Iterable[Pass] | None = None,
    dynamic: bool | None = None,
    **kwargs: Any,
) -> list[PassedGraph]:
    """The graphs of ``model(*args, **kwargs)`` before and after the passes; nothing runs, so any rank alone may call it.

    When a result needs gradients these are the joint graph, the forward and the backward that it is divided into; ``kind`` says
    which is which.
    """
    return capture(model, *args, passes=passes, dynamic=dynamic, **kwargs)[0]


def normalized_graph(graph: Any, *, ops: tuple[str, ...] | None = None) -> str:
    """A graph as text that is the same on every run, machine and torch version: for `expecttest`.

    ``ops``: keep the lines whose op starts with one of these words, for example ``("epops", "mm")``.
    """
    if isinstance(graph, PassedGraph):
        graph = graph.after
    if isinstance(graph, (list, tuple, Inspection)):
        raise TypeError(
            f"epops.testing.normalized_graph: graph: expected one graph, got {type(graph).__name__}; choose one of them, such as "
            "captured(…)[0]"
        )
    return graph_text(graph, ops=ops)


def count_ops(graphs: Any, op: str) -> int:
    """Calls of ``op`` ("epops.combine", "mm") in a graph, or in all that run of `captured` or `epops.inspect`, after the passes."""
    graphs = getattr(graphs, "graphs", graphs)
    if isinstance(graphs, (list, tuple)) and not isinstance(graphs, PassedGraph):
        return sum(count_ops(graph, op) for graph in graphs if getattr(graph, "kind", "") != "joint")
    if isinstance(graphs, PassedGraph):
        graphs = graphs.after
    return sum(line.op == op for line in graph_lines(graphs))


def assert_fused(graphs: Any, **expected: int) -> None:
    """Each named pass made so many rewrites in all graphs together: ``assert_fused(graphs, fuse_add=2)``.

    ``graphs``: those of `captured`, some of them, or what `epops.inspect` returns.

    Raises:
        AssertionError: with the counts, what the pass declined and why, and what stands around the exchanges that it found.
    """
    graphs = [graphs] if isinstance(graphs, PassedGraph) else list(getattr(graphs, "graphs", graphs))
    for name, count in expected.items():
        known = {one for graph in graphs for one in graph.rewrites}
        if name not in known:
            raise AssertionError(
                f"epops.testing.assert_fused: no pass {name!r} ran; these did: {', '.join(sorted(known))}"
            )
        got = sum(graph.rewrites.get(name, 0) for graph in graphs)
        if got != count:
            reasons = [
                f"  {graph.kind}: {entry}" for graph in graphs for entry in declined(graph) if entry.rule == name
            ]
            lines = [f"epops.testing.assert_fused: {name}: expected {count} rewrites, got {got}"]
            lines += reasons or ["  it declined nothing"]
            for graph in (graph for graph in graphs if name in graph.rewrites):
                near = graph_near(graph.before, "epops.")
                lines.append(f"\n{graph.kind} graph, {headings(graph)[0]}, what is around its exchanges:\n{near}")
            raise AssertionError("\n".join(lines))
