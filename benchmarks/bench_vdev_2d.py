"""Time of torch's own ragged exchange, `symm_mem.all_to_all_vdev_2d`: token rows to the ranks of their experts, one way.

    torchrun --nproc-per-node 2 benchmarks/bench_vdev_2d.py --tokens 16 128 512 4096

It needs torch's NVSHMEM backend of symmetric memory, of which a process has one: `bench_dispatch_combine.py` therefore runs
this file beside it, one process a GPU.  Prints one JSON object: microseconds by tokens a rank, and under "missing" what ended it.

Symmetric memory is asked for on "cuda:0", never on "cuda": torch keeps the device as it was named when ranks first meet over a
tensor, and refuses the tensor's own later ("Detected use of TeamManager on multiple devices").
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics

import torch
import torch.distributed as dist

TOP_K, EXPERTS, HIDDEN = 8, 32, 7168  # more splits than 32 experts make, it does not take on every torch


def exchange_us(tokens: int, rank: int, world: int, device: torch.device) -> float:
    """The slowest rank's median of one call with bf16 rows, a row for each choice, grouped by expert as it wants them."""
    import torch.distributed._symmetric_memory as symm_mem

    group = dist.group.WORLD.group_name
    made = torch.Generator().manual_seed(tokens + 77 * rank)
    chosen = torch.rand(tokens, EXPERTS, generator=made).topk(TOP_K).indices.flatten()
    splits = torch.bincount(chosen, minlength=EXPERTS).to(device)
    rows = tokens * TOP_K
    given = symm_mem.empty((rows, HIDDEN), dtype=torch.bfloat16, device=device)
    taken = symm_mem.empty((rows * world, HIDDEN), dtype=torch.bfloat16, device=device)
    in_splits = symm_mem.empty(EXPERTS, dtype=torch.int64, device=device).copy_(splits)
    out_splits = symm_mem.empty((2, EXPERTS), dtype=torch.int64, device=device)
    for tensor in (given, taken, in_splits, out_splits):
        symm_mem.rendezvous(tensor, group)
    torch.cuda.synchronize()
    dist.barrier()
    times = []
    for _ in range(8):
        dist.barrier()
        torch.cuda.synchronize()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.ops.symm_mem.all_to_all_vdev_2d(given, taken, in_splits, out_splits, group, 1)
        begin.record()
        for _ in range(10):
            torch.ops.symm_mem.all_to_all_vdev_2d(given, taken, in_splits, out_splits, group, 1)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 100)
    slowest = torch.tensor([statistics.median(times)], device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--tokens", type=int, nargs="*", default=[16, 128, 512, 4096])
    chosen = arguments.parse_args()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    found: dict[str, float | str] = {}
    try:
        import torch.distributed._symmetric_memory as symm_mem

        torch.cuda.set_device(device)
        symm_mem.set_backend("NVSHMEM")
        limit = datetime.timedelta(seconds=60)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device, timeout=limit)
        dist.all_reduce(torch.zeros(1, device=device))
        for tokens in chosen.tokens:
            found[str(tokens)] = exchange_us(tokens, rank, world, device)
    except Exception as error:
        found["missing"] = f"torch {torch.__version__}: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
    if rank == 0:
        print(json.dumps(found), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
