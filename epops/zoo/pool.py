"""Processes that stand for ranks: started once, used for many checks, replaced when a check fails or hangs in one of them."""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

PRELOAD = ["torch", "torch.distributed", "transformers", "epops.zoo.pool"]
"""Imported once in the fork server: a rank then starts in a fraction of a second instead of ten."""


class RankError(RuntimeError):
    """A check raised in a rank, or a rank died or did not answer in time; says which and where it stood."""


def _serve(conn: Any, rank: int, ranks: int, folder: str, gloo_timeout: float, env: dict[str, str]) -> None:
    """The life of a rank: join the process group, then run what it is sent."""
    os.environ.update(env)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    log = open(Path(folder) / f"rank{rank}.log", "w")  # noqa: SIM115 - lives as long as the process
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    faulthandler.register(signal.SIGUSR1, log)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), ranks)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=ranks, timeout=datetime.timedelta(seconds=gloo_timeout)
    )
    while True:
        try:
            work = conn.recv()
        except EOFError:
            break
        if work is None:
            break
        call, args, kwargs = work
        try:
            conn.send(("done", call(*args, **kwargs)))
        except BaseException as error:
            conn.send(("error", f"{type(error).__name__}: {error}", traceback.format_exc()))
            if not isinstance(error, Exception):
                break
    with contextlib.suppress(Exception):
        dist.destroy_process_group()


class Pool:
    """``ranks`` processes with a gloo group on loopback.

    ``run(call, *args)`` calls ``call`` on every rank (inside, torch.distributed tells the rank) and returns the results in
    rank order.  After an error the processes are ended and the next ``run`` starts fresh ones, for ranks that
    stopped at different places cannot go on together.
    """

    def __init__(self, ranks: int, *, gloo_timeout: float = 60.0, env: dict[str, str] | None = None) -> None:
        self.ranks = ranks
        self.gloo_timeout = gloo_timeout
        self.env = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", **(env or {})}
        self._processes: list[Any] = []
        self._connections: list[Any] = []
        self._folder = ""

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self._folder = tempfile.mkdtemp(prefix="epops-pool-")
        for rank in range(self.ranks):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(theirs, rank, self.ranks, self._folder, self.gloo_timeout, self.env),
                daemon=True,
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def run(self, call: Callable[..., Any], *args: Any, timeout: float = 300.0, **kwargs: Any) -> list[Any]:
        """Results of ``call(*args, **kwargs)``, one a rank; `RankError` if any rank fails or ``timeout`` seconds pass."""
        if not self._processes:
            self._start()
        for rank, connection in enumerate(self._connections):
            try:
                connection.send((call, args, kwargs))
            except OSError:
                self._fail(f"rank {rank} had ended before the call", "")
        results: list[Any] = [None] * self.ranks
        waiting: dict[Any, int] = dict(zip(self._connections, range(self.ranks)))
        deadline = time.monotonic() + timeout
        errors: dict[int, tuple[str, str]] = {}
        while waiting:
            ready: list[Any] = multiprocessing.connection.wait(
                list(waiting), timeout=max(0.0, deadline - time.monotonic())
            )
            if not ready:
                break
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    answer = connection.recv()
                except EOFError:
                    answer = ("error", "the process ended", self._log(rank))
                if answer[0] == "done":
                    results[rank] = answer[1]
                else:
                    errors[rank] = answer[1:]
                    # The others may wait for this rank; what they say within seconds is still worth hearing.
                    deadline = min(deadline, time.monotonic() + 5.0)
        if errors:
            self._fail_with(errors)
        if waiting:
            late = sorted(waiting.values())
            self._fail(f"ranks {late} did not answer in {timeout:g} s", self._stacks(late))
        return results

    def _fail_with(self, errors: dict[int, tuple[str, str]]) -> None:
        """Raise for the error that came first in rank order and is no mere echo of a peer's end."""

        def echo(text: str) -> bool:
            return any(word in text for word in ("Connection closed by peer", "Connection reset", "Timed out waiting"))

        rank = min(errors, key=lambda r: (echo(errors[r][0]), r))
        self._fail(f"rank {rank}: {errors[rank][0]}", errors[rank][1])

    def _fail(self, message: str, detail: str) -> None:
        self.close(kill=True)
        error = RankError(message)
        error.detail = detail  # type: ignore[attr-defined]
        raise error

    def _log(self, rank: int) -> str:
        with contextlib.suppress(OSError):
            return (Path(self._folder) / f"rank{rank}.log").read_text(errors="replace")[-4000:]
        return ""

    def _stacks(self, ranks: list[int]) -> str:
        """Where each late rank stands, from faulthandler."""
        for rank in ranks:
            with contextlib.suppress(OSError, TypeError):
                os.kill(self._processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.5)
        return "\n".join(f"rank {rank}:\n{self._log(rank)}" for rank in ranks)

    def close(self, *, kill: bool = False) -> None:
        """End the processes; ``kill`` without asking."""
        for connection in self._connections:
            with contextlib.suppress(OSError):
                if not kill:
                    connection.send(None)
                connection.close()
        for process in self._processes:
            process.join(timeout=0.0 if kill else 5.0)
            if process.is_alive():
                process.kill()
                process.join(timeout=5.0)
        self._processes, self._connections = [], []
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = ""
