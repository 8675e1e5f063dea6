"""Time of ragged all-to-alls that turn tokens into heads, beside torch's own with the transposes around it.

    torchrun --nproc-per-node 2 benchmarks/bench_all_to_all.py --device cuda --out all_to_all.json
    torchrun --nproc-per-node 2 benchmarks/bench_all_to_all.py --sizes 16KiB      # gloo: that it runs, not how fast

A rank has (tokens, heads, 64) numbers and sends each token to a rank, "even" or four times as many to rank 0 ("skewed").  Bytes
are those that cross the wire to other ranks; the ceiling is torch's equal all_to_all_single of 256 MiB (of the largest size on
CPU) in the same run.  ``--graphs`` times replays of CUDA graphs of what reads no split on the host.  Not yet run on GPUs: there is
no measured result of it in this project, and torch's symmetric-memory exchange is not among the ways.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import epops

HEADS, WIDTH = 8, 64
UNITS = {"KiB": 1 << 10, "MiB": 1 << 20}
SIZES = ("16KiB", "64KiB", "256KiB", "1MiB", "4MiB", "16MiB", "64MiB", "256MiB")


def num_bytes(size: str) -> int:
    """
    >>> num_bytes("64KiB")
    65536
    """
    return int(size[:-3]) * UNITS[size[-3:]]


def splits_of(tokens: int, ranks: int, skewed: bool) -> list[int]:
    """Tokens for each rank; they add up to ``tokens``.

    >>> splits_of(10, 2, True), splits_of(10, 2, False), splits_of(7, 3, True)
    ([8, 2], [5, 5], [5, 1, 1])
    """
    shares = [4 if skewed and rank == 0 else 1 for rank in range(ranks)]
    rest = [tokens * share // sum(shares) for share in shares[1:]]
    return [tokens - sum(rest), *rest]


class Case(NamedTuple):
    size: str
    skewed: bool
    transposed: bool


def ways(
    case: Case, x: torch.Tensor, splits: list[int], group: epops.ExpertGroup
) -> Iterator[tuple[str, Callable, bool]]:
    """Name, call, and whether a CUDA graph can hold it.

    With transposes: x (heads, tokens, width) → (heads * R, tokens here, width).  Without: (tokens, heads, width) → (tokens for
    this rank of all ranks, heads, width).
    """
    ranks, mine = group.size, splits[group.rank]
    sent = torch.tensor(splits, device=x.device)
    came = [mine] * ranks  # every rank divides its tokens alike

    def to_heads(rows: torch.Tensor) -> torch.Tensor:
        """(R * n, heads, width) → (R * heads, n, width)."""
        return rows.unflatten(0, (ranks, -1)).transpose(1, 2).flatten(0, 1).contiguous()

    def host_splits() -> torch.Tensor:
        given = x.transpose(0, 1).contiguous() if case.transposed else x
        rows = given.new_empty(sum(came), *given.shape[1:])
        dist.all_to_all_single(rows, given, came, splits)
        return to_heads(rows) if case.transposed else rows

    yield "torch, host splits", host_splits, False
    most = max(splits)
    index = torch.zeros(ranks, most, dtype=torch.int64)
    for rank, count in enumerate(splits):
        index[rank, :count] = torch.arange(count) + sum(splits[:rank])
    index = index.flatten().to(x.device)

    def padded() -> torch.Tensor:
        given = (x.transpose(0, 1) if case.transposed else x)[index]
        rows = torch.empty_like(given)
        dist.all_to_all_single(rows, given)
        return to_heads(rows) if case.transposed else rows

    yield "torch, padded equal splits", padded, True
    if case.transposed:
        heads = torch.full((ranks,), x.shape[0], device=x.device)
        plan = epops.plan_all_to_all(sent, heads, group=group).plan
        settings: dict[str, Any] = {
            "scatter_dim": 1,
            "gather_dim": 0,
            "scatter_size": most,
            "out_size": ranks * x.shape[0],
        }
    else:
        plan = epops.plan_all_to_all(sent, group=group).plan
        settings = {"out_size": ranks * most}
    yield "epops, splits on the device", lambda: epops.all_to_all(x, plan=plan, group=group, **settings).rows, True


def milliseconds(call: Callable, device: torch.device, runs: int, graph: bool) -> float:
    """Median time of one call, of the slowest rank."""
    for _ in range(2):
        call()
    replay = call
    if graph:
        torch.cuda.synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            call()
        replay = captured.replay
    times = []
    for _ in range(runs):
        dist.barrier()
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            replay()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            began = time.perf_counter()
            replay()
            times.append(1e3 * (time.perf_counter() - began))
    slowest = torch.tensor(statistics.median(times), device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)


def measure(
    case: Case, group: epops.ExpertGroup, device: torch.device, runs: int, graphs: bool
) -> list[dict[str, Any]]:
    """Every way of one case, checked against the first."""
    dtype = torch.bfloat16
    tokens = max(num_bytes(case.size) // (HEADS * WIDTH * dtype.itemsize), group.size)
    shape = (HEADS, tokens, WIDTH) if case.transposed else (tokens, HEADS, WIDTH)
    x = torch.randn(shape, device=device, dtype=dtype)
    splits = splits_of(tokens, group.size, case.skewed)
    mine = splits[group.rank]
    wire = max(tokens - count for count in splits) * HEADS * WIDTH * dtype.itemsize
    found, first = [], None
    for name, call, graphable in ways(case, x, splits, group):
        rows = call()
        if name.endswith("padded equal splits"):
            rows = rows[:, :mine] if case.transposed else rows.unflatten(0, (group.size, -1))[:, :mine].flatten(0, 1)
        else:
            rows = rows[:, :mine] if case.transposed else rows[: mine * group.size]
        first = rows if first is None else first
        assert torch.equal(rows, first), f"{name} gives other rows"
        graph = graphable and graphs and device.type == "cuda"
        ms = milliseconds(call, device, runs, graph)
        found.append({**case._asdict(), "way": name, "graph": graph, "ms": ms, "gb_s": wire / ms / 1e6})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sizes", nargs="*", default=SIZES, help="bytes a rank has")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--graphs", action="store_true", help="time CUDA graphs where they are possible")
    parser.add_argument("--out", type=Path, help="a JSON file")
    options = parser.parse_args()
    device = torch.device("cpu")
    if options.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if options.device == "cuda" else "gloo")
    with epops.ExpertGroup(name="bench") as group:
        largest = "256MiB" if options.device == "cuda" else max(options.sizes, key=num_bytes)
        equal = torch.zeros(num_bytes(largest) // group.size * group.size, dtype=torch.uint8, device=device)
        into = torch.empty_like(equal)
        ms = milliseconds(lambda: dist.all_to_all_single(into, equal), device, options.runs, False)
        ceiling = equal.numel() * (group.size - 1) / group.size / ms / 1e6
        rows = []
        for size in options.sizes:
            for skewed in (False, True):
                for transposed in (False, True):
                    rows += measure(Case(size, skewed, transposed), group, device, options.runs, options.graphs)
        if group.rank == 0:
            report(rows, ceiling, f"{group.size} ranks, {device.type}, {group.transport!r}", options.out)
    dist.destroy_process_group()


def report(rows: list[dict[str, Any]], ceiling: float, where: str, out: Path | None) -> None:
    """The table, and the JSON file."""
    print(f"{where}; ceiling {ceiling:.2f} GB/s a direction")
    print("| a rank | splits | transposes | way | graph | ms | GB/s | of the ceiling |\n" + "| --- " * 8 + "|")
    for row in rows:
        row["of_ceiling"] = row["gb_s"] / ceiling
        cells = [row["size"], "4:1" if row["skewed"] else "even", "both" if row["transposed"] else "none", row["way"]]
        cells += ["yes" if row["graph"] else "no", f"{row['ms']:.4f}", f"{row['gb_s']:.2f}", f"{row['of_ceiling']:.0%}"]
        print("| " + " | ".join(cells) + " |")
    if out is not None:
        out.write_text(
            json.dumps({"where": where, "ceiling_gb_s": ceiling, "torch": torch.__version__, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
