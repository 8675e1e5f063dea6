"""What stands between two grouped products, when there is room for many more rows than came.

    python benchmarks/bench_padding.py [--valid 1024] [--out results/padding.json]

Both products and what is between them are compiled with the epops backend, with and without `skip_padding`, captured into a CUDA
graph and replayed.  The time is that of all kernels but the products', by the profiler.  Needs a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import epops
from epops.models.experts import Rows, bias

PRODUCTS = ("GroupProblemShape", "prepare_grouped")
"""In the names of the kernels of grouped products."""
REPLAYS = 20


class Case(NamedTuple):
    between: Callable[..., Tensor]
    hidden: int
    inner: int
    experts: int
    biased: bool


def gated(h: Tensor, *_: Tensor) -> Tensor:
    gate, up = h.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def clamped(h: Tensor, biases: Tensor, expert: Tensor, ends: Tensor) -> Tensor:
    """GPT-OSS: a bias an expert, every other column a gate, both clamped."""
    h = h + bias(Rows(h, h, expert, ends), biases)
    gate, up = h[:, ::2].clamp(max=7.0), h[:, 1::2].clamp(min=-7.0, max=7.0)
    return (up + 1) * gate * torch.sigmoid(gate * 1.702)


CASES = {
    "Qwen3-30B-A3B, SwiGLU": Case(gated, 2048, 768, 64, False),
    "GPT-OSS-120B, bias and clamped gate": Case(clamped, 2880, 2880, 16, True),
}


def inputs(case: Case, valid: int, capacity: int, device: Any) -> tuple[Tensor, ...]:
    """Rows, both weights, biases, each row's expert, ends: ``valid`` rows over all experts alike."""
    make = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=make, device=device) / shape[-1] ** 0.5).bfloat16()

    ends = torch.arange(1, case.experts + 1, device=device) * valid // case.experts
    rows = torch.arange(capacity, device=device)
    expert = torch.where(rows < valid, torch.searchsorted(ends, rows, right=True), -1).int()
    up, down = draw(case.experts, 2 * case.inner, case.hidden), draw(case.experts, case.hidden, case.inner)
    return draw(capacity, case.hidden), up, down, draw(case.experts, 2 * case.inner), expert, ends.int()


def layer(case: Case) -> Callable[..., Tensor]:
    def run(x: Tensor, up: Tensor, down: Tensor, biases: Tensor, expert: Tensor, ends: Tensor) -> Tensor:
        h = epops.grouped_mm(x, up.transpose(1, 2), ends)
        return epops.grouped_mm(case.between(h, biases, expert, ends), down.transpose(1, 2), ends)

    return run


@torch.no_grad()
def microseconds(case: Case, valid: int, capacity: int, skip: bool) -> float:
    """Of the kernels beside the products', one replay."""
    given = inputs(case, valid, capacity, "cuda")
    torch._dynamo.reset()
    passes = [one for one in epops.PASSES if skip or one.__name__ != "skip_padding"]
    compiled = torch.compile(layer(case), backend="epops", fullgraph=True, options={"passes": passes})
    compiled(*given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        compiled(*given)
    graph.replay()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        for _ in range(REPLAYS):
            graph.replay()
        torch.cuda.synchronize()
    found = [event for event in seen.key_averages() if event.device_type == torch.profiler.DeviceType.CUDA]
    return sum(e.self_device_time_total for e in found if not any(word in e.key for word in PRODUCTS)) / REPLAYS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--valid", type=int, default=1024, help="rows that came")
    parser.add_argument("--room", type=int, nargs="+", default=(1, 4, 16), help="capacities, in valid rows")
    parser.add_argument("--out", default="", help="file for JSON")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "bench_padding: expected a GPU, got a torch that sees none; run it on a machine with one", file=sys.stderr
        )
        sys.exit(2)
    lines = [f"{torch.cuda.get_device_name()}, bfloat16, {chosen.valid} valid rows, µs beside the grouped products"]
    lines += ["", "| rows between | pass | " + " | ".join(f"room × {room}" for room in chosen.room) + " |"]
    lines.append("|" + " --- |" * (2 + len(chosen.room)))
    rows = []
    for name, case in CASES.items():
        for skip in (False, True):
            times = {room: microseconds(case, chosen.valid, room * chosen.valid, skip) for room in chosen.room}
            word = "skip_padding" if skip else "without"
            lines.append(f"| {name} | {word} | " + " | ".join(f"{time:.1f}" for time in times.values()) + " |")
            rows.append({"case": name, "skip_padding": skip, "microseconds": times})
    print("\n".join(lines))
    if chosen.out:
        facts = {"what": lines[0], "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
        facts["command"] = " ".join(["python", *sys.argv])
        Path(chosen.out).write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
