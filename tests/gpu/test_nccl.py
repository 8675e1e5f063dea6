"""Transport c10d on nccl: the same results as gloo ranks, with nothing read on the host, also inside a CUDA graph."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import epops
from tests import inputs

from .devices import need_gpus, take_gpu

pytestmark = pytest.mark.gpu


def run_on_gpus(fn: Any, size: int) -> None:
    need_gpus(size)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(enter, args=(size, folder, fn), nprocs=size)


def enter(rank: int, size: int, folder: str, fn: Any) -> None:
    take_gpu(rank, size)
    store = dist.FileStore(os.path.join(folder, "store"), size)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=rank, world_size=size)
    try:
        fn(rank, size)
    finally:
        torch.cuda.synchronize()
        dist.destroy_process_group()


def close(got: torch.Tensor, want: torch.Tensor, where: str) -> None:
    torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-5, msg=lambda text: f"{where}: {text}")


def layer(group: epops.ExpertGroup, layout: str, x: Any, idx: Any, w: Any, top_k: int) -> list[torch.Tensor]:
    sent = epops.dispatch(x, idx, w, group=group, layout=layout)
    y = sent.rows * 2
    out = epops.combine(
        y, sent.route, None if layout == "rank" else sent.row_weights, x, group=group, num_tokens=x.shape[0], top_k=top_k,
        layout=layout,
    ).out  # fmt: skip
    grads = torch.autograd.grad(out.pow(2).sum(), [x, w], allow_unused=True)
    facts = [sent.rows, sent.row_weights, sent.row_expert, sent.row_source, sent.expert_counts, sent.expert_ends]
    return [*facts, sent.route, sent.status[:5], out, *[grad for grad in grads if grad is not None]]


def same_as_gloo(rank: int, size: int) -> None:
    made = {"max_tokens": 7, "num_experts": 5, "alignment": 4}
    cpu = epops.ExpertGroup(None, "cpu", device="cpu", **made)
    gpu = epops.ExpertGroup(None, "gpu", device="cuda", transport="c10d", **made)
    with cpu, gpu:
        for layout in ("expert", "rank", "batched"):
            for kind in ("random", "one", "holes", "none"):
                for top_k in (1, 3):
                    tokens = (5, 0)[rank] if kind == "one" else (4, 7)[rank]
                    x, (idx, w) = inputs.rows(tokens, 16, rank), inputs.routing(kind, tokens, top_k, 5, rank)
                    results = []
                    for group in (cpu, gpu):
                        leaves = [t.to(group.device).detach().requires_grad_() for t in (x, w)]
                        results.append(layer(group, layout, leaves[0], idx.to(group.device), leaves[1], top_k))
                    for place, (want, got) in enumerate(zip(*results)):
                        close(got, want, f"{layout} {kind} K={top_k} result {place} rank {rank}")
        splits = torch.tensor([[2, 1], [0, 3]])[rank]
        y = torch.arange(20.0).view(5, 4) + 100 * rank
        for settings in (
            {"out_size": 6},
            {"out_size": 9, "scatter_dim": 1, "gather_dim": 0},
            {"out_size": 8, "scatter_size": 4, "scatter_dim": 0, "gather_dim": 1},
        ):
            ins = None if settings.get("scatter_dim") == 1 else splits
            if settings.get("gather_dim") == 1:
                ins = torch.tensor([2, 3])
            outs = torch.tensor([5, 3]) if settings.get("scatter_dim") == 1 else None
            a = epops.all_to_all(y, ins, outs, group=cpu, **settings)
            b = epops.all_to_all(
                y.cuda(),
                None if ins is None else ins.cuda(),
                None if outs is None else outs.cuda(),
                group=gpu,
                **settings,
            )
            close(b.rows, a.rows, f"all_to_all {settings}")
            close(b.counts, a.counts, f"all_to_all counts {settings}")


def test_nccl_ranks_get_what_gloo_ranks_get() -> None:
    run_on_gpus(same_as_gloo, 2)


def captured(rank: int, size: int) -> None:
    with epops.ExpertGroup(None, "gpu", device="cuda", transport="c10d", max_tokens=8, num_experts=6) as group:
        x, (idx, w) = inputs.rows(6, 16, rank).cuda(), inputs.routing("random", 6, 2, 6, rank)
        idx, w = idx.cuda(), w.cuda()

        def step() -> torch.Tensor:
            sent = epops.dispatch(x, idx, w, group=group)
            return epops.combine(sent.rows * 2, sent.route, sent.row_weights, group=group, num_tokens=6, top_k=2).out

        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()
        for seed in range(20):
            fresh, weights = inputs.routing("random", 6, 2, 6, 10 * seed + rank)
            idx.copy_(fresh)
            w.copy_(weights)
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(out, 2 * x * w.sum(1, keepdim=True))
        idx[0, 0] = 99
        graph.replay()
        torch.cuda.synchronize()
        with pytest.raises(epops.RoutingError, match="index out of range"):
            group.check()


def test_exchanges_on_nccl_are_captured_and_replayed_with_new_routing() -> None:
    run_on_gpus(captured, 2)
