"""Time of a fresh process to its first compiled result, with an empty compile cache and with a warm one.

    python benchmarks/bench_warm_start.py --ranks 2 --model mixtral

Each measurement starts new processes: imports, model, group, compile (or cache), one training step.  Target: warm at least 3
times faster than cold.  The processors' time, of all ranks and their compilers, is what a busy machine changes least.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STEP = """
import sys
import time

began = time.time()
import torch
import torch.distributed as dist

import epops
from epops import zoo

rank, size, store, family = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
with epops.ExpertGroup(name="ep", max_tokens=64, timeout=900.0) as group:
    torch.manual_seed(0)
    model = zoo.tiny(family)
    inputs = zoo.inputs(family, model, batch=2, seqlen=8, seed=rank)
    epops.parallelize(model, group)
    ready = time.time()
    answer = torch.compile(model, fullgraph=True, backend="epops")(**inputs)
    zoo.loss_of(answer).backward()
    print(f"{ready - began:.2f} {time.time() - ready:.2f}")
"""


def _processor_time() -> float:
    """Seconds that processes which this one started, and theirs, have computed."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(size: int, family: str, cache: str) -> tuple[float, float, float, float]:
    """Seconds of the slowest rank: the whole process, before the first call, the first forward and backward; and of processors."""
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        began, computed = time.time(), _processor_time()
        command = [sys.executable, "-W", "ignore", "-c", STEP]
        ranks = [
            subprocess.Popen(
                [*command, str(rank), str(size), f"{folder}/store", family], env=env, stdout=subprocess.PIPE, text=True
            )
            for rank in range(size)
        ]
        said = [process.communicate()[0] for process in ranks]
        if any(process.returncode for process in ranks):
            raise SystemExit(f"a rank failed: {[process.returncode for process in ranks]}")
        parts = [tuple(map(float, text.split()[-2:])) for text in said]
        computed = _processor_time() - computed
        return time.time() - began, max(a for a, _ in parts), max(b for _, b in parts), computed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--model", default="mixtral")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    chosen = parser.parse_args()
    import torch

    with tempfile.TemporaryDirectory() as cache:
        cold = run(chosen.ranks, chosen.model, cache)
        warm = run(chosen.ranks, chosen.model, cache)
    names = ("process", "before_first_call", "first_step", "processors")
    result = {
        "what": "seconds to the first compiled forward and backward, slowest rank; processors: of all ranks and their compilers",
        "model": chosen.model,
        "ranks": chosen.ranks,
        "cold": dict(zip(names, cold)),
        "warm": dict(zip(names, warm)),
        "process_speedup": cold[0] / warm[0],
        "first_step_speedup": cold[2] / warm[2],
        "processors_speedup": cold[3] / warm[3],
        "torch": torch.__version__,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", *sys.argv]),
    }
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / f"warm_start_{chosen.model}_{chosen.ranks}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"{'':6}{'process':>10}{'imports…':>10}{'first step':>12}{'processors':>12}   seconds")
    for name, row in (("cold", cold), ("warm", warm)):
        print(f"{name:6}{row[0]:10.1f}{row[1]:10.1f}{row[2]:12.1f}{row[3]:12.1f}")
    print(f"process {cold[0] / warm[0]:.1f} times faster warm, first step {cold[2] / warm[2]:.1f} (target 3)")


if __name__ == "__main__":
    main()
