"""A tensor's dims as the all_to_all kernel takes them: those that lie in one piece counted as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Dims(NamedTuple):
    """Dims of x from outermost to innermost, those that lie in one piece counted as one; strides in elements.

    ``scatter_at`` and ``gather_at`` are the places of the two dims, whose steps have ``scatter_unit`` and ``gather_unit`` elements.
    The last dim has stride 1.
    """

    size: tuple[int, ...]
    x_stride: tuple[int, ...]
    out_stride: tuple[int, ...]
    scatter_at: int
    gather_at: int
    scatter_unit: int
    gather_unit: int


def dims_of(
    shape: Sequence[int], stride: Sequence[int], out_shape: Sequence[int], scatter_dim: int, gather_dim: int
) -> Dims:
    """Merge dims of an x of ``shape`` and ``stride`` whose result is contiguous, of ``out_shape``.

    >>> dims_of((6, 4, 8), (32, 8, 1), (9, 4, 8), 0, 0)
    Dims(size=(192,), x_stride=(1,), out_stride=(1,), scatter_at=0, gather_at=0, scatter_unit=32, gather_unit=32)
    >>> dims_of((6, 4, 8), (64, 8, 1), (3, 9, 8), 0, 1)  # every other four of eight rows
    Dims(size=(6, 32), x_stride=(64, 1), out_stride=(72, 1), scatter_at=0, gather_at=1, scatter_unit=1, gather_unit=8)
    """
    out_strides = [1] * len(shape)
    for dim in reversed(range(len(shape) - 1)):
        out_strides[dim] = out_strides[dim + 1] * out_shape[dim + 1]
    # Each kept dim: size, stride in x, stride in out, the dims of x whose steps it counts and elements a step.
    kept: list[list[Any]] = []
    for dim, (size, step, out_step) in enumerate(zip(shape, stride, out_strides, strict=True)):
        special = dim in (scatter_dim, gather_dim)
        if size == 1 and not special:
            continue
        if kept and not special and kept[-1][1] == size * step:
            last = kept[-1]
            last[0], last[1], last[2], last[4] = last[0] * size, step, out_step, last[4] * size
        else:
            kept.append([size, step, out_step, dim if special else -1, 1])
    if not kept or kept[-1][1] != 1:
        kept.append([1, 1, 1, -1, 1])
    places = [entry[3] for entry in kept]
    scatter_at, gather_at = places.index(scatter_dim), places.index(gather_dim)
    return Dims(
        tuple(entry[0] for entry in kept),
        tuple(entry[1] for entry in kept),
        tuple(entry[2] for entry in kept),
        scatter_at,
        gather_at,
        kept[scatter_at][4],
        kept[gather_at][4],
    )
