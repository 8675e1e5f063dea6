"""Programs for emulated kernels that look for races; test_emulated.py runs them in a process with plugin.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from epops import layout as words
from tests.emulated import ranks as emulated
from tests.gpu.ranks import Batch, Ranks, Shape, random_batch, slots_of
from tests.gpu.test_virtual_all_to_all import Call, by_owner, make_ranks, run, splits_of
from tests.gpu.test_virtual_ranks import check_rows, expected_dispatch, kernels, must_stream, run_pair, sizes_for
from tests.gpu.test_virtual_ranks import test_gradients as check_gradients

LINES = dict(dispatch_line_tokens=256, combine_line_tokens=256)
THREADS = 160
WAYS: dict[str, dict[str, Any]] = {
    "counts": dict(dispatch_line_tokens=0, combine_line_tokens=0, combine_stream_tokens=1024, num_sms=1),
    "lines": dict(**LINES, apart_tokens=0),
    "apart": dict(**LINES, apart_tokens=0, line_senders=1),
    "streams": dict(combine_stream_tokens=0, num_sms=1),
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few warps and little shared memory, so that rings and stages go round, and one place for records, so that ops wait for
    the room of others."""
    monkeypatch.setattr(kernels, "shared_bytes", lambda device: 40 << 10)
    monkeypatch.setattr(kernels.room, "STREAM_ROWS", 5)
    monkeypatch.setattr(kernels.room, "COMBINE_THREADS", THREADS)
    lay_out_stages, plan = kernels.room.lay_out_stages, Ranks.plan

    def few_warps(p: Any, shared: int) -> None:
        lay_out_stages(p, shared)
        p.launch.num_threads = THREADS

    monkeypatch.setattr(kernels.room, "lay_out_stages", few_warps)
    monkeypatch.setattr(Ranks, "plan", lambda self, *facts: plan(self, *facts)._replace(num_threads=THREADS))
    lay_out = kernels.lay_out

    def one_place(rank: int, num_ranks: int, sizes: Any, timeout: float) -> Any:
        ws, _ = lay_out(rank, num_ranks, sizes, timeout)
        ws.data_bytes = (num_ranks - 1) * sizes.max_tokens * sizes.row_bytes
        return ws, ws.layout()

    monkeypatch.setattr(kernels, "lay_out", one_place)


def ranks_for(shape: Shape, way: str) -> Any:
    sizes = sizes_for(shape)._replace(row_bytes=shape.hidden * 2)
    return Ranks(shape.num_ranks, sizes, tuning=kernels.Tuning(**WAYS[way]))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", ["expert", "rank", "batched"])
def test_pairs(way: str, layout: str) -> None:
    """More tokens than warps, more rows than places."""
    shape = Shape(2, 40, 3, 6, 3, 256, 4 if layout == "expert" else 1, layout, tokens=(40, 21))
    run_pair(ranks_for(shape, way), shape, 1, repeat=2)


@pytest.mark.parametrize("rows", [4, 9, 14])
def test_rings_of_any_length(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Places that consumers give back by one, two and four, of which the last group has fewer."""
    given = must_stream(monkeypatch)
    monkeypatch.setattr(kernels.room, "STREAM_ROWS", rows)
    shape = Shape(2, 40, 5, 6, 3, 256, 4, tokens=(40, 21))
    run_pair(ranks_for(shape, "streams"), shape, 1, repeat=2)
    assert {ring for _, ring, _ in given} == {rows}


@pytest.mark.parametrize("way", ["counts", "lines", "streams"])
def test_three_ranks_and_quantized_rows(way: str) -> None:
    shape = Shape(3, 20, 4, 12, 4, 384, tokens=(20, 0, 7))
    ranks = ranks_for(shape, way)
    run_pair(ranks, shape, 1, quant=kernels.QuantSettings())
    run_pair(ranks, shape, 2, weighted=False, addend=False)


@pytest.mark.parametrize("way", ["counts", "lines"])
def test_ops_behind_one_another(way: str) -> None:
    """Kernels of a stream that overlap the end of the one before."""
    shape = Shape(2, 40, 3, 6, 3, 256)
    ranks = ranks_for(shape, way)
    batches = [[random_batch(shape, rank, seed) for rank in range(2)] for seed in range(3)]
    plan = ranks.plan("dispatch", shape.max_tokens, shape.hidden)
    settings = dict(
        num_experts=6, num_slots=3, max_tokens=40, layout="expert", capacity=shape.rows, alignment=shape.alignment
    )
    slots, mask = slots_of(shape), torch.ones(2, dtype=torch.int64)

    def send(rank: int) -> list[Any]:
        return [
            kernels.dispatch(ranks.workspaces[rank], plan, slots, mask, *batches[seed][rank], **settings)
            for seed in range(3)
        ]

    got = ranks.run(send)
    for seed in range(3):
        want = expected_dispatch(shape, batches[seed])
        for rank in range(2):
            check_rows(shape, rank, got[rank][seed], *want[rank], batches[seed][rank], seed)


def test_gradients_of_both() -> None:
    check_gradients("expert", 19)


@pytest.mark.parametrize("small_bytes", [0, 256 << 10], ids=["any", "small"])
def test_all_to_all(small_bytes: int) -> None:
    ranks = make_ranks(2, ring=256 << 10, small_bytes=small_bytes)
    run(ranks, Call(splits_of("uneven", 2, 7), (0, 40), how="both"), repeat=2)
    run(ranks, Call(by_owner(2), (4, 4, 24), 1, 0, gathered=(4, 4), how="plan", strided=True))
    if small_bytes == 0:
        run(ranks, Call(splits_of("uneven", 2, 600), (0, 64), how="splits"))


def alone(ranks: Any, shape: Shape) -> Any:
    """dispatch on rank 0, without the others; returns the rank's batch and what the kernel made of it."""
    plan, batch = ranks.plan("dispatch", shape.max_tokens, shape.hidden), random_batch(shape, 0, 2)

    def send(rank: int) -> Any:
        if rank != 0:
            return None
        return kernels.dispatch(
            ranks.workspaces[0], plan, slots_of(shape), torch.ones(2, dtype=torch.int64), *batch, num_experts=6,
            num_slots=3, max_tokens=20, layout="expert", capacity=shape.rows, alignment=shape.alignment,
        )  # fmt: skip

    return batch, ranks.run(send)[0]


@pytest.mark.parametrize("way", ["counts", "lines"])
def test_a_rank_that_never_comes(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    monkeypatch.setattr(emulated, "CHECKS", False)  # threads that see a loss all store the same to one word, unordered
    shape = Shape(2, 20, 3, 6, 3, 256)
    ranks = Ranks(2, sizes_for(shape), timeout=0.05, tuning=kernels.Tuning(**WAYS[way]))
    run_pair(ranks, shape, 1)
    batch, got = alone(ranks, shape)
    nothing = Batch(batch.x[:0], batch.topk_idx[:0], batch.topk_weights[:0])
    want, _ = expected_dispatch(shape, [batch, nothing])[0]
    end = int(want.expert_ends[-1])
    assert torch.equal(got.rows[:end], want.rows[:end])
    assert int(got.status[0]) & words.STATUS_TIMEOUT


def test_what_waits_for_ever_is_stopped() -> None:
    shape = Shape(2, 20, 3, 6, 3, 256)
    with pytest.raises(RuntimeError, match="stuck: 320 threads of kernels of epops::DispatchParams"):
        alone(Ranks(2, sizes_for(shape), timeout=1e6), shape)
