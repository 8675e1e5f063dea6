"""Random computations over received rows, between two grouped products, as graphs that passes can rewrite."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

SLOTS, HIDDEN, INNER = 3, 8, 6

UNARY: list[Callable[[Tensor], Tensor]] = [
    torch.neg, torch.abs, torch.exp, torch.sigmoid, torch.tanh, torch.erf, torch.sin, torch.cos, F.silu, F.gelu, torch.relu,
    torch.square, torch.floor, torch.ceil, torch.trunc, torch.expm1, F.softplus, F.hardtanh, torch.isnan, F.elu, F.mish,
    lambda x: x.abs().sqrt(), lambda x: (x.abs() + 1).log(), lambda x: (x.abs() + 0.5).rsqrt(), lambda x: x.abs().log1p(),
    lambda x: x.clamp(-0.5, 0.7), lambda x: x.clamp(max=0.3), lambda x: x * 1.702, lambda x: 1 - x, lambda x: x / 3, lambda x: x**3,
    lambda x: x.float(), lambda x: x.to(torch.bfloat16), lambda x: x.half(), lambda x: F.leaky_relu(x, 0.1),
    lambda x: F.gelu(x, approximate="tanh"), lambda x: torch.where(x > 0.1, x, -2.0), lambda x: (x < 0.25).to(x.dtype),
]  # fmt: skip
BINARY: list[Callable[[Tensor, Tensor], Tensor]] = [
    torch.add, torch.sub, torch.mul, torch.maximum, torch.minimum, lambda a, b: a / (b.abs() + 1), lambda a, b: a - 0.5 * b,
    lambda a, b: torch.where(a < b, a, b * 2), lambda a, b: torch.add(a, b, alpha=-0.5), lambda a, b: a * (a >= b),
    lambda a, b: torch.where((a > 0) & ~(b > 0), a, b),
]  # fmt: skip


def gate(seed: int) -> Callable[..., Tensor]:
    """A random function of up (C, 2·INNER), slot (C,), weights (C,), table (SLOTS + 1, 2·INNER), channel (2·INNER,) → (C, INNER)"""

    def call(up: Tensor, slot: Tensor, weights: Tensor, table: Tensor, channel: Tensor) -> Tensor:
        choose = random.Random(seed)
        values = [up]
        if choose.random() < 0.5:
            values.append(up + table[torch.where(slot < 0, SLOTS, slot).long()].to(up.dtype))
        for _ in range(choose.randint(3, 9)):
            values.append(_step(choose, values, weights, channel))
        return _narrow(choose, values[-1] if values[-1] is not up else up * 2).to(up.dtype)

    return call


def _step(choose: random.Random, values: list[Tensor], weights: Tensor, channel: Tensor) -> Tensor:
    x = choose.choice(values[-3:])
    kind = choose.random()
    if kind < 0.4:
        result = choose.choice(UNARY)(x)
        return result.to(x.dtype) if result.dtype == torch.bool else result
    if kind < 0.65:
        other = choose.choice(values)
        return choose.choice(BINARY)(x, _fit(choose, other, x.shape[1]))
    if kind < 0.75:
        return x * weights[:, None].to(choose.choice([x.dtype, torch.float32]))
    if kind < 0.85:
        return x + channel[: x.shape[1]].to(x.dtype) if choose.random() < 0.5 else x * channel[None, : x.shape[1]]
    return _moved(choose, x)


def _moved(choose: random.Random, x: Tensor) -> Tensor:
    """The same row's numbers at other places, or some of them."""
    width = x.shape[1]
    half = width // 2
    moves: list[Callable[[], Tensor]] = [
        lambda: torch.cat([x[:, half:], -x[:, :half]], 1),
        lambda: F.pad(x[:, 1:], (1, 0), value=0.5),
        lambda: x.unflatten(1, (2, half)).transpose(1, 2).flatten(1) if width % 2 == 0 else x,
        lambda: torch.stack([x[:, ::2], x[:, 1::2]], 2).flatten(1) if width % 2 == 0 else x,
        lambda: torch.slice_scatter(x, x[:, 0:width:2] * 2, 1, 0, width, 2),
        lambda: x[:, :half].exp(),
    ]
    return choose.choice(moves[:-1] if width <= INNER else moves)()


def _fit(choose: random.Random, x: Tensor, width: int) -> Tensor:
    if x.shape[1] == width:
        return x
    return x[:, choose.randrange(2) :: 2][:, :width] if x.shape[1] > width else torch.cat([x, x], 1)[:, :width]


def _narrow(choose: random.Random, x: Tensor) -> Tensor:
    if x.shape[1] == INNER:
        return x
    a, b = x.chunk(2, 1) if choose.random() < 0.5 else (x[:, ::2], x[:, 1::2])
    return a * b if choose.random() < 0.5 else a + b.sigmoid()


def inputs(seed: int, dtype: torch.dtype, capacity: int = 37, device: str = "cpu") -> list[Tensor]:
    """Arguments of `graph_of`; some experts have no rows, and padding holds large numbers."""
    make = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 9, (SLOTS,), generator=make)
    ends = counts.cumsum(0).to(torch.int32)
    rows = torch.randn(capacity, HIDDEN, generator=make)
    slot = torch.full((capacity,), -1, dtype=torch.int32)
    slot[: int(ends[-1])] = torch.repeat_interleave(torch.arange(SLOTS), counts).int()
    given = [
        rows.to(dtype), ends, slot, torch.rand(capacity, generator=make),
        (torch.randn(SLOTS, HIDDEN, 2 * INNER, generator=make) / 3).to(dtype),
        (torch.randn(SLOTS, INNER, HIDDEN, generator=make) / 3).to(dtype),
        torch.randn(SLOTS + 1, 2 * INNER, generator=make), torch.randn(2 * INNER, generator=make),
    ]  # fmt: skip
    return [item.to(device) for item in given]


def graph_of(seed: int, given: list[Tensor]) -> GraphModule:
    """up → the random computation → down, decomposed as Inductor would."""
    function = gate(seed)

    def block(rows: Tensor, ends: Tensor, slot: Tensor, weights: Tensor, up: Any, down: Any, table: Any, channel: Any):
        grouped = torch.ops.epops.grouped_mm
        return grouped(function(grouped(rows, up, ends), slot, weights, table, channel), down, ends)

    module = make_fx(block, decomposition_table=select_decomp_table(), tracing_mode="fake")(*given)
    module.graph.eliminate_dead_code()
    return module
