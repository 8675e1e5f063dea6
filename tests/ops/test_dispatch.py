"""dispatch brings every selected row to its expert's rank, in the order and at the place that the layout says."""

from __future__ import annotations

import pytest
import torch

import epops
from tests import inputs
from tests.ops import meaning
from tests.ranks import run_ranks

TOKENS = (5, 0, 7, 3)
KINDS = ("random", "one", "holes", "skewed", "none")


def everyone(kind: str, size: int, top_k: int, experts: int, dtype: torch.dtype = torch.float32):
    tokens = TOKENS[:size]
    xs = [inputs.rows(t, 16, rank, dtype) for rank, t in enumerate(tokens)]
    routed = [inputs.routing(kind, t, top_k, experts, rank) for rank, t in enumerate(tokens)]
    return xs, [idx for idx, _ in routed], [w for _, w in routed]


def grouped_by_expert(rank: int, size: int) -> None:
    for kind in KINDS:
        for top_k, experts, alignment in ((2, 7, 1), (4, 3, 4), (1, 5, 8), (3, 8, 2)):
            xs, idxs, ws = everyone(kind, size, top_k, experts)
            with epops.ExpertGroup(None, "ep", max_tokens=7, num_experts=experts) as group:
                got = epops.dispatch(xs[rank], idxs[rank], ws[rank], group=group, alignment=alignment)
            rows, counts, ends = meaning.expert_layout(xs, ws, idxs, rank, experts, alignment)
            where = f"{kind} K={top_k} E={experts} rank {rank} of {size}"
            assert got.expert_counts.tolist() == counts, where
            assert got.expert_ends.tolist() == ends, where
            assert int(got.status[1]) == sum(counts), where
            assert got.rows.shape[0] == epops.layout.capacity("expert", 7, size, top_k, -(-experts // size), alignment)
            for place in range(got.rows.shape[0]):
                row = rows[place] if place < len(rows) else None
                if row is None:
                    assert not got.rows[place].any(), where
                    assert got.row_weights[place] == 0 and got.row_expert[place] == -1 and got.row_source[place] == -1
                else:
                    values, weight, slot, source, token = row
                    assert torch.equal(got.rows[place], values), where
                    assert got.row_weights[place] == weight, where
                    assert got.row_expert[place] == slot and got.row_source[place] == source * 7 + token, where


@pytest.mark.parametrize("size", (1, 2, 3, 4))
def test_expert_layout_groups_rows_by_expert_then_source_then_token(size: int) -> None:
    run_ranks(grouped_by_expert, size)


def one_row_a_rank(rank: int, size: int) -> None:
    for kind in KINDS:
        xs, idxs, ws = everyone(kind, size, 3, 7)
        with epops.ExpertGroup(None, "ep", max_tokens=7, num_experts=7) as group:
            got = epops.dispatch(xs[rank], idxs[rank], ws[rank], group=group, layout="rank")
        pairs: dict[tuple[int, int], dict[int, int]] = {}
        for source, token, k, slot in meaning.arrivals(idxs, rank, 7):
            pairs.setdefault((source, token), {})[k] = slot
        assert got.expert_ends.tolist() == [sum(s <= source for s, _ in pairs) for source in range(size)]
        for place, ((source, token), picks) in enumerate(pairs.items()):
            assert torch.equal(got.rows[place], xs[source][token])
            assert got.row_expert[place].tolist() == [picks.get(k, -1) for k in range(3)]
            expected = [float(ws[source][token, k]) if k in picks else 0.0 for k in range(3)]
            assert got.row_weights[place].tolist() == expected
            assert int(got.row_source[place]) == source * 7 + token
        assert not got.rows[len(pairs) :].any() and (got.row_source[len(pairs) :] == -1).all()


@pytest.mark.parametrize("size", (1, 3))
def test_rank_layout_has_one_row_a_token_and_rank(size: int) -> None:
    run_ranks(one_row_a_rank, size)


def batched(rank: int, size: int) -> None:
    for kind in KINDS:
        xs, idxs, ws = everyone(kind, size, 2, 5)
        with epops.ExpertGroup(None, "ep", max_tokens=7, num_experts=5) as group:
            got = epops.dispatch(xs[rank], idxs[rank], ws[rank], group=group, layout="batched")
        slots = -(-5 // size)
        assert got.rows.shape == (slots, 7 * size, 16) and got.expert_ends.numel() == 0
        for slot in range(slots):
            own = [(s, t, k) for s, t, k, e in meaning.arrivals(idxs, rank, 5) if e == slot]
            assert int(got.expert_counts[slot]) == len(own)
            for place, (source, token, k) in enumerate(own):
                assert torch.equal(got.rows[slot, place], xs[source][token])
                assert got.row_weights[slot, place] == ws[source][token, k]
            assert not got.rows[slot, len(own) :].any()


@pytest.mark.parametrize("size", (1, 2))
def test_batched_layout_puts_each_slots_rows_first(size: int) -> None:
    run_ranks(batched, size)


def payloads(rank: int, size: int) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.uint8, torch.float8_e4m3fn):
        for index_dtype in (torch.int32, torch.int64):
            _, idxs, ws = everyone("random", size, 2, 6)
            xs = [inputs.rows(t, 16, r).abs().to(dtype) for r, t in enumerate(TOKENS[:size])]
            scales = [torch.full((t, 3), 1.0 + r) for r, t in enumerate(TOKENS[:size])]
            with epops.ExpertGroup(None, "ep", max_tokens=7, num_experts=6) as group:
                got = epops.dispatch(xs[rank], idxs[rank].to(index_dtype), ws[rank], scales[rank], group=group)
            assert got.rows.dtype == dtype and got.scales.shape == (got.rows.shape[0], 3)
            rows, _, _ = meaning.expert_layout(xs, ws, idxs, rank, 6, 1)
            for place, row in enumerate(rows):
                assert row is not None
                assert torch.equal(got.rows[place].view(torch.uint8), row[0].view(torch.uint8))
                assert (got.scales[place] == 1.0 + row[3]).all()


def test_every_payload_dtype_and_its_scales_travel_unchanged() -> None:
    run_ranks(payloads, 3)


def small_capacity(rank: int, size: int) -> tuple[int, list[int], str]:
    x, (idx, w) = inputs.rows(4, 16, rank), inputs.routing("one", 4, 1, 2, rank)
    group = epops.ExpertGroup(None, "ep", max_tokens=4, num_experts=2, overflow="count")
    with group:
        got = epops.dispatch(x, idx, w, group=group, capacity=5)
        back = epops.combine(got.rows, got.route, got.row_weights, group=group, num_tokens=4, top_k=1)
        kept = 5 - 4 * rank if rank < 2 else 0
        expected = x * w
        expected[max(min(kept, 4), 0) :] = 0
        assert torch.equal(back.out, expected), "rows that found no room come back as zeros"
        dropped = int(got.status[2])
    strict = epops.ExpertGroup(None, "strict", max_tokens=4, num_experts=2)
    epops.dispatch(x, idx, w, group=strict, capacity=5)
    try:
        epops.dispatch(x, idx, w, group=strict, capacity=5)
        said = "nothing"
    except epops.EpopsError as error:
        said = f"{type(error).__name__}: {error}"
    strict.close(raise_errors=False)
    return dropped, got.expert_ends.tolist(), said


def test_rows_over_capacity_are_dropped_in_order_and_counted_and_raised() -> None:
    (dropped, ends, said), (none, _, peer_said) = run_ranks(small_capacity, 2)
    assert (dropped, ends, none) == (3, [5], 0)
    assert "RoutingError" in said and "overflow" in said and "3 rows dropped" in said
    assert "PeerError" in peer_said and "its own call failed" in peer_said


def bad_index(rank: int, size: int) -> tuple[str, bool]:
    group = epops.ExpertGroup(None, "ep", max_tokens=4, num_experts=4)
    x = inputs.rows(2, 16, rank)
    idx = torch.tensor([[0, 9], [1, 1]]) if rank == 1 else torch.tensor([[0, 1], [2, 3]])
    w = torch.ones(2, 2)
    got = epops.dispatch(x, idx, w, group=group)
    as_absent = int(got.status[0]) == epops.layout.STATUS_BAD_INDEX | epops.layout.STATUS_DUPLICATE
    try:
        group.check()
        said = "nothing"
    except epops.RoutingError as error:
        said = str(error)
    again = epops.dispatch(x, idx.clamp(max=3), w.clone(), group=group) if rank == 0 else None
    if rank == 1:
        again = epops.dispatch(x, torch.tensor([[0, 1], [1, 2]]), w, group=group)
    assert again is not None and int(again.status[0]) == 0, "the group goes on after an error in the routing"
    group.close()
    return said, as_absent


def test_bad_and_repeated_indices_act_as_absent_and_every_rank_hears_of_them() -> None:
    (first, seen), (second, seen_too) = run_ranks(bad_index, 2)
    assert seen and seen_too
    for said in (first, second):
        assert "index out of range" in said and "expert chosen twice" in said
    assert "1 indices out of range here" in second and "on another rank" in first
