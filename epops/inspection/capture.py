"""Compiles a model up to where Inductor would go on to write code, and keeps each graph before and after the passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, GraphModule

from ..group import process_groups
from ..passes import process_groups as torch_groups
from ..passes import run_joint_passes, run_pass
from ..passes.decline_log import Declined, listen
from ..passes.keep_order import keep_order
from ..passes.ordering import pin
from ..torch_private import eager_backward_compile, graphs_backend
from .text import number_inputs

Pass = Callable[[Graph], int]


class PassedGraph(NamedTuple):
    """One graph: "inference", or "joint", "forward" and "backward", as the passes found it and as they left it.

    The joint graph of a training step does not run: it is divided into the forward and the backward graph, whose ``before`` so
    has its rewrites in it already; what no pass has touched is the joint graph's ``before``.  ``rewrites``: how many each pass
    made, in their order.
    """

    kind: str
    before: GraphModule
    after: GraphModule
    rewrites: dict[str, int]
    declined: list[Declined]


def capture(
    model: Callable[..., Any],
    *args: Any,
    passes: Iterable[Pass] | None = None,
    dynamic: bool | None = None,
    fullgraph: bool = False,
    run: bool = False,
    **kwargs: Any,
) -> tuple[list[PassedGraph], Any]:
    """The graphs of ``model(*args, **kwargs)`` so far, and its result.

    ``passes``: those of the backend unless given.  ``run``: graphs run node by node, and the result is the model's; otherwise
    nothing runs, no exchange takes place and the result is zeros.
    """
    chosen = list(all_passes() if passes is None else passes)
    graphs: list[PassedGraph] = []

    def seen(module: GraphModule, kind: str) -> None:
        graphs.append(apply_passes(module, chosen, kind))

    torch_groups.known = process_groups

    def call(*args: Any, **kwargs: Any) -> Any:
        # What this calls is traced, even if it was compiled before: it would run by itself as the outermost.
        return model(*args, **kwargs)

    torch._dynamo.reset()
    compiled = torch.compile(call, backend=graphs_backend(seen, run=run), dynamic=dynamic, fullgraph=fullgraph)
    try:
        with eager_backward_compile():
            return graphs, compiled(*args, **kwargs)
    finally:
        torch._dynamo.reset()  # the sizes of this call would make the next compile's dynamic


def all_passes() -> tuple[Pass, ...]:
    """The backend's own passes, in order."""
    from ..passes import PASSES

    return tuple(PASSES)


def apply_passes(module: GraphModule, passes: Iterable[Pass], kind: str) -> PassedGraph:
    """Run passes on a graph and record what each did; the graph is changed."""
    number_inputs(module.graph)
    before = GraphModule(module, copy_graph(module.graph))
    rewrites: dict[str, int] = {}
    with listen() as declined:
        if kind == "joint":
            rewrites = run_joint_passes(module.graph, tuple(passes))
        else:
            for one in sorted(passes, key=lambda one: one is keep_order):  # which pins what the others left
                run_pass(one, module.graph, rewrites)
            pin(module.graph)
            module.graph.lint()
    return PassedGraph(kind, before, GraphModule(module, copy_graph(module.graph)), rewrites, declined)


def copy_graph(graph: Graph) -> Graph:
    """A copy that keeps the names and recorded values of nodes."""
    copy = Graph(graph.owning_module)
    places: dict[Any, Any] = {}
    output = copy.graph_copy(graph, places)
    if output is not None:
        copy.output(output)
    for node, twin in places.items():
        twin.meta = dict(node.meta)
    return copy
