"""Many decode steps with random buckets, sequences, routing and idle ranks; every so often compared with the plain model.

    python benchmarks/soak_decode.py --device cuda --steps 20000 --every 500

All ranks draw each step's bucket from one seed, and each its own rows: none on some steps.  Every ``--every`` steps the logits are
compared with an eager step of the unsharded model on the same keys and values, and memory is looked at, which must not grow.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import time
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
ROOM = 64 * 2**20
"""Bytes that a process on the CPU may grow by: its allocator keeps some.  On a GPU: none."""


class Options(NamedTuple):
    model: str
    steps: int
    every: int
    length: int
    buckets: tuple[int, ...]
    dtype: str
    tolerance: float
    how: str


def memory(device: torch.device) -> int:
    """Bytes in use: of torch on a GPU, of the process without mapped files elsewhere; 0 where nobody says."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        with open("/proc/self/status") as status:
            return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon"))
    except (OSError, StopIteration):
        return 0


def work(place: Place, options: Options) -> bool:
    """The whole soak on one rank; whether no comparison failed on any."""
    shared, own = random.Random(1), random.Random(100 + place.rank)
    device = torch.device(place.device)
    with process_group(place), torch.no_grad():
        whole = zoo.tiny(options.model, dtype=getattr(torch, options.dtype)).to(device)
        largest = options.buckets[-1]
        with epops.ExpertGroup(max_tokens=largest, timeout=900.0) as group:
            model = epops.parallelize(copy.deepcopy(whole), group)
            settings = None if options.how == "eager" else {}
            capture = options.how == "captured"
            steps = Steps(model, group, check_model(model), options.buckets, options.length, settings, capture)
            for bucket in reversed(options.buckets):
                steps.prepare(bucket)
            vocab = whole.config.get_text_config().vocab_size
            worst, compared, first, began = 0.0, 0, 0, time.perf_counter()
            good = True
            for step in range(1, options.steps + 1):
                bucket = shared.choice(options.buckets)
                count = 0 if own.random() < IDLE else own.randint(1, bucket)
                rows = {slot: own.randrange(options.length - 1) for slot in own.sample(range(bucket), count)}
                fed = torch.tensor([own.randrange(vocab) for _ in range(largest)], device=device)
                steps.tokens.copy_(fed)
                logits = steps.decode(bucket, rows)
                if step % options.every == 0:
                    error = difference(whole, steps, bucket, rows, fed, logits, options)
                    now = memory(device)
                    first = first or now
                    grown = now - first
                    told: list[Any] = [None] * place.size
                    dist.all_gather_object(told, (error, grown, count))
                    worst = max(worst, *(one[0] for one in told))
                    compared += sum(one[2] for one in told)
                    flat = all(one[1] <= (0 if device.type == "cuda" else ROOM) for one in told)
                    # A NaN compares as False, which is what it should be here.
                    good = good and worst <= options.tolerance and flat
                    if place.rank == 0:
                        rate = step / (time.perf_counter() - began)
                        grew = max(one[1] for one in told) / 2**20
                        print(
                            f"step {step}: largest relative difference {worst:.1e} over {compared} rows, memory grown by "
                            f"{grew:.1f} MiB, {rate:.0f} steps/s{'' if good else '  WRONG'}",
                            flush=True,
                        )
                    if not good:
                        return False
            group.check()
    return good


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
    return float((ours - theirs).abs().max() / theirs.abs().max())


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
    chosen = parser.parse_args()
    started = size_under_torchrun()
    count, kind = choose(started, chosen.ranks, chosen.device, "soak_decode")
    how = chosen.how or ("captured" if kind == "cuda" else "compiled")
    numbers = (chosen.steps, min(chosen.every, chosen.steps), chosen.length, tuple(sorted(set(chosen.buckets))))
    options = Options(chosen.model, *numbers, chosen.dtype, chosen.tolerance, how)
    good = start(work, options, count, kind) if started is None else join_torchrun(work, options, kind)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
