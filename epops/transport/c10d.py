"""Transport ``c10d``: torch.distributed moves the bytes; gloo on CPU tensors, nccl on CUDA tensors, any number of hosts.

On gloo every exchange opens with a header to each peer (`base.Call.header`): ranks that called something else, or that
failed in their own checks, are found before a row moves, and a peer that does not come is named.
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..errors import DisagreementError, GroupError, PeerError
from ..layout import STATUS_BAD_ROUTE
from ..torch_private import is_capturing, never_destroy
from .base import OPCODES, Call, Pending, Swap, differences
from .mailbox import Absent, Mailbox

HEADER_TAG = 71
ROWS_TAG = 72


class GlooTransport:
    """Headers and rows as point-to-point messages over a private gloo communicator (None: a group of one rank)."""

    name = "c10d"
    host_counts = True
    row_alignment = 1

    def __init__(self, communicator: Any, group_name: str, timeout: float) -> None:
        self.communicator = communicator
        self.group_name = group_name
        self.timeout = timedelta(seconds=timeout)
        self.mailbox = Mailbox(communicator, timeout, HEADER_TAG)
        self.size = self.mailbox.size
        self.rank = self.mailbox.rank

    def __repr__(self) -> str:
        return "c10d (gloo)" if self.size > 1 else "c10d (one rank, no wire)"

    def swap(
        self,
        call: Call,
        sequence: int,
        bits: int,
        rows: list[torch.Tensor],
        expected: list[int] | None = None,
        sizes: list[tuple[int, int]] | None = None,
    ) -> Swap:
        """Send ``rows[r]`` (N_r, W) uint8 to rank r and return what each rank sent here.

        ``expected``: rows of each rank where the caller knows them (a combine knows its route); what does not fit counts as
        zeros and is reported.  ``sizes``: two more words for each rank.
        """
        if self.size == 1:
            return Swap(rows, bits, None, sizes)
        heads = call.header(sequence, bits, [part.shape[0] for part in rows], sizes)
        theirs = self._swap_headers(call, sequence, heads)
        mine = heads[self.rank].tolist()
        for peer, head in theirs.items():
            self._check(call, sequence, peer, mine, head)
            bits |= head[13]
        received = [
            rows[self.rank] if peer == self.rank else rows[0].new_empty(theirs[peer][12], rows[0].shape[1])
            for peer in range(self.size)
        ]
        self._swap_rows(call, sequence, rows, received)
        if expected is not None:
            for peer, count in enumerate(expected):
                if received[peer].shape[0] != count:
                    bits |= STATUS_BAD_ROUTE
                    received[peer] = rows[0].new_zeros(count, rows[0].shape[1])
        theirs[self.rank] = mine
        return Swap(received, bits, None, [(theirs[peer][14], theirs[peer][15]) for peer in range(self.size)])

    def abort(self, op: str, sequence: int) -> None:
        """Tell every peer that this rank failed in its own checks of the op in this position of the order."""
        if self.size > 1:
            heads = Call("abort").header(sequence, OPCODES.index(op) if op in OPCODES else 0, [0] * self.size)
            self._swap_headers(Call("abort"), sequence, heads)

    def _swap_headers(self, call: Call, sequence: int, heads: torch.Tensor) -> dict[int, list[int]]:
        try:
            return self.mailbox.swap(heads)
        except Absent as error:
            raise self._lost(call, sequence, "header", error.peer, error) from error

    def _swap_rows(self, call: Call, sequence: int, rows: list[torch.Tensor], received: list[torch.Tensor]) -> None:
        works = []
        for peer in self.mailbox.peers():
            if received[peer].numel():
                works.append((peer, self._post(call, sequence, "rows", peer, received[peer], ROWS_TAG, send=False)))
            if rows[peer].numel():
                works.append(
                    (peer, self._post(call, sequence, "rows", peer, rows[peer].contiguous(), ROWS_TAG, send=True))
                )
        self._wait_all(call, sequence, "rows", works)

    def _post(
        self, call: Call, sequence: int, phase: str, peer: int, tensor: torch.Tensor, tag: int, *, send: bool
    ) -> tuple[dist.Work, torch.Tensor]:
        assert self.communicator is not None, "a group of one rank has no peers"
        try:
            if send:
                return self.communicator.send([tensor], peer, tag), tensor
            return self.communicator.recv([tensor], peer, tag), tensor
        except RuntimeError as error:
            raise self._lost(call, sequence, phase, peer, error) from error

    def _wait_all(
        self, call: Call, sequence: int, phase: str, works: list[tuple[int, tuple[dist.Work, torch.Tensor]]]
    ) -> None:
        deadline = time.monotonic() + self.timeout.total_seconds()
        for peer, (work, _) in works:
            left = max(deadline - time.monotonic(), 0.001)
            try:
                work.wait(timedelta(seconds=left))
            except RuntimeError as error:
                raise self._lost(call, sequence, phase, peer, error) from error

    def _lost(self, call: Call, sequence: int, phase: str, peer: int, error: Exception) -> PeerError:
        return PeerError(
            f"epops.{call.op}: rank {self.rank} of group {self.group_name!r}: peer {peer} did not arrive within "
            f"{self.timeout.total_seconds():g} s, or left (phase {phase}, epoch {sequence}); see what ended "
            f"that rank, then close the group and make a new one "
            f"[{str(error).splitlines()[0][:200] if str(error) else 'no detail'}]"
        )

    def _check(self, call: Call, sequence: int, peer: int, mine: list[int], theirs: list[int]) -> None:
        here = f"epops.{call.op}: rank {self.rank} of group {self.group_name!r}, epoch {sequence}: "
        if theirs[2] == 0 and theirs[0] == mine[0]:
            raise PeerError(
                f"{here}expected {call.op} of peer {peer}, got word that its own call failed (an error in its arguments, or "
                "one of an earlier op); see the error on that rank"
            )
        found = differences(mine, theirs)
        if found:
            raise DisagreementError(
                f"{here}peer {peer} disagrees on {found}; all ranks must make the same calls with the same settings in the "
                "same order"
            )

    def close(self) -> None:
        self.mailbox.close()
        self.communicator = None


def begin_equal(communicator: Any, buffer: torch.Tensor) -> Pending:
    """Begin to send row r of ``buffer`` (R, bytes) to rank r over nccl; row s of what is taken came from rank s.

    nccl runs on a stream of its own and keeps the exchanges of a communicator in order, inside a CUDA graph too.
    """
    if is_capturing():
        never_destroy(communicator)
    buffer = buffer.contiguous()
    received = torch.empty_like(buffer)
    work = communicator.alltoall_base(received, buffer, [], [])
    kept = [buffer]

    def take() -> torch.Tensor:
        work.wait()
        kept.clear()  # only now may what comes next on this stream have its memory
        return received

    return Pending(take)


class NcclTransport:
    """Equal splits of M rows a pair over a private nccl communicator: nothing is read on the host, so graphs hold it."""

    name = "c10d"
    host_counts = False
    row_alignment = 1

    def __init__(self, communicator: Any, group_name: str, timeout: float) -> None:
        self.communicator = communicator
        self.group_name = group_name
        self.timeout = timedelta(seconds=timeout)
        self.size = communicator.size() if communicator is not None else 1
        self.rank = communicator.rank() if communicator is not None else 0

    def __repr__(self) -> str:
        return "c10d (nccl)"

    def swap_padded(self, buffer: torch.Tensor) -> torch.Tensor:
        """Exchange ``buffer`` (R, bytes) uint8: row r goes to rank r, row s of the result came from rank s."""
        return self.begin_padded(buffer).take()

    def begin_padded(self, buffer: torch.Tensor) -> Pending:
        """`swap_padded`, taken later."""
        return Pending(lambda: buffer) if self.size == 1 else begin_equal(self.communicator, buffer)

    def close(self) -> None:
        self.communicator = None


class CaptureTransport:
    """A group over torch's ``fake`` process group: graphs of any number of ranks are captured in one process, never run."""

    name = "fake"
    host_counts = True
    row_alignment = 1

    def __init__(self, group_name: str) -> None:
        self.group_name = group_name

    def __repr__(self) -> str:
        return "fake (captures graphs only)"

    def swap(self, call: Call, *_: object, **__: object) -> Swap:
        raise GroupError(
            f"epops.{call.op}: group {self.group_name!r} is over a fake process group, which captures graphs and moves no "
            "bytes; make the group from a gloo or nccl process group to run"
        )

    def close(self) -> None:
        """Nothing to give back."""
