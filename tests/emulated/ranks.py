"""`Ranks` of tests/gpu for emulated kernels: R memories in one process, kernels that run by turns on one thread.

Import it before anything of `epops.transport.kernels` or tests/gpu: it puts the emulated module in the place of ``epops._C``.  Only
in a process of its own: programs.py.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

MODULE = Path(os.environ["EPOPS_EMULATED"])
spec = importlib.util.spec_from_file_location("epops._C", MODULE)
assert spec is not None and spec.loader is not None
sys.modules["epops._C"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["epops._C"])
machine = ctypes.CDLL(str(MODULE))
machine.emulated_run.restype = ctypes.c_char_p
machine.emulated_run.argtypes = [ctypes.c_uint64, ctypes.c_int]
torch.cuda.is_available = lambda: True  # tests/gpu asks when it is imported

from epops.transport import kernels  # noqa: E402

CHECKS, BLOCKS = os.environ.get("EPOPS_EMULATED_CHECKS") == "1", int(os.environ.get("EPOPS_EMULATED_BLOCKS", "2"))
SHARED_BYTES = 221 << 10  # that kernels may take on an H200
kernels.shared_bytes = lambda device: SHARED_BYTES
kernels.has_bulk_copies = lambda device: True
kernels.error_words = lambda: torch.zeros(kernels._C.error_words, dtype=torch.int32)
given: list[torch.Tensor] = []
address_of = kernels.address


def address(tensor: torch.Tensor | None) -> int:
    """As it is, and the tensor is there until the kernels have run."""
    if tensor is not None:
        given.append(tensor)
    return address_of(tensor)


running = 0  # the rank that launches


def stream_of(tensor: torch.Tensor) -> int:
    return running + 1


kernels.address, kernels.stream_of = address, stream_of  # before others import them by name


class Race(AssertionError):
    """Accesses that nothing orders."""


def where(code: str) -> str:
    """The lines of an address in the module, innermost first."""
    base = next(
        int(line.split("-")[0], 16) for line in Path("/proc/self/maps").read_text().splitlines() if str(MODULE) in line
    )
    command = ["addr2line", "-e", str(MODULE), "-f", "-C", "-i", hex(int(code, 16) - base)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    names = [re.sub(r"\(.*", "", name).split("::")[-1] for name in lines[::2]]
    places = [re.sub(r" .*", "", Path(place).name) for place in lines[1::2]]
    return " < ".join(
        f"{name} {place}" for name, place in zip(names, places, strict=True) if not place.startswith("machine.")
    )


def run(seed: int, checks: bool) -> None:
    """Run what has been launched."""
    told = machine.emulated_run(seed, int(checks)).decode().splitlines()
    given.clear()
    failed = [line for line in told if line.startswith("failed")]
    races = []
    for line in told[len(failed) :]:
        _, times, before, after, what = line.split(" ", 4)
        races.append(f"{what} ({times} times)\n    before: {where(before)}\n    then:   {where(after)}")
    if races:
        raise Race("\n".join(races + failed))
    if failed:
        raise RuntimeError("\n".join(failed))


class Ranks:
    """The memories of all ranks."""

    def __init__(
        self,
        num_ranks: int,
        sizes: kernels.Sizes,
        *,
        timeout: float = 10.0,
        tuning: kernels.Tuning | None = None,
    ) -> None:
        self.num_ranks, self.device, self.num_sms = num_ranks, torch.device("cpu"), 132
        self.tuning = tuning or kernels.Tuning()
        self.tuning.limit_blocks = BLOCKS
        self.seed = 0
        self.workspaces, self.memories, self.errors = [], [], []
        for rank in range(num_ranks):
            ws, num_bytes = kernels.lay_out(rank, num_ranks, sizes, timeout)
            whole = torch.zeros(num_bytes + 1024, dtype=torch.uint8)  # memory of a GPU begins at such places
            self.memories.append(whole[-whole.data_ptr() % 1024 :])
            self.errors.append(kernels.error_words())
            ws.error_host = self.errors[-1].data_ptr()
            self.workspaces.append(ws)
        for ws in self.workspaces:
            ws.set_peers([memory.data_ptr() for memory in self.memories])

    def plan(self, op: str, max_tokens: int, hidden: int = 7168) -> kernels.Plan:
        return self.tuning.plan(op, max_tokens, self.num_ranks, self.num_sms, hidden)

    def run(self, call: Any) -> list[Any]:
        """``call(rank)`` for each rank, all at once; waits for all."""
        global running
        results = []
        for running in range(self.num_ranks):
            results.append(call(running))
        self.seed += 1
        run(self.seed, CHECKS)
        return results
