"""all_to_all cuts along one dim, gathers along another, and moves exactly what the splits name."""

from __future__ import annotations

import pytest
import torch

import epops
from tests.ranks import run_ranks


def table(size: int, kind: str) -> list[list[int]]:
    """splits[source][destination]."""
    if kind == "uneven":
        return [[(3 * s + 2 * d) % 5 for d in range(size)] for s in range(size)]
    if kind == "to_one":
        return [[4 if d == 0 else 0 for d in range(size)] for _ in range(size)]
    return [[0] * size for _ in range(size)]


def values(rank: int, count: int, *shape: int) -> torch.Tensor:
    return (torch.arange(count * max(torch.Size(shape).numel(), 1)).view(count, *shape) + 1000 * (rank + 1)).float()


def ragged(rank: int, size: int) -> None:
    for kind in ("uneven", "to_one", "none"):
        splits = table(size, kind)
        for known in (True, False):
            for planned in (True, False):
                with epops.ExpertGroup(None, "ep") as group:
                    x = values(rank, sum(splits[rank]) + 2, 3).requires_grad_()
                    ins = torch.tensor(splits[rank])
                    outs = torch.tensor([splits[s][rank] for s in range(size)])
                    bound = int(outs.sum()) + 3
                    if planned:
                        plan = epops.plan_all_to_all(ins, outs if known else None, group=group).plan
                        got = epops.all_to_all(x, plan=plan, group=group, out_size=bound)
                    else:
                        got = epops.all_to_all(x, ins, outs if known else None, group=group, out_size=bound)
                    offset = 0
                    for source in range(size):
                        sent = values(source, sum(splits[source]) + 2, 3)
                        at = sum(splits[source][:rank])
                        piece = sent[at : at + splits[source][rank]]
                        assert torch.equal(got.rows[offset : offset + len(piece)], piece), (kind, known, planned)
                        offset += len(piece)
                    assert not got.rows[offset:].any() and got.counts.tolist() == outs.tolist()
                    weight = torch.arange(1.0, bound + 1).view(-1, 1)
                    (grad,) = torch.autograd.grad((got.rows * weight).sum(), x)
                    total = sum(splits[rank])
                    assert not grad[total:].any() and (grad[:total] != 0).all()


@pytest.mark.parametrize("size", (1, 2, 3))
def test_ragged_splits_along_one_dim(size: int) -> None:
    run_ranks(ragged, size)


def tokens_to_heads(rank: int, size: int) -> None:
    tokens, heads = [3, 0, 5][:size], 2 * size
    full = torch.arange(sum(tokens) * heads * 2).view(sum(tokens), heads, 2).float()
    start = sum(tokens[:rank])
    mine = full[start : start + tokens[rank]]
    counts = torch.tensor(tokens)
    with epops.ExpertGroup(None, "ep") as group:
        padded = torch.nn.functional.pad(mine, (0, 0, 0, 0, 0, 2)).requires_grad_()
        there = epops.all_to_all(
            padded, None, counts, group=group, scatter_dim=1, gather_dim=0, out_size=sum(tokens) + 1
        )
        assert torch.equal(there.rows[: sum(tokens)], full[:, 2 * rank : 2 * rank + 2])
        assert not there.rows[sum(tokens) :].any()
        back = epops.all_to_all(
            there.rows,
            counts,
            None,
            group=group,
            scatter_dim=0,
            gather_dim=1,
            out_size=heads,
            scatter_size=tokens[rank] + 2,
        )
        assert torch.equal(back.rows[: tokens[rank]], mine) and not back.rows[tokens[rank] :].any()
        (grad,) = torch.autograd.grad((back.rows * 3).sum(), padded)
        assert torch.equal(grad[: tokens[rank]], torch.full_like(mine, 3)) and not grad[tokens[rank] :].any()
        strided = full.permute(2, 1, 0)[..., start : start + tokens[rank]]
        moved = epops.all_to_all(strided, None, counts, group=group, scatter_dim=1, gather_dim=2, out_size=sum(tokens))
        assert torch.equal(moved.rows, full[:, 2 * rank : 2 * rank + 2].permute(2, 1, 0))


@pytest.mark.parametrize("size", (1, 2, 3))
def test_one_dim_is_scattered_while_another_is_gathered(size: int) -> None:
    run_ranks(tokens_to_heads, size)


def even_and_dtypes(rank: int, size: int) -> None:
    with epops.ExpertGroup(None, "ep") as group:
        for dtype in (torch.uint8, torch.bfloat16, torch.float32, torch.int64):
            x = (torch.arange(4 * size).view(2 * size, 2) + 10 * rank).to(dtype)
            got = epops.all_to_all(x, group=group).rows
            expected = torch.cat(
                [(torch.arange(4 * size).view(2 * size, 2) + 10 * s)[2 * rank : 2 * rank + 2] for s in range(size)]
            )
            assert torch.equal(got, expected.to(dtype))
        heads = epops.all_to_all(torch.full((3, 2 * size), rank + 1.0), group=group, scatter_dim=-1, gather_dim=0).rows
        assert heads.tolist() == [[s + 1.0] * 2 for s in range(size) for _ in range(3)]


def test_even_splits_and_every_element_size() -> None:
    run_ranks(even_and_dtypes, 3)


def disagreement(rank: int, size: int) -> tuple[bool, str]:
    group = epops.ExpertGroup(None, "ep", timeout=20)
    ins = torch.tensor([1, 2])
    outs = torch.tensor([1, 1]) if rank == 0 else torch.tensor([2, 2 + 1])
    got = epops.all_to_all(torch.ones(3, 2), ins, outs, group=group, out_size=8)
    clean = not got.rows[2:].any()
    try:
        epops.all_to_all(torch.ones(2, 2), group=group)
        said = "nothing"
    except epops.EpopsError as error:
        said = f"{type(error).__name__}: {error}"
    group.close(raise_errors=False)
    return clean and int(got.status[0]) == (epops.layout.STATUS_DISAGREE if rank == 1 else 0), said


def test_splits_that_disagree_are_raised_and_never_taken_for_rows() -> None:
    (fine, said), (fine_too, said_too) = run_ranks(disagreement, 2)
    assert fine and fine_too
    assert "PeerError" in said and "DisagreementError" in said_too and "ranks disagree" in said_too


def pieces_of_other_lengths(rank: int, size: int) -> None:
    """Equal parts of x, whose length differs from rank to rank: each gradient goes back to its element."""
    with epops.ExpertGroup(None, "ep") as group:
        x = (torch.arange(4.0 * (rank + 1)).view(-1, 2) + 100 * rank).requires_grad_()
        got = epops.all_to_all(x, group=group, out_size=5)
        (grad,) = torch.autograd.grad((got.rows.cumsum(0) * got.rows).sum(), x)
        lengths = [rank + 1 for rank in range(size)]
        back = epops.all_to_all(grad.detach(), torch.tensor([lengths[rank]] * size), group=group, out_size=5)
        rows = got.rows.detach().requires_grad_()
        (expected,) = torch.autograd.grad((rows.cumsum(0) * rows).sum(), rows)
        assert torch.equal(back.rows[: sum(lengths)], expected[: sum(lengths)])
        heads = (torch.arange(4.0 * (rank + 1)).view(4, -1) + 100 * rank).requires_grad_()
        got = epops.all_to_all(heads, group=group, scatter_dim=0, gather_dim=1, out_size=5)
        (grad,) = torch.autograd.grad(got.rows.square().sum(), heads)
        assert torch.equal(grad, 2 * heads), "each element came once, whatever its rank's length"


def test_gradients_of_pieces_whose_lengths_differ() -> None:
    run_ranks(pieces_of_other_lengths, 2)


def overflow(rank: int, size: int) -> None:
    with epops.ExpertGroup(None, "ep", overflow="count") as group:
        got = epops.all_to_all(torch.arange(6.0), torch.tensor([3, 3]), group=group, out_size=4)
        assert int(got.status[2]) == 2 and got.counts.tolist() == [3, 3]
        assert got.rows.tolist() == ([0, 1, 2, 0] if rank == 0 else [3, 4, 5, 3])


def test_pieces_without_room_are_counted() -> None:
    run_ranks(overflow, 2)


@pytest.mark.parametrize("how", ["splits", "both", "plan"])
def test_the_gradient_of_what_was_dropped_is_refused_with_what_to_do(how: str) -> None:
    """x of the backward is the gradient of what had room: the message speaks of out_size, not of x alone."""
    x, splits = torch.ones(4, 2, requires_grad=True), torch.tensor([4])
    with epops.ExpertGroup(None, "ep", overflow="count") as group:
        given = {"input_splits": splits, "output_splits": splits if how == "both" else None}
        if how == "plan":
            given = {"plan": epops.plan_all_to_all(splits, group=group).plan}
        got = epops.all_to_all(x, **given, group=group, out_size=3)
        with pytest.raises(ValueError) as raised:
            got.rows.sum().backward()
    said = str(raised.value)
    assert (
        said.startswith(f"epops.all_to_all: {'plan' if how == 'plan' else 'input_splits'}: expected ")
        and ", got " in said
    )
    assert "its out_size had no room for (overflow='count')" in said
    assert "give that call an out_size with room for them" in said


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda g: epops.all_to_all(torch.ones(3, 2), torch.tensor([4]), group=g, out_size=4), "sum is at most 3"),
        (
            lambda g: epops.all_to_all(torch.ones(3, 2), torch.tensor([1, 1]), group=g, out_size=4),
            "input_splits: expected shape",
        ),
        (
            lambda g: epops.all_to_all(torch.ones(3), torch.tensor([1], dtype=torch.int32), group=g, out_size=4),
            "expected int64",
        ),
        (lambda g: epops.all_to_all(torch.ones(3), torch.tensor([1]), group=g), "out_size: expected the size of dim 0"),
        (lambda g: epops.all_to_all(torch.ones(3, dtype=torch.complex128), group=g), "elements of 1, 2, 4 or 8 bytes"),
    ],
)
def test_bad_splits_are_named(call, said: str) -> None:
    with epops.ExpertGroup(None, "ep") as group:
        with pytest.raises(ValueError) as raised:
            call(group)
    assert said in str(raised.value)
