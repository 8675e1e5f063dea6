"""Time of dispatch and combine over NVLink, in CUDA graphs, beside the ceilings of the same link in the same run.

    torchrun --nproc-per-node 2 benchmarks/bench_dispatch_combine.py --out benchmarks/results

One process a GPU.  A graph holds many pairs (or many of one op); its replay is timed with events, the median of the replays is
divided by the pairs, and the slowest rank counts.  Bytes are those that cross the wire: one row a (token, other rank).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import epops
from epops.torch_private import symmetric_empty
from epops.transport.kernels import LINES, Plan

TOP_K, EXPERTS = 8, 256
REACH = {16: 20.0, 128: 27.0, 512: 58.0, 4096: 350.0}
PEER = {16: 59.0, 128: 53.0, 512: 90.0, 4096: 492.0}


class Case(NamedTuple):
    tokens: int
    hidden: int = 7168
    wire: str = "fp8"
    layout: str = "expert"
    skew: bool = False
    alignment: int = 1

    @property
    def name(self) -> str:
        more = f", aligned to {self.alignment}" if self.alignment > 1 else ""
        return (
            f"{self.tokens} x {self.hidden} {self.wire} {self.layout}{more}{', 80 % to one rank' if self.skew else ''}"
        )


def routing(case: Case, rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Uniform random experts, or four fifths of the choices on rank 0's experts."""
    made = torch.Generator().manual_seed(case.tokens + 77 * rank)
    scores = torch.rand(case.tokens, EXPERTS, generator=made)
    if case.skew:
        # Six or seven of eight choices: 0.8 on average.
        first = EXPERTS // world
        here = scores[:, :first].topk(7).indices
        there = scores[:, first:].topk(2).indices + first
        seven = torch.rand(case.tokens, 1, generator=made) < 0.4
        idx = torch.where(seven, torch.cat([here, there[:, :1]], 1), torch.cat([here[:, :6], there], 1))
    else:
        idx = scores.topk(TOP_K).indices
    return idx.cuda(), torch.rand(case.tokens, TOP_K, generator=made).cuda()


def graph_time(body: Any, calls: int, replays: int = 12) -> float:
    """Microseconds of one call of ``body``: ``calls`` of them in a graph, the median of its replays, the slowest rank."""
    for _ in range(2):
        body()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            body()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(replays):
        dist.barrier()
        torch.cuda.synchronize()
        graph.replay()  # ranks leave the barrier microseconds apart; the first replay brings them together
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / calls)
    slowest = torch.tensor([statistics.median(times)], device="cuda")
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)


class Runner:
    """One case: inputs, a group, and bodies to time."""

    def __init__(self, case: Case, rank: int, world: int, name: str) -> None:
        self.case, self.rank, self.world = case, rank, world
        self.group = epops.ExpertGroup(
            None,
            name,
            max_tokens=case.tokens,
            num_experts=EXPERTS,
            alignment=case.alignment,
            device="cuda",
            transport="nvlink",
        )
        self.x = torch.randn(case.tokens, case.hidden, device="cuda").bfloat16()
        self.idx, self.weights = routing(case, rank, world)
        self.sent = self.dispatch()
        self.y = torch.randn(*self.sent.rows.shape, device="cuda", dtype=torch.bfloat16)
        self.row_weights = self.sent.row_weights if case.layout == "expert" else None
        self.route = self.sent.route
        self.combine()
        torch.cuda.synchronize()

    def dispatch(self) -> Any:
        if self.case.wire == "fp8":
            return epops.dispatch_quant(self.x, self.idx, self.weights, group=self.group, layout=self.case.layout)
        return epops.dispatch(self.x, self.idx, self.weights, group=self.group, layout=self.case.layout)

    def combine(self) -> Any:
        return epops.combine(
            self.y, self.route, self.row_weights, group=self.group, layout=self.case.layout,
            num_tokens=self.case.tokens, top_k=TOP_K,
        )  # fmt: skip

    def pair(self) -> None:
        self.dispatch()
        self.combine()

    def wire_bytes(self) -> tuple[int, int]:
        """Bytes that this rank sends to others in dispatch and in combine."""
        slots = -(-EXPERTS // self.world)
        to = torch.zeros(self.case.tokens, self.world, dtype=torch.bool, device="cuda")
        to.scatter_(1, self.idx // slots, True)
        rows = torch.tensor([int(to.sum() - to[:, self.rank].sum()), 0], device="cuda")
        all_to = [torch.zeros_like(to) for _ in range(self.world)]
        dist.all_gather(all_to, to)
        rows[1] = sum(int(theirs[:, self.rank].sum()) for r, theirs in enumerate(all_to) if r != self.rank)
        row = self.case.hidden * (1 if self.case.wire == "fp8" else 2)
        row += self.case.hidden // 128 * 4 if self.case.wire == "fp8" else 0
        return int(rows[0]) * row, int(rows[1]) * self.case.hidden * 2

    def close(self) -> None:
        torch.cuda.synchronize()
        dist.barrier()
        self.group.close()


def measure(case: Case, rank: int, world: int, number: int) -> dict[str, Any]:
    runner = Runner(case, rank, world, f"bench{number}")
    calls = 20 if case.tokens <= 512 else 4
    made: dict[str, Any] = {"case": case.name, **case._asdict()}
    made["pair_us"] = graph_time(runner.pair, calls)
    made["dispatch_us"] = graph_time(runner.dispatch, calls)
    made["combine_us"] = graph_time(runner.combine, calls)
    made["dispatch_bytes"], made["combine_bytes"] = runner.wire_bytes()
    made["workspace_mib"] = runner.group.transport.workspace_bytes / 2**20
    made["plan"] = {
        op: runner.group.transport.plan(op, case.tokens, case.hidden)._asdict() for op in ("dispatch", "combine")
    }
    runner.close()
    return made


def ceilings(rank: int, world: int) -> dict[str, float]:
    """What the link and the memory of this machine give, now."""
    from torch.distributed import _symmetric_memory

    num = 256 << 20
    mine = symmetric_empty(num, torch.device("cuda", torch.cuda.current_device()))
    handle = _symmetric_memory.rendezvous(mine, dist.group.WORLD.group_name)
    theirs = handle.get_buffer((rank + 1) % world, (num,), torch.uint8)
    source, other = torch.randint(0, 255, (num,), device="cuda", dtype=torch.uint8), torch.empty_like(mine)
    found = {}

    def rate(body: Any, num_bytes: int) -> float:
        return num_bytes / graph_time(body, 4, 6) / 1000

    def stream_time(body: Any, num_bytes: int) -> float:
        body()
        times = []
        for _ in range(6):
            dist.barrier()
            torch.cuda.synchronize()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            body()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        return num_bytes / statistics.median(times) / 1e6

    found["copy_engine_gbs"] = stream_time(lambda: theirs.copy_(source), num)
    found["hbm_copy_gbs"] = rate(lambda: other.copy_(source), 2 * num)
    found["barrier_us"] = graph_time(lambda: handle.barrier(0), 20)
    received = torch.empty_like(source)
    found["nccl_all_to_all_256MiB_gbs"] = stream_time(
        lambda: dist.all_to_all_single(received, source), num * (world - 1) // world
    )
    for tokens in (16, 128, 512, 4096):
        out8 = torch.empty(world * tokens, 7168 + 224, dtype=torch.uint8, device="cuda")
        in8 = torch.empty_like(out8)
        out16 = torch.empty(world * tokens, 7168, dtype=torch.bfloat16, device="cuda")
        in16 = torch.empty_like(out16)

        def pair(a: Any = out8, b: Any = in8, c: Any = out16, d: Any = in16) -> None:
            dist.all_to_all_single(b, a)
            dist.all_to_all_single(d, c)

        found[f"nccl_pair_{tokens}_us"] = graph_time(pair, 4, 6)
    return found


def vdev_2d(rank: int, tokens: list[int]) -> dict[str, Any]:
    """Microseconds of torch's `symm_mem.all_to_all_vdev_2d` by tokens, or {"missing": why}; in processes of its own."""
    environment = {**os.environ, "MASTER_PORT": str(int(os.environ["MASTER_PORT"]) + 1)}
    environment.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # rank 0 of the child makes its own store
    command = [sys.executable, str(Path(__file__).with_name("bench_vdev_2d.py")), "--tokens", *map(str, tokens)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        if rank != 0:
            return {}
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        last = (done.stderr.strip().splitlines() or ["no output"])[-1][:200]
        return json.loads(lines[-1]) if lines else {"missing": f"exit status {done.returncode}: {last}"}
    except subprocess.TimeoutExpired:
        return {"missing": "did not end within 60 s"}
    finally:
        dist.barrier()


def sweep(rank: int, world: int, tokens: list[int]) -> list[dict[str, Any]]:
    """Times of both ops over launch plans, to set the defaults from."""
    rows = []
    for number, count in enumerate(tokens):
        runner = Runner(Case(count), rank, world, f"sweep{number}")
        transport = runner.group.transport
        plans: dict[str, list[Plan]] = {"dispatch": [], "combine": []}
        if count <= 160:
            for blocks in (64, 128):
                for parts in (15, 7, 5):
                    plans["dispatch"].append(Plan(blocks, blocks, 512, parts, 1, 0, 1, LINES))
                    plans["combine"].append(Plan(min(blocks, count), min(blocks, count), 512, parts, parts, 0, 1))
        elif count <= 1024:
            for send in (7, 5, 3, 1):
                for recv in (7, 3, 1):
                    plans["combine"].append(Plan(128, 128, 512, send, recv, 0, 1))
                plans["dispatch"].append(Plan(128, 128, 512, send, 1, 0, 1, LINES))
            for senders in (64, 96):
                plans["dispatch"].append(Plan(128, senders, 512, 1, 1, 1, 1))
                plans["combine"].append(Plan(128, senders, 512, 2, 1, 1, 1))
        else:
            for send in (1, 2, 3):
                plans["combine"].append(Plan(128, 32, 512, send, 1, 1, 1))
                plans["combine"].append(Plan(100, 32, 512, send, 1, 1, 1))
            plans["combine"].append(Plan(128, 32, 512, 2, 2, 0, 1))
            for blocks, senders in ((128, 32), (100, 32), (116, 32), (128, 24), (128, 40), (128, 128)):
                plans["dispatch"].append(Plan(blocks, senders, 512, 1, 1, 1, 1))
            plans["combine"].append(Plan(128, 128, 512, 1, 1, 1, 1))
        calls = 20 if count <= 512 else 4
        for op in ("dispatch", "combine"):
            for plan in plans[op]:
                transport.tune(extra={op: plan})
                time = graph_time(runner.dispatch if op == "dispatch" else runner.combine, calls, 6)
                rows.append({"tokens": count, "op": op, "us": round(time, 2), "plan": list(plan)})
        transport.tune(extra={})
        runner.close()
    return rows


TRACE_POINTS = {
    "dispatch": "start, after earlier kernels, group state, counted, placed, told, sent, counts came, frame, rows, end",
    "dispatch_lines": "start, earlier kernels done, group, made, sent, board, lines came, marked, rows came, rows, landed, end",
    "combine": "start, after earlier kernels, group state, sent, told, -, rows, end",
    "combine_lines": "start, earlier kernels done, group read, first done, own summed, answer came, added, ended",
    "combine_streams": "start, after earlier kernels, group state, sends asked for, told, all asked for, rows, end",
}


def trace(rank: int, world: int, tokens: list[int]) -> None:
    """Microseconds from the end of the kernels before to points in these (a build with -DEPOPS_TRACE), and times without a peer."""
    from epops import _C
    from epops.transport import kernels

    for number, count in enumerate(tokens):
        runner = Runner(Case(count), rank, world, f"trace{number}")
        for op in ("dispatch", "combine"):
            time = graph_time(getattr(runner, op), 10, 3)
            plan = runner.group.transport.plan(op, count, 7168)
            kernel = op + ("", "_lines", "_streams")[plan.rows_as]
            clocks = torch.tensor(_C.read_trace(kernel), dtype=torch.int64).view(256, 12)[: plan.num_blocks]
            if rank == 0:
                print(f"trace {kernel} {count}: {time:.1f} us")
                # Blocks that were there when the kernels before ended have that moment in common.
                waited = clocks[:, 1] - clocks[:, 0] > 400
                clocks = clocks[waited] if waited.any() else clocks
                for point, name in enumerate(TRACE_POINTS[kernel].split(", ")):
                    since = (clocks[:, point] - clocks[:, 1]).float() / 1980
                    since = since[clocks[:, point] >= clocks[:, 0]]
                    if name != "-" and since.numel():
                        low, mid, high = since.min(), since.median(), since.max()
                        print(f"  {name:24} {low:7.2f} {mid:7.2f} {high:7.2f}  ({since.numel()} blocks)")
        runner.close()
        ws, num_bytes = kernels.lay_out(0, 1, kernels.Sizes(count, TOP_K, EXPERTS, 16384), 5.0)
        memory = torch.zeros(num_bytes, dtype=torch.uint8, device="cuda")
        ws.set_peers([memory.data_ptr()])
        rows = epops.layout.capacity("expert", count, 1, TOP_K, EXPERTS, 16)
        slots, mask = torch.arange(EXPERTS, device="cuda"), torch.ones(1, dtype=torch.int64, device="cuda")
        facts = {"num_experts": EXPERTS, "num_slots": EXPERTS, "max_tokens": count, "layout": "expert"}
        tuning = kernels.Tuning()

        def send(quant: Any = kernels.QuantSettings()) -> Any:  # noqa: B008
            return kernels.dispatch(
                ws, tuning.plan("dispatch", count, 1, 132), slots, mask, runner.x, runner.idx, runner.weights,
                capacity=rows, alignment=16, quant=quant, **facts,
            )  # fmt: skip

        route = send().route
        y = torch.randn(rows, 7168, device="cuda", dtype=torch.bfloat16)

        def back() -> Any:
            return kernels.combine(
                ws, tuning.plan("combine", count, 1, 132), y, route, num_tokens=count, top_k=TOP_K,
                out_dtype=torch.bfloat16, **facts,
            )  # fmt: skip

        fp8, bf16, combine = graph_time(send, 10, 3), graph_time(lambda: send(None), 10, 3), graph_time(back, 10, 3)
        if rank == 0:
            print(f"no peer, {count}: dispatch fp8 {fp8:.1f}, bf16 {bf16:.1f}, combine {combine:.1f} us", flush=True)


def facts(world: int) -> dict[str, Any]:
    def run(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            return ""

    driver = run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    return {
        "gpu": torch.cuda.get_device_name(),
        "gpus": world,
        "driver": driver[0] if driver else "",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "epops": getattr(epops, "__version__", ""),
        "commit": run("git", "rev-parse", "--short", "HEAD"),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": "torchrun --nproc-per-node " + " ".join([str(world), *sys.argv]),
    }


def table(result: dict[str, Any]) -> str:
    link = result["ceilings"].get("copy_engine_gbs", 0.0)
    lines = [
        f"{result['facts']['gpus']} x {result['facts']['gpu']}, torch {result['facts']['torch']}, "
        f"driver {result['facts']['driver']}, "
        f"{result['facts']['date']}, commit {result['facts']['commit']}",
        f"command: {result['facts']['command']}",
        "ceilings: " + ", ".join(f"{name} {value:.1f}" for name, value in result["ceilings"].items()),
        "symm_mem.all_to_all_vdev_2d, one way, bf16, 32 experts, us by tokens: " + json.dumps(result["vdev_2d"]),
        "",
        "| tokens a rank x hidden, wire, layout | pair us | dispatch us | combine us | wire MB out, back "
        "| of the link | peer MiB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["cases"]:
        moved = row["dispatch_bytes"] + row["combine_bytes"]
        share = f"{moved / row['pair_us'] / 1000 / link:.0%}" if link else "-"
        lines.append(
            f"| {row['case']} | {row['pair_us']:.1f} | {row['dispatch_us']:.1f} | {row['combine_us']:.1f} | "
            f"{row['dispatch_bytes'] / 1e6:.2f}, {row['combine_bytes'] / 1e6:.2f} | {share} | {row['workspace_mib']:.1f} |"
        )
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [
        r
        for r in result["cases"]
        if r["hidden"] == 7168
        and r["wire"] == "fp8"
        and r["layout"] == "expert"
        and not r["skew"]
        and r["alignment"] == 1
    ]
    link = result["ceilings"].get("copy_engine_gbs", 0.0)
    figure, axes = plt.subplots(figsize=(7, 4.5))
    tokens = [r["tokens"] for r in rows]
    axes.plot(tokens, [r["pair_us"] for r in rows], "o-", label="epops, dispatch + combine")
    nccl = [(t, result["ceilings"].get(f"nccl_pair_{t}_us")) for t in tokens]
    axes.plot(
        [t for t, v in nccl if v],
        [v for _, v in nccl if v],
        "s--",
        label="nccl all_to_all_single, out + back, no routing",
    )
    axes.plot(
        [t for t in tokens if t in PEER],
        [PEER[t] for t in tokens if t in PEER],
        "^:",
        label="best other kernels (measured before)",
    )
    if link:
        floor = [(r["dispatch_bytes"] + r["combine_bytes"]) / link / 1000 for r in rows]
        axes.plot(tokens, floor, "k-", linewidth=0.8, label=f"wire floor at {link:.0f} GB/s")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="tokens a rank",
        ylabel="microseconds a pair",
        title="fp8 out, bf16 back, hidden 7168, top-8",
    )
    axes.legend(fontsize=8)
    axes.grid(True, which="both", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments.add_argument("--tokens", type=int, nargs="*", default=[1, 16, 128, 512, 1024, 2048, 4096])
    arguments.add_argument("--quick", action="store_true", help="the figures of the table alone")
    arguments.add_argument("--sweep", action="store_true", help="launch plans instead of cases")
    arguments.add_argument(
        "--trace", action="store_true", help="phases inside the kernels; needs a build with -DEPOPS_TRACE"
    )
    arguments.add_argument("--no-ceilings", action="store_true")
    chosen = arguments.parse_args()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl")
    dist.all_reduce(torch.zeros(1, device="cuda"))
    if chosen.trace:
        trace(rank, world, chosen.tokens)
    elif chosen.sweep:
        rows = sweep(rank, world, chosen.tokens)
        if rank == 0:
            for row in sorted(rows, key=lambda r: (r["op"], r["tokens"], r["us"])):
                print(row["op"], row["tokens"], row["us"], row["plan"])
    else:
        cases = [Case(tokens) for tokens in chosen.tokens]
        cases += [Case(tokens, alignment=16) for tokens in chosen.tokens if tokens in REACH]
        if not chosen.quick:
            for tokens in (128, 4096):
                cases += [Case(tokens, wire="bf16"), Case(tokens, layout="rank"), Case(tokens, skew=True)]
                cases += [Case(tokens, hidden=2048), Case(tokens, hidden=2880, wire="bf16")]
        result: dict[str, Any] = {"facts": facts(world), "ceilings": {}, "vdev_2d": {}, "cases": []}
        if not chosen.no_ceilings:
            result["ceilings"] = ceilings(rank, world)
            result["vdev_2d"] = vdev_2d(rank, sorted(REACH))
        for number, case in enumerate(cases):
            result["cases"].append(measure(case, rank, world, number))
            if rank == 0:
                row = result["cases"][-1]
                print(
                    f"{row['case']}: {row['pair_us']:.1f} = {row['dispatch_us']:.1f} + {row['combine_us']:.1f} us",
                    flush=True,
                )
        if rank == 0:
            chosen.out.mkdir(parents=True, exist_ok=True)
            (chosen.out / "dispatch_combine.json").write_text(json.dumps(result, indent=1) + "\n")
            (chosen.out / "dispatch_combine.md").write_text(table(result) + "\n")
            plot(result, chosen.out / "dispatch_combine.png")
            print(table(result))
    dist.barrier()
    torch.cuda.synchronize()
    os._exit(0)


if __name__ == "__main__":
    main()
