"""What `map_rows` means: a row program over the rows before the last expert's end, an op of torch for each line.

>>> program = "x0: f32[*, 2] = rows()\\nv0: f32[*, 2] = mul(x0, 10.0)\\nreturn v0"
>>> rows = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
>>> map_rows([rows], torch.tensor([1, 2]), program=program)[0].tolist()
[[10.0, 20.0], [30.0, 40.0], [0.0, 0.0]]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..row_program import Line, Ref, parse

BLOCK = 64
"""Rows are computed in multiples of it where there are as many: vectorized loops of torch round the elements at their end in
another way, and so a valid row has the bits that it has in a computation over all rows."""

FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{
        name: getattr(torch, name)
        for name in (
            *("neg", "abs", "exp", "exp2", "expm1", "log", "log2", "log1p", "sqrt", "rsqrt", "reciprocal", "sigmoid"),
            *("tanh", "erf", "sin", "cos", "relu", "floor", "ceil", "trunc", "isnan", "logical_not", "bitwise_not"),
            *("mul", "div", "maximum", "minimum", "clamp_min", "clamp_max", "pow", "eq", "ne", "lt", "le", "gt", "ge"),
            *("logical_and", "logical_or", "logical_xor", "bitwise_and", "bitwise_or", "bitwise_xor", "where"),
        )
    },
    "add": lambda x, y, alpha=1: torch.add(x, y, alpha=alpha),
    "sub": lambda x, y, alpha=1: torch.sub(x, y, alpha=alpha),
    "sigmoid_backward": torch.ops.aten.sigmoid_backward,
    "tanh_backward": torch.ops.aten.tanh_backward,
    "threshold_backward": torch.ops.aten.threshold_backward,
    "permute": torch.permute,
    "select": torch.select,
    "cat": torch.cat,
    "pad": lambda x, pads, number: torch.nn.functional.pad(x, pads, value=number),
}


def map_rows(inputs: Sequence[Tensor], expert_ends: Tensor, *, program: str) -> list[Tensor]:
    """Results (C, …) of ``program``, zero from row ``expert_ends[-1]`` on."""
    parsed = parse(program)
    capacity = next(x.shape[0] for x, line in zip(inputs, parsed.inputs, strict=True) if line.by_row)
    valid = min(int(expert_ends[-1].item()), capacity)
    some = min(-(-valid // BLOCK) * BLOCK, capacity)
    values: dict[str, Tensor] = {
        line.name: x[:some] if line.by_row else x for x, line in zip(inputs, parsed.inputs, strict=True)
    }
    for line in parsed.lines:
        if line.name not in values:
            values[line.name] = _run(line, values, some, valid, expert_ends.device)
    results = []
    for line in parsed.results:
        result = torch.zeros((capacity, *line.columns), dtype=line.dtype, device=expert_ends.device)
        result[:valid] = values[line.name][:valid]
        results.append(result)
    return results


def _run(line: Line, values: dict[str, Tensor], rows: int, valid: int, device: torch.device) -> Tensor:
    args = _given(line.args, values)
    shape = tuple(rows if size is None else size for size in line.shape)
    if line.op == "cast":
        return args[0].to(line.dtype)
    if line.op == "full":
        return torch.full(shape, args[0], dtype=line.dtype, device=device)
    if line.op == "reshape":
        return args[0].reshape(shape)
    if line.op == "expand":
        return args[0].expand(shape)
    if line.op == "slice":
        return _part(args[0], *args[1:], length=shape[args[1]])
    if line.op == "scatter":
        x, part, dim, start, step = args
        result = x.clone(memory_format=torch.contiguous_format)
        _part(result, dim, start, step, length=part.shape[dim]).copy_(part)
        return result
    if line.op == "index":
        table, index = args
        # Rows that nobody asked for may hold any number, and a number outside the table is an error.
        index = index.clone()
        index[valid:] = 0
        return table[index.long()]
    result = FUNCTIONS[line.op](*args)
    assert result.dtype == line.dtype, f"epops.map_rows: {line} gave {result.dtype}"
    return result


def _part(x: Tensor, dim: int, start: int, step: int = 1, *, length: int) -> Tensor:
    index = [slice(None)] * dim + [slice(start, start + (length - 1) * step + 1 if length else start, step)]
    return x[tuple(index)]


def _given(item: Any, values: dict[str, Tensor]) -> Any:
    if isinstance(item, Ref):
        return values[item]
    return [_given(part, values) for part in item] if isinstance(item, tuple) else item
