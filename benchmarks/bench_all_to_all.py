"""Time of ragged all-to-alls that turn tokens into heads, beside torch's own with the transposes around it.

    torchrun --nproc-per-node 2 benchmarks/bench_all_to_all.py --device cuda --out benchmarks/results/all_to_all.json
    torchrun --nproc-per-node 2 benchmarks/bench_all_to_all.py --device cuda --vdev --out benchmarks/results/all_to_all.json
    torchrun --nproc-per-node 2 benchmarks/bench_all_to_all.py --sizes 16KiB      # gloo: that it runs, not how fast

A rank has (tokens, heads, 64) numbers and sends each token to a rank, "even" or four times as many to rank 0 ("4:1").  Bytes are
those that cross the wire to other ranks, of the rank that sends most.  On CUDA, what reads no split on the host is timed in a
CUDA graph of many calls; the median of the replays is divided by the calls, and the slowest rank counts.  The ceiling is the
copy engines' both ways at once over peer-mapped memory (on CPU: torch's equal exchange of the largest size), in the same run.
``--vdev`` adds torch's `symm_mem.all_to_all_vdev`, which needs NVSHMEM for all symmetric memory of its process, to a file that is
there.  Beside the JSON file lie a table (.md) and, where matplotlib is installed, a plot (.png); ``--draw`` makes these again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import epops
from epops.torch_private import symmetric_empty

HEADS, WIDTH = 8, 64
UNITS = {"KiB": 1 << 10, "MiB": 1 << 20}
VDEV = "torch, symm_mem.all_to_all_vdev"
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
    case: Case, x: torch.Tensor, splits: list[int], group: epops.ExpertGroup | None
) -> Iterator[tuple[str, Callable, bool]]:
    """Name, call, and whether a CUDA graph can hold it.

    With transposes: x (heads, tokens, width) → (heads * R, tokens here, width).  Without: (tokens, heads, width) → (tokens for
    this rank of all ranks, heads, width).
    """
    ranks, mine = dist.get_world_size(), splits[dist.get_rank()]
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
    if group is None:
        return
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


class Symmetric:
    """Symmetric memory for `vdev`, of the largest case, asked for once: to make and free it is an exchange of all ranks.

    On "cuda:0", never on "cuda": torch keeps the device as it was named when ranks first meet over a tensor, and refuses the
    tensor's own later ("Detected use of TeamManager on multiple devices").
    """

    def __init__(self, sizes: list[str], device: torch.device) -> None:
        from torch.distributed import _symmetric_memory as symmetric

        assert device.index is not None
        ranks, self.name = dist.get_world_size(), dist.group.WORLD.group_name
        largest = max([num_bytes(size) for size in sizes], default=0) + ranks * HEADS * WIDTH * 2
        self.sent, self.came = (
            symmetric.empty(count, dtype=torch.bfloat16, device=device)
            for count in (largest // 2, largest // 2 * ranks)
        )
        self.splits = symmetric.empty(ranks, dtype=torch.int64, device=device)
        self.found = symmetric.empty(2, ranks, dtype=torch.int64, device=device)
        for tensor in (self.sent, self.came, self.splits, self.found):
            symmetric.rendezvous(tensor, self.name)


def vdev(case: Case, x: torch.Tensor, splits: list[int], memory: Symmetric) -> Callable:
    """torch's exchange with splits on the device; its input and output are symmetric memory."""
    ranks, mine = dist.get_world_size(), splits[dist.get_rank()]
    given = x.transpose(0, 1) if case.transposed else x
    held = memory.sent[: given.numel()].view(given.shape)
    held.copy_(given)
    rows = memory.came[: max(splits) * ranks * given[0].numel()].view(-1, *given.shape[1:])
    memory.splits.copy_(torch.tensor(splits))

    def call() -> torch.Tensor:
        if case.transposed:
            held.copy_(x.transpose(0, 1))
        torch.ops.symm_mem.all_to_all_vdev(held, rows, memory.splits, memory.found, memory.name)
        got = rows[: mine * ranks]
        return got.unflatten(0, (ranks, -1)).transpose(1, 2).flatten(0, 1).contiguous() if case.transposed else got

    return call


def milliseconds(call: Callable, device: torch.device, runs: int, graph: bool, calls: int = 1) -> float:
    """Median time of one call, of the slowest rank; on CUDA of ``calls`` in a row."""
    for _ in range(2):
        call()

    def several() -> None:
        for _ in range(calls):
            call()

    replay, captured = several, None
    if graph:
        torch.cuda.synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            several()
        replay = captured.replay
    times = []
    for _ in range(runs):
        dist.barrier()
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            call()  # ranks leave the barrier microseconds apart; this brings them together
            begin.record()
            replay()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / calls)
        else:
            began = time.perf_counter()
            replay()
            times.append(1e3 * (time.perf_counter() - began) / calls)
    if captured is not None:
        captured.reset()
    slowest = torch.tensor(statistics.median(times), device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)


def inputs(case: Case, device: torch.device) -> tuple[torch.Tensor, list[int], int]:
    """x, this rank's splits, and bytes on the wire."""
    dtype, ranks = torch.bfloat16, dist.get_world_size()
    tokens = max(num_bytes(case.size) // (HEADS * WIDTH * dtype.itemsize), ranks)
    shape = (HEADS, tokens, WIDTH) if case.transposed else (tokens, HEADS, WIDTH)
    splits = splits_of(tokens, ranks, case.skewed)
    wire = max(tokens - count for count in splits) * HEADS * WIDTH * dtype.itemsize
    return torch.randn(shape, device=device, dtype=dtype), splits, wire


def calls_in_a_row(case: Case, device: torch.device) -> int:
    if device.type == "cpu":
        return 1
    return 50 if num_bytes(case.size) <= 1 << 20 else 10 if num_bytes(case.size) <= 16 << 20 else 3


def measure(case: Case, group: epops.ExpertGroup, device: torch.device, runs: int) -> list[dict[str, Any]]:
    """Every way of one case, checked against the first."""
    x, splits, wire = inputs(case, device)
    mine = splits[group.rank]
    found, first = [], None
    for name, call, graphable in ways(case, x, splits, group):
        rows = call()
        if name.endswith("padded equal splits"):
            rows = rows[:, :mine] if case.transposed else rows.unflatten(0, (group.size, -1))[:, :mine].flatten(0, 1)
        else:
            rows = rows[:, :mine] if case.transposed else rows[: mine * group.size]
        first = rows if first is None else first
        assert torch.equal(rows, first), f"{name} gives other rows"
        del rows
        graph = graphable and device.type == "cuda"
        ms = milliseconds(call, device, runs, graph, calls_in_a_row(case, device))
        found.append({**case._asdict(), "way": name, "graph": graph, "ms": ms, "gb_s": wire / ms / 1e6})
    return found


def measure_vdev(case: Case, memory: Symmetric, device: torch.device, runs: int, graph: bool) -> dict[str, Any]:
    """torch's symmetric-memory exchange of one case, checked against its own with splits on the host."""
    x, splits, wire = inputs(case, device)
    call = vdev(case, x, splits, memory)
    _, plain, _ = next(ways(case, x, splits, None))
    torch.cuda.synchronize()
    dist.barrier()
    assert torch.equal(call(), plain()), "torch, symm_mem.all_to_all_vdev gives other rows"
    calls = calls_in_a_row(case, device)
    try:
        ms = milliseconds(call, device, runs, graph, calls)
    except RuntimeError as error:
        if not graph:
            raise
        print(f"{case}: not captured: {(str(error).splitlines() or [''])[0][:200]}", flush=True)
        graph, ms = False, milliseconds(call, device, runs, False, calls)
    return {**case._asdict(), "way": VDEV, "graph": graph, "ms": ms, "gb_s": wire / ms / 1e6}


def ceiling_of(device: torch.device, size: int, runs: int) -> float:
    """GB/s a direction: copies to the next rank's memory, all ranks at once; on CPU torch's equal exchange."""
    ranks = dist.get_world_size()
    equal = torch.zeros(size // ranks * ranks, dtype=torch.uint8, device=device)
    if device.type == "cpu":
        into = torch.empty_like(equal)
        return (
            size
            * (ranks - 1)
            / ranks
            / milliseconds(lambda: dist.all_to_all_single(into, equal), device, runs, False)
            / 1e6
        )
    from torch.distributed import _symmetric_memory

    mine = symmetric_empty(size, device)
    handle = _symmetric_memory.rendezvous(mine, dist.group.WORLD.group_name)
    theirs = handle.get_buffer((dist.get_rank() + 1) % ranks, (size,), torch.uint8)
    return size / milliseconds(lambda: theirs.copy_(equal), device, runs, False, 4) / 1e6


def nccl_memory(device: torch.device, size: int) -> int:
    """Bytes of device memory that its first exchanges took, tensors not counted."""
    torch.cuda.synchronize()
    tensors = [torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2)]
    before, reserved = torch.cuda.mem_get_info(device)[0], torch.cuda.memory_reserved(device)
    dist.all_to_all_single(*tensors)
    torch.cuda.synchronize()
    return before - torch.cuda.mem_get_info(device)[0] - (torch.cuda.memory_reserved(device) - reserved)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sizes", nargs="*", default=SIZES, help="bytes a rank has")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--vdev", action="store_true", help="only torch's symmetric-memory exchange, added to --out")
    parser.add_argument("--no-graph", action="store_true", help="with --vdev: time its calls outside of a CUDA graph")
    parser.add_argument("--draw", action="store_true", help="only the table and the plot of --out")
    parser.add_argument("--out", type=Path, help="a JSON file")
    options = parser.parse_args()
    if options.draw:
        report(json.loads(options.out.read_text()), options.out)
        return
    device = torch.device("cpu")
    if options.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    bound = {"device_id": device} if options.vdev else {}
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if options.device == "cuda" else "gloo", timeout=timedelta(seconds=120), **bound
    )
    cases = [
        Case(size, skewed, turned) for size in options.sizes for skewed in (False, True) for turned in (False, True)
    ]
    if options.vdev:
        result = json.loads(options.out.read_text())
        dist.barrier()  # rank 0 writes to that file
        run_vdev(cases, device, options, result)
    else:
        result = run(cases, device, options.runs)
    if dist.get_rank() == 0:
        report(result, options.out)
    dist.barrier()
    if options.vdev:
        sys.stdout.flush()
        os._exit(0)  # NVSHMEM's own end crashes in some versions, after everything is done
    dist.destroy_process_group()


def run(cases: list[Case], device: torch.device, runs: int) -> dict[str, Any]:
    largest = max((num_bytes(case.size) for case in cases), default=1 << 20)
    memory = {"nccl": nccl_memory(device, largest)} if device.type == "cuda" else {}
    rows = []
    with epops.ExpertGroup(name="bench") as group:
        for case in cases:
            rows += measure(case, group, device, runs)
        where = f"{group.size} ranks, {device.type}, {group.transport!r}"
        memory["epops"] = getattr(group.transport, "workspace_bytes", 0)
    ceiling = ceiling_of(device, 256 << 20 if device.type == "cuda" else largest, runs)
    return {"where": where, "ceiling_gb_s": ceiling, "memory": memory, "torch": torch.__version__, "rows": rows}


def run_vdev(cases: list[Case], device: torch.device, options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Add torch's symmetric-memory exchange to ``result``, and to the file as each case is done."""
    from torch.distributed import _symmetric_memory as symmetric

    if not symmetric.is_nvshmem_available():
        raise SystemExit("torch has no NVSHMEM here: symm_mem.all_to_all_vdev cannot be measured")
    symmetric.set_backend("NVSHMEM")
    result["rows"] = [row for row in result["rows"] if row["way"] != VDEV]
    memory = Symmetric(options.sizes, device)
    for case in cases:
        result["rows"].append(measure_vdev(case, memory, device, options.runs, not options.no_graph))
        if dist.get_rank() == 0:
            row = result["rows"][-1]
            print(f"{case}: {row['ms']:.4f} ms, {row['gb_s']:.2f} GB/s", flush=True)
            options.out.write_text(json.dumps(result, indent=1) + "\n")


def report(result: dict[str, Any], out: Path | None) -> None:
    """The table, and the files."""
    ceiling = result["ceiling_gb_s"]
    memory = ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in result["memory"].items())
    lines = [
        f"{result['where']}, torch {result['torch']}; ceiling {ceiling:.2f} GB/s a direction; device memory taken: {memory}",
        "",
        "| a rank | splits | transposes | way | graph | ms | GB/s | of the ceiling |",
        "| --- " * 8 + "|",
    ]
    for row in result["rows"]:
        row["of_ceiling"] = row["gb_s"] / ceiling
        cells = [row["size"], "4:1" if row["skewed"] else "even", "both" if row["transposed"] else "none", row["way"]]
        cells += ["yes" if row["graph"] else "no", f"{row['ms']:.4f}", f"{row['gb_s']:.2f}", f"{row['of_ceiling']:.0%}"]
        lines.append("| " + " | ".join(cells) + " |")
    print("\n".join(lines))
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")
        out.with_suffix(".md").write_text("\n".join(lines) + "\n")
        try:
            import matplotlib
        except ModuleNotFoundError:
            return
        matplotlib.use("Agg")
        plot(result, out.with_suffix(".png"))


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 7), sharex=True, sharey=True)
    for place, (skewed, turned) in zip(
        axes.flat, ((False, False), (False, True), (True, False), (True, True)), strict=True
    ):
        rows = [row for row in result["rows"] if (row["skewed"], row["transposed"]) == (skewed, turned)]
        for way in dict.fromkeys(row["way"] for row in rows):
            mine = [row for row in rows if row["way"] == way]
            place.plot([num_bytes(row["size"]) for row in mine], [row["gb_s"] for row in mine], "o-", label=way)
        place.axhline(result["ceiling_gb_s"], color="k", linewidth=0.8, label="copy engines")
        place.set(
            xscale="log", yscale="log", title=f"{'4:1' if skewed else 'even'}{', transposed twice' if turned else ''}"
        )
        place.grid(True, which="both", alpha=0.3)
    axes[0, 0].legend(fontsize=7)
    for place in axes[1]:
        place.set_xlabel("bytes a rank")
    for place in axes[:, 0]:
        place.set_ylabel("GB/s a direction on the wire")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
