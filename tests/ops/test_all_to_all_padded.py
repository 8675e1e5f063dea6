"""The path of all_to_all that reads nothing on the host (nccl) gives what the host path gives; here over gloo, padded."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist

import epops
from epops.layout import STATUS_DISAGREE, STATUS_OVERFLOW
from tests.ops.test_all_to_all_ugly import KINDS, rows_of, same, splits_of
from tests.ranks import run_ranks


class Padded:
    """Equal parts for all pairs, as on nccl."""

    name = "padded"
    host_counts = False
    row_alignment = 1

    def __init__(self, group: epops.ExpertGroup) -> None:
        self.size, self.rank = group.size, group.rank
        self.before = group.transport  # kept: a slower rank may still be connecting to its communicator

    def swap_padded(self, buffer: torch.Tensor) -> torch.Tensor:
        received = torch.empty_like(buffer)
        dist.all_to_all_single(received, buffer.contiguous())
        return received

    def close(self) -> None:
        """Nothing to give back."""


def padded_group(name: str = "padded") -> epops.ExpertGroup:
    """A group that reads nothing on the host."""
    group = epops.ExpertGroup(name=name)
    group.transport = Padded(group)
    group.record_on_device = lambda status: (
        None
    )  # its word is read through pinned memory, which this machine may not have
    return group


def agree(rank: int, size: int) -> None:
    host, padded = epops.ExpertGroup(name="host", overflow="count"), padded_group()
    for kind in KINDS:
        splits = splits_of(kind, size)
        ins, outs = torch.tensor(splits[rank]), torch.tensor([split[rank] for split in splits])
        for dim, room in ((0, 2), (1, 0), (2, -1)):
            shape = [2, 3, 4]
            # Equal parts for all pairs want x and the result of one size on all ranks.
            shape[dim] = max(sum(split) for split in splits) + 1
            out = max(max(sum(column) for column in zip(*splits)) + room, 0)
            x = rows_of(rank, tuple(shape), torch.float32).requires_grad_()
            for how in ("splits", "both", "plan"):
                got = []
                for group in (host, padded):
                    given = {"input_splits": ins, "output_splits": outs if how == "both" else None}
                    if how == "plan":
                        given = {"plan": epops.plan_all_to_all(ins, group=group).plan}
                    result = epops.all_to_all(x, **given, group=group, scatter_dim=dim, gather_dim=dim, out_size=out)
                    found = [result.rows.detach(), result.counts, result.status[:3]]
                    if room >= 0:
                        found += torch.autograd.grad(result.rows.sin().sum(), x)
                    got.append(found)
                assert all(same(one, other) for one, other in zip(*got)), (kind, dim, how)
    host.close(raise_errors=False)
    padded.close(raise_errors=False)


@pytest.mark.parametrize("size", (2, 3))
def test_one_dim(size: int) -> None:
    run_ranks(agree, size, timeout=60)


def agree_on_two_dims(rank: int, size: int) -> None:
    tokens, heads = [3, 0, 4][:size], [2, 1, 3][:size]
    host, padded = epops.ExpertGroup(name="host"), padded_group()
    for scatter, gather in itertools.permutations(range(3), 2):
        shape = [2, 2, 2]
        shape[scatter], shape[gather] = sum(tokens) + 2, max(heads)
        x = rows_of(rank, tuple(shape), torch.bfloat16).requires_grad_()
        got = []
        for group in (host, padded):
            plan = epops.plan_all_to_all(torch.tensor(tokens), torch.tensor(heads), group=group).plan
            settings = {"scatter_dim": scatter, "gather_dim": gather, "scatter_size": 5, "out_size": sum(heads)}
            result = epops.all_to_all(x, plan=plan, group=group, **settings)
            (grad,) = torch.autograd.grad(result.rows.float().sin().sum(), x)
            got.append((result.rows.detach(), result.counts, result.status[:3], grad))
        wrong = [place for place, (one, other) in enumerate(zip(*got)) if not same(one, other)]
        assert not wrong, (scatter, gather, [(got[0][place], got[1][place]) for place in wrong])
        assert got[0][0].any() == bool(tokens[rank])
        for dtype in (torch.bool, torch.float8_e4m3fn, torch.float64):
            x = rows_of(rank, tuple(shape), dtype)
            one, other = (
                epops.all_to_all(
                    x,
                    torch.tensor(tokens),
                    torch.tensor(heads),
                    group=group,
                    scatter_dim=scatter,
                    gather_dim=gather,
                    scatter_size=5,
                    out_size=sum(heads),
                ).rows
                for group in (host, padded)
            )
            assert same(one, other)
    host.close()
    padded.close()


@pytest.mark.parametrize("size", (2, 3))
def test_two_dims(size: int) -> None:
    run_ranks(agree_on_two_dims, size, timeout=60)


def reported(rank: int, size: int) -> list[int]:
    """Status bits of hostile calls; no row of another."""
    group = padded_group()
    ins, outs = torch.tensor([1, 1, 1]), torch.tensor([1, 1, 1])
    x = torch.full((3, 2), rank + 1.0)
    bad = rank == 1
    calls = [
        (torch.tensor([2**62, -5, 3]) if bad else ins, outs, 3),
        (ins, torch.tensor([2**62, -5, 2**62]) if bad else outs, 3),
        (torch.tensor([0, 1, 1]) if bad else ins, outs, 3),
        (ins, outs, 2 if bad else 3),
    ]
    bits = []
    for given, expected, out in calls:
        got = epops.all_to_all(x, given, expected, group=group, out_size=out)
        for place, row in enumerate(got.rows):
            assert row.eq(0).all() or row.eq(place + 1).all(), (rank, given, expected, got.rows)
        bits.append(int(got.status[0]))
    group.close(raise_errors=False)
    return bits


def test_hostile_splits_are_reported_and_no_row_is_taken_for_another() -> None:
    first, second, third = run_ranks(reported, 3, timeout=60)
    assert first[0] & third[0] & STATUS_DISAGREE, "negative and enormous splits are not what peers expect"
    assert second[1] & STATUS_DISAGREE and first[2] & STATUS_DISAGREE and second[3] & STATUS_OVERFLOW
    assert first[3] == third[3] == 0


def dropped_gradient(rank: int, size: int) -> list[list[float]]:
    """Gradients of x where each rank sends 2 rows to each, and there is room for 3 of the 2 * size that come."""
    gradients = []
    for how in ("splits", "both", "plan"):
        group = padded_group(f"padded {how}")
        group.overflow = "count"
        x, splits = torch.ones(2 * size, 3, requires_grad=True), torch.full((size,), 2)
        given = {"input_splits": splits, "output_splits": splits if how == "both" else None}
        if how == "plan":
            given = {"plan": epops.plan_all_to_all(splits, group=group).plan}
        got = epops.all_to_all(x, **given, group=group, out_size=3)
        assert int(got.status[2]) == 2 * size - 3
        (got.rows * torch.tensor([[2.0], [3.0], [5.0]])).sum().backward()
        gradients.append(x.grad[:, 0].tolist())
        group.close()
    assert gradients[0] == gradients[1] == gradients[2]
    return gradients[0]


def test_what_was_dropped_has_no_gradient() -> None:
    """Rank 0's rows come first and find room everywhere; of rank 1's one does; never the gradient of another row."""
    first, second, third = run_ranks(dropped_gradient, 3, timeout=60)
    assert (first, second, third) == ([2.0, 3.0] * 3, [5.0, 0.0] * 3, [0.0, 0.0] * 3)


def sizes_differ(rank: int, size: int) -> list[str]:
    """What a rank is told about calls whose sizes are not those of the others; the group goes on after each."""
    group = padded_group()
    odd = rank == size - 1
    asked = []
    ask = group.host_all_gather
    group.host_all_gather = lambda values: asked.append(1) or ask(values)
    rows, heads = torch.ones(2 * size + (size if odd else 0), 4), torch.ones(size, 6, 3 if odd else 2)
    splits = torch.ones(size, dtype=torch.int64)
    calls = [
        lambda: epops.all_to_all(rows, group=group),
        lambda: epops.all_to_all(rows, splits, splits, group=group, out_size=size),
        lambda: epops.all_to_all(heads, group=group, scatter_dim=0, gather_dim=2),
        lambda: epops.all_to_all(torch.ones(size, 1, size), group=group, scatter_dim=2 * odd, gather_dim=2 * odd),
        lambda: epops.all_reduce(rows, group=group) if odd else epops.all_to_all(torch.ones(size, 7), group=group),
    ]
    said = []
    for one in calls:
        try:
            one()
            said.append("nothing")
        except epops.DisagreementError as error:
            said.append(str(error))
        got = epops.all_to_all(torch.full((size, 11), rank + 1.0), group=group)
        assert [int(row[0]) for row in got.rows] == list(range(1, size + 1))
    assert len(asked) == len(calls) + 1, "sizes are compared once, when a rank first has them"
    group.close()
    return said


@pytest.mark.parametrize("size", (2, 3))
def test_ranks_with_other_sizes_are_named_before_anything_moves(size: int) -> None:
    everyone = run_ranks(sizes_differ, size, timeout=60)
    for rank, (even, ragged, heads, dims, ops) in enumerate(everyone):
        assert all(said.startswith("epops.all_") and "pad to the largest" in said for said in everyone[rank])
        assert "x, the bytes for each rank: expected " in even and "as on rank" in even and "got " in even
        assert "x, the bytes for each rank" in ragged and "x, the bytes for each rank" in heads
        assert "layout: expected " in dims and "op: expected " in ops
    assert f"expected {2 * size * 16} on every rank" in everyone[0][0]
    assert f"got {3 * size * 16} on rank {size - 1}" in everyone[0][0]


def nobody_asks(rank: int, size: int) -> str:
    """Rank 1 has new sizes where rank 0 repeats a call that it knows: rank 1 is told, within the group's timeout."""
    group = epops.ExpertGroup(name="padded", timeout=2.0)
    group.transport = Padded(group)
    group.record_on_device = lambda status: None
    try:
        epops.all_to_all(torch.ones(2, 2), group=group)
        if rank == 1:
            epops.all_to_all(torch.ones(2, 3), group=group)
        said = "nothing"
    except epops.PeerError as error:
        said = str(error)
    group.close(raise_errors=False)
    return said


def test_a_rank_alone_with_new_sizes_does_not_wait_for_ever() -> None:
    said = run_ranks(nobody_asks, 2, timeout=60, fresh=True)
    assert said[0] == "nothing"
    assert "epops.all_to_all: rank 1" in said[1] and "for the first time with 24 bytes" in said[1]


def test_a_capture_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside a capture a call that ran before is found; another is refused with what to do."""
    with padded_group() as group:
        monkeypatch.setattr(Padded, "swap_padded", lambda self, buffer: buffer)
        epops.all_to_all(torch.ones(2, 2), group=group)
        monkeypatch.setattr("epops.ops.exchange.is_capturing", lambda: True)
        epops.all_to_all(torch.ones(2, 2), group=group)
        with pytest.raises(epops.GroupError, match="all_to_all.*run one step with the same sizes before capturing"):
            epops.all_to_all(torch.ones(2, 3), group=group)
