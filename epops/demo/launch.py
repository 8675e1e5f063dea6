"""Starts the ranks of a command on this machine, or joins those that torchrun started on any number of hosts."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

PRELOAD = ["torch", "torch.distributed", "epops", "epops.zoo", "transformers.models.auto.modeling_auto"]
"""Imported once, in the server that the ranks are forked from."""


class Place(NamedTuple):
    """Where a rank is."""

    rank: int
    size: int
    device: str
    """"cpu" or "cuda:0"."""
    store: str | None
    """File through which the ranks of one machine meet; None: torchrun's environment says where."""

    @property
    def folder(self) -> Path:
        assert self.store is not None, "under torchrun there is no folder that all ranks see"
        return Path(self.store).parent


Work = Callable[[Place, Any], bool]


def size_under_torchrun() -> int | None:
    """Ranks that torchrun (or whoever set its environment) started; None where nobody did."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in names) else None


def choose(started: int | None, ranks: int | None, device: str, command: str = "epops demo") -> tuple[int, str]:
    """Number of ranks and kind of device: GPUs, one a rank, where there are any, else two ranks on the CPU.

    ``started``: ranks that torchrun has started already.  ``command``: what errors name.

    Raises:
        ValueError: a device that is not there, fewer GPUs than ranks, or ranks other than those that torchrun started.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"{command}: --device: expected auto, cpu or cuda, got {device!r}")
    if ranks is not None and ranks < 1:
        raise ValueError(f"{command}: --ranks: expected at least 1, got {ranks}")
    if started is not None and ranks not in (None, started):
        raise ValueError(
            f"{command}: --ranks: expected {started}, the ranks that torchrun started, got {ranks}; leave it out"
        )
    gpus = 0
    if device != "cpu":
        import torch

        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cuda" and not gpus:
        raise ValueError(f"{command}: --device cuda: this torch sees no GPU; use --device cpu")
    kind = "cuda" if gpus else "cpu"
    if started is not None:
        return started, kind
    ranks = ranks or gpus or 2
    if gpus and ranks > gpus:
        raise ValueError(
            f"{command}: --ranks: expected at most {gpus}, the number of GPUs, got {ranks}; use fewer, or --device cpu"
        )
    return ranks, kind


@contextmanager
def process_group(place: Place) -> Iterator[None]:
    """The default process group over the ranks, on the device that this one has."""
    import torch
    import torch.distributed as dist

    on_cuda = torch.device(place.device).type == "cuda"
    if on_cuda:
        torch.cuda.set_device(place.device)
    backend = "nccl" if on_cuda else "gloo"
    if place.store is None:
        dist.init_process_group(backend)
    else:
        store = dist.FileStore(place.store, place.size)
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def join_torchrun(work: Work, recipe: Any, device: str) -> bool:
    """Run this process's part of what torchrun started."""
    here = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else "cpu"
    return work(Place(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), here, None), recipe)


def start(work: Work, recipe: Any, ranks: int, device: str) -> bool:
    """Run ``work(place, recipe)`` in ``ranks`` processes; whether all returned True.

    The first rank has the terminal; what the others print is shown if they fail.
    """
    # Ranks of one machine talk over loopback, whatever the host's name resolves to, and share its cores.
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory(prefix="epops-demo-") as folder:
        store = str(Path(folder) / "store")
        places = [Place(rank, ranks, f"cuda:{rank}" if device == "cuda" else "cpu", store) for rank in range(ranks)]
        processes = [context.Process(target=_child, args=(work, place, recipe)) for place in places]
        for process in processes:
            process.start()
        try:
            _wait(processes)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
        for place, process in zip(places, processes, strict=True):
            if process.exitcode not in (0, 1):
                log = _log(place)
                said = log.read_text(errors="replace")[-4000:] if log.exists() else ""
                print(f"rank {place.rank} ended with {process.exitcode}:\n{said}", file=sys.stderr)
    return all(process.exitcode == 0 for process in processes)


def _wait(processes: list[Any]) -> None:
    """Until all have ended; once one has failed, the others have a few seconds to say why."""
    waiting = {process.sentinel: process for process in processes}
    failed = False
    while waiting:
        ended = multiprocessing.connection.wait(list(waiting), timeout=10.0 if failed else None)
        if not ended:
            return
        for sentinel in ended:
            failed |= waiting.pop(sentinel).exitcode not in (0, 1)  # type: ignore[index]


def _log(place: Place) -> Path:
    return place.folder / f"rank{place.rank}.log"


FAILED = 3
"""Exit status of a rank that raised; 1 says that it ran to its end and found a difference."""


def _child(work: Work, place: Place, recipe: Any) -> None:
    if place.rank:
        with open(_log(place), "w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
    try:
        good = work(place, recipe)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(FAILED)
    sys.stdout.flush()
    sys.exit(0 if good else 1)
