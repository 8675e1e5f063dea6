"""Several gloo ranks on this machine, for tests: `run_ranks(fn, 3, arg)` runs ``fn(rank, size, arg)`` in three processes.

The processes live on from test to test (starting one costs seconds); a test that kills or breaks its ranks asks for fresh ones.
"""

from __future__ import annotations

import atexit
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_pools: dict[int, Pool] = {}


class RankError(AssertionError):
    """What failed on which ranks."""


class Pool:
    """``size`` processes with an initialized gloo group."""

    def __init__(self, size: int) -> None:
        # torch is imported once, in the server that the ranks are forked from.
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["torch", "epops"])
        self.size = size
        self.folder = tempfile.mkdtemp(prefix="epops-ranks-")
        self.tasks = [context.SimpleQueue() for _ in range(size)]
        self.results = context.Queue()
        self.processes = [
            context.Process(target=_serve, args=(rank, size, self.folder, self.tasks[rank], self.results), daemon=True)
            for rank in range(size)
        ]
        for process in self.processes:
            process.start()

    def run(
        self, fn: Callable[..., Any], args: tuple[Any, ...], timeout: float, survivors: set[int] | None
    ) -> list[Any]:
        for queue in self.tasks:
            queue.put((fn, args))
        waiting = set(range(self.size)) if survivors is None else set(survivors)
        values: list[Any] = [None] * self.size
        failures = {}
        while waiting:
            try:
                rank, good, value = self.results.get(timeout=timeout)
            except Exception as error:  # queue.Empty, of a queue that lives in another context
                self.stop()
                said = "\n".join(f"rank {rank}:\n{text}" for rank, text in sorted(failures.items()))
                raise RankError(
                    f"ranks {sorted(waiting)} of {self.size} gave no answer in {timeout} s\n{said}"
                ) from error
            waiting.discard(rank)
            if good:
                values[rank] = value
            else:
                failures[rank] = value
        if failures:
            self.stop()
            raise RankError("\n".join(f"rank {rank}:\n{text}" for rank, text in sorted(failures.items())))
        return values

    def stop(self) -> None:
        _pools.pop(self.size, None)
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def _serve(rank: int, size: int, folder: str, tasks: Any, results: Any) -> None:
    torch.set_num_threads(1)
    os.environ["EPOPS_TEST_RANK"] = str(rank)
    dist.init_process_group(
        "gloo", store=dist.FileStore(os.path.join(folder, "store"), size), rank=rank, world_size=size
    )
    while True:
        fn, args = tasks.get()
        try:
            value, good = fn(rank, size, *args), True
        except BaseException:
            value, good = traceback.format_exc(), False
        finally:
            _close_groups()
        results.put((rank, good, value))


def _close_groups() -> None:
    from epops.group import open_groups

    for group in open_groups():
        group.close(raise_errors=False)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def run_ranks(
    fn: Callable[..., Any],
    size: int,
    *args: Any,
    timeout: float = 120.0,
    fresh: bool = False,
    survivors: set[int] | None = None,
) -> list[Any]:
    """Results of ``fn(rank, size, *args)`` of every rank; raises `RankError` with the tracebacks.

    ``fn`` must be a module-level function.  ``fresh``: processes of its own, ended afterwards.  ``survivors``: ranks whose answer
    is waited for (the others are killed by the test).
    """
    pool = _pools.get(size)
    if pool is None or fresh:
        pool = Pool(size)
        if not fresh:
            _pools[size] = pool
    try:
        return pool.run(fn, args, timeout, survivors)
    finally:
        if fresh:
            pool.stop()


@atexit.register
def _stop_all() -> None:
    for pool in list(_pools.values()):
        pool.stop()
