"""What a transport is asked for, and the header that every exchange of a group opens with."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from .mailbox import MESSAGE_WORDS

HEADER_WORDS = MESSAGE_WORDS
HEADER_MAGIC = 0x45504F5058

OPCODES = (
    "abort",
    "dispatch",
    "dispatch_quant",
    "dispatch_backward",
    "combine",
    "combine_backward",
    "all_to_all",
    "plan_all_to_all",
    "all_reduce",
    "gather_tokens",
)

WITH_SIZES = ("all_to_all", "plan_all_to_all")

COMPARED = (
    (2, "op"),
    (3, "max_tokens"),
    (4, "top_k"),
    (5, "bytes a row"),
    (6, "num_slots"),
    (7, "num_experts"),
    (8, "layout"),
    (9, "alignment"),
    (10, "capacity"),
    (11, "lane"),
    (1, "position in the group's order"),
)
"""Header words that must be equal on all ranks, in the order in which a difference is reported."""


OTHER_DIMS = "x, the sizes of its dims that are neither scattered nor gathered (as one number)"


class Call(NamedTuple):
    """The settings of one exchange that ranks must agree on; 0 where an op has none."""

    op: str
    max_tokens: int = 0
    top_k: int = 0
    row_bytes: int = 0
    num_slots: int = 0
    num_experts: int = 0
    layout: int = 0
    alignment: int = 0
    capacity: int = 0
    lane: int = 0
    grad_scale: float = 1.0
    """Travels in the place of ``sizes``, so that host transports compare it, of ops that have no sizes."""

    def words(self) -> list[int]:
        """What ranks compare, as the header has it from word 2 on."""
        return [OPCODES.index(self.op), *self[1:-1]]

    def header(
        self, sequence: int, bits: int, counts: list[int], sizes: list[tuple[int, int]] | None = None
    ) -> torch.Tensor:
        """(R, `HEADER_WORDS`) int64, a row a destination.

        Words: 0 magic · 1 sequence · 2 op · 3 … 11 settings · 12 rows that follow · 13 status bits · 14, 15 ``sizes``, or the
        bits of ``grad_scale`` as float64.
        """
        fixed = [HEADER_MAGIC, sequence, *self.words()]
        pairs = sizes or [(struct.unpack("<q", struct.pack("<d", self.grad_scale))[0], 0)] * len(counts)
        return torch.tensor(
            [[*fixed, n, bits, *pair] for n, pair in zip(counts, pairs, strict=True)], dtype=torch.int64
        )


def all_to_all_call(shape: Sequence[int], scatter_dim: int, gather_dim: int, row_bytes: int, lane: int) -> Call:
    """The settings of an all_to_all of a tensor of this shape; the sizes that are not exchanged are compared as one number."""
    rest = tuple(int(size) for dim, size in enumerate(shape) if dim not in (scatter_dim, gather_dim))
    layout, others = scatter_dim * 16 + gather_dim, zlib.crc32(repr(rest).encode())
    return Call("all_to_all", row_bytes=row_bytes, layout=layout, capacity=others, lane=lane)


def differences(mine: list[int], theirs: list[int]) -> str | None:
    """What a peer's header says differently, as "argument: expected …, got …", or None."""
    if theirs[0] != mine[0]:
        return f"the peer sent no epops header (its first word is {theirs[0]:#x}); do all ranks run the same epops?"
    for word, name in COMPARED:
        if theirs[word] != mine[word]:
            expected, got = mine[word], theirs[word]
            if name == "op":
                return f"op: expected {OPCODES[expected]} as here, got {_opcode(got)} there"
            return f"{_word_name(name, _opcode(mine[2]))}: expected {expected} as here, got {got} there"
    if _opcode(mine[2]) not in WITH_SIZES and mine[14] != theirs[14]:
        expected, got = (struct.unpack("<d", struct.pack("<q", words[14]))[0] for words in (mine, theirs))
        return f"grad_scale: expected {expected:g} as here, got {got:g} there (is it grad_reduce of epops.parallelize?)"
    return None


def describe(word: int, mine: list[int], theirs: list[int]) -> tuple[str, str, str]:
    """Name and both values, as text, of one of `Call.words`, or of the bytes of a part, which follow them."""
    if word == 0:
        return "op", _opcode(mine[word]), _opcode(theirs[word])
    name = {place - 2: name for place, name in COMPARED}.get(word, "x, the bytes for each rank")
    return _word_name(name, _opcode(mine[0])), str(mine[word]), str(theirs[word])


def _word_name(name: str, opcode: str) -> str:
    """What a word of an op is called there: those with sizes have no rows of one width, and no capacity."""
    if opcode in WITH_SIZES and name == "bytes a row":
        return "x, the bytes for each rank"
    return OTHER_DIMS if opcode in WITH_SIZES and name == "capacity" else name


def _opcode(code: int) -> str:
    return OPCODES[code] if 0 <= code < len(OPCODES) else f"op number {code}"


class Swap(NamedTuple):
    """What came back from an exchange: a block of rows a source, and the union of all ranks' status bits.

    On device transports ``bits`` and ``counts`` are tensors and blocks are padded; on host transports ``sizes`` are the two
    words that each peer sent along.
    """

    rows: list[torch.Tensor]
    bits: Any
    counts: Any = None
    sizes: list[tuple[int, int]] | None = None


class Pending(NamedTuple):
    """An exchange that a device transport has begun and that runs beside what its caller launches next."""

    take: Callable[[], Any]
    """Have the caller's stream wait for the exchange, and return what it brings; called once."""
    behind: Callable[[], None] = lambda: None
    """Have the caller's stream wait for the exchange, where the wire itself does not keep exchanges in order."""


class Transport(Protocol):
    """Who moves the bytes.

    ``host_counts`` transports read row counts on the host and move exactly the rows there are; the others move M rows a
    pair, so that a CUDA graph can hold them (``swap_padded``, and ``begin_padded`` for started halves).  A transport may also
    implement whole ops: a method named like the op, with the op's arguments after the group, replaces pack, swap and unpack;
    ``beside`` then begins one for a start half, if ``runs_beside`` says that it pays; else the wait runs it.
    """

    name: str
    host_counts: bool
    row_alignment: int

    def close(self) -> None: ...
