"""Time that the passes themselves take on the graph of an MoE model, by number of layers.

    python benchmarks/bench_passes.py [--layers 4 8 16 32] [--runs 3] [--out results/passes.json]

One process captures the graph of one rank of 8 with torch's fake process group; nothing runs.  A layer is attention-like
products, a router, dispatch, quantized expert rows or plain ones in turn, combine, a shared expert and residuals, and backward.
The ceiling is 1 s for 16 layers, and twice the layers should take twice the time.
"""

from __future__ import annotations

import argparse
import copy
import cProfile
import json
import os
import platform
import pstats
import time
from pathlib import Path

import torch
import torch.distributed as dist

import epops
from epops.inspection.capture import all_passes, copy_graph
from epops.passes import JOINT, keep_order, run_joint_passes, run_passes
from epops.testing import captured
from epops.torch_private import is_joint

TOKENS, HIDDEN, EXPERTS, TOP_K, RANKS = 64, 256, 32, 4, 8


class Layer(torch.nn.Module):
    """Attention-like products, a router, experts and a shared expert."""

    def __init__(self, quantized: bool) -> None:
        super().__init__()
        self.quantized = quantized
        self.mix = torch.nn.ModuleList(torch.nn.Linear(HIDDEN, HIDDEN) for _ in range(4))
        self.router = torch.nn.Linear(HIDDEN, EXPERTS)
        self.experts = torch.nn.Parameter(torch.randn(EXPERTS // RANKS, HIDDEN, HIDDEN))
        self.shared = torch.nn.Sequential(
            torch.nn.Linear(HIDDEN, 2 * HIDDEN), torch.nn.SiLU(), torch.nn.Linear(2 * HIDDEN, HIDDEN)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value, out = self.mix
        weights = torch.softmax(query(x) @ key(x).t() / HIDDEN**0.5, dim=-1)
        x = x + out(weights @ value(x))
        probabilities, chosen = self.router(x).softmax(-1).topk(TOP_K, dim=-1)
        sent = epops.dispatch(x, chosen, probabilities, group="bench")
        rows = sent.rows
        if self.quantized:
            quantized, scales = epops.quantize(rows.detach())
            rows = (quantized.float().view(-1, HIDDEN // 128, 128) * scales.unsqueeze(-1)).view(-1, HIDDEN)
        y = epops.grouped_mm(rows, self.experts, sent.expert_ends)
        back = epops.combine(y, sent.route, sent.row_weights, group="bench", num_tokens=TOKENS, top_k=TOP_K)
        return x + (back.out + self.shared(x))


def graphs_of(layers: int) -> list[torch.fx.GraphModule]:
    """Joint, forward and backward graph of a model before the passes."""
    model = torch.nn.Sequential(*(Layer(quantized=bool(index % 2)) for index in range(layers)))
    torch._dynamo.config.recompile_limit = 64
    return [graph.before for graph in captured(model, torch.randn(TOKENS, HIDDEN), passes=[])]


def time_of(module: torch.fx.GraphModule, passes: tuple) -> tuple[float, dict[str, int]]:
    """Processor seconds of one run of ``passes`` over a copy of a graph, and what they rewrote."""
    fresh = torch.fx.GraphModule(module, copy_graph(module.graph))
    run = run_joint_passes if is_joint(fresh.graph) else run_passes
    start = time.process_time()
    done = run(fresh.graph, passes)
    return time.process_time() - start, done


def calls_of(module: torch.fx.GraphModule, passes: tuple) -> int:
    """Function calls of one run: unlike seconds, the same on a busy machine."""
    fresh = torch.fx.GraphModule(module, copy_graph(module.graph))
    run = run_joint_passes if is_joint(fresh.graph) else run_passes
    profile = cProfile.Profile()
    profile.runcall(run, fresh.graph, passes)
    return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    given = parser.parse_args()
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    rows: list[dict[str, object]] = []
    print(f"{'layers':>7} {'nodes':>7} {'all, s':>8} {'ms/layer':>9} {'calls/layer':>11}  each pass alone, ms")
    with epops.ExpertGroup(name="bench", num_experts=EXPERTS, max_tokens=TOKENS):
        for layers in given.layers:
            modules = graphs_of(layers)
            nodes = sum(len(module.graph.nodes) for module in modules)
            total = min(sum(time_of(module, all_passes())[0] for module in modules) for _ in range(given.runs))
            alone = {
                one.__name__: min(
                    sum(time_of(copy.copy(module), (one,))[0] for module in modules) for _ in range(given.runs)
                )
                for one in all_passes()
                if one is not keep_order
            }
            each = ", ".join(f"{name} {1000 * seconds:.0f}" for name, seconds in alone.items())
            calls = sum(calls_of(module, all_passes()) for module in modules)
            print(f"{layers:>7} {nodes:>7} {total:>8.3f} {1000 * total / layers:>9.2f} {calls / layers:>11.0f}  {each}")
            done: dict[str, int] = {}
            for module in modules:
                for name, count in time_of(module, all_passes())[1].items():
                    done[name] = done.get(name, 0) + count
            print(f"{'':>16} rewrites: {', '.join(f'{name} {count}' for name, count in done.items())}")
            rows.append(
                {"layers": layers, "nodes": nodes, "seconds": total, "calls": calls, "alone": alone, "rewrites": done}
            )
    if given.out:
        where = {"machine": _processor(), "cores": os.cpu_count(), "python": platform.python_version()}
        facts = {**where, "torch": torch.__version__, "epops": epops.__version__, "ceiling": "1 s for 16 layers"}
        joint = [one.__name__ for one in JOINT]
        text = json.dumps({**facts, "joint": joint, "runs": given.runs, "rows": rows}, indent=2)
        given.out.write_text(text + "\n")


def _processor() -> str:
    """The processor's name, where the system tells."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
