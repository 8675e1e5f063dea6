"""Results of a training step lie in memory as the program left them: passes over its joint graph may lay them out otherwise.

Of inference graphs Inductor writes down how the results lie before it runs a pass, and keeps to it; of joint graphs it does so only
when they are divided.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from ..torch_private import is_tangent
from .graph_facts import aten, known_equal, tensor
from .rewriting import call, erase_unused

Strides = dict[int, tuple[Any, ...]]


def output_strides(graph: Graph) -> Strides:
    """Place among the outputs of a joint graph → strides, of the results of its forward."""
    backward: set[Node] = set()
    for node in graph.nodes:
        if is_tangent(node) or any(item in backward for item in node.all_input_nodes):
            backward.add(node)
    return {
        place: tensor(item).stride()
        for place, item in enumerate(_outputs(graph))
        if tensor(item) is not None and tensor(item).layout == torch.strided and item not in backward
    }


def keep_output_strides(graph: Graph, strides: Strides) -> None:
    """Copy results that lie otherwise than they did, where a copy of permuted dims lies so."""
    output = next(iter(graph.find_nodes(op="output")))
    found = list(_outputs(graph))
    plain = list(found)
    for place, wanted in strides.items():
        node = found[place]
        if _lies_so(node, wanted):
            continue
        hints = [_hint(stride) for stride in wanted]
        order = sorted(range(len(hints)), key=hints.__getitem__, reverse=True)
        back = sorted(range(len(order)), key=order.__getitem__)
        with graph.inserting_before(output):
            outermost = call(graph, aten.permute.default, (node, order), like=node)
            copy = call(graph, aten.clone.default, (outermost,), {"memory_format": torch.contiguous_format}, like=node)
            result = call(graph, aten.permute.default, (copy, back), like=node)
        if _lies_so(result, wanted):
            found[place] = result
        else:
            erase_unused([result])
    if found != plain:
        output.args = (found, *output.args[1:])


def _outputs(graph: Graph) -> Any:
    return next(iter(graph.find_nodes(op="output"))).args[0]


def _lies_so(node: Node, strides: tuple[Any, ...]) -> bool:
    """Whether a tensor has strides for certain; those of a dimension of size 1 say nothing."""
    now = tensor(node)
    pairs = zip(now.shape, now.stride(), strides, strict=True)
    return all(known_equal(size, 1) or known_equal(one, other) for size, one, other in pairs)


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else int(getattr(size.node, "hint", None) or 0)
