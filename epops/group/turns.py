"""The exchanges of a group, one after another in the order of their calls, those of a start half beside their caller."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

from ..errors import EpopsError, GroupError, PeerError
from ..transport import GlooTransport, Pending
from . import compiling
from .faults import Faults


class Started(NamedTuple):
    """A started exchange that nobody has waited for yet: on a host transport a thread runs it, on a device transport a stream."""

    op: str
    key: int
    running: Future[Any] | Pending
    keep: Any


class Turns(Faults):
    """The order of a group's exchanges; a part of `ExpertGroup`."""

    closed: bool

    def __init__(self) -> None:
        super().__init__()
        self.sequence = 0
        self._lock = threading.RLock()
        self._worker: ThreadPoolExecutor | None = None
        self._started: dict[int, Started] = {}

    def _require_open(self, op: str) -> None:
        if self.closed:
            raise GroupError(f"epops.{op}: group {self.name!r} is closed; make a new epops.ExpertGroup")

    def run(self, op: str, exchange: Callable[[int], Any]) -> Any:
        """Run ``exchange(sequence)`` in its turn; earlier errors are raised here instead, on every rank."""
        with self._lock:
            sequence = self._next(op)
            if not self._started or not self.transport.host_counts:
                self.in_order()
                return self._guarded(exchange, sequence)
            future = self._submit(exchange, sequence)
        return future.result()

    def in_order(self) -> None:
        """On a device transport: what is launched next runs behind the exchanges that were started before."""
        for item in self._started.values() if self._started else ():
            if isinstance(item.running, Pending):
                item.running.behind()

    def start(self, op: str, key: int, exchange: Callable[[int], Any], keep: Any) -> int:
        """Begin ``exchange(sequence)`` beside the caller; ``keep`` is handed back by `finish`.  Returns the sequence.

        On a device transport ``exchange`` itself only begins, and returns a `Pending`.
        """
        with self._lock:
            sequence = self._next(op)
            begin = self._submit if self.transport.host_counts else self._guarded
            self._started[sequence] = Started(op, key, begin(exchange, sequence), keep)
            return sequence

    def finish(self, op: str, key: int, sequence: int) -> tuple[Any, Any]:
        """Result and ``keep`` of a started exchange."""
        with self._lock:
            started = self._started.get(sequence)
            if started is None or started.key != key:
                got = "no started exchange" if started is None else f"that of epops.{started.op} with other settings"
                raise GroupError(
                    f"epops.{op}_wait: ticket: expected one of epops.{op}_start with the same arguments, got {got} "
                    f"(epoch {sequence}); wait once for each start, with the arguments of the start"
                )
        try:
            running = started.running
            if isinstance(running, Pending):
                take = running.take
                return self._guarded(lambda _: take(), sequence), started.keep
            return running.result(), started.keep
        finally:
            with self._lock:
                self._started.pop(sequence, None)

    def oldest_started(self, op: str, key: int) -> int:
        """Sequence of the first such exchange that nobody has waited for: device transports read no ticket."""
        with self._lock:
            return next((sequence for sequence, item in self._started.items() if item.key == key and item.op == op), -1)

    def abort(self, op: str) -> None:
        """This rank's call of ``op`` failed its checks: take its place in the order, so that no peer waits for it."""
        if self.closed or self._lost is not None or not isinstance(self.transport, GlooTransport):
            return
        transport = self.transport
        with self._lock:
            self.sequence += 1
            try:
                future = self._submit(lambda sequence: transport.abort(op, sequence), self.sequence)
            except EpopsError:
                return
        try:
            future.result()
        except EpopsError as error:
            warnings.warn(f"epops.{op}: peers could not be told that this call failed: {error}", stacklevel=3)

    def _next(self, op: str) -> int:
        self._require_open(op)
        compiling.watch()
        if self._lost is not None:
            self.check()
        if self.pending_errors():
            self.abort(op)
            self.check()
        self.sequence += 1
        return self.sequence

    def _submit(self, exchange: Callable[[int], Any], sequence: int) -> Future[Any]:
        if self._worker is None:
            self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"epops-{self.name}")
        return self._worker.submit(self._guarded, exchange, sequence)

    def _guarded(self, exchange: Callable[[int], Any], sequence: int) -> Any:
        try:
            # The worker thread starts with autograd on; what an exchange is made of records none anywhere.
            with torch.no_grad():
                return exchange(sequence)
        except PeerError as error:
            # gloo cannot go on after a peer left; an abort is a message like any other.
            if error.__cause__ is not None:
                self._lost = str(error)
            raise

    def _end_turns(self) -> list[str]:
        """No more exchanges; returns the starts that nobody waited for."""
        unfinished = [f"epops.{item.op}_start (epoch {sequence})" for sequence, item in self._started.items()]
        if self._worker is not None:
            # A worker that waits for a dead peer ends with the peer's timeout, by itself.
            self._worker.shutdown(wait=self._lost is None)
        self._started.clear()
        return unfinished
