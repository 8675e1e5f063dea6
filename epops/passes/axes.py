"""Which axis of a tensor is which: shapes as lists of atoms that views and transposes split and reorder, but never change.

A dimension is a list of `Atom`, outermost first.  Reading a tensor row by row walks its atoms like the digits of a number, so two
tensors whose atoms come in the same order hold the same elements in the same order.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from .graph_facts import COPIES, PERMUTES, aten, is_reshape, known_equal, tensor


class Atom:
    """A stretch of an axis; it may turn out later to be two."""

    def __init__(self, size: Any, *, whole: bool = False) -> None:
        self.size = size
        self.whole = whole  # never split or left out, whatever its size on this rank
        self.parts: tuple[Atom, Atom] | None = None

    def split(self, outer: int) -> bool:
        """Divide into ``outer`` times the rest; whether that is possible.

        A symbolic size is divided like a known one, for another rank may know it: a view that is dealt out to the end divides
        it without remainder, or it would not be a view.
        """
        if self.whole or outer <= 0 or (isinstance(self.size, int) and self.size % outer):
            return False
        self.parts = (Atom(outer), Atom(self.size // outer))
        return True


Dims = list[list[Atom]]


def flat(dims: Dims) -> list[Atom]:
    """All atoms in order, after every split; those of size 1 say nothing and are left out."""
    found: list[Atom] = []
    stack = [atom for dim in dims for atom in dim][::-1]
    while stack:
        atom = stack.pop()
        if atom.parts is not None:
            stack.extend(atom.parts[::-1])
        elif atom.whole or not known_equal(atom.size, 1):
            found.append(atom)
    return found


def resolved(dims: Dims) -> Dims:
    """The same dims with the parts of their atoms in place of split ones."""
    return [flat([dim]) for dim in dims]


def of_shape(shape: Any) -> Dims:
    """One atom a dimension."""
    return [[Atom(size)] for size in shape]


def through(node: Node, dims: Dims) -> Dims | None:
    """Dims of what a reshape, permute or copy makes of a tensor with ``dims``; None for other nodes, or when atoms do not fit."""
    if node.target in PERMUTES:
        order = permutation(node, len(dims))
        return None if order is None else [dims[place] for place in order]
    if node.target in COPIES:
        return dims
    after = tensor(node)
    return reshaped(dims, list(after.shape)) if is_reshape(node) and after is not None else None


def permutation(node: Node, rank: int) -> list[int] | None:
    """For each dimension of a permute's result the dimension of its input."""
    args = list(node.args[1:])
    if node.target is aten.permute.default:
        return [place % rank for place in args[0]]
    order = list(range(rank))
    if node.target is aten.t.default:
        return order[::-1] if rank == 2 else order
    if node.target is aten.movedim.int:
        order.insert(args[1] % rank, order.pop(args[0] % rank))
        return order
    one, other = args[0] % rank, args[1] % rank
    order[one], order[other] = order[other], order[one]
    return order


def permuted_by(nodes: list[Node], rank: int) -> list[int] | None:
    """For each dimension behind a chain of permutes and copies the dimension in front of it; None for other chains."""
    order = list(range(rank))
    for node in nodes:
        one = permutation(node, rank) if node.target in PERMUTES else None
        if one is None and node.target not in COPIES:
            return None
        order = order if one is None else [order[place] for place in one]
    return order


def reshaped(dims: Dims, shape: list[Any]) -> Dims | None:
    """Deal the atoms out to the dimensions of ``shape``, splitting where a boundary falls inside one."""
    waiting = flat(dims)[::-1]
    result: Dims = []
    for size in shape:
        dim: list[Atom] = []
        have: Any = 1
        while not known_equal(have, size):
            if not waiting:
                return None
            atom = waiting.pop()
            if known_equal(have * atom.size, size) or _fits(have * atom.size, size):
                dim.append(atom)
                have = have * atom.size
                continue
            if not (isinstance(size, int) and isinstance(have, int)) or size % have or not atom.split(size // have):
                return None
            outer, inner = atom.parts  # type: ignore[misc]
            dim.append(outer)
            waiting.append(inner)
            have = size
        result.append(dim)
    return result if not waiting else None


def _fits(have: Any, size: Any) -> bool:
    if isinstance(have, int) and isinstance(size, int):
        return 0 < have < size and size % have == 0
    return not isinstance(size, int)


def boundary(dims: Dims, before: Atom | None) -> list[list[Atom]]:
    """Resolved dims with a boundary in front of one atom, where there is none yet."""
    result: list[list[Atom]] = []
    for dim in resolved(dims):
        place = dim.index(before) if before in dim else 0
        result.extend([dim[:place], dim[place:]] if place else [dim])
    return result
