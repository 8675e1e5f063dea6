"""Latent attention at decode: exchange, attention over a rank's own requests, exchange; beside the tensor-parallel core.

    torchrun --nproc-per-node 2 benchmarks/bench_mla.py --device cuda --out benchmarks/results/mla.json
    torchrun --nproc-per-node 2 benchmarks/bench_mla.py --heads 6 --requests 4 --lengths 16 --lora 32 --rope 8   # gloo

Both cores are those of `epops.nn.shard_mla` (the absorbed form), compiled with backend="epops", from a rank's heads of all requests
to its heads of all results, one new token a request, the cache full:

* tensor-parallel: each rank attends with its heads for all requests, whose latent rows every rank therefore caches;
* data-parallel: queries go to the rank that owns the request, all heads meet its latent rows there, results go back.

On CUDA a graph holds ``--layers`` layers, which use ``--caches`` different caches by turns (so that no cache stays in L2), and
for the data-parallel core the two plans that serve them all; the median of its replays is divided by the layers, and the slowest
rank counts.  "exchanges alone" is the data-parallel core without attention.  Every result is compared with float32 attention
over the duplicated cache.  What is found is written after each length.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

import epops
from epops import nn
from epops.nn import mla
from epops.nn.by_heads import heads_of
from epops.nn.latent_cache import StepCache

TENSOR, DATA, EXCHANGES = "tensor-parallel", "data-parallel", "exchanges alone"
NOPE = 128
"""Of DeepSeek-V3: scores are divided by the root of qk_nope_head_dim + qk_rope_head_dim."""
TOLERANCE = {"bfloat16": 3e-2, "float32": 1e-5}
"""Largest difference from float32 attention that counts as right, of the largest value."""


class Case:
    """Inputs of one cache length: queries of this rank's heads, both caches with the same rows, both batches."""

    def __init__(
        self, options: argparse.Namespace, length: int, group: epops.ExpertGroup, device: torch.device
    ) -> None:
        self.options, self.length, self.group = options, length, group
        rank, size = group.rank, group.size
        self.heads = heads_of(options.heads, size)
        self.own = heads_of(options.requests, size)  # requests of each rank
        dtype = getattr(torch, options.dtype)
        self.width = options.lora + options.rope
        self.scaling = (NOPE + options.rope) ** -0.5
        sizes = SimpleNamespace(
            kv_lora_rank=options.lora, qk_rope_head_dim=options.rope, num_hidden_layers=options.caches
        )
        slots = max(self.own)
        self.whole = nn.LatentCache(sizes, options.requests, length, dtype=dtype, device=device)
        self.mine = nn.LatentCache(sizes, slots, length, dtype=dtype, device=device)
        first = sum(self.own[:rank])
        for layer in range(options.caches):
            made = torch.Generator(device).manual_seed(layer)  # the same rows on every rank
            rows = self.whole.get_buffer(f"layer{layer}")
            rows.copy_(torch.randn(rows.shape, generator=made, device=device))
            part = rows[first * length : (first + self.own[rank]) * length]
            self.mine.get_buffer(f"layer{layer}")[: len(part)].copy_(part)
        made = torch.Generator(device).manual_seed(1000 + rank)
        # (h, T, D) lying so, as the product with kv_b_proj leaves them.
        shape = (self.heads[rank], options.requests, self.width)
        self.queries = (torch.randn(shape, generator=made, device=device) / 2).to(dtype)
        owners = [(owner, slot) for owner in range(size) for slot in range(self.own[owner])]
        bounds = {"max_tokens": options.requests, "chunk_tokens": 1, "max_length": length, "device": device}
        here = [nn.Chunk(owner, slot, length - 1, [0]) for owner, slot in owners]
        self.batch, _ = nn.lay_out(here, rank=rank, ep_size=size, rank_tokens=slots, num_slots=slots, **bounds)
        there = [nn.Chunk(0, slot, length - 1, [0]) for slot in range(options.requests)]
        requests = options.requests
        self.all, _ = nn.lay_out(there, rank=0, ep_size=1, rank_tokens=requests, num_slots=requests, **bounds)
        self.tokens = torch.tensor(self.own, device=device)
        self.split = torch.tensor(self.heads, device=device)

    def cores(self) -> dict[str, tuple[Callable[[], Any], Callable[..., torch.Tensor]]]:
        """Name → what is done once for all layers, and a layer: (its result, number of the layer) → (h, T, lora)."""
        kinds = {TENSOR: "heads", DATA: "requests", EXCHANGES: "requests"}
        return {name: self._core(name, kind) for name, kind in kinds.items()}

    def _core(self, name: str, kind: str) -> tuple[Callable[[], Any], Callable[..., torch.Tensor]]:
        core = mla.Core(kind, self.group.name, self.group.rank, self.heads)
        cache, batch = (self.whole, self.all) if kind == "heads" else (self.mine, self.batch)
        stored = StepCache(cache, batch)
        lora, scaling = self.options.lora, self.scaling

        def plans() -> tuple[torch.Tensor, torch.Tensor]:
            if kind == "heads":
                return self.tokens, self.tokens
            out, _ = epops.plan_all_to_all(self.tokens, self.split, group=self.group)
            back, _ = epops.plan_all_to_all(self.split, self.tokens, group=self.group)
            return out, back

        def layer(queries: torch.Tensor, rows: torch.Tensor, out: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
            step = mla.MLAStep(batch, out, back, stored)
            key = rows[:-1].view(cache.num_slots, 1, cache.max_length, cache.width)
            if name == EXCHANGES:
                return exchanged(core, queries, step, lora)
            return mla.attend(core, queries, key, key[..., :lora], step, scaling)

        run = layer
        if not self.options.eager and name != EXCHANGES:  # that one is written as the passes leave it
            run = torch.compile(layer, fullgraph=True, dynamic=False, backend="epops")

        def call(planned: Any, number: int) -> torch.Tensor:
            return run(self.queries, cache.get_buffer(f"layer{number % self.options.caches}"), *planned)

        return plans, call

    def expected(self, number: int) -> torch.Tensor:
        """Float32 attention of this rank's heads over the duplicated cache, a request at a time: (h, T, lora)."""
        rows = self.whole.get_buffer(f"layer{number}")[:-1].view(self.options.requests, self.length, self.width)
        found = []
        for request in range(self.options.requests):
            keys = rows[request].float()
            weights = torch.softmax(self.queries[:, request].float() @ keys.t() * self.scaling, dim=-1)
            found.append(weights @ keys[:, : self.options.lora])
        return torch.stack(found, dim=1)


def exchanged(core: mla.Core, queries: torch.Tensor, step: nn.MLAStep, lora: int) -> torch.Tensor:
    """Both exchanges of the data-parallel core with nothing between them; results are the queries' first channels."""
    most = core.heads[0]
    if most > core.heads[core.rank]:
        queries = torch.nn.functional.pad(queries, (0, 0, 0, 0, 0, most - core.heads[core.rank]))
    settings: dict[str, Any] = {"group": core.group}
    here = epops.all_to_all(
        queries.transpose(0, 1), plan=step.out, scatter_dim=0, gather_dim=1, scatter_size=step.batch.own.shape[0],
        out_size=sum(core.heads), **settings,
    ).rows  # fmt: skip
    back = epops.all_to_all(
        here[..., :lora], plan=step.back, scatter_dim=1, gather_dim=0, scatter_size=most,
        out_size=step.batch.cache_row.shape[0], **settings,
    ).rows  # fmt: skip
    return back.transpose(0, 1)[: core.heads[core.rank]]


def microseconds(
    plans: Callable[[], Any], call: Callable[..., Any], device: torch.device, layers: int, runs: int
) -> float:
    """Median time of a layer, of the slowest rank."""

    def several() -> None:
        planned = plans()
        for number in range(layers):
            call(planned, number)

    for _ in range(2):
        several()
    replay, graph = several, None
    if device.type == "cuda":
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            several()
        replay = graph.replay
    times = []
    for _ in range(runs):
        dist.barrier()
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            replay()  # ranks leave the barrier microseconds apart; this brings them together
            begin.record()
            replay()
            end.record()
            torch.cuda.synchronize()
            times.append(1e3 * begin.elapsed_time(end) / layers)
        else:
            began = time.perf_counter()
            replay()
            times.append(1e6 * (time.perf_counter() - began) / layers)
    if graph is not None:
        graph.reset()
    slowest = torch.tensor(statistics.median(times), device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)


def measure(options: argparse.Namespace, length: int, group: epops.ExpertGroup, device: torch.device) -> dict[str, Any]:
    """One cache length: both cores' times, caches, and how far each is from float32 attention."""
    case = Case(options, length, group, device)
    row: dict[str, Any] = {"length": length, "us": {}, "difference": {}}
    # Bytes of one layer: a model has one such cache a layer.
    row["cache_bytes"] = {TENSOR: case.whole.num_bytes // options.caches, DATA: case.mine.num_bytes // options.caches}
    last = options.caches - 1
    expected = case.expected(last)
    for name, (plans, call) in case.cores().items():
        got = call(plans(), last).float()
        if name == EXCHANGES:
            expected = case.queries[..., : options.lora].float()
        worst = ((got - expected).abs().max() / expected.abs().max()).to(torch.float64)
        worst = torch.nan_to_num(worst, nan=float("inf"))
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        row["difference"][name] = float(worst)
        if not worst <= (0.0 if name == EXCHANGES else TOLERANCE[options.dtype]):
            raise SystemExit(
                f"bench_mla: {name} at length {length}: differs by {float(worst):.1e} of the largest value"
            )
        row["us"][name] = microseconds(plans, call, device, options.layers, options.runs)
    torch._dynamo.reset()
    return row


def table(result: dict[str, Any]) -> list[str]:
    facts, asked = result["facts"], result["options"]
    lines = [
        f"{facts['ranks']} x {facts['device']}, {facts['transport']}, torch {facts['torch']}, commit {facts['commit']}, "
        f"{facts['date']}: {asked['requests']} requests, {asked['heads']} heads, latent {asked['lora']} + {asked['rope']}, "
        f"{asked['dtype']}",
        "",
        "| tokens a request | tensor-parallel core, µs a layer | data-parallel core | of it exchanges | times faster | "
        "cache a layer and rank, tensor-parallel | data-parallel | differences from float32 |",
        "|" + " --- |" * 8,
    ]
    for row in result["rows"]:
        us, held, far = row["us"], row["cache_bytes"], row["difference"]
        cells = [f"{us[name]:.1f}" for name in (TENSOR, DATA, EXCHANGES)]
        cells += [f"{us[TENSOR] / us[DATA]:.2f}", *(f"{held[name] / 2**20:.2f} MiB" for name in (TENSOR, DATA))]
        cells.append(", ".join(f"{far[name]:.1e}" for name in (TENSOR, DATA)))
        lines.append(f"| {row['length']} | " + " | ".join(cells) + " |")
    return lines


def facts(group: epops.ExpertGroup, device: torch.device) -> dict[str, Any]:
    def said(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            return ""

    driver = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    return {
        "ranks": group.size,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "driver": driver[0] if driver else "",
        "transport": repr(group.transport),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": os.environ.get("COMMIT") or said("git", "rev-parse", "--short", "HEAD"),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "command": f"torchrun --nproc-per-node {group.size} " + " ".join(sys.argv),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[1024, 4096, 8192], help="tokens a request has in the cache"
    )
    parser.add_argument("--requests", type=int, default=64, help="of all ranks together")
    parser.add_argument("--heads", type=int, default=128)
    parser.add_argument("--lora", type=int, default=512)
    parser.add_argument("--rope", type=int, default=64)
    parser.add_argument("--dtype", choices=tuple(TOLERANCE), help="default: bfloat16 on CUDA, float32 on CPU")
    parser.add_argument("--layers", type=int, help="layers a graph; default 16 on CUDA, 2 on CPU")
    parser.add_argument("--caches", type=int, default=4, help="different caches that the layers use")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--out", type=Path, help="a JSON file; a table (.md) is written beside it")
    options = parser.parse_args()
    device = torch.device("cpu")
    if options.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = False
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    options.layers = options.layers or (16 if options.device == "cuda" else 2)
    options.caches = min(options.caches, options.layers)
    dist.init_process_group("cpu:gloo,cuda:nccl" if options.device == "cuda" else "gloo")
    with epops.ExpertGroup(name="mla", timeout=120) as group, torch.no_grad():
        result: dict[str, Any] = {"facts": facts(group, device), "options": {**vars(options), "out": None}, "rows": []}
        for length in options.lengths:
            result["rows"].append(measure(options, length, group, device))
            group.check()
            if group.rank == 0:
                lines = table(result)
                print("\n".join(lines[-1:] if len(result["rows"]) > 1 else lines), flush=True)
                if options.out is not None:
                    options.out.parent.mkdir(parents=True, exist_ok=True)
                    options.out.write_text(json.dumps(result, indent=1) + "\n")
                    options.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
