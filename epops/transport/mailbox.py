"""Small messages between all pairs of ranks over gloo, waited for as long as a peer says that it compiles.

gloo closes a connection when a wait on it times out, so that a wait cannot be begun with one limit and ended with another.
Therefore the rank that keeps its peers waiting speaks up: while it compiles it sends a busy message now and then, and each
one that a peer reads gives the sender the whole timeout anew.
"""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from typing import Any

import torch

MESSAGE_WORDS = 16
BUSY = 0x45504F42555359
"""First word of a message that says: I compile, wait for me."""


class Absent(Exception):
    """A peer that did not arrive within the timeout, or left; the cause is gloo's error."""

    def __init__(self, peer: int, cause: Exception) -> None:
        super().__init__(str(cause).splitlines()[0][:200] if str(cause) else "no detail")
        self.peer = peer


class Mailbox:
    """Messages of `MESSAGE_WORDS` int64 words over ``communicator`` (None: a group of one rank), all with one ``tag``."""

    def __init__(self, communicator: Any, timeout: float, tag: int) -> None:
        self.communicator = communicator
        self.timeout = timeout
        self.tag = tag
        self.size = communicator.size() if communicator is not None else 1
        self.rank = communicator.rank() if communicator is not None else 0
        self._busy: list[tuple[Any, torch.Tensor, int]] = []
        self._lock = threading.Lock()

    def peers(self) -> list[int]:
        """The other ranks, each rank beginning with another one."""
        return [(self.rank + step) % self.size for step in range(1, self.size)]

    def swap(self, messages: torch.Tensor) -> dict[int, list[int]]:
        """Send row r of ``messages`` (R, `MESSAGE_WORDS`) int64 to rank r; what each peer sent.  Raises `Absent`."""
        # Peers read in the order of sending: with this exchange they have read the busy messages before it too.
        with self._lock:
            earlier, self._busy = self._busy, []
        incoming = {peer: torch.empty(MESSAGE_WORDS, dtype=torch.int64) for peer in self.peers()}
        sends, receives = [], {}
        for peer in self.peers():
            sends.append((self._send(messages[peer], peer), messages, peer))
            receives[peer] = self._receive(incoming[peer], peer)
        deadline = time.monotonic() + self.timeout
        for peer, work in receives.items():
            _wait(work, peer, deadline)
            while int(incoming[peer][0]) == BUSY:
                deadline = time.monotonic() + self.timeout
                _wait(self._receive(incoming[peer], peer), peer, deadline)
        for work, _, peer in [*earlier, *sends]:
            _wait(work, peer, deadline)
        return {peer: message.tolist() for peer, message in incoming.items()}

    def busy(self) -> None:
        """Tell every peer that this rank compiles; from any thread.  What a lost peer makes of it, the next `swap` says."""
        message = torch.full((MESSAGE_WORDS,), BUSY, dtype=torch.int64)
        with self._lock:
            for peer in self.peers():
                try:
                    self._busy.append((self._send(message, peer), message, peer))
                except Absent:
                    return

    def close(self) -> None:
        self._busy = []
        self.communicator = None

    def _send(self, message: torch.Tensor, peer: int) -> Any:
        try:
            return self.communicator.send([message], peer, self.tag)
        except RuntimeError as error:
            raise Absent(peer, error) from error

    def _receive(self, message: torch.Tensor, peer: int) -> Any:
        try:
            return self.communicator.recv([message], peer, self.tag)
        except RuntimeError as error:
            raise Absent(peer, error) from error


def _wait(work: Any, peer: int, deadline: float) -> None:
    try:
        work.wait(timedelta(seconds=max(deadline - time.monotonic(), 0.001)))
    except RuntimeError as error:
        raise Absent(peer, error) from error
