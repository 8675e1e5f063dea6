"""Dispatch and combine with all ranks on one GPU: what a change of their kernels costs, where there is no second GPU.

    PYTHONPATH=. python benchmarks/bench_one_gpu.py [--op dispatch combine] [--ranks 1 2] [--tokens 16 512 4096] [--senders 8]

Each rank has a memory, a stream and its share of the multiprocessors, as in tests/gpu/ranks.py, and a number of calls in a CUDA
graph; several ranks launch without overlap, which else takes turns with their kernels as it likes.  Dispatch quantizes to fp8, a
scale per 128 channels; combine sums bfloat16.  It says nothing of NVLink.  Beside each figure: the time in which this GPU copies as
many bytes as must be read and written.  With few ``--senders`` the blocks that make peers' answers bound combine of more than 256
tokens, as they do over two GPUs: the time is theirs.  Needs a GPU.
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
FP8_ROW = HIDDEN + HIDDEN // 128 * 4


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


def call_time(op: str, num_ranks: int, tokens: int, alignment: int = 1, senders: int = 0) -> float:
    """Microseconds of one ``op`` of ``tokens`` tokens a rank."""
    from epops.transport import kernels  # there where the extension was built
    from tests.gpu.ranks import Ranks, Shape, random_batch, slots_of

    experts = SLOTS * num_ranks
    shape = Shape(num_ranks, tokens, TOP_K, experts, SLOTS, HIDDEN, alignment)
    tuning = kernels.Tuning(pdl=int(num_ranks == 1), **({"stream_senders": senders} if senders else {}))
    ranks = Ranks(num_ranks, kernels.Sizes(tokens, TOP_K, SLOTS, HIDDEN * 2 + 1024), tuning=tuning)
    device = ranks.device
    slots, alive = slots_of(shape).to(device), torch.ones(num_ranks, dtype=torch.int64, device=device)
    common: dict[str, Any] = {"num_experts": experts, "num_slots": SLOTS, "max_tokens": tokens, "layout": "expert"}
    batches = [[part.to(device) for part in random_batch(shape, rank, 1, holes=False)] for rank in range(num_ranks)]
    out, back = ranks.plan("dispatch", tokens, HIDDEN), ranks.plan("combine", tokens, HIDDEN)

    def dispatch(rank: int) -> Any:
        return kernels.dispatch(
            ranks.workspaces[rank], out, slots, alive, *batches[rank],
            capacity=shape.rows, alignment=alignment, quant=kernels.QuantSettings(), **common,
        )  # fmt: skip

    sent = ranks.run(dispatch)
    rows = [torch.randn(shape.rows, HIDDEN, device=device, dtype=torch.bfloat16) for _ in range(num_ranks)]
    weights = [torch.rand(shape.rows, device=device) for _ in range(num_ranks)]

    def combine(rank: int) -> Any:
        return kernels.combine(
            ranks.workspaces[rank], back, rows[rank], sent[rank].route, weights[rank], None,
            num_tokens=tokens, top_k=TOP_K, out_dtype=torch.bfloat16, **common,
        )  # fmt: skip

    call = dispatch if op == "dispatch" else combine
    for _ in range(2):
        ranks.run(call)
    calls = 20 if tokens <= 512 else 6
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        begin = torch.cuda.Event()
        begin.record(stream)
        for rank, own in enumerate(ranks.streams):
            own.wait_event(begin)
            with torch.cuda.stream(own):
                for _ in range(calls):
                    call(rank)
                end = torch.cuda.Event()
                end.record(own)
            stream.wait_event(end)
    return median_of(graph.replay, stream) / calls


def copy_rate() -> float:
    """Bytes, read and written, in a microsecond of a copy of 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / median_of(lambda: target.copy_(source), torch.cuda.current_stream())


def least_bytes(op: str, num_ranks: int, tokens: int) -> int:
    """What is read and written once, without rows that alignment adds.

    Dispatch: tokens read, each quantized for every other rank, written and read there, and rows written.  Combine: rows
    read, results written, and of every token an answer from each other rank, written and read.
    """
    if op == "dispatch":
        return num_ranks * tokens * (HIDDEN * 2 + (2 * (num_ranks - 1) + TOP_K) * FP8_ROW)
    return num_ranks * tokens * (TOP_K + 1 + 2 * (num_ranks - 1)) * HIDDEN * 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", nargs="+", choices=("dispatch", "combine"), default=("dispatch", "combine"))
    parser.add_argument("--ranks", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--tokens", type=int, nargs="+", default=(16, 128, 256, 512, 4096), help="a rank")
    parser.add_argument("--alignment", type=int, default=1, help="rows of an expert begin at multiples of it")
    parser.add_argument("--senders", type=int, default=0, help="of combine of many tokens (0: the default)")
    parser.add_argument("--runs", type=int, default=2)
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "bench_one_gpu: expected a GPU, got a torch that sees none; run it on a machine with one", file=sys.stderr
        )
        sys.exit(2)
    rate = copy_rate()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, a copy: {rate / 1e6:.2f} TB/s\n")
    print(
        "| op | ranks | tokens a rank | " + " | ".join(f"run {run + 1}, µs" for run in range(chosen.runs)) + " | copy |"
    )
    print("|" + " --- |" * (4 + chosen.runs))
    for op in chosen.op:
        for num_ranks in chosen.ranks:
            for tokens in chosen.tokens:
                call = op, num_ranks, tokens, chosen.alignment, chosen.senders
                times = [f"{call_time(*call):.1f}" for _ in range(chosen.runs)]
                least = least_bytes(op, num_ranks, tokens) / rate
                print(f"| {op} | {num_ranks} | {tokens} | " + " | ".join(times) + f" | {least:.1f} |", flush=True)


if __name__ == "__main__":
    main()
