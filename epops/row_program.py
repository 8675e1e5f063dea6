"""The language of `map_rows`: what a pointwise computation over received rows is, as text that graphs and cache keys hold.

A program is one assignment a line, then what it returns.  A type has ``*`` for the rows; a value without it is the same
for every row, and is read whole::

    x0: bf16[*, 4] = rows()
    x1: i32[*] = rows()
    x2: bf16[3, 2] = whole()
    v0: bf16[*, 2] = slice(x0, 1, 0, 2)
    v1: bf16[*, 2] = index(x2, x1)
    v2: bf16[*, 2] = add(v0, v1)
    return v2

Each line rounds to its type, as eager would: an op of bf16 values computes in float32 and rounds once.

>>> program = parse("x0: f32[*, 2] = rows()\\nv0: f32[*, 2] = mul(x0, 0.5)\\nreturn v0")
>>> program.lines[1].op, program.lines[1].args, program.returns
('mul', (Ref('x0'), 0.5), ('v0',))
>>> str(program) == "x0: f32[*, 2] = rows()\\nv0: f32[*, 2] = mul(x0, 0.5)\\nreturn v0"
True
"""

from __future__ import annotations

import ast
import functools
import math
import re
from typing import Any, NamedTuple

import torch

DTYPES: dict[str, torch.dtype] = {
    "f64": torch.float64,
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "f8e4m3": torch.float8_e4m3fn,
    "f8e5m2": torch.float8_e5m2,
    "i64": torch.int64,
    "i32": torch.int32,
    "i16": torch.int16,
    "i8": torch.int8,
    "u8": torch.uint8,
    "b8": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
"""Read by `cast` and nothing else; no value of a program but an input has such a type."""

UNARY = (
    *("neg", "abs", "exp", "exp2", "expm1", "log", "log2", "log1p", "sqrt", "rsqrt", "reciprocal", "sigmoid", "tanh"),
    *("erf", "sin", "cos", "relu", "floor", "ceil", "trunc", "isnan", "logical_not", "bitwise_not"),
)
BINARY = (
    *("add", "sub", "mul", "div", "maximum", "minimum", "clamp_min", "clamp_max", "pow"),
    *("eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_xor"),
    *("bitwise_and", "bitwise_or", "bitwise_xor", "sigmoid_backward", "tanh_backward"),
)
"""Of two values, or a value and a number; ``add`` and ``sub`` may have a third, by which the second is multiplied.  ``pow`` has a
number of `EXPONENTS`."""

POINTWISE = (*UNARY, *BINARY, "where", "threshold_backward", "cast")

VIEWS = ("reshape", "permute", "expand", "slice", "select")
"""``slice(x, dim, start, step)``, as long as its type says; ``select(x, dim, place)``; ``permute(x, [dims])``."""

PLACED = ("full", "index", "cat", "scatter", "pad")
"""``full(number)``, ``index(whole, row numbers)``, ``cat([values], dim)``, ``scatter(x, part, dim, start, step)`` (x, with part in
place of a slice of it), ``pad(x, [left and right of the last dim, …], number)``."""

EXPONENTS = (0.5, 1.0, 2.0, 3.0, -0.5, -1.0, -2.0)
OPS = ("rows", "whole", *POINTWISE, *VIEWS, *PLACED)


class Ref(str):
    """The name of a value, among the arguments of a line."""

    def __repr__(self) -> str:
        return f"Ref({str.__repr__(self)})"


class Line(NamedTuple):
    """``name: dtype[shape] = op(args)``; the rows in a shape are None."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | None, ...]
    op: str
    args: tuple[Any, ...]

    @property
    def by_row(self) -> bool:
        """Whether the value has a row for every received row."""
        return bool(self.shape) and self.shape[0] is None

    @property
    def columns(self) -> tuple[int, ...]:
        """The shape of one row, or of the whole value where all rows share it."""
        return tuple(size for size in self.shape if size is not None)

    def __str__(self) -> str:
        sizes = ", ".join("*" if size is None else str(size) for size in self.shape)
        return f"{self.name}: {NAMES[self.dtype]}[{sizes}] = {self.op}({', '.join(map(_text, self.args))})"


class Program(NamedTuple):
    """A parsed program: inputs first, in the order in which the op takes them."""

    lines: tuple[Line, ...]
    returns: tuple[str, ...]

    @property
    def inputs(self) -> tuple[Line, ...]:
        return tuple(line for line in self.lines if line.op in ("rows", "whole"))

    @property
    def results(self) -> tuple[Line, ...]:
        return tuple(self.line(name) for name in self.returns)

    def line(self, name: str) -> Line:
        return next(line for line in self.lines if line.name == name)

    def __str__(self) -> str:
        return "\n".join([*map(str, self.lines), f"return {', '.join(self.returns)}"])


@functools.lru_cache(maxsize=1024)
def parse(text: str) -> Program:
    """The program that a text is.

    Raises:
        ValueError: naming the line that is none.
    """
    *body, last = text.splitlines()
    lines: list[Line] = []
    known: set[str] = set()
    for row in body:
        line = _line(row)
        if line is None or line.op not in OPS or not {str(ref) for ref in refs(line.args)} <= known:
            raise ValueError(f"epops.map_rows: program: expected an assignment of epops/row_program.py, got {row!r}")
        lines.append(line)
        known.add(line.name)
    names = tuple(last.removeprefix("return ").split(", "))
    if not last.startswith("return ") or not set(names) <= known:
        raise ValueError(f"epops.map_rows: program: expected 'return' and names of values at its end, got {last!r}")
    return Program(tuple(lines), names)


def refs(args: Any) -> list[Ref]:
    """The values that arguments name, in order."""
    if isinstance(args, Ref):
        return [args]
    return [ref for item in args for ref in refs(item)] if isinstance(args, (tuple, list)) else []


def _line(row: str) -> Line | None:
    found = re.fullmatch(r"(\w+): (\w+)\[([\d*, ]*)\] = (\w+)\((.*)\)", row)
    if not found or found[2] not in DTYPES:
        return None
    sizes = tuple(None if size == "*" else int(size) for size in found[3].split(", ") if size)
    call = ast.parse(f"f({found[5]})", mode="eval").body
    assert isinstance(call, ast.Call)
    return Line(found[1], DTYPES[found[2]], sizes, found[4], tuple(map(_argument, call.args)))


def _argument(node: ast.expr) -> Any:
    if isinstance(node, ast.Name):
        return float(node.id) if node.id in ("inf", "nan") else Ref(node.id)
    if isinstance(node, ast.List):
        return tuple(map(_argument, node.elts))
    if isinstance(node, ast.UnaryOp):
        return -_argument(node.operand)
    assert isinstance(node, ast.Constant), "written by `_text`"
    return node.value


def _text(item: Any) -> str:
    if isinstance(item, Ref):
        return str(item)
    if isinstance(item, (tuple, list)):
        return f"[{', '.join(map(_text, item))}]"
    if isinstance(item, float) and math.isinf(item):
        return "inf" if item > 0 else "-inf"
    return "nan" if isinstance(item, float) and math.isnan(item) else repr(item)
