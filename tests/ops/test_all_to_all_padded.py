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
