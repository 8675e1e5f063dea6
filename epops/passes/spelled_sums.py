"""Sums that are written as something else: addcmul, addmm, and stacks that are summed over their new dim."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.fx import Node

from . import axes
from .axes import Atom
from .graph_facts import arguments, aten, is_number, is_reshape, prims, same_shape, tensor
from .rewriting import call, reshape_like

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MATRICES = {aten.addmm.default: aten.mm.default, aten.baddbmm.default: aten.bmm.default}
JOINS = (aten.cat.default, aten.stack.default)


class Written(NamedTuple):
    """``result``, ``factor`` times the operand plus something else, is in the place of ``node``; ``add`` is the addition in it,
    which leaves the factor out."""

    node: Node
    result: Node
    add: Node
    factor: float


def write_sum(user: Node, operand: Node) -> Written | None:
    """Write the sum of ``operand`` and something else that ``user`` is, or is the beginning of; None where it is none."""
    if user.op != "call_function":
        return None
    if user.target is aten.addcmul.default:
        return _addcmul(user, operand)
    if user.target in MATRICES:
        return _addmm(user, operand)
    return _stack(user, operand) if user.target in JOINS else None


def _addcmul(node: Node, operand: Node) -> Written | None:
    """The product is rounded as little as in the node."""
    given, total = arguments(node), tensor(node)
    if not _only_self(node, operand) or total is None or total.dtype not in FLOATS or not is_number(given["value"]):
        return None
    with node.graph.inserting_before(node):
        product = call(node.graph, aten.mul.Tensor, [_wide(item, node) for item in node.args[1:3]], like=node)
    return _written(node, operand, product, given["value"], 1.0)


def _addmm(node: Node, operand: Node) -> Written | None:
    given, total = arguments(node), tensor(node)
    beta, alpha = given["beta"], given["alpha"]
    if not _only_self(node, operand) or not (is_number(beta) and is_number(alpha)) or not beta or not alpha:
        return None  # what is multiplied by 0 is left out, whatever it is
    if total is None or not same_shape(tensor(operand).shape, total.shape):
        return None
    with node.graph.inserting_before(node):
        product = call(node.graph, MATRICES[node.target], node.args[1:3], like=node)
    return _written(node, operand, product, alpha, float(beta))


def _only_self(node: Node, operand: Node) -> bool:
    return node.args[0] is operand and sum(item is operand for item in node.args) == 1 and len(node.args) >= 3


def _stack(join: Node, operand: Node) -> Written | None:
    """Pieces of one shape, put beside one another along a dim of their own that is then summed over."""
    pieces, total = join.args[0], None
    if not isinstance(pieces, (list, tuple)) or sum(item is operand for item in pieces) != 1 or len(pieces) < 2:
        return None
    if any(
        tensor(item) is None
        or tensor(item).dtype != tensor(operand).dtype
        or not same_shape(tensor(item).shape, tensor(operand).shape)
        for item in pieces
    ):
        return None
    many = Atom(len(pieces), whole=True)
    dim = arguments(join)["dim"] % tensor(join).dim()
    dims = axes.of_shape(tensor(operand).shape)
    dims = [*dims[:dim], [many], *dims[dim:]] if join.target is aten.stack.default else dims
    if join.target is aten.cat.default:
        dims[dim] = [many, *dims[dim]]
    total = join
    while len(total.users) == 1 and is_reshape(next(iter(total.users))):
        total = next(iter(total.users))
        found = axes.through(total, dims)
        if found is None:
            return None
        dims = found
    if len(total.users) != 1 or next(iter(total.users)).target is not aten.sum.dim_IntList:
        return None
    node = next(iter(total.users))
    over = [place % len(dims) for place in arguments(node)["dim"] or ()]
    if len(over) != 1 or axes.resolved(dims)[over[0]] != [many] or tensor(node).dtype not in FLOATS:
        return None
    others = [item for item in pieces if item is not operand]
    with node.graph.inserting_before(node):
        other = others[0] if tensor(node).dtype == tensor(operand).dtype else _wide(others[0], node)
        for item in others[1:]:
            other = call(node.graph, aten.add.Tensor, (_wide(other, node), _wide(item, node)), like=node)
    return _written(node, operand, other, 1, 1.0)


def _wide(node: Node, like: Node) -> Node:
    if tensor(node).dtype == torch.float32:
        return node
    return call(node.graph, prims.convert_element_type.default, (node, torch.float32), like=like)


def _written(node: Node, operand: Node, other: Node, alpha: Any, factor: float) -> Written:
    graph, total = node.graph, tensor(node)
    with graph.inserting_before(node):
        add = call(graph, aten.add.Tensor, (operand, other), {"alpha": alpha} if alpha != 1 else {}, like=node)
        result = add
        if total.dtype != tensor(add).dtype:
            result = call(graph, prims.convert_element_type.default, (add, total.dtype), like=node)
        result = reshape_like(graph, result, node)
    node.replace_all_uses_with(result)
    return Written(node, result, add, factor)
