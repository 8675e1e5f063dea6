"""The words of the project and the arithmetic of its tensors: one legend that every other module uses.

==========  ==================================================================================================
T           tokens that this rank sends in this call (0 is fine; may differ from rank to rank)
M           ``max_tokens``: a bound on T that holds on every rank of this call, equal on all of them
K           ``top_k``: experts chosen for a token
E           ``num_experts``: logical experts of the layer, over all ranks
R           ``ep_size``: ranks of the group
L           ``num_slots``: physical expert slots a rank, equal on all ranks
H           hidden size, in elements of a row
C           ``capacity``: rows that a rank can receive
==========  ==================================================================================================

``topk_idx`` (T, K) int32 or int64, -1 = not selected.  ``topk_weights`` (T, K) float32.  A *global slot* is
``rank * L + slot``; the group's expert map says which global slots hold a logical expert.

Everything here is plain integer arithmetic: it runs on ints and on SymInts, and never looks at a device.
"""

from __future__ import annotations

from typing import Any

LAYOUTS = ("expert", "rank", "batched")
"""Receive layouts, by their code in a route header.

``expert``: rows grouped by local expert slot, each group starting at a multiple of ``alignment``; inside a group rows
are ordered by (source rank, token, k).  ``rank``: one row a (token, rank) pair, ordered by (source rank, token).
``batched``: (L, R * M, H), slot by slot, each slot's rows first and zeros after them; decode sizes only.
"""

ROUTE_MAGIC = 0x45504F31  # "EPO1"
ROUTE_VERSION = 1
ROUTE_HEADER = 32
"""int32 words before a route's sections.  Word by word:

0 magic · 1 version · 2 layout code · 3 T · 4 M · 5 K · 6 R · 7 L · 8 C · 9 alignment · 10 rank · 11 zero ·
12 valid rows received · 13 lane · 14 E · 15 rows dropped · 16 … 31 zero.  Nothing in it tells one call from the next: equal
inputs give equal routes.

Then, in this order: ``mask`` (R,), 1 = the rank took part; ``send_slot`` (T, K), the global slot that each selection went
to, -1 = none; ``recv_row`` (R, M, K), the row of ``rows`` that holds selection k of token m of rank r, -1 = not
here.  In the ``rank`` layout every local k of a token names the same row; in ``batched`` the row is
``slot * R * M + position``.
"""

STATUS_WORDS = 8
"""int32 words of ``status``: 0 bits of `STATUS_BITS` · 1 valid rows received · 2 rows dropped for want of capacity ·
3 selections out of range on this rank · 4 selections repeated in a token on this rank · 5 peer (or -1) ·
6, 7 zero.  Bits are the group's: every rank of the call sees what any rank saw."""

STATUS_OVERFLOW = 1
STATUS_BAD_INDEX = 2
STATUS_DUPLICATE = 4
STATUS_BAD_ROUTE = 8
STATUS_DISAGREE = 16
STATUS_TIMEOUT = 32
STATUS_EXCLUDED = 64
STATUS_BITS = {
    STATUS_OVERFLOW: "overflow",
    STATUS_BAD_INDEX: "index out of range",
    STATUS_DUPLICATE: "expert chosen twice by one token",
    STATUS_BAD_ROUTE: "route does not fit the call",
    STATUS_DISAGREE: "ranks disagree on the op or its settings",
    STATUS_TIMEOUT: "peer did not arrive in time",
    STATUS_EXCLUDED: "this rank was excluded",
}

TICKET_WORDS = 4
"""int64 words of a ticket: 0 sequence number of the started exchange · 1 hash of the op and its settings · 2 lane · 3 zero."""

PLAN_HEADER = 4
"""int64 words before an all-to-all plan's sections: 0 version (1) · 1 R · 2 valid elements sent · 3 valid elements
received.  Then input splits, input offsets, output splits, output offsets, (R,) each."""

QUANT_BLOCKS = (0, 16, 32, 64, 128, 256, 512)
"""Channels to a scale for which `dispatch_quant` has CUDA kernels; the reference takes any number."""

SCALE_FORMATS = ("float32", "ue8m0", "float32_pow2")
"""``float32``; ``ue8m0``: powers of two as ``torch.float8_e8m0fnu``; ``float32_pow2``: the same powers of two in float32."""

SCALE_MATHS = (
    "divide",
    "multiply",
    "reciprocal",
    "divide_log2",
    "multiply_log2",
    "reciprocal_exact",
    "reciprocal_amax",
)
"""How float32 scales s (or their inverses r) and rows q come from a = max |x| of a block, and top, the largest fp8 value.

``divide``: s = a / top, q = x / s.  ``multiply``: s = a / top, q = x * (1 / s).  Here a / top is what torch computes on the device:
a correctly rounded quotient on CPU, the product with the float32 1 / top on CUDA.  ``reciprocal``: r = (1 / a) * top, which is
how torch computes ``top / a`` for a tensor a; q = x * r, s = 1 / r.  ``reciprocal_exact``: the same with r = top / a rounded once
(what float64 arithmetic rounded to float32 gives).  ``reciprocal_amax``: r and q as in ``reciprocal``, but s = a / top.
``divide_log2`` and ``multiply_log2``: powers of two are 2 ** ceil(log2(s)) in float32, which near a power of two is not what
rounding up the bits gives, the rule of the others.
"""

SCALE_LAYOUTS = ("row", "column")
"""How a grouped GEMM reads (C, H / block) scales: ``row``: contiguous; ``column``: strides (1, C)."""


def align_up(value: Any, alignment: int) -> Any:
    """Smallest multiple of ``alignment`` that is at least ``value``."""
    return (value + alignment - 1) // alignment * alignment


def num_slots_for(num_experts: int, ep_size: int) -> int:
    """Slots a rank when no expert is replicated: E / R rounded up."""
    return -(-num_experts // ep_size)


def capacity(layout: str, max_tokens: Any, ep_size: int, top_k: int, num_slots: int, alignment: int) -> Any:
    """Rows that always suffice, C = f(M); the most that any routing can bring to one rank.

    >>> capacity("expert", 4, 2, 2, 3, 1)
    16
    >>> capacity("expert", 4, 2, 2, 3, 8)
    40
    >>> capacity("rank", 4, 2, 2, 3, 1)
    8
    >>> capacity("batched", 4, 2, 2, 3, 1)
    24
    """
    if layout == "rank":
        return ep_size * max_tokens
    if layout == "batched":
        return num_slots * ep_size * max_tokens
    rows = ep_size * max_tokens * min(top_k, num_slots)
    return align_up(rows + num_slots * (alignment - 1), alignment)


def route_size(num_tokens: Any, max_tokens: Any, ep_size: int, top_k: int) -> Any:
    """int32 words of a route; see `ROUTE_HEADER`."""
    return ROUTE_HEADER + ep_size + num_tokens * top_k + ep_size * max_tokens * top_k


def plan_size(ep_size: int) -> int:
    """int64 words of an all-to-all plan; see `PLAN_HEADER`."""
    return PLAN_HEADER + 4 * ep_size


def num_scales(hidden: Any, block: int) -> Any:
    """Scales of one row: 1 when ``block`` is 0 (per token), else H / block rounded up."""
    return 1 if block == 0 else (hidden + block - 1) // block
