"""Triton expressions of the lines of a row program, each at the columns that are asked of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..row_program import Line, Program, Ref, refs

TYPES = {
    torch.float64: "tl.float64",
    torch.float32: "tl.float32",
    torch.bfloat16: "tl.bfloat16",
    torch.float16: "tl.float16",
    torch.float8_e4m3fn: "tl.float8e4nv",
    torch.float8_e5m2: "tl.float8e5",
    torch.int64: "tl.int64",
    torch.int32: "tl.int32",
    torch.int16: "tl.int16",
    torch.int8: "tl.int8",
    torch.uint8: "tl.uint8",
    torch.bool: "tl.int1",
}
NARROW = (torch.bfloat16, torch.float16)
COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")

# In the type that the line computes in; comparisons with NaN are written out, since maximum and minimum would drop it.
EXPRESSIONS: dict[str, str] = {
    "neg": "-{0}", "abs": "tl.abs({0})", "exp": "tl.exp({0})", "exp2": "tl.exp2({0})", "expm1": "expm1({0})",
    "log": "tl.log({0})", "log2": "tl.log2({0})", "log1p": "log1p({0})", "rsqrt": "tl.rsqrt({0})",
    "sqrt": "tl.sqrt_rn({0})", "reciprocal": "tl.div_rn({one}, {0})", "sigmoid": "1.0 / (1.0 + tl.exp(-{0}))",
    "tanh": "tanh({0})", "erf": "tl.erf({0})", "sin": "tl.sin({0})", "cos": "tl.cos({0})",
    "relu": "tl.where(({0} > 0) | ({0} != {0}), {0}, {zero})", "floor": "tl.floor({0})", "ceil": "tl.ceil({0})",
    "trunc": "rounded({0})", "isnan": "{0} != {0}", "bitwise_not": "~{0}",
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "div": "tl.div_rn({0}, {1})",
    "maximum": "tl.where(({0} > {1}) | ({0} != {0}), {0}, {1})",
    "minimum": "tl.where(({0} < {1}) | ({0} != {0}), {0}, {1})",
    "clamp_min": "tl.where(({0} > {1}) | ({0} != {0}), {0}, {1})",
    "clamp_max": "tl.where(({0} < {1}) | ({0} != {0}), {0}, {1})",
    "eq": "{0} == {1}", "ne": "{0} != {1}", "lt": "{0} < {1}", "le": "{0} <= {1}", "gt": "{0} > {1}", "ge": "{0} >= {1}",
    "bitwise_and": "{0} & {1}", "bitwise_or": "{0} | {1}", "bitwise_xor": "{0} ^ {1}",
    "sigmoid_backward": "{0} * (1.0 - {1}) * {1}", "tanh_backward": "{0} * (1.0 - {1} * {1})",
    "threshold_backward": "tl.where({1} <= {2}, {zero}, {0})",
}  # fmt: skip
LOGICAL = {"logical_not": "~({0})", "logical_and": "({0}) & ({1})", "logical_or": "({0}) | ({1})",
           "logical_xor": "({0}) ^ ({1})"}  # fmt: skip
DOUBLE = {"sqrt": "tl.sqrt({0})", "reciprocal": "{one} / {0}", "div": "{0} / {1}"}
POWERS = {0.5: "tl.sqrt_rn({0})", 1.0: "{0}", 2.0: "{0} * {0}", 3.0: "{0} * {0} * {0}", -0.5: "tl.rsqrt({0})",
          -1.0: "tl.div_rn({one}, {0})", -2.0: "tl.div_rn({one}, {0} * {0})"}  # fmt: skip
DOUBLE_POWERS = {0.5: "tl.sqrt({0})", -1.0: "{one} / {0}", -2.0: "{one} / ({0} * {0})"}

Place = str | int
"""The number of a column: known, or an expression of ``j``."""


class Columns(NamedTuple):
    """Where in a row a value is wanted: a place for each dimension, and under which conditions these exist."""

    at: tuple[Place, ...]
    when: tuple[str, ...] = ()

    @staticmethod
    def of(flat: Place, shape: tuple[int, ...], when: tuple[str, ...] = ()) -> Columns:
        """The places in ``shape`` of a number that counts its elements."""
        at: list[Place] = []
        inner = 1
        for dim in reversed(range(len(shape))):
            place = _over(flat, inner)
            at.insert(0, place if dim == 0 else _modulo(place, shape[dim]))
            inner *= shape[dim]
        return Columns(tuple(at), when)

    def flat(self, shape: tuple[int, ...]) -> Place:
        """The inverse of `of`."""
        total: Place = 0
        for place, size in zip(self.at, shape):
            total = _plus(_times(total, size), place)
        return total

    def moved(self, dim: int, place: Place, *when: str) -> Columns:
        return Columns((*self.at[:dim], place, *self.at[dim + 1 :]), (*self.when, *when))


def _plus(a: Place, b: Place) -> Place:
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    return b if a == 0 else a if b == 0 else f"({a} + {b})"


def _times(a: Place, k: int) -> Place:
    return a * k if isinstance(a, int) else a if k == 1 else f"({a} * {k})"


def _over(a: Place, k: int) -> Place:
    return a // k if isinstance(a, int) else a if k == 1 else f"({a} // {k})"


def _modulo(a: Place, k: int) -> Place:
    return a % k if isinstance(a, int) else 0 if k == 1 else f"({a} % {k})"


def compute_type(line: Line, operands: list[Line | float]) -> torch.dtype:
    """What torch converts the operands of a pointwise line to."""
    if line.op not in COMPARISONS:
        return line.dtype
    given = [
        torch.empty([1] * len(item.shape), dtype=item.dtype, device="meta") if isinstance(item, Line) else item
        for item in operands
    ]
    return torch.result_type(*given)


class Writer:
    """Writes assignments of one tile, ``rows``; a value at the same columns is computed once."""

    def __init__(self, program: Program) -> None:
        self.lines = {line.name: line for line in program.lines}
        self.rows: list[str] = []
        self.known: dict[tuple[str, Columns], str] = {}

    def value(self, line: Line, columns: Columns) -> str:
        """The variable that holds a line's value at ``columns``."""
        key = (line.name, columns)
        if key not in self.known:
            special: Callable[[Line, Columns], str] | None = getattr(self, f"_{line.op}", None)
            self.known[key] = special(line, columns) if special else self._pointwise(line, columns)
        return self.known[key]

    def assign(self, expression: str) -> str:
        self.rows.append(f"_{len(self.rows)} = {expression}")
        return f"_{len(self.rows) - 1}"

    def operand(self, ref: Ref, line: Line, columns: Columns) -> str:
        """An operand that is broadcast to ``line``."""
        other = self.lines[ref]
        places = (0, *columns.at) if line.by_row else columns.at
        kept = places[len(places) - len(other.shape) :] if other.shape else ()
        at = tuple(0 if size == 1 else place for place, size in zip(kept, other.shape) if size is not None)
        return self.value(other, Columns(at, columns.when))

    # ---- what is read ----------------------------------------------------------------------------------------------

    def _rows(self, line: Line, columns: Columns) -> str:
        return self._load(line.name, f"r * {line.name}_0", columns, 1, ["in_rows"])

    def _whole(self, line: Line, columns: Columns) -> str:
        return self._load(line.name, "tl.full([1, 1], 0, tl.int32)", columns, 0, [])

    def _index(self, line: Line, columns: Columns) -> str:
        table, index = (self.lines[ref] for ref in refs(line.args))
        place = self.assign(f"{self.value(index, Columns(()))}.to(tl.int64) + r * 0")
        place = self.assign(f"tl.where({place} < 0, {place} + {table.shape[0]}, {place})")
        inside = f"({place} >= 0) & ({place} < {table.shape[0]})"  # a bad number never becomes an address
        return self._load(table.name, f"{place} * {table.name}_0", columns, 1, ["in_rows", inside])

    def _load(self, name: str, start: str, columns: Columns, first: int, masks: list[str]) -> str:
        terms = [f"{place} * {name}_{first + dim}" for dim, place in enumerate(columns.at) if place != 0]
        if any(isinstance(place, str) for place in columns.at):
            masks = [*masks, "in_columns", *columns.when]
        # 0.0 and not 0 for floats: Triton casts no int to fp8.
        other = "0.0" if self.lines[name].dtype.is_floating_point else "0"
        mask = f", mask={' & '.join(masks)}, other={other}" if masks else ""
        return self.assign(f"tl.load({' + '.join([name, start, *terms])}{mask})")

    def _full(self, line: Line, columns: Columns) -> str:
        return self._number(line.args[0], line.dtype)

    def _number(self, number: Any, dtype: torch.dtype) -> str:
        wide = torch.float32 if dtype in NARROW else dtype
        literal = f'float("{number}")' if number != number or number in (float("inf"), -float("inf")) else repr(number)
        if wide.is_floating_point and literal.lstrip("-").isdigit():
            literal += ".0"
        narrow = f".to({TYPES[dtype]})" if wide != dtype else ""
        return self.assign(f"tl.full([1, 1], {literal}, {TYPES[wide]}){narrow}")

    # ---- where it lies ---------------------------------------------------------------------------------------------

    def _reshape(self, line: Line, columns: Columns) -> str:
        before = self.lines[line.args[0]]
        return self.value(before, Columns.of(columns.flat(line.columns), before.columns, columns.when))

    def _permute(self, line: Line, columns: Columns) -> str:
        at: list[Place] = [0] * len(columns.at)
        for place, dim in zip(columns.at, line.args[1][1:]):
            at[dim - 1] = place
        return self.value(self.lines[line.args[0]], Columns(tuple(at), columns.when))

    def _expand(self, line: Line, columns: Columns) -> str:
        return self.operand(line.args[0], line, columns)

    def _slice(self, line: Line, columns: Columns) -> str:
        before, dim, start, step = line.args
        place = _plus(_times(columns.at[dim - 1], step), start)
        return self.value(self.lines[before], columns.moved(dim - 1, place))

    def _select(self, line: Line, columns: Columns) -> str:
        before, dim, place = line.args
        at = (*columns.at[: dim - 1], place, *columns.at[dim - 1 :])
        return self.value(self.lines[before], Columns(at, columns.when))

    # ---- what is put together ----------------------------------------------------------------------------------------

    def _cat(self, line: Line, columns: Columns) -> str:
        parts, dim = line.args
        start, found = 0, ""
        for ref in parts:
            part = self.lines[ref]
            length = part.columns[dim - 1]
            found = self._among(part, columns, dim, start, length, 1, found)
            start += length
        return found

    def _scatter(self, line: Line, columns: Columns) -> str:
        x, part, dim, start, step = line.args
        around = self.value(self.lines[x], columns)
        length = self.lines[part].columns[dim - 1]
        return self._among(self.lines[part], columns, dim, start, length, step, around)

    def _pad(self, line: Line, columns: Columns) -> str:
        x, pads, number = line.args
        around = self._number(number, line.dtype)
        before = self.lines[x]
        inside: list[str] = []
        for back in range(len(pads) // 2):
            dim = len(columns.at) - 1 - back
            place = _plus(columns.at[dim], -pads[2 * back])
            if isinstance(place, int):
                if not 0 <= place < before.columns[dim]:
                    return around
                columns = columns.moved(dim, place)
                continue
            here = [f"({place} >= 0)", f"({place} < {before.columns[dim]})"]
            inside += here
            columns = columns.moved(dim, place, *here)
        value = self.value(before, columns)
        return self.assign(f"tl.where({' & '.join(inside)}, {value}, {around})") if inside else value

    def _among(self, part: Line, columns: Columns, dim: int, start: int, length: int, step: int, around: str) -> str:
        """``part`` where the column is one of those that it fills, and ``around`` elsewhere."""
        away = _plus(columns.at[dim - 1], -start)
        if isinstance(away, int):
            if not (0 <= away < length * step and away % step == 0):
                return around
            return self.value(part, columns.moved(dim - 1, away // step))
        inside = [f"({away} >= 0)", f"({away} < {length * step})"]
        if step != 1:
            inside.append(f"({away} % {step} == 0)")
        value = self.value(part, columns.moved(dim - 1, _over(away, step), *inside))
        return self.assign(f"tl.where({' & '.join(inside)}, {value}, {around})") if around else value

    # ---- what is computed --------------------------------------------------------------------------------------------

    def _cast(self, line: Line, columns: Columns) -> str:
        value = self.operand(line.args[0], line, columns)
        through = ".to(tl.float32)" if self.lines[line.args[0]].dtype == torch.float64 and line.dtype in NARROW else ""
        return self.assign(f"{value}{through}.to({TYPES[line.dtype]})")

    def _where(self, line: Line, columns: Columns) -> str:
        sides = [self._given(item, line, columns, line.dtype, line.dtype) for item in line.args[1:]]
        truth = self._truth(line.args[0], line, columns)
        return self.assign(f"tl.where({truth}, {sides[0]}, {sides[1]})")

    def _pow(self, line: Line, columns: Columns) -> str:
        table = {**POWERS, **DOUBLE_POWERS} if line.dtype == torch.float64 else POWERS
        return self._formula(table[float(line.args[1])], line, line.args[:1], columns)

    def _pointwise(self, line: Line, columns: Columns) -> str:
        if line.op in LOGICAL:
            sides = [self._truth(item, line, columns) for item in line.args]
            return self.assign(LOGICAL[line.op].format(*sides))
        expression, args = EXPRESSIONS[line.op], line.args
        if line.dtype == torch.float64:
            expression = DOUBLE.get(line.op, expression)
        if line.op in ("add", "sub") and len(args) == 3:
            expression = expression.replace("{1}", "{1} * {2}")
        return self._formula(expression, line, args, columns)

    def _formula(self, expression: str, line: Line, args: tuple[Any, ...], columns: Columns) -> str:
        operands = [self.lines[item] if isinstance(item, Ref) else item for item in args]
        common = compute_type(line, operands) if line.op != "isnan" else operands[0].dtype
        wide = torch.float32 if common in NARROW else common
        given = [self._given(item, line, columns, common, wide) for item in args]
        extra = {
            word: self._number(number, wide)
            for word, number in (("one", 1), ("zero", 0))
            if f"{{{word}}}" in expression
        }
        result = expression.format(*given, **extra)
        return self.assign(f"({result}).to({TYPES[line.dtype]})" if line.dtype != wide else result)

    def _given(self, item: Any, line: Line, columns: Columns, common: torch.dtype, wide: torch.dtype) -> str:
        """An operand converted as torch would: to the common type, and computed with in a wider one where that is narrow."""
        if not isinstance(item, Ref):
            if (
                line.op in COMPARISONS and common in NARROW
            ):  # torch compares in the common type, and has the number in it
                item = float(torch.tensor(item, dtype=common))
            return self._number(item, wide)
        value, dtype = self.operand(item, line, columns), self.lines[item].dtype
        if dtype != common and common in NARROW and wide != common:
            value = f"{value}.to({TYPES[common]})"
            dtype = common
        return self.assign(f"{value}.to({TYPES[wide]})") if dtype != wide else value

    def _truth(self, item: Any, line: Line, columns: Columns) -> str:
        if not isinstance(item, Ref):
            return self._number(bool(item), torch.bool)
        value = self.operand(item, line, columns)
        return value if self.lines[item].dtype == torch.bool else f"({value} != 0)"
