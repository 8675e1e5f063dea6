"""all_to_all with hostile splits: an error on every rank, a hang on none, and never a row of another."""

from __future__ import annotations

import time

import pytest
import torch

import epops
from epops.layout import STATUS_OVERFLOW
from tests.ranks import run_ranks


def hears(rank: int, size: int, case: str) -> tuple[str, str, float, bool]:
    """What this rank's call and its next exchange raise, how long it took, and whether all rows it got are right ones."""
    group = epops.ExpertGroup(name="a2a", timeout=20)
    began = time.monotonic()
    bad = rank == 1
    ins, outs = torch.tensor([1, 1, 1]), torch.tensor([1, 1, 1])
    x = torch.full((3, 2), rank + 1.0)
    settings = {"out_size": 3}
    make_plan = case.startswith("plan")
    if case == "negative":
        ins = torch.tensor([2, -1, 2]) if bad else ins
    elif case == "negative output":
        outs = torch.tensor([1, -1, 1]) if bad else outs
    elif case == "beyond x":
        ins = torch.tensor([1, 1, 2]) if bad else ins
    elif case == "overflowing":
        ins = torch.tensor([2**62, 2**62, 2**62]) if bad else ins
    elif case == "overflowing output":
        outs = torch.tensor([2**62, 2**62, 2**62]) if bad else outs
    elif case == "int32":
        ins = ins.to(torch.int32) if bad else ins
    elif case == "sent less than expected":
        ins = torch.tensor([0, 1, 1]) if bad else ins
    elif case == "sent more than expected":
        ins = torch.tensor([2, 1, 0]) if bad else ins
    elif case == "expected less than sent":
        outs = torch.tensor([1, 1, 0]) if bad else outs
    elif case == "no room":
        settings = {"out_size": 2} if bad else settings
    elif case == "other width":
        x = torch.full((3, 4 if bad else 2), rank + 1.0)
    elif case == "plan negative":
        ins = torch.tensor([1, -1, 1]) if bad else ins
    elif case == "plan int32":
        ins = ins.to(torch.int32) if bad else ins
    said = ["nothing", "nothing"]
    fine = True
    try:
        if make_plan:
            plan = epops.plan_all_to_all(ins, group=group).plan
            if case == "plan forged" and bad:
                plan = plan.clone()
                plan[4 + size] = 99  # the offset of the first piece
            given = {"plan": plan}
        else:
            given = {"input_splits": ins, "output_splits": outs}
        got = epops.all_to_all(x, **given, group=group, **settings)
        pieces = got.rows.view(got.rows.shape[0], -1)
        # Row r is rank r's, or absent: never another's.
        fine = all(piece.eq(0).all() or piece.eq(place + 1).all() for place, piece in enumerate(pieces))
    except (ValueError, epops.EpopsError) as error:
        said[0] = f"{type(error).__name__}: {error}"
    try:
        epops.all_to_all(torch.ones(3, 2), group=group)
    except epops.EpopsError as error:
        said[1] = f"{type(error).__name__}: {error}"
    took = time.monotonic() - began
    group.close(raise_errors=False)
    return *said, took, fine


CASES = {
    # what rank 1 does wrong: (what it is told, at once or by its next exchange; what its peers are told)
    "negative": ("ValueError: epops.all_to_all: input_splits: expected splits from 0", "PeerError"),
    "negative output": ("ValueError: epops.all_to_all: output_splits: expected splits from 0", "PeerError"),
    "beyond x": ("sum is at most 3", "PeerError"),
    "overflowing": ("sum is at most 3", "PeerError"),
    "overflowing output": ("DisagreementError", "PeerError"),
    "int32": ("ValueError: epops.all_to_all: input_splits: expected int64, got torch.int32; cast it", "PeerError"),
    "sent less than expected": ("PeerError", "DisagreementError"),
    "sent more than expected": ("PeerError", "DisagreementError"),
    "expected less than sent": ("DisagreementError", "PeerError"),
    "no room": ("RoutingError: epops.all_to_all: overflow", "PeerError"),
    "other width": ("DisagreementError: epops.all_to_all", "DisagreementError: epops.all_to_all"),
    "plan negative": ("ValueError: epops.plan_all_to_all: input_splits: expected splits from 0", "PeerError"),
    "plan int32": ("ValueError: epops.plan_all_to_all: input_splits: expected int64", "PeerError"),
    "plan forged": (
        "ValueError: epops.all_to_all: plan: expected a plan for 3 ranks of pieces inside dim 0",
        "PeerError",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_one_rank_does_wrong_every_rank_hears(case: str) -> None:
    answers = run_ranks(hears, 3, case)
    here, there = CASES[case]
    for rank, (*_, took, fine) in enumerate(answers):
        assert took < 10, "nobody waited for a timeout"
        assert fine, f"rank {rank} got rows of another rank"
    assert here in "\n".join(answers[1][:2]), answers[1]
    # Where only the rank that is wronged can see it, the others hear of it from that rank.
    told = ["\n".join(answers[rank][:2]) for rank in (0, 2)]
    assert any(there in text for text in told), told
    assert "nothing\nnothing" not in told, told


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda g: epops.all_to_all(torch.ones(3), plan=torch.zeros(8, dtype=torch.int64), group=g, out_size=3),
            "version 0, 0",
        ),
        (
            lambda g: epops.all_to_all(torch.ones(3), plan=torch.zeros(9, dtype=torch.int64), group=g, out_size=3),
            "int64 (8,)",
        ),
        (lambda g: epops.all_to_all(torch.ones(3), plan=torch.zeros(8), group=g, out_size=3), "got torch.float32 (8,)"),
        (lambda g: epops.plan_all_to_all(torch.tensor([[1]]), group=g), "shape (1,), one split a rank"),
        (
            lambda g: epops.plan_all_to_all(torch.tensor([1]), torch.tensor([-2]), group=g),
            "output_splits: expected splits from 0",
        ),
        (
            lambda g: epops.all_to_all(
                torch.ones(3, 2), None, torch.tensor([3]), group=g, scatter_dim=0, gather_dim=1, out_size=3
            ),
            "at most 2 for rank 0 itself",
        ),
        (lambda g: epops.all_to_all(torch.tensor(1.0), group=g), "a tensor of at least one dimension"),
        (lambda g: epops.all_to_all(torch.ones(3, 2), group=g, gather_dim=2), "gather_dim: expected -2 … 1, got 2"),
        (lambda g: epops.all_to_all(torch.ones(3, 2), group=g, scatter_dim=-3), "scatter_dim: expected -2 … 1, got -3"),
        (lambda g: epops.all_to_all(torch.ones(3, dtype=torch.complex128), group=g), "elements of 1, 2, 4 or 8 bytes"),
    ],
)
def test_bad_arguments_are_named(call, said: str) -> None:
    with epops.ExpertGroup(name="a2a") as group:
        with pytest.raises(ValueError) as raised:
            call(group)
    assert said in str(raised.value)


def test_pieces_without_room_count_as_dropped_in_both_dims() -> None:
    with epops.ExpertGroup(name="a2a", overflow="count") as group:
        got = epops.all_to_all(
            torch.ones(4, 3), torch.tensor([4]), group=group, gather_dim=1, out_size=2, scatter_size=3
        )
        assert got.rows.tolist() == [[1, 1]] * 3 and int(got.status[0]) == STATUS_OVERFLOW
        assert int(got.status[2]) == 2
