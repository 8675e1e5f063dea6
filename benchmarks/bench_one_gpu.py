"""Combine with all ranks on one GPU: what a change of its kernels costs, where there is no second GPU.

    PYTHONPATH=. python benchmarks/bench_one_gpu.py [--ranks 1 2] [--tokens 256 512 4096] [--runs 2]

Each rank has a memory, a stream and its share of the multiprocessors, as in tests/gpu/ranks.py, and a number of combines in a CUDA
graph; several ranks launch without overlap, which else takes turns with their kernels as it likes.  It says nothing of NVLink.
Beside each figure: the time in which this GPU copies as many bytes as rows, answers and results have.  Needs a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch

HIDDEN, TOP_K, SLOTS = 7168, 8, 128
REPLAYS = 12


def median_of(replay: Callable[[], Any], stream: Any) -> float:
    """Microseconds of one replay."""
    times = []
    for _ in range(REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(stream):
            begin.record()
            replay()
            end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1000)
    return statistics.median(times)


def combine_time(num_ranks: int, tokens: int) -> float:
    """Microseconds of one combine of ``tokens`` tokens a rank."""
    from epops.transport import kernels  # there where the extension was built
    from tests.gpu.ranks import Ranks, Shape, random_batch, slots_of

    experts = SLOTS * num_ranks
    shape = Shape(num_ranks, tokens, TOP_K, experts, SLOTS, HIDDEN, 1)
    tuning = kernels.Tuning(pdl=int(num_ranks == 1))
    ranks = Ranks(num_ranks, kernels.Sizes(tokens, TOP_K, SLOTS, HIDDEN * 2 + 1024), tuning=tuning)
    device = ranks.device
    slots, alive = slots_of(shape).to(device), torch.ones(num_ranks, dtype=torch.int64, device=device)
    common: dict[str, Any] = {"num_experts": experts, "num_slots": SLOTS, "max_tokens": tokens, "layout": "expert"}
    batches = [[part.to(device) for part in random_batch(shape, rank, 1, holes=False)] for rank in range(num_ranks)]
    out, back = ranks.plan("dispatch", tokens, HIDDEN), ranks.plan("combine", tokens, HIDDEN)

    def dispatch(rank: int) -> Any:
        return kernels.dispatch(
            ranks.workspaces[rank], out, slots, alive, *batches[rank],
            capacity=shape.rows, alignment=1, quant=None, **common,
        )  # fmt: skip

    sent = ranks.run(dispatch)
    rows = [torch.randn(shape.rows, HIDDEN, device=device, dtype=torch.bfloat16) for _ in range(num_ranks)]
    weights = [torch.rand(shape.rows, device=device) for _ in range(num_ranks)]

    def combine(rank: int) -> Any:
        return kernels.combine(
            ranks.workspaces[rank], back, rows[rank], sent[rank].route, weights[rank], None,
            num_tokens=tokens, top_k=TOP_K, out_dtype=torch.bfloat16, **common,
        )  # fmt: skip

    for _ in range(2):
        ranks.run(combine)
    calls = 20 if tokens <= 512 else 6
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        begin = torch.cuda.Event()
        begin.record(stream)
        for rank, own in enumerate(ranks.streams):
            own.wait_event(begin)
            with torch.cuda.stream(own):
                for _ in range(calls):
                    combine(rank)
                end = torch.cuda.Event()
                end.record(own)
            stream.wait_event(end)
    return median_of(graph.replay, stream) / calls


def copy_rate() -> float:
    """Bytes, read and written, in a microsecond of a copy of 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / median_of(lambda: target.copy_(source), torch.cuda.current_stream())


def least_bytes(num_ranks: int, tokens: int) -> int:
    """Rows read, results written; and answers, of every token one from each other rank, written and read."""
    return num_ranks * tokens * (TOP_K + 1 + 2 * (num_ranks - 1)) * HIDDEN * 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--tokens", type=int, nargs="+", default=(256, 512, 4096), help="a rank")
    parser.add_argument("--runs", type=int, default=2)
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "bench_one_gpu: expected a GPU, got a torch that sees none; run it on a machine with one", file=sys.stderr
        )
        sys.exit(2)
    rate = copy_rate()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, a copy: {rate / 1e6:.2f} TB/s\n")
    print("| ranks | tokens a rank | " + " | ".join(f"run {run + 1}, µs" for run in range(chosen.runs)) + " | copy |")
    print("|" + " --- |" * (3 + chosen.runs))
    for num_ranks in chosen.ranks:
        for tokens in chosen.tokens:
            times = [f"{combine_time(num_ranks, tokens):.1f}" for _ in range(chosen.runs)]
            least = least_bytes(num_ranks, tokens) / rate
            print(f"| {num_ranks} | {tokens} | " + " | ".join(times) + f" | {least:.1f} |", flush=True)


if __name__ == "__main__":
    main()
