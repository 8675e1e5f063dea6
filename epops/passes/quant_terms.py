"""Reads arithmetic on rows out of a graph: an interpreter over formulas instead of over numbers.

Starting from the rows (the *root*) it gives each node that it understands a `Term`: what the node computes, element by
element or block by block, as a nested tuple.  Different spellings of the same arithmetic (views, casts that change no value,
``clamp`` or ``maximum``, ``1 / s`` or ``reciprocal``, keepdim or unsqueeze, repeat_interleave or broadcasting) give equal
tuples; other arithmetic gives other tuples or none, and then nothing is fused.  `quant_formula` knows which are quantizers.
"""

from __future__ import annotations

import heapq
import math
import operator
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from .graph_facts import (
    aten,
    constant,
    is_cast,
    keeps_values,
    known_equal,
    reshapes_on_all_ranks,
    same_shape,
    tensor,
)

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)

Expr = tuple[Any, ...]
X: Expr = ("x",)
ABS: Expr = ("abs", X)
AMAX: Expr = ("amax", ABS)
LARGEST: Expr = ("amax", X)
SMALLEST: Expr = ("amin", X)
ENDS: Expr = ("ends", X)  # max(largest, -smallest): the largest magnitude, but -0 for a block of zeros
SIGNED = (LARGEST, SMALLEST, ("neg", SMALLEST), ENDS)


class Term(NamedTuple):
    """What a node computes: ``per`` "element" of the rows or "block" of ``width`` channels.

    ``row``: channels of a row of the root, ``dtype``: its dtype.
    ``padding``: zeros that lengthened the rows to whole blocks, and ``padded``: they are still there.
    """

    per: str
    expr: Expr
    width: Any = None
    padding: Any = 0
    padded: bool = False
    row: Any = None
    dtype: torch.dtype | None = None

    def of_blocks_of(self, other: Term) -> bool:
        """Whether the numbers of both are of the same blocks of channels: the same formula of others is another quantizer."""
        return known_equal(self.width, other.width) and known_equal(self.padding, other.padding)

    def same_as(self, other: Term) -> bool:
        return self.expr == other.expr and self.of_blocks_of(other)


def read_terms(root: Node, allowed: set[Node] | None = None) -> dict[Node, Term]:
    """Terms of the nodes (of ``allowed`` alone, if given) that compute something from the root and numbers, in graph order."""
    terms = {root: Term("element", X, row=tensor(root).shape[-1], dtype=tensor(root).dtype)}
    waiting = list(root.users)
    heapq.heapify(waiting)
    while waiting:
        node = heapq.heappop(waiting)
        if node in terms or node.op != "call_function" or (allowed is not None and node not in allowed):
            continue
        term = _read(node, terms)
        if term is not None:
            terms[node] = term
            for user in node.users:
                heapq.heappush(waiting, user)
    return terms


# ---- one node --------------------------------------------------------------------------------------------------------


def _read(node: Node, terms: dict[Node, Term]) -> Term | None:
    if node.target is operator.getitem:
        source = node.args[0]
        if node.args[1] == 0 and isinstance(source, Node) and source.target is aten.max.dim:
            return terms.get(source)
        return None
    known = [terms.get(item) if isinstance(item, Node) else None for item in node.args]
    first = known[0] if known else None
    if reshapes_on_all_ranks(node):
        return first
    if is_cast(node):
        return _cast(node, first)
    if node.target in _SHAPED:
        return None if first is None else _SHAPED[node.target](node, first)
    return _arithmetic(node, known)


def _cast(node: Node, term: Term | None) -> Term | None:
    before, after = tensor(node.args[0]), tensor(node)
    if term is None or before is None or after is None:
        return None
    if before.dtype == after.dtype and not _fits_the_rows(term):
        return None
    if keeps_values(before.dtype, after.dtype):
        return term  # arithmetic carries the dtype that it was done in
    if term.per == "element":
        if before.dtype == torch.float32 and after.dtype in FP8:
            return term._replace(expr=("fp8", term.expr, after.dtype))
        return None
    if term.expr[0] == "max" and term.expr[1] in (AMAX, ENDS) and after.dtype == term.dtype:
        # The rows have the magnitude as it is; of the two numbers only the other one can be rounded.
        return term._replace(expr=(*term.expr[:2], float(torch.tensor(term.expr[2]).to(after.dtype).item())))
    if after.dtype == torch.bool:
        return term._replace(expr=("ne", term.expr, 0.0))
    return term._replace(expr=("to", term.expr, after.dtype))


def _fits_the_rows(term: Term) -> bool:
    """Whether rounding to the rows' own dtype changes nothing.

    A cast that changes no dtype is what torch 2.11 leaves of one down and up again (``pointless_convert``): the dtype between
    is lost, and with it what eager rounded to.  A ``clamp`` of 16-bit magnitudes is traced so: that dtype is the rows'.
    """
    if term.dtype is None or term.dtype.itemsize != 2:
        return False
    expr = term.expr
    if expr[0] == "max" and isinstance(expr[2], float):
        if float(torch.tensor(expr[2]).to(term.dtype).item()) != expr[2]:
            return False
        expr = expr[1]
    return expr in (X, ABS, AMAX, *SIGNED)


def _amax(node: Node, term: Term) -> Term | None:
    rows = tensor(node.args[0])
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", ())
    dims = [dims] if isinstance(dims, int) else list(dims)
    if (
        term.per != "element"
        or term.expr not in (ABS, X)
        or (node.target is aten.amin.default and term.expr != X)
        or rows is None
        or len(dims) != 1
        or dims[0] not in (-1, rows.dim() - 1)
    ):
        return None
    word = "amin" if node.target is aten.amin.default else "amax"
    return term._replace(per="block", expr=(word, term.expr), width=rows.shape[-1])


def _expand(node: Node, term: Term) -> Term | None:
    """A block's number repeated for each of its channels."""
    before, after = tensor(node.args[0]), tensor(node)
    if term.per != "block" or before is None or after is None or before.dim() != after.dim():
        return None
    if (
        same_shape(before.shape[:-1], after.shape[:-1])
        and before.shape[-1] == 1
        and known_equal(after.shape[-1], term.width)
    ):
        return term._replace(per="element", expr=("spread", term.expr))
    return None


def _pad(node: Node, term: Term) -> Term | None:
    value = node.args[2] if len(node.args) > 2 else 0
    pads = node.args[1]
    before = tensor(node.args[0])
    if before is None or not known_equal(before.shape[-1], term.row):
        return None  # not rows but parts of them, or several of them
    if term.expr == X and not term.padding and len(pads) == 2 and pads[0] == 0 and value == 0:
        return term._replace(padding=pads[1], padded=True)
    return None


def _slice(node: Node, term: Term) -> Term | None:
    """The rows without the zeros that lengthened them."""
    before = tensor(node.args[0])
    dim, start = (list(node.args[1:]) + [0, None])[:2]
    step = node.args[4] if len(node.args) > 4 else 1
    after = tensor(node)
    if not term.padded or term.per != "element" or before is None or after is None or dim not in (-1, before.dim() - 1):
        return None
    whole = start in (0, None) and step == 1 and known_equal(after.shape[-1], term.row)
    whole = whole and known_equal(before.shape[-1] - after.shape[-1], term.padding)
    return term._replace(padded=False) if whole else None


_SHAPED = {
    aten.amax.default: _amax,
    aten.amin.default: _amax,
    aten.max.dim: _amax,
    aten.expand.default: _expand,
    aten.constant_pad_nd.default: _pad,
    aten.slice.Tensor: _slice,
}

_UNARY = {
    aten.reciprocal.default: "recip",
    aten.log2.default: "log2",
    aten.ceil.default: "ceil",
    aten.floor.default: "floor",
    aten.exp2.default: "exp2",
}

_BINARY = {
    aten.mul.Tensor: "mul",
    aten.mul.Scalar: "mul",
    aten.div.Tensor: "div",
    aten.div.Scalar: "div",
    aten.add.Tensor: "add",
    aten.add.Scalar: "add",
    aten.maximum.default: "max",
    aten.clamp_min.default: "max",
    aten.clamp_min.Tensor: "max",
    aten.minimum.default: "min",
    aten.clamp_max.default: "min",
    aten.clamp_max.Tensor: "min",
    aten.bitwise_and.Scalar: "and",
    aten.bitwise_and.Tensor: "and",
    aten.__rshift__.Scalar: "shr",
    aten.bitwise_right_shift.Tensor_Scalar: "shr",
    aten.bitwise_right_shift.Tensor: "shr",
    aten.__lshift__.Scalar: "shl",
    aten.bitwise_left_shift.Tensor_Scalar: "shl",
    aten.bitwise_left_shift.Tensor: "shl",
    aten.ne.Scalar: "ne",
}

_COMMUTES = ("mul", "add", "max", "min", "and")


def _arithmetic(node: Node, known: list[Term | None]) -> Term | None:
    result = tensor(node)
    if result is None:
        return None
    first = known[0] if known else None
    if node.target is aten.abs.default and first is not None:
        if first.expr in (LARGEST, SMALLEST):
            return first._replace(expr=("abs", first.expr))
        if first.expr in SIGNED:
            return first._replace(expr=AMAX) if first.expr == ENDS else None
        if first.per == "block":
            return first if _never_negative(first.expr) else None
        return first._replace(expr=ABS) if first.expr in (X, ABS) else None
    if node.target is aten.view.dtype and first is not None and first.per == "block":
        return first._replace(expr=("as", first.expr, node.args[1]))
    if node.target is aten.neg.default and first is not None and first.expr == SMALLEST:
        return first._replace(expr=("neg", SMALLEST))
    if node.target in _UNARY and first is not None and first.per == "block":
        return first._replace(expr=(_UNARY[node.target], first.expr, result.dtype))
    if node.target is aten.pow.Scalar and node.args[0] == 2 and known[1] is not None and known[1].per == "block":
        return known[1]._replace(expr=("exp2", known[1].expr, result.dtype))
    if node.target is aten.clamp.default and first is not None:
        low = node.args[1] if len(node.args) > 1 else node.kwargs.get("min")
        high = node.args[2] if len(node.args) > 2 else node.kwargs.get("max")
        for word, bound in (("max", low), ("min", high)):
            if bound is not None:
                first = _with_number(word, first, bound, result.dtype) if _keeps_shape(node.args[0], result) else None
                if first is None:
                    return None
        return first
    if node.target not in _BINARY:
        return None
    word = _BINARY[node.target]
    if node.kwargs.get("rounding_mode") or node.kwargs.get("alpha", 1) != 1 or len(node.args) < 2:
        return None
    left, right = known[0], known[1]
    if left is not None and right is not None:
        return _two_terms(word, node, left, right, result)
    if left is not None:
        return _with_number(word, left, node.args[1], result.dtype) if _keeps_shape(node.args[0], result) else None
    if right is not None and word in _COMMUTES:
        return _with_number(word, right, node.args[0], result.dtype) if _keeps_shape(node.args[1], result) else None
    if right is not None and word == "div" and right.per == "block" and constant(node.args[0]) is not None:
        # The graph divides a number: one rounding, unlike ``number / tensor`` in Python, which is reciprocal, then product.
        return right._replace(expr=("rdiv", right.expr, constant(node.args[0]), result.dtype))
    return None


def _keeps_shape(operand: Any, result: torch.Tensor) -> bool:
    """Whether a number does not widen what it meets: one that was filled in may have a shape."""
    return same_shape(tensor(operand).shape, result.shape)


def _never_negative(expr: Expr) -> bool:
    """Whether a number of a block has no sign, so that ``abs`` leaves it as it is."""
    if expr == AMAX:
        return True
    if expr[0] in ("max", "mul", "div"):
        return isinstance(expr[2], float) and (expr[2] > 0) and _never_negative(expr[1])
    return expr[0] in ("recip", "to") and _never_negative(expr[1])


def _with_number(word: str, term: Term, item: Any, dtype: torch.dtype) -> Term | None:
    number = constant(item)
    if number is None or math.isnan(number):
        return None
    divisor = tensor(item) if word == "div" else None
    if divisor is not None and divisor.device.type != "cpu":
        return (
            None  # a quotient in eager torch on CUDA; by a number it is the product with its reciprocal, in the op too
        )
    if word == "mul" and number == 1.0:
        return term
    if word == "min" and number == math.inf:
        return term
    if term.per == "element":
        return (
            term._replace(expr=(word, term.expr, number)) if word in ("max", "min") and dtype == torch.float32 else None
        )
    if dtype.is_floating_point:
        number = float(torch.tensor(number, dtype=dtype).item())
    if word in ("max", "min", "ne"):
        # These round nothing, so their dtype is only that of the number.
        return term._replace(expr=(word, term.expr, number))
    return term._replace(expr=(word, term.expr, number, dtype))


_MAGNITUDES: dict[frozenset[Expr], Expr] = {
    frozenset((("abs", LARGEST), ("abs", SMALLEST))): AMAX,
    frozenset((LARGEST, ("neg", SMALLEST))): ENDS,
}
"""Two numbers of a block → their maximum, where that is its largest magnitude."""


def _two_terms(word: str, node: Node, left: Term, right: Term, result: torch.Tensor) -> Term | None:
    if left.per == "block" and right.per == "block":
        if word == "add" and left.width is right.width and not result.is_floating_point():
            return left._replace(expr=("add", *sorted((left.expr, right.expr), key=repr)))
        alike = known_equal(left.width, right.width) and (left.padding, left.padded) == (right.padding, right.padded)
        shapes = [tensor(item) for item in node.args[:2]]
        if word == "max" and alike and same_shape(shapes[0].shape, shapes[1].shape):
            found = _MAGNITUDES.get(frozenset((left.expr, right.expr)))
            return None if found is None else left._replace(expr=found)
        return None
    if word not in ("mul", "div") or result.dtype != torch.float32:
        return None
    rows, scale = (node.args[0], node.args[1])
    if left.per == "block" or left.expr[0] == "spread":
        if word == "div":
            return None
        left, right, rows, scale = right, left, scale, rows
    if left.expr != X or (left.padding, left.padded) != (right.padding, right.padded):
        return None
    wide, narrow = tensor(rows), tensor(scale)
    if wide is None or narrow is None:
        return None
    if right.per == "block":
        aligned = known_equal(wide.shape[-1], right.width) and same_shape(narrow.shape, (*wide.shape[:-1], 1))
        return left._replace(expr=(word, X, right.expr), width=right.width) if aligned else None
    if right.expr[0] == "spread" and same_shape(wide.shape, narrow.shape):
        return left._replace(expr=(word, X, right.expr[1]), width=right.width)
    return None
