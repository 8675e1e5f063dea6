"""Which request is where: a queue, slots of the cache, and what the next round should be.  Plain Python, no device."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from .request import Request


class Need(NamedTuple):
    """What this rank has to do next; the ranks tell each other theirs before every round."""

    prefill: int
    """1: prompts wait that a prefill would take."""
    bucket: int
    """The smallest bucket that holds the requests that decode; 0: none do."""


class Chunk(NamedTuple):
    """A part of a prompt to be run in one prefill."""

    request: Request
    start: int
    length: int

    @property
    def ends_prompt(self) -> bool:
        return self.start + self.length == len(self.request.prompt)


class Move(NamedTuple):
    """Copy one slot's keys and values to another."""

    source: int
    target: int


def choose(needs: list[Need], prefilled: bool) -> Need | None:
    """The round that all ranks run next, out of what each needs; None when nobody has work.

    Prefill and decode take turns while there is both, so that a long queue of prompts never stops the ones that are being
    answered for longer than one prefill.  ``prefilled``: the last round was a prefill.

    >>> choose([Need(0, 4), Need(1, 0)], prefilled=False)
    Need(prefill=1, bucket=0)
    >>> choose([Need(0, 4), Need(1, 2)], prefilled=True)
    Need(prefill=0, bucket=4)
    """
    bucket = max(need.bucket for need in needs)
    if any(need.prefill for need in needs) and not (prefilled and bucket):
        return Need(1, 0)
    return Need(0, bucket) if bucket else None


class Schedule:
    """The requests of one rank.

    ``buckets``: batch sizes, rising; the last one is the number of slots.  ``budget``: tokens that one prefill may have.
    """

    def __init__(self, buckets: tuple[int, ...], budget: int) -> None:
        self.buckets = buckets
        self.budget = budget
        self.queue: deque[Request] = deque()
        self.slots: list[Request | None] = [None] * buckets[-1]

    @property
    def running(self) -> list[Request]:
        return [request for request in self.slots if request is not None]

    def need(self) -> Need:
        running = self.running
        unfilled = any(not request.decoding for request in running)
        prefill = unfilled or (bool(self.queue) and len(running) < len(self.slots))
        decoding = any(request.decoding for request in running)
        bucket = next(size for size in self.buckets if size >= len(running)) if decoding else 0
        return Need(int(prefill), bucket)

    def prefill(self) -> list[Chunk]:
        """Chunks for one prefill: begun prompts first, then the queue in its order, padded to the longest within the budget.

        A prompt longer than the budget goes alone, a budget at a time.
        """
        chunks: list[Chunk] = []
        longest = 0
        waiting = [request for request in self.running if not request.decoding]
        while True:
            request = waiting[0] if waiting else self.queue[0] if self.queue and None in self.slots else None
            if request is None:
                return chunks
            left = len(request.prompt) - request.filled
            if (len(chunks) + 1) * max(longest, left) > self.budget:
                if chunks:
                    return chunks
                left = min(left, self.budget)
            longest = max(longest, left)
            if request.slot < 0:
                self.queue.popleft()
                request.slot = self.slots.index(None)
                self.slots[request.slot] = request
            else:
                waiting.pop(0)
            chunks.append(Chunk(request, request.filled, left))

    def compact(self, bucket: int) -> list[Move]:
        """Bring the requests that decode into the first ``bucket`` slots; the copies that this takes, to be done in order."""
        moves = []
        for slot in range(bucket, len(self.slots)):
            request = self.slots[slot]
            if request is not None and request.decoding:
                target = self.slots.index(None)
                assert target < bucket, "a bucket holds all requests that have a slot"
                self.slots[target], self.slots[slot] = request, None
                request.slot = target
                moves.append(Move(slot, target))
        return moves

    def release(self, request: Request) -> None:
        """Free the request's slot, or take it out of the queue.  What was launched for it before runs to its end unread."""
        if request.slot >= 0:
            self.slots[request.slot] = None
            request.slot = -1
        elif request in self.queue:
            self.queue.remove(request)
