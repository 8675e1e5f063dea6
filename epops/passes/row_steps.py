"""Nodes that compute each row from the same row of their inputs, as lines of a row program (`epops.row_program`)."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from ..row_program import BINARY, EXPONENTS, FLOAT8, NAMES, UNARY
from .graph_facts import RESHAPES, aten, is_cast, is_number, is_reshape, is_whole_slice, known_equal, tensor, value

SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int)
"""Ops with several results that `getitem` takes; they are views, and part of what takes them."""

FILLS = {
    aten.zeros.default: 0,
    aten.zeros_like.default: 0,
    aten.new_zeros.default: 0,
    aten.ones.default: 1,
    aten.ones_like.default: 1,
    aten.new_ones.default: 1,
}
FILLED = {
    aten.full.default: 1,
    aten.full_like.default: 1,
    aten.new_full.default: 2,
    aten.scalar_tensor.default: 0,
}
"""Op → where its number stands."""

PERMUTES = (aten.permute.default, aten.transpose.int, aten.t.default)


class Step(NamedTuple):
    """``op(args)`` of the language; values among the arguments are nodes."""

    op: str
    args: tuple[Any, ...]

    @property
    def operands(self) -> list[Node]:
        flat = [part for item in self.args for part in (item if isinstance(item, (list, tuple)) else (item,))]
        return [item for item in flat if isinstance(item, Node)]


def _targets() -> dict[Any, str]:
    """Operator of torch → its name in the language; rounding modes and outputs given by the caller are other overloads."""
    found: dict[Any, str] = {}
    for name in (*UNARY, *BINARY):
        packet = getattr(aten, name, None)
        for overload in ("default", "Tensor", "Scalar", "Tensor_Scalar", "self"):
            if packet is not None and hasattr(packet, overload):
                found[getattr(packet, overload)] = name
    return found


TARGETS = _targets()


def same_rows(item: Any, rows: Any) -> bool:
    """Whether a tensor has ``rows`` as its first size, for certain."""
    found = tensor(item)
    return found is not None and found.dim() > 0 and known_equal(found.shape[0], rows)


def step_of(node: Node, rows: Any) -> Step | str:
    """The line of a node whose result has ``rows`` rows or is the same for all of them; or why it has none."""
    result = tensor(node)
    if node.op != "call_function":
        return "it is computed elsewhere"
    if result is None or result.dtype not in NAMES:
        return f"{_name(node)} gives no tensor of a type that row programs have"
    found = _step(node, rows, result)
    if isinstance(found, str):
        return found
    if found.op != "full" and not same_rows(node, rows):
        return f"{_name(node)} does not give a row for each row"
    if found.op != "full" and not all(isinstance(size, int) for size in result.shape[1:]):
        return f"the rows of {node.name} have a length that is known at run time only"
    if found.op != "cast" and any(_dtype(item) in FLOAT8 for item in found.operands) or result.dtype in FLOAT8:
        return f"{_name(node)} computes in float8"
    for item in found.operands:
        reason = _why_not_operand(node, item, found, rows)
        if reason:
            return reason
    return found


def _why_not_operand(node: Node, item: Node, step: Step, rows: Any) -> str | None:
    given, result = tensor(item), tensor(node)
    if given is None or given.dtype not in NAMES:
        return f"{item.name} is a number that is known at run time only"
    if given.device != result.device and not (is_fill(item) and given.dim() == 0):
        return f"{item.name} is on {given.device}"
    if by_row(item, step, node, rows):
        if not all(isinstance(size, int) for size in given.shape[1:]):
            return f"the rows of {item.name} have a length that is known at run time only"
    elif not all(isinstance(size, int) for size in given.shape):
        return f"{item.name} has sizes that are known at run time only"
    return None


def by_row(item: Node, step: Step, node: Node, rows: Any) -> bool:
    """Whether row r of ``node`` reads row r of an operand; otherwise every row may read all of it."""
    if step.op == "index":
        return item is step.args[1] and item is not step.args[0]
    given, result = tensor(item), tensor(node)
    if step.op in ("reshape", "permute", "slice", "select", "cat", "scatter", "pad"):
        return True
    return given.dim() == result.dim() and same_rows(item, rows)


def is_fill(node: Any) -> bool:
    """Whether a node is one number, known now, in every place."""
    return isinstance(node, Node) and (node.target in FILLS or filled(node) is not None)


def filled(node: Node) -> Any:
    """The number that an op of `FILLED` fills its result with, known now; None for every other node."""
    place = FILLED.get(node.target)
    number = node.args[place] if place is not None and len(node.args) > place else None
    return number if is_number(number) or isinstance(number, bool) else None


def _step(node: Node, rows: Any, result: torch.Tensor) -> Step | str:
    target, args = node.target, node.args
    if is_fill(node):
        sizes = result.shape[1:] if same_rows(node, rows) else result.shape
        if not all(isinstance(size, int) for size in sizes):
            return f"{node.name} has sizes that are known at run time only"
        return Step("full", (FILLS[target] if target in FILLS else filled(node),))
    if target is operator.getitem:
        return _part(args[0], args[1], rows)
    if is_cast(node):
        return Step("cast", (args[0],))
    if target is aten.expand.default:
        before = tensor(args[0])
        if before is not None and before.dim() > 0 and not same_rows(args[0], rows) and before.dim() == result.dim():
            if not known_equal(before.shape[0], 1):
                return f"{_name(node)} mixes rows"
        return Step("expand", (args[0],))
    if target in RESHAPES or is_reshape(node):
        if not same_rows(args[0], rows) or not same_rows(node, rows):
            return f"{_name(node)} mixes rows"
        return Step("reshape", (args[0],))
    if target in PERMUTES:
        return _permuted(node, result.dim())
    found = _placed(node, rows)
    return _pointwise(node, result) if found is None else found


def _pointwise(node: Node, result: torch.Tensor) -> Step | str:
    target, args, kwargs = node.target, node.args, dict(node.kwargs)
    alpha = kwargs.pop("alpha", None)
    if kwargs:
        return f"{_name(node)} has {', '.join(kwargs)}"
    if target in (aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar):
        return Step("where", args) if len(args) == 3 else f"{_name(node)} lists places"
    if target in (aten.rsub.Tensor, aten.rsub.Scalar):
        return Step("sub", (args[1], args[0])) if len(args) == 2 and alpha is None else f"{_name(node)} has alpha"
    if target is aten.threshold_backward.default:
        return Step("threshold_backward", args)
    name = TARGETS.get(target)
    if name is None:
        return f"{_name(node)} is not known to work row by row"
    if name == "pow" and not (is_number(args[1]) and float(args[1]) in EXPONENTS):
        return f"{_name(node)} has an exponent that is not one of {', '.join(f'{e:g}' for e in EXPONENTS)}"
    if name in ("add", "sub"):
        alpha = args[2] if len(args) > 2 else alpha
        args = args[:2] if alpha in (None, 1) else (*args[:2], alpha)
    if len(args) != (1 if name in UNARY else 2) + (name in ("add", "sub") and len(args) == 3):
        return f"{_name(node)} has arguments beside its operands"
    if not all(isinstance(item, Node) or is_number(item) or isinstance(item, bool) for item in args):
        return f"{_name(node)} has arguments beside its operands"
    integers = not result.dtype.is_floating_point
    if integers and name in ("div", "pow", "add", "sub", "mul", "neg") and result.dtype == torch.bool:
        return f"{_name(node)} computes with truth values"
    if name in UNARY and not integers and _dtype(args[0]) != result.dtype:
        return f"{_name(node)} takes a float function of whole numbers"
    if integers and name in UNARY and name not in ("neg", "abs", "relu", "isnan", "logical_not", "bitwise_not"):
        return f"{_name(node)} computes with whole numbers"
    return Step(name, tuple(args))


def _placed(node: Node, rows: Any) -> Step | str | None:
    """Views and what puts parts together, along other dims than the rows; None for every other op."""
    target, args = node.target, node.args
    before = tensor(args[0]) if args and isinstance(args[0], Node) else None
    if target is aten.index.Tensor:
        index = args[1]
        if len(index) != 1 or tensor(index[0]) is None or tensor(index[0]).dtype not in (torch.int64, torch.int32):
            return f"{_name(node)} indexes with something else than one row number"
        if tensor(index[0]).dim() != 1 or not same_rows(index[0], rows):
            return f"{_name(node)} does not read one row for each row"
        if same_rows(args[0], rows):
            return f"{_name(node)} reads other rows"
        return Step("index", (args[0], index[0]))
    if target is aten.cat.default:
        dim = _dim(node, 1, tensor(args[0][0]))
        if any(tensor(item).dim() != tensor(node).dim() for item in args[0]):
            return f"{_name(node)} puts unlike things together"
        return f"{_name(node)} puts rows together" if dim == 0 else Step("cat", (list(args[0]), dim))
    if before is None:
        return None
    if target is aten.slice.Tensor:
        dim, start, end, step = _slice(node, before, 1)
        if dim == 0:
            return Step("reshape", (args[0],)) if is_whole_slice(node) else f"{_name(node)} reads other rows"
        if start is None:
            return f"{_name(node)} has bounds that are known at run time only"
        return Step("slice", (args[0], dim, start, step))
    if target is aten.select.int:
        dim, place = _dim(node, 1, before), args[2]
        if dim == 0 or not isinstance(place, int) or not isinstance(before.shape[dim], int):
            return f"{_name(node)} takes one row for all"
        return Step("select", (args[0], dim, place % before.shape[dim]))
    if target is aten.slice_scatter.default:
        dim, start, end, step = _slice(node, before, 2)
        if dim == 0 or start is None:
            return f"{_name(node)} writes to some rows"
        return Step("scatter", (args[0], args[1], dim, start, step))
    if target is aten.constant_pad_nd.default:
        pads, number = list(args[1]), args[2] if len(args) > 2 else 0
        if len(pads) >= 2 * before.dim() and any(pads[2 * before.dim() - 2 :]):
            return f"{_name(node)} adds rows"
        if not all(isinstance(pad, int) for pad in pads) or not is_number(number):
            return f"{_name(node)} pads by what is known at run time only"
        return Step("pad", (args[0], pads[: 2 * before.dim() - 2], number))
    return None


def _part(source: Any, place: Any, rows: Any) -> Step | str:
    if not isinstance(source, Node) or source.target not in SPLITS or not isinstance(place, int):
        return "it is a result of another op"
    parts = value(source)
    before = tensor(source.args[0])
    default = 0
    dim = source.args[2] if len(source.args) > 2 else source.kwargs.get("dim", default)
    if source.target is aten.unbind.int:
        dim = source.args[1] if len(source.args) > 1 else source.kwargs.get("dim", default)
    dim %= before.dim()
    if dim == 0:
        return f"{_name(source)} divides the rows"
    place %= len(parts)
    if source.target is aten.unbind.int:
        return Step("select", (source.args[0], dim, place))
    start = sum(part.shape[dim] for part in parts[:place])
    if not isinstance(start, int):
        return f"{_name(source)} has sizes that are known at run time only"
    return Step("slice", (source.args[0], dim, start, 1))


def _permuted(node: Node, rank: int) -> Step | str:
    if node.target is aten.permute.default:
        dims = [dim % rank for dim in node.args[1]]
    else:
        dims = list(range(rank))
        first, second = (0, 1) if node.target is aten.t.default else node.args[1:3]
        if rank > 1:
            dims[first], dims[second] = dims[second], dims[first]
    return Step("permute", (node.args[0], dims)) if dims[:1] == [0] else f"{_name(node)} moves the rows"


def _dim(node: Node, place: int, of: torch.Tensor) -> int:
    dim = node.args[place] if len(node.args) > place else node.kwargs.get("dim", 0)
    return dim % of.dim()


def _slice(node: Node, before: torch.Tensor, first: int) -> tuple[int, int | None, Any, int]:
    """Dim, start (None: not known now), end and step of a slice or a slice_scatter."""
    names = ("dim", "start", "end", "step")
    given = {name: node.kwargs.get(name) for name in names}
    given.update({name: node.args[first + i] for i, name in enumerate(names) if len(node.args) > first + i})
    dim = (given["dim"] or 0) % before.dim()
    start, step = given["start"] or 0, 1 if given["step"] is None else given["step"]
    length = before.shape[dim]
    if not all(isinstance(item, int) for item in (start, step, length)):
        return dim, None, given["end"], 1
    start = max(start + length, 0) if start < 0 else start
    return dim, min(start, length), given["end"], step


def _dtype(item: Any) -> torch.dtype | None:
    found = tensor(item)
    return None if found is None else found.dtype


def _name(node: Node) -> str:
    return f"{node.name} ({str(node.target).removeprefix('aten.')})" if node.op == "call_function" else node.name
