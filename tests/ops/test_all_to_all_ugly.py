"""all_to_all with ugly splits, shapes, dtypes and strides: exactly the right rows, and gradients."""

from __future__ import annotations

import pytest
import torch

import epops
from tests.ranks import run_ranks

DTYPES = (
    torch.bool, torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16, torch.int16,
    torch.float32, torch.int32, torch.float64, torch.int64, torch.complex64,
)  # fmt: skip
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def splits_of(kind: str, size: int) -> list[list[int]]:
    """splits[source][destination]."""
    if kind == "to_one":
        return [[3 * (d == size - 1) for d in range(size)] for _ in range(size)]
    if kind == "from_one":
        return [[(d + 1) * (s == 0) for d in range(size)] for s in range(size)]
    if kind == "none":
        return [[0] * size for _ in range(size)]
    if kind == "ring":
        return [[2 * (d == (s + 1) % size) for d in range(size)] for s in range(size)]
    return [[(5 * s + 3 * d + s * d) % 4 for d in range(size)] for s in range(size)]


KINDS = ("uneven", "to_one", "from_one", "none", "ring")


def rows_of(source: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """What rank ``source`` has: bytes that differ from element to element and rank to rank, of any dtype."""
    make = torch.Generator().manual_seed(source)
    if dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.bool):
        return torch.randint(0, 2, shape, generator=make).to(dtype)
    return torch.randint(-9, 10, shape, generator=make).to(dtype)


def same(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Bit for bit, for dtypes that cannot be compared too."""
    assert got.shape == expected.shape and got.dtype == expected.dtype
    return torch.equal(*(item.contiguous().view(-1).view(torch.uint8) for item in (got, expected)))


def expected_rows(
    rank: int, splits: list[list[int]], dtype: torch.dtype, width: tuple[int, ...], out: int
) -> torch.Tensor:
    """The pieces for ``rank`` in rank order, and zeros."""
    pieces = []
    for source, split in enumerate(splits):
        at = sum(split[:rank])
        pieces.append(rows_of(source, (sum(split) + 1, *width), dtype)[at : at + split[rank]])
    came = torch.cat([piece.view(torch.uint8) if piece.dtype.itemsize == 1 else piece for piece in pieces])
    full = torch.zeros((out, *width), dtype=came.dtype)
    full[: came.shape[0]] = came
    return full.view(dtype)


def ugly(rank: int, size: int) -> None:
    """Every kind of split, with and without output splits and plans, forward and backward, eagerly and half by half."""
    with epops.ExpertGroup(name="a2a", timeout=60) as group:
        for kind in KINDS:
            splits = splits_of(kind, size)
            ins, outs = torch.tensor(splits[rank]), torch.tensor([split[rank] for split in splits])
            out = int(outs.sum()) + 2
            width = (3,) if kind != "ring" else (2, 0, 3)  # rows of length 0 too
            x = rows_of(rank, (sum(splits[rank]) + 1, *width), torch.float64).requires_grad_()
            want = expected_rows(rank, splits, torch.float64, width, out)
            plan = epops.plan_all_to_all(ins, group=group).plan
            assert (
                plan.tolist()[4 : 4 + size] == splits[rank]
                and plan.tolist()[4 + 2 * size : 4 + 3 * size] == outs.tolist()
            )
            given = ({"input_splits": ins}, {"input_splits": ins, "output_splits": outs}, {"plan": plan})
            for how in given:
                got = epops.all_to_all(x, **how, group=group, out_size=out)
                assert same(got.rows.detach(), want) and got.counts.tolist() == outs.tolist(), (kind, list(how))
                assert got.status.tolist()[:3] == [0, int(outs.sum()), 0]
                weight = torch.arange(1.0, out + 1, dtype=torch.float64).view(-1, *[1] * len(width)) * (rank + 1)
                (grad,) = torch.autograd.grad((got.rows * weight).sum(), x)
                assert same(grad, gradient(rank, splits, x.shape)), (kind, list(how))
                ticket = epops.all_to_all_start(x.detach(), **how, group=group, out_size=out)
                halves = epops.all_to_all_wait(ticket, x.detach(), **how, group=group, out_size=out)
                assert same(halves.rows, want)


def gradient(rank: int, splits: list[list[int]], shape: torch.Size) -> torch.Tensor:
    """Row i of this rank went to row j of rank d, whose weight is (j + 1) * (d + 1)."""
    grad = torch.zeros(shape, dtype=torch.float64)
    at = 0
    for other in range(len(splits)):
        behind = sum(split[other] for split in splits[:rank])
        for step in range(splits[rank][other]):
            grad[at + step] = (behind + step + 1) * (other + 1)
        at += splits[rank][other]
    return grad


@pytest.mark.parametrize("size", (3, 5, 7))
def test_ugly_splits_on_ranks_that_are_no_power_of_two(size: int) -> None:
    run_ranks(ugly, size)


def every_dtype(rank: int, size: int) -> None:
    splits = splits_of("uneven", size)
    ins, outs = torch.tensor(splits[rank]), torch.tensor([split[rank] for split in splits])
    with epops.ExpertGroup(name="a2a") as group:
        plan = epops.plan_all_to_all(ins, group=group).plan
        for dtype in DTYPES:
            for width in ((), (5,), (0,), (1, 3)):
                x = rows_of(rank, (sum(splits[rank]) + 1, *width), dtype)
                got = epops.all_to_all(x, plan=plan, group=group, out_size=int(outs.sum()) + 1).rows
                assert same(got, expected_rows(rank, splits, dtype, width, int(outs.sum()) + 1)), (dtype, width)
        for dtype in FLOATS:  # one plan for layers of any dtype and width, and their gradients
            x = rows_of(rank, (sum(splits[rank]), 2), dtype).requires_grad_()
            got = epops.all_to_all(x, plan=plan, group=group, out_size=int(outs.sum())).rows
            (grad,) = torch.autograd.grad(got, x, torch.full_like(got, 0.5))
            assert grad.dtype == dtype and bool((grad == 0.5).all())


def test_every_dtype_and_width() -> None:
    run_ranks(every_dtype, 3)


def both_dims(rank: int, size: int, tokens: list[int], heads: list[int]) -> None:
    """Tokens scattered and heads gathered and back, ragged in both, with plans, any order of dims, gradients."""
    total, mine, all_heads = sum(tokens), tokens[rank], sum(heads)
    full = torch.arange(total * all_heads * 2, dtype=torch.float64).view(total, all_heads, 2) + 1
    before = sum(heads[:rank])
    part = torch.nn.functional.pad(
        full[:, before : before + heads[rank]], (0, 0, 0, 0, 0, 2)
    )  # bound on the tokens: T + 2
    own = full[sum(tokens[:rank]) :][:mine]
    with epops.ExpertGroup(name="a2a") as group:
        out = epops.plan_all_to_all(torch.tensor(tokens), torch.tensor(heads), group=group).plan
        back = epops.plan_all_to_all(torch.tensor(heads), torch.tensor(tokens), group=group).plan
        for order in ((0, 1, 2), (1, 0, 2), (2, 1, 0), (1, 2, 0)):
            place = [order.index(dim) for dim in range(3)]
            x = part.permute(order).requires_grad_()
            settings = {"scatter_dim": place[0], "gather_dim": place[1]}
            there = epops.all_to_all(x, plan=out, group=group, scatter_size=mine + 1, out_size=all_heads, **settings)
            rows = there.rows.permute(place)
            assert same(rows[:mine].detach(), own) and not rows[mine:].any()
            assert there.counts.tolist() == heads
            settings = {"scatter_dim": place[1], "gather_dim": place[0]}
            again = epops.all_to_all(
                there.rows * 2, plan=back, group=group, scatter_size=heads[rank], out_size=total + 2, **settings
            )
            assert same(again.rows.permute(place).detach(), part * 2) and again.counts.tolist() == tokens
            (grad,) = torch.autograd.grad((again.rows * part.permute(order)).sum(), x)
            assert same(grad, 2 * part.permute(order))


@pytest.mark.parametrize(
    ("tokens", "heads"),
    [([3, 0, 4], [2, 2, 2]), ([0, 0, 5], [3, 1, 0]), ([0, 0, 0], [1, 2, 3]), ([2, 1, 3, 0, 4], [1] * 5)],
)
def test_one_dim_scattered_another_gathered_both_ragged(tokens: list[int], heads: list[int]) -> None:
    run_ranks(both_dims, len(tokens), tokens, heads)


def strided(rank: int, size: int) -> None:
    """x as a view of every other row, of a transposed matrix, of one element for all: rows are the same as of a copy."""
    with epops.ExpertGroup(name="a2a") as group:
        base = rows_of(rank, (4 * size, 3 * size, 2), torch.float32)
        for view in (
            base[::2, ::3],
            base.permute(2, 0, 1).transpose(0, 1)[1::2],
            base[:1, :1, :1].expand(2 * size, size, 2),
        ):
            for scatter, gather in ((0, 0), (0, 1), (1, 0), (0, 2)):
                if view.shape[scatter] % size == 0:
                    settings = {"group": group, "scatter_dim": scatter, "gather_dim": gather}
                    got = epops.all_to_all(view, **settings).rows
                    assert same(got, epops.all_to_all(view.contiguous(), **settings).rows) and got.is_contiguous()


def test_strided_input() -> None:
    run_ranks(strided, 3)


def plans_of_other_sizes(rank: int, size: int) -> None:
    """A plan lives on while others are made and used, and serves layers of other widths and dtypes again and again."""
    with epops.ExpertGroup(name="a2a") as group:
        plans = {}
        for kind in KINDS:
            plans[kind] = epops.plan_all_to_all(torch.tensor(splits_of(kind, size)[rank]), group=group).plan
        for turn, kind in enumerate([*KINDS, *KINDS[::-1], *KINDS]):
            splits, dtype = splits_of(kind, size), FLOATS[turn % 4]
            out = sum(split[rank] for split in splits) + turn
            x = rows_of(rank, (sum(splits[rank]) + 1, turn + 1), dtype)
            got = epops.all_to_all(x, plan=plans[kind], group=group, out_size=out).rows
            assert same(got, expected_rows(rank, splits, dtype, (turn + 1,), out))


def test_plans_are_used_again_and_beside_one_another() -> None:
    run_ranks(plans_of_other_sizes, 3)


@pytest.mark.parametrize("dims", [(0, 0), (0, 1), (1, 0), (2, 1)])
def test_opcheck_of_dims_and_plans(dims: tuple[int, int]) -> None:
    with epops.ExpertGroup(name="a2a"):
        x = torch.randn(4, 4, 4, requires_grad=True)
        plan = torch.ops.epops.plan_all_to_all(
            torch.tensor([3]), torch.tensor([4 if dims[0] != dims[1] else 3]), group="a2a", ep_size=1
        )
        same_dim = dims[0] == dims[1]
        torch.library.opcheck(
            torch.ops.epops.all_to_all.default,
            (x, None, None, plan[0]),
            {
                "group": "a2a",
                "ep_size": 1,
                "out_size": 5,
                "scatter_size": 5 if same_dim else 4,
                "scatter_dim": dims[0],
                "gather_dim": dims[1],
            },
        )
