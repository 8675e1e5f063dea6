"""Many decode steps with random buckets, sequences, routing and idle ranks; every so often compared with the plain model.

    python benchmarks/soak_decode.py --device cuda --steps 20000 --every 500 --buckets 1 8 32 --out benchmarks/results/soak.json

All ranks draw each step's bucket from one seed, and each its own rows: none on some steps.  Every ``--every`` steps (and once a
bucket before the first) the logits are compared with an eager step of the unsharded model on the same keys and values, and memory
is looked at, which must not grow.  In a long soak every bucket must have been compared and every rank idle now and then.
Progress and ``--out`` are written at each comparison, so that a run that is cut short keeps what it has; ``--seconds`` ends it
cleanly.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import epops
from epops import zoo
from epops.demo.launch import Place, choose, join_torchrun, process_group, size_under_torchrun, start
from epops.serving.attention import check_model
from epops.serving.step import Steps, decode_step

HOWS = ("eager", "compiled", "captured")
IDLE = 0.2
"""Share of the steps in which a rank has no row."""
ROOM = {"allocated": 0, "reserved": 64 * 2**20, "host": 64 * 2**20}
"""Bytes that each kind of memory may grow by after the first comparison: allocators keep some of what they have freed."""


class Options(NamedTuple):
    model: str
    steps: int
    every: int
    length: int
    buckets: tuple[int, ...]
    dtype: str
    tolerance: float
    how: str
    seconds: float
    out: str
    command: str


def memory(device: torch.device) -> dict[str, int]:
    """Bytes in use: of torch on a GPU, allocated and held; "host": of the process without mapped files, where that is known."""
    found = {}
    if device.type == "cuda":
        found["allocated"] = torch.cuda.memory_allocated(device)
        found["reserved"] = torch.cuda.memory_reserved(device)
    try:
        with open("/proc/self/status") as status:
            found["host"] = next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon"))
    except (OSError, StopIteration):
        pass
    return found


class Found:
    """What a soak has shown so far, the same on every rank."""

    def __init__(self, size: int, options: Options) -> None:
        self.options = options
        self.worst = 0.0
        self.rows = 0
        self.step = 0
        self.compared = dict.fromkeys(options.buckets, 0)
        self.steps = dict.fromkeys(options.buckets, 0)
        self.idle = [0] * size
        self.memory: dict[int, list[dict[str, int]]] = {}
        """Step → what each rank had in use."""

    def add(self, step: int, bucket: int, told: list[Any]) -> None:
        """A comparison: (difference, rows, idle steps, memory) of every rank."""
        self.step = step
        self.worst = max(self.worst, *(one[0] for one in told))
        self.rows += sum(one[1] for one in told)
        self.idle = [one[2] for one in told]
        if step:
            self.compared[bucket] += sum(one[1] for one in told)
            self.memory[step] = [one[3] for one in told]

    def grown(self) -> dict[str, int]:
        """Most bytes by which a rank's memory is larger than at the first comparison."""
        if not self.memory:
            return {}
        first, last = (self.memory[step] for step in (min(self.memory), max(self.memory)))
        return {kind: max(now[kind] - then[kind] for then, now in zip(first, last, strict=True)) for kind in first[0]}

    def wrong(self) -> str:
        """What was found to be wrong, or nothing."""
        if not self.worst <= self.options.tolerance:
            return f"logits differ by {self.worst:.1e} of the largest, more than {self.options.tolerance:.1e}"
        for kind, bytes_ in self.grown().items():
            if bytes_ > ROOM[kind]:
                return f"{kind} memory has grown by {bytes_ / 2**20:.1f} MiB"
        return ""

    def missed(self) -> str:
        """What a whole soak should have come by and did not, or nothing."""
        if self.step < self.options.steps:
            return f"{self.step} of {self.options.steps} steps"
        empty = [bucket for bucket, count in self.compared.items() if not count]
        if empty and len(self.memory) >= 10 * len(self.compared):
            return f"no row compared in buckets {empty}"
        if self.step >= 100 and not all(self.idle):
            return f"steps in which each rank was idle: {self.idle}"
        return ""

    def facts(self, seconds: float) -> dict[str, Any]:
        """What the JSON file says; memory at the first, the middle and the last comparison."""
        at = sorted(self.memory)
        shown = sorted({at[0], at[len(at) // 2], at[-1]}) if at else []
        return {
            "steps": self.step,
            "seconds": seconds,
            "steps_a_second": self.step / seconds if seconds else 0.0,
            "steps_by_bucket": self.steps,
            "rows_compared_by_bucket": self.compared,
            "largest_relative_difference": self.worst,
            "idle_steps_by_rank": self.idle,
            "memory_by_rank": {step: self.memory[step] for step in shown},
            "memory_grown": self.grown(),
            "wrong": self.wrong(),
            "missed": self.missed(),
        }


def work(place: Place, options: Options) -> bool:
    """The whole soak on one rank; whether no comparison failed on any."""
    device = torch.device(place.device)
    began = time.perf_counter()
    with process_group(place), torch.no_grad():
        whole = zoo.tiny(options.model, dtype=getattr(torch, options.dtype)).to(device)
        with epops.ExpertGroup(max_tokens=options.buckets[-1], timeout=900.0) as group:
            model = epops.parallelize(copy.deepcopy(whole), group)
            settings = None if options.how == "eager" else {}
            capture = options.how == "captured"
            steps = Steps(model, group, check_model(model), options.buckets, options.length, settings, capture)
            say(place, f"{place.size} ranks, {group.transport!r}, model ready", began)
            for bucket in reversed(options.buckets):
                steps.prepare(bucket)
                say(place, f"bucket {bucket} ready", began)
            good = soak(place, options, whole, steps, began)
            group.check()
            steps.close()
    return good


def say(place: Place, what: str, began: float) -> None:
    if place.rank == 0:
        print(f"{time.perf_counter() - began:.0f} s: {what}", flush=True)


def soak(place: Place, options: Options, whole: Any, steps: Steps, began: float) -> bool:
    """All steps; the same answer on every rank."""
    shared, own = random.Random(1), random.Random(100 + place.rank)
    draw = torch.Generator(steps.tokens.device).manual_seed(100 + place.rank)
    vocab = whole.config.get_text_config().vocab_size
    found, idle, first = Found(place.size, options), 0, time.perf_counter()
    # Step 0 is one comparison a bucket, before anything is counted.
    for step, bucket in [(0, bucket) for bucket in options.buckets] + [
        (step, shared.choice(options.buckets)) for step in range(1, options.steps + 1)
    ]:
        comparing = step % options.every == 0 or step == options.steps
        alone = step > 0 and own.random() < IDLE
        count = 0 if alone else own.randint(1, bucket)
        idle += alone
        found.steps[bucket] += step > 0
        rows = {slot: own.randrange(options.length - 1) for slot in own.sample(range(bucket), count)}
        # Drawn where they lie: numbers from the host would be waited for.
        steps.tokens.random_(0, vocab, generator=draw)
        fed = steps.tokens.clone() if comparing else None
        logits = steps.decode(bucket, rows)
        if fed is None:
            continue
        told: list[Any] = [None] * place.size
        error = difference(whole, steps, bucket, rows, fed, logits, options)
        late = bool(options.seconds) and time.perf_counter() - began > options.seconds
        dist.all_gather_object(told, (error, count, idle, memory(steps.tokens.device), late))
        found.add(step, bucket, told)
        if step:
            report(place, options, found, time.perf_counter() - first, began)
        if found.wrong() or any(one[4] for one in told):
            break
        first = first if step else time.perf_counter()
    if place.rank == 0 and (found.wrong() or found.missed()):
        print(f"WRONG: {found.wrong()}" if found.wrong() else f"not shown: {found.missed()}", flush=True)
    return not found.wrong() and not found.missed()


def report(place: Place, options: Options, found: Found, seconds: float, began: float) -> None:
    """A line of progress, and the file."""
    if place.rank:
        return
    grew = ", ".join(f"{kind} {size / 2**20:.1f}" for kind, size in found.grown().items())
    say(
        place,
        f"step {found.step}: largest relative difference {found.worst:.1e} over {found.rows} rows, memory grown by MiB: "
        f"{grew or 'unknown'}; {found.step / seconds:.0f} steps/s{'  WRONG' if found.wrong() else ''}",
        began,
    )
    if options.out:
        named = torch.cuda.get_device_name() if place.device.startswith("cuda") else platform.machine()
        facts = {
            "what": f"{options.model}, {options.dtype}, {options.how}, {place.size} x {named}",
            "torch": torch.__version__,
            "commit": commit(),
            "date": time.strftime("%Y-%m-%d"),
            "command": options.command,
            "every": options.every,
            "tolerance": options.tolerance,
            "seconds_before_the_first_step": time.perf_counter() - began - seconds,
        }
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        Path(options.out).write_text(json.dumps({**facts, **found.facts(seconds)}, indent=1) + "\n")


def commit() -> str:
    if os.environ.get("COMMIT"):
        return os.environ["COMMIT"]
    try:
        command = ("git", "rev-parse", "--short", "HEAD")
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def difference(
    whole: Any,
    steps: Steps,
    bucket: int,
    rows: dict[int, int],
    fed: torch.Tensor,
    logits: torch.Tensor,
    options: Options,
) -> float:
    """Largest difference of this rank's logits from the plain model's on the same cache, relative to the largest logit."""
    if not rows:
        return 0.0
    slots = torch.tensor(sorted(rows), device=fed.device)
    ours = logits[slots].clone()
    positions = steps.control[0, :bucket, None]
    steps.cache.place.slots, steps.cache.place.positions = None, positions
    theirs = decode_step(whole, steps.cache, fed[:bucket].clone(), positions, options.length, steps.dtype)[slots]
    error = (ours - theirs).abs().max() / theirs.abs().max()
    # A NaN would lose every comparison with a number, the one with the largest so far too.
    return float(torch.nan_to_num(error, nan=float("inf")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen3_moe")
    parser.add_argument("--ranks", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--every", type=int, default=500)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--buckets", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128])
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--how", choices=HOWS, help="default: captured on a GPU, compiled elsewhere")
    parser.add_argument(
        "--seconds", type=float, default=0.0, help="end after the comparison that comes later than this"
    )
    parser.add_argument("--out", default="", help="a JSON file")
    chosen = parser.parse_args()
    started = size_under_torchrun()
    count, kind = choose(started, chosen.ranks, chosen.device, "soak_decode")
    how = chosen.how or ("captured" if kind == "cuda" else "compiled")
    numbers = (chosen.steps, min(chosen.every, chosen.steps), chosen.length, tuple(sorted(set(chosen.buckets))))
    last = (chosen.seconds, chosen.out, " ".join(["python", *sys.argv]))
    options = Options(chosen.model, *numbers, chosen.dtype, chosen.tolerance, how, *last)
    good = start(work, options, count, kind) if started is None else join_torchrun(work, options, kind)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
