"""The tokens of one step, ordered by the ranks that own their requests: tensors of fixed shapes, whatever the step brings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Chunk(NamedTuple):
    """New tokens of one request: the rank that owns its cache, its slot there, the position of the first token."""

    rank: int
    slot: int
    start: int
    tokens: Sequence[int]


class Batch(NamedTuple):
    """A step as one rank sees it.  T, N, Q and S are bounds that hold for every step, so that one graph serves all.

    ``input_ids``, ``position_ids`` (1, T): the tokens of all ranks, in rank order, padded.  ``rank_tokens`` (R,): how many
    are whose.  ``own`` (N,): which of the T are this rank's.  ``cache_row`` (T,): the cache row of each, the last row for
    those of other ranks.  ``grid`` (Q * S,): which of the N stands at place s of slot q.  ``place`` (N,): and back.
    ``query_position`` (Q, S).  All int64; entries that stand for nothing are in range and their results are not used.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    rank_tokens: torch.Tensor
    own: torch.Tensor
    cache_row: torch.Tensor
    grid: torch.Tensor
    place: torch.Tensor
    query_position: torch.Tensor


def lay_out(
    chunks: Sequence[Chunk],
    *,
    rank: int,
    ep_size: int,
    max_tokens: int,
    rank_tokens: int,
    num_slots: int,
    chunk_tokens: int,
    max_length: int,
    device: torch.device | str | None = None,
) -> tuple[Batch, list[list[int]]]:
    """A step's `Batch`, and for each chunk the places of its tokens among the T.

    Args:
        max_tokens: T, of all ranks together.
        rank_tokens: N, of one rank.
        num_slots: Q, requests of one rank.
        chunk_tokens: S, new tokens of one request in one step.
        max_length: tokens of one request in the cache.

    >>> batch, places = lay_out([Chunk(1, 0, 5, [7]), Chunk(0, 1, 0, [8, 9])], rank=1, ep_size=2, max_tokens=4,
    ...                         rank_tokens=2, num_slots=2, chunk_tokens=2, max_length=8)
    >>> batch.input_ids.tolist(), batch.rank_tokens.tolist(), places
    ([[8, 9, 7, 0]], [2, 1], [[2], [0, 1]])
    """
    counts = [sum(len(chunk.tokens) for chunk in chunks if chunk.rank == one) for one in range(ep_size)]
    _check(chunks, counts, ep_size, max_tokens, rank_tokens, num_slots, chunk_tokens, max_length)
    ids, positions = [0] * max_tokens, [0] * max_tokens
    own, cache_row = [0] * rank_tokens, [num_slots * max_length] * max_tokens
    grid, place = [0] * (num_slots * chunk_tokens), [0] * rank_tokens
    query = [[0] * chunk_tokens for _ in range(num_slots)]
    places: list[list[int]] = [[] for _ in chunks]
    at = mine = 0
    for number in sorted(range(len(chunks)), key=lambda number: chunks[number].rank):
        owner, slot, start, tokens = chunks[number]
        for step, token in enumerate(tokens):
            ids[at], positions[at] = token, start + step
            if owner == rank:
                cache_row[at] = slot * max_length + start + step
                own[mine], place[mine] = at, slot * chunk_tokens + step
                grid[slot * chunk_tokens + step] = mine
                query[slot][step] = start + step
                mine += 1
            places[number].append(at)
            at += 1
    made = ([ids], [positions], counts, own, cache_row, grid, place, query)
    return Batch(*(torch.tensor(values, dtype=torch.int64, device=device) for values in made)), places


def _check(
    chunks: Sequence[Chunk],
    counts: list[int],
    ep_size: int,
    max_tokens: int,
    rank_tokens: int,
    num_slots: int,
    chunk_tokens: int,
    max_length: int,
) -> None:
    def fail(argument: str, expected: str, got: object, remedy: str) -> None:
        raise ValueError(f"epops.nn.lay_out: {argument}: expected {expected}, got {got}; {remedy}")

    seen: set[tuple[int, int]] = set()
    for chunk in chunks:
        if not 0 <= chunk.rank < ep_size:
            fail("chunks", f"ranks 0 … {ep_size - 1}", chunk.rank, "name the rank that owns the request")
        if not 0 <= chunk.slot < num_slots:
            fail("chunks", f"slots 0 … {num_slots - 1}", chunk.slot, "raise num_slots or wait for a free one")
        if (chunk.rank, chunk.slot) in seen:
            fail(
                "chunks",
                "one chunk a slot",
                f"two for slot {chunk.slot} of rank {chunk.rank}",
                "send one in a later step",
            )
        seen.add((chunk.rank, chunk.slot))
        if len(chunk.tokens) > chunk_tokens:
            fail(
                "chunks",
                f"at most chunk_tokens = {chunk_tokens} tokens",
                len(chunk.tokens),
                "send the rest in a later step",
            )
        if chunk.start < 0 or chunk.start + len(chunk.tokens) > max_length:
            end = chunk.start + len(chunk.tokens)
            fail("chunks", f"positions 0 … {max_length - 1}", f"{chunk.start} … {end - 1}", "raise max_length")
    if max(counts) > rank_tokens:
        fail(
            "rank_tokens",
            f"a bound on the tokens of every rank, {max(counts)}",
            rank_tokens,
            "send some in a later step",
        )
    if sum(counts) > max_tokens:
        fail("max_tokens", f"a bound on the tokens of the step, {sum(counts)}", max_tokens, "send some in a later step")
