"""Results of a training step lie in memory as the program left them: passes over its joint graph may lay them out otherwise.

Of inference graphs Inductor writes down how everything lies before it runs a pass, and keeps to it; of joint graphs it does so only
when they are divided.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from ..torch_private import is_tangent
from .graph_facts import BY_STRIDES, aten, known_equal, tensor
from .rewriting import call, erase_unused, record_value

Strides = tuple[Any, ...]


class Layout(NamedTuple):
    """A joint graph before the passes: ``inputs`` of each node, ``strides`` of each tensor, ``results`` of its forward by place."""

    inputs: dict[Node, list[Node]]
    strides: dict[Node, Strides]
    results: dict[int, Strides]


def layout_of(graph: Graph) -> Layout:
    """Of a joint graph, before a pass."""
    inputs = {node: node.all_input_nodes for node in graph.nodes}
    backward: set[Node] = set()
    strides: dict[Node, Strides] = {}
    for node in graph.nodes:
        if is_tangent(node) or any(item in backward for item in inputs[node]):
            backward.add(node)
        if tensor(node) is not None and tensor(node).layout == torch.strided:
            strides[node] = tensor(node).stride()
    outputs = enumerate(_output(graph).args[0])
    results = {place: strides[item] for place, item in outputs if item in strides and item not in backward}
    return Layout(inputs, strides, results)


def keep_output_strides(graph: Graph, before: Layout) -> None:
    """Copy results, and what as_strided reads, that lie otherwise than ``before``, where a copy of permuted dims lies so."""
    _renew(graph, before)
    output = _output(graph)
    found = list(output.args[0])  # type: ignore[call-overload]
    for place, wanted in before.results.items():
        found[place] = _laid_out(graph, found[place], wanted, output)
    if found != list(output.args[0]):  # type: ignore[call-overload]
        output.args = (found, *output.args[1:])


def _renew(graph: Graph, before: Layout) -> None:
    """Record how what is computed from other nodes than before lies: element by element, for one, as its inputs do."""
    inputs, strides = before.inputs, before.strides
    changed: set[Node] = set()
    for node in list(graph.nodes):
        if tensor(node) is None:
            continue
        if node.all_input_nodes != inputs.get(node) or any(item in changed for item in node.all_input_nodes):
            if node.target in BY_STRIDES and node in inputs and inputs[node][0] in strides:
                source = node.args[0]
                node.replace_input_with(source, _laid_out(graph, source, strides[inputs[node][0]], node))
            elif torch.Tag.dynamic_output_shape not in getattr(node.target, "tags", ()):
                record_value(node, node)
        if node not in strides or not _lies_so(node, strides[node]):
            changed.add(node)


def _laid_out(graph: Graph, node: Node, strides: Strides, before: Node) -> Node:
    """The same with these strides, if they are of permuted dims; else ``node``."""
    if _lies_so(node, strides):
        return node
    hints = [_hint(stride) for stride in strides]
    order = sorted(range(len(hints)), key=hints.__getitem__, reverse=True)
    back = sorted(range(len(order)), key=order.__getitem__)
    with graph.inserting_before(before):
        outermost = call(graph, aten.permute.default, (node, order), like=node)
        copy = call(graph, aten.clone.default, (outermost,), {"memory_format": torch.contiguous_format}, like=node)
        result = call(graph, aten.permute.default, (copy, back), like=node)
    if _lies_so(result, strides):
        return result
    erase_unused([result])
    return node


def _output(graph: Graph) -> Node:
    return next(iter(graph.find_nodes(op="output")))


def _lies_so(node: Node, strides: Strides) -> bool:
    """Whether a tensor has strides for certain; those of a dimension of size 1 say nothing."""
    now = tensor(node)
    pairs = zip(now.shape, now.stride(), strides, strict=True)
    return all(known_equal(size, 1) or known_equal(one, other) for size, one, other in pairs)


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else int(getattr(size.node, "hint", None) or 0)
