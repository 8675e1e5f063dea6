"""An MoE layer with a shared expert, compiled with and without the pass that hides exchanges behind the shared expert.

    python benchmarks/bench_overlap.py --tokens 512 4096 --out benchmarks/results

On GPUs each figure is a sixteenth of the replay of a CUDA graph with 16 calls, timed by events; on CPU the compiled call, timed
on the host.  The median of the slowest rank counts.  ``exchanges`` is a dispatch and the combine that answers it, alone;
``shared expert`` the compiled shared expert alone.  The ceiling of what overlap can save is the smaller of the two.
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


class Options(NamedTuple):
    tokens: tuple[int, ...]
    hidden: int
    intermediate: int
    shared: int
    experts: int
    top_k: int
    dtype: str
    runs: int
    out: str
    command: str


class Layer(torch.nn.Module):
    """Router, routed experts of this rank, shared expert."""

    def __init__(self, options: Options, group: epops.ExpertGroup) -> None:
        super().__init__()
        self.group, self.top_k = group.name, options.top_k
        hidden, inner = options.hidden, options.intermediate
        self.router = torch.nn.Linear(hidden, options.experts, bias=False)
        self.gate_up = torch.nn.Parameter(torch.randn(group.num_slots, hidden, 2 * inner) / hidden**0.5)
        self.down = torch.nn.Parameter(torch.randn(group.num_slots, inner, hidden) / inner**0.5)
        self.shared = torch.nn.Sequential(
            torch.nn.Linear(hidden, options.shared, bias=False),
            torch.nn.SiLU(),
            torch.nn.Linear(options.shared, hidden, bias=False),
        )

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.router(x).float().softmax(-1).topk(self.top_k, dim=-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.route(x)
        sent = epops.dispatch(x, chosen, weights, group=self.group)
        gate, up = epops.grouped_mm(sent.rows, self.gate_up, sent.expert_ends).chunk(2, dim=-1)
        y = epops.grouped_mm(torch.nn.functional.silu(gate) * up, self.down, sent.expert_ends)
        back = epops.combine(y, sent.route, sent.row_weights, group=self.group, num_tokens=x.shape[0], top_k=self.top_k)
        return back.out + self.shared(x)


def milliseconds(call: Callable[[], Any], device: torch.device, runs: int) -> float:
    """Median time of a call, of the slowest rank.

    A CUDA graph holds `CALLS` of them, one behind the other: where one rank begins later than another, only the first one waits.
    """
    with torch.no_grad():
        for _ in range(WARM_UPS):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(CALLS):
                    call()
            graph.replay()
        times = []
        for _ in range(runs):
            dist.barrier()
            if device.type == "cuda":
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda.synchronize()
                begin.record()
                graph.replay()
                end.record()
                torch.cuda.synchronize()
                times.append(begin.elapsed_time(end) / CALLS)
            else:
                began = time.perf_counter()
                call()
                times.append(1e3 * (time.perf_counter() - began))
    slowest = torch.tensor([statistics.median(times)], device=device, dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.item()


def measure(options: Options, tokens: int, device: torch.device) -> dict[str, float]:
    dtype = getattr(torch, options.dtype)
    with epops.ExpertGroup(name="bench", num_experts=options.experts, max_tokens=tokens, device=device) as group:
        torch.manual_seed(0)
        layer = Layer(options, group).to(device, dtype).eval()
        torch.manual_seed(1 + group.rank)
        x = torch.randn(tokens, options.hidden, dtype=dtype, device=device)
        weights, chosen = layer.route(x)
        weights, chosen = weights.detach(), chosen.detach()

        def exchanges() -> None:
            sent = epops.dispatch(x, chosen, weights, group=group)
            epops.combine(sent.rows, sent.route, sent.row_weights, group=group, num_tokens=tokens, top_k=options.top_k)

        plain = [one.__name__ for one in epops.PASSES if one.__name__ != "overlap"]
        one_after_another = torch.compile(layer, fullgraph=True, backend="epops", options={"passes": plain})
        overlapped = torch.compile(layer, fullgraph=True, backend="epops")
        # By turns with copies of itself: in the layer its weights do not find themselves in the L2 either.
        copies = [layer.shared, *(copy.deepcopy(layer.shared) for _ in range(COPIES - 1))]
        shared = torch.compile(lambda x: [one(x) for one in copies])
        with torch.no_grad():
            difference = (overlapped(x) - one_after_another(x)).abs().max().item()
        found = {
            "tokens": tokens,
            "exchanges_ms": milliseconds(exchanges, device, options.runs),
            "shared_expert_ms": milliseconds(lambda: shared(x), device, options.runs) / COPIES,
            "one_after_another_ms": milliseconds(lambda: one_after_another(x), device, options.runs),
            "overlapped_ms": milliseconds(lambda: overlapped(x), device, options.runs),
            "largest_difference": difference,
        }
        saved = found["one_after_another_ms"] - found["overlapped_ms"]
        found["saved_ms"] = saved
        found["share_of_the_smaller"] = saved / min(found["exchanges_ms"], found["shared_expert_ms"])
        found["transport"] = repr(group.transport)
        return found


def work(place: Place, options: Options) -> bool:
    device = torch.device(place.device)
    with process_group(place):
        rows = []
        for tokens in options.tokens:
            torch.compiler.reset()
            rows.append(measure(options, tokens, device))
        if place.rank == 0:
            report(rows, place.size, device, options)
    return True


def report(rows: list[dict[str, Any]], size: int, device: torch.device, options: Options) -> None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    facts = {"ranks": size, "device": name, "torch": torch.__version__, "python": platform.python_version()}
    facts |= {"epops": epops.__version__, "date": time.strftime("%Y-%m-%d"), **options._asdict()}
    columns = ("one_after_another_ms", "overlapped_ms", "saved_ms", "exchanges_ms", "shared_expert_ms")
    print(f"{size} ranks, {name}, {rows[0]['transport']}")
    print(
        f"{'tokens':>7}"
        + "".join(f"{c.removesuffix('_ms').replace('_', ' '):>19}" for c in columns)
        + "   saved of the smaller"
    )
    for row in rows:
        figures = "".join(f"{row[c]:>16.3f} ms" for c in columns)
        print(f"{row['tokens']:>7}{figures}{100 * row['share_of_the_smaller']:>20.0f} %")
    if options.out:
        folder = Path(options.out)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"overlap_{device.type}.json"
        path.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
        print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512, 4096], help="a rank")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=768, help="of a routed expert")
    parser.add_argument("--shared", type=int, default=6144, help="intermediate size of the shared expert")
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--out", default="", help="folder for overlap_cpu.json or overlap_cuda.json")
    given = vars(parser.parse_args())
    given["tokens"] = tuple(given["tokens"])
    started = size_under_torchrun()
    size, device = choose(started, given.pop("ranks"), given.pop("device"), "bench_overlap")
    options = Options(**given, command="python " + " ".join(sys.argv))
    done = join_torchrun(work, options, device) if started else start(work, options, size, device)
    sys.exit(0 if done else 1)


if __name__ == "__main__":
    main()
