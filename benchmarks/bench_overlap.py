"""An MoE layer with a shared expert, compiled with and without the pass that hides exchanges behind the shared expert.

    python benchmarks/bench_overlap.py --shapes qwen3_next deepseek_v3 --tokens 128 4096 --out benchmarks/results

On GPUs each figure is a sixteenth of the replay of a CUDA graph with 16 calls, timed by events; on CPU the compiled call, timed
on the host.  What is compared runs by turns, and the median of the slowest rank counts.  ``exchanges`` is a dispatch and the
combine that answers it, alone; ``shared expert`` the compiled shared expert alone.  The ceiling of what overlap can save is the
smaller of the two.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import epops
from epops.demo.launch import Place, choose, join_torchrun, process_group, size_under_torchrun, start

WARM_UPS = 5
CALLS = 16
COPIES = 4


class Shape(NamedTuple):
    """A layer; ``shared`` is the intermediate size of its shared expert, a SwiGLU where it is ``gated``.

    ``experts`` are those of a rank.
    """

    hidden: int
    intermediate: int
    shared: int
    gated: bool
    experts: int
    top_k: int


# Layers of models, with as many experts a rank as 32 ranks have (16 for GLM): with all of them on two, most of the time is the
# weights of routed experts, and what comes before it is less than two runs differ by.  "wide" has Qwen3-30B-A3B's experts, all of
# them, and a shared expert as wide as what a token has of them.
SHAPES = {
    "qwen3_next": Shape(2048, 512, 512, True, 16, 10),
    "deepseek_v3": Shape(7168, 2048, 2048, True, 8, 8),
    "glm4_5_air": Shape(4096, 1408, 1408, True, 8, 8),
    "wide": Shape(2048, 768, 6144, False, 64, 8),
}


class Options(NamedTuple):
    shapes: tuple[str, ...]
    tokens: tuple[int, ...]
    dtype: str
    runs: int
    tune: str
    out: str
    command: str


class SharedExpert(torch.nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gated = shape.gated
        self.up = torch.nn.Linear(shape.hidden, shape.shared * (2 if shape.gated else 1), bias=False)
        self.down = torch.nn.Linear(shape.shared, shape.hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.gated:
            return self.down(torch.nn.functional.silu(self.up(x)))
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(torch.nn.functional.silu(gate) * up)


class Layer(torch.nn.Module):
    """Router, routed experts of this rank, shared expert."""

    def __init__(self, shape: Shape, group: epops.ExpertGroup) -> None:
        super().__init__()
        self.group, self.top_k = group.name, shape.top_k
        hidden, inner = shape.hidden, shape.intermediate
        self.router = torch.nn.Linear(hidden, group.num_experts, bias=False)
        self.gate_up = torch.nn.Parameter(torch.randn(group.num_slots, hidden, 2 * inner) / hidden**0.5)
        self.down = torch.nn.Parameter(torch.randn(group.num_slots, inner, hidden) / inner**0.5)
        self.shared = SharedExpert(shape)

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.router(x).float().softmax(-1).topk(self.top_k, dim=-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.route(x)
        sent = epops.dispatch(x, chosen, weights, group=self.group)
        gate, up = epops.grouped_mm(sent.rows, self.gate_up, sent.expert_ends).chunk(2, dim=-1)
        y = epops.grouped_mm(torch.nn.functional.silu(gate) * up, self.down, sent.expert_ends)
        back = epops.combine(y, sent.route, sent.row_weights, group=self.group, num_tokens=x.shape[0], top_k=self.top_k)
        return back.out + self.shared(x)


def milliseconds(calls: list[Callable[[], Any]], device: torch.device, runs: int) -> list[float]:
    """Median times of calls that run by turns, of the slowest rank.

    A CUDA graph holds `CALLS` of one, one behind the other: where one rank begins later than another, only the first one waits.
    """
    replays = [held(call, device) for call in calls]
    times: list[list[float]] = [[] for _ in calls]
    with torch.no_grad():
        for _ in range(runs):
            for replay, found in zip(replays, times, strict=True):
                dist.barrier()
                found.append(replay())
    slowest = torch.tensor([statistics.median(found) for found in times], device=device, dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.tolist()


def held(call: Callable[[], Any], device: torch.device) -> Callable[[], float]:
    """``call``, warmed up; its result runs it once and returns milliseconds."""
    with torch.no_grad():
        for _ in range(WARM_UPS):
            call()
        if device.type != "cuda":

            def once() -> float:
                began = time.perf_counter()
                call()
                return 1e3 * (time.perf_counter() - began)

            return once
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(CALLS):
                call()

    def replay() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / CALLS

    replay()
    return replay


def measure(options: Options, name: str, tokens: int, device: torch.device) -> dict[str, Any]:
    dtype, shape = getattr(torch, options.dtype), SHAPES[name]
    num_experts = shape.experts * dist.get_world_size()
    with epops.ExpertGroup(name="bench", num_experts=num_experts, max_tokens=tokens, device=device) as group:
        if options.tune:
            group.transport.tune(**json.loads(options.tune))
        torch.manual_seed(0)
        with torch.device(device):
            layer = Layer(shape, group).to(dtype).eval()
        torch.manual_seed(1 + group.rank)
        x = torch.randn(tokens, shape.hidden, dtype=dtype, device=device)
        weights, chosen = layer.route(x)
        weights, chosen = weights.detach(), chosen.detach()

        def exchanges() -> None:
            sent = epops.dispatch(x, chosen, weights, group=group)
            epops.combine(sent.rows, sent.route, sent.row_weights, group=group, num_tokens=tokens, top_k=shape.top_k)

        plain = [one.__name__ for one in epops.PASSES if one.__name__ != "overlap"]
        one_after_another = torch.compile(layer, fullgraph=True, backend="epops", options={"passes": plain})
        overlapped = torch.compile(layer, fullgraph=True, backend="epops")
        # By turns with copies of itself: in the layer its weights do not find themselves in the L2 either.
        copies = [layer.shared, *(copy.deepcopy(layer.shared) for _ in range(COPIES - 1))]
        shared = torch.compile(lambda x: [one(x) for one in copies])
        with torch.no_grad():
            difference = (overlapped(x) - one_after_another(x)).abs().max().item()
        calls = [exchanges, lambda: shared(x), lambda: one_after_another(x), lambda: overlapped(x)]
        times = milliseconds(calls, device, options.runs)
        names = "exchanges_ms", "shared_expert_ms", "one_after_another_ms", "overlapped_ms"
        found: dict[str, Any] = {"shape": name, "tokens": tokens, **dict(zip(names, times, strict=True))}
        found["shared_expert_ms"] /= COPIES
        found["largest_difference"] = difference
        saved = found["one_after_another_ms"] - found["overlapped_ms"]
        found["saved_ms"] = saved
        found["share_of_the_smaller"] = saved / min(found["exchanges_ms"], found["shared_expert_ms"])
        found["transport"] = repr(group.transport)
        return found


def work(place: Place, options: Options) -> bool:
    device = torch.device(place.device)
    with process_group(place):
        rows = []
        for name in options.shapes:
            for tokens in options.tokens:
                torch.compiler.reset()
                rows.append(measure(options, name, tokens, device))
                if place.rank == 0:
                    print(line_of(rows[-1]), flush=True)
        if place.rank == 0:
            report(rows, place.size, device, options)
    return True


COLUMNS = ("one_after_another_ms", "overlapped_ms", "saved_ms", "exchanges_ms", "shared_expert_ms")


def line_of(row: dict[str, Any]) -> str:
    figures = "".join(f"{1e3 * row[c]:>17.1f} us" for c in COLUMNS)
    return f"{row['shape']:>12}{row['tokens']:>7}{figures}{100 * row['share_of_the_smaller']:>20.0f} %"


def report(rows: list[dict[str, Any]], size: int, device: torch.device, options: Options) -> None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    facts = {"ranks": size, "device": name, "torch": torch.__version__, "python": platform.python_version()}
    facts |= {"epops": epops.__version__, "date": time.strftime("%Y-%m-%d"), **options._asdict()}
    shapes = {name: SHAPES[name]._asdict() for name in options.shapes}
    print(f"{size} ranks, {name}, {rows[-1]['transport']}")
    heads = "".join(f"{c.removesuffix('_ms').replace('_', ' '):>20}" for c in COLUMNS)
    print(f"{'':>12}{'tokens':>7}{heads}   saved of the smaller")
    for row in rows:
        print(line_of(row))
    if options.out:
        folder = Path(options.out)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"overlap_{device.type}.json"
        path.write_text(json.dumps({**facts, "layers": shapes, "rows": rows}, indent=1) + "\n")
        print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512, 4096], help="a rank")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--tune", default="", help="settings of the nvlink transport, as JSON")
    parser.add_argument("--out", default="", help="folder for overlap_cpu.json or overlap_cuda.json")
    given = vars(parser.parse_args())
    given["tokens"], given["shapes"] = tuple(given["tokens"]), tuple(given["shapes"])
    started = size_under_torchrun()
    size, device = choose(started, given.pop("ranks"), given.pop("device"), "bench_overlap")
    options = Options(**given, command="python " + " ".join(sys.argv))
    done = join_torchrun(work, options, device) if started else start(work, options, size, device)
    sys.exit(0 if done else 1)


if __name__ == "__main__":
    main()
