"""all_to_all for R ranks on one GPU that run at once, against the reference's cut and join, bit for bit."""

from __future__ import annotations

import dataclasses
import random
from typing import Any, NamedTuple

import pytest
import torch

from epops import layout as words
from epops.reference.all_to_all import cut, even_splits, join, write_plan

if torch.cuda.is_available():
    from epops.transport import kernel_all_to_all, kernels

    from .ranks import Ranks

pytestmark = pytest.mark.gpu

MIB = 1 << 20


class Call(NamedTuple):
    """One exchange of R ranks; splits[source][destination] along ``scatter``."""

    splits: list[list[int]]
    shape: tuple[int, ...]  # of x, but for the dims that follow from the splits
    scatter: int = 0
    gather: int = 0
    dtype: torch.dtype = torch.bfloat16
    gathered: tuple[int, ...] | None = None  # of each rank, along `gather`, where the dims differ
    spare: int = 1  # steps of x that go nowhere, and of the result that nothing reaches
    how: str = "splits"  # or "both", "plan", "even"
    strided: bool = False
    expected: list[list[int]] | None = None  # output splits that a rank gives, where they are wrong
    out_size: int | None = None
    scatter_size: int | None = None


def bits_of(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    made = torch.Generator().manual_seed(seed)
    count = 1
    for size in shape:
        count *= size
    return torch.randint(0, 120, (count * dtype.itemsize,), generator=made, dtype=torch.uint8).view(dtype).view(shape)


def inputs_of(call: Call, rank: int, seed: int) -> torch.Tensor:
    shape = list(call.shape)
    shape[call.scatter] = sum(call.splits[rank]) + (0 if call.how == "even" else call.spare)
    if call.gathered is not None:
        shape[call.gather] = call.gathered[rank]
    if not call.strided:
        return bits_of(tuple(shape), call.dtype, seed * 97 + rank)
    # In memory: the dims in another order, and every second step of the outermost.
    order = list(range(len(shape)))
    random.Random(seed).shuffle(order)
    inner = [shape[dim] for dim in order]
    held = bits_of((2 * inner[0] + 1, *inner[1:]), call.dtype, seed * 97 + rank)
    return held[1 : 2 * inner[0] + 1 : 2].permute([order.index(dim) for dim in range(len(shape))])


def outputs_of(call: Call, rank: int) -> list[int]:
    """What each rank has for this one, along ``gather``."""
    if call.expected is not None:
        return call.expected[rank]
    if call.gathered is not None:
        return list(call.gathered)
    return [split[rank] for split in call.splits]


class Wanted(NamedTuple):
    rows: torch.Tensor
    counts: list[int]
    bits: int
    dropped: int


def sizes_of(call: Call, rank: int) -> tuple[int, int]:
    """out_size, scatter_size."""
    came = sum(outputs_of(call, rank))
    out_size = call.out_size if call.out_size is not None else came + (0 if call.how == "even" else call.spare)
    if call.scatter == call.gather:
        return out_size, out_size
    most = max(call.splits[rank]) if call.how != "even" else call.splits[rank][0]
    return out_size, call.scatter_size if call.scatter_size is not None else most


def wanted(call: Call, xs: list[torch.Tensor]) -> list[Wanted]:
    """What `epops.ops.all_to_all.finish` makes of the pieces, in one process."""
    num_ranks, same = len(xs), call.scatter == call.gather
    results = []
    for rank in range(num_ranks):
        given = outputs_of(call, rank) if call.how in ("both", "plan") else None
        chunks, came, bits = [], [], 0
        for source, x in enumerate(xs):
            splits = call.splits[source]
            mine = x.shape[call.gather]
            if not same and call.how in ("both", "plan"):
                mine = min(outputs_of(call, source)[source], mine)
            offsets = [sum(splits[:peer]) for peer in range(num_ranks)]
            chunk = cut(
                x, splits, offsets, scatter_dim=call.scatter, gather_dim=call.gather, gather_size=mine
            )[rank]  # fmt: skip
            size = splits[rank] if same else mine
            wrong = (
                given is not None and size != given[source] or (not same and splits[rank] != call.splits[rank][rank])
            )
            bits |= words.STATUS_DISAGREE * wrong
            chunks.append(chunk.narrow(call.gather, 0, 0) if wrong else chunk)
            came.append(size)
        out_size, scatter_size = sizes_of(call, rank)
        shape = list(xs[rank].shape)
        shape[call.scatter], shape[call.gather] = scatter_size, out_size
        placed = came if given is None else given
        offsets = [sum(placed[:source]) for source in range(num_ranks)]
        whole = [chunk.contiguous().view(words_of(call.dtype)) for chunk in chunks]
        out, lost = join(whole, offsets, shape, scatter_dim=call.scatter, gather_dim=call.gather)
        bits |= words.STATUS_OVERFLOW * (lost > 0)
        results.append(Wanted(out, came, bits, lost))
    return results


def words_of(dtype: torch.dtype) -> torch.dtype:
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]


def make_ranks(num_ranks: int, ring: int = 4 * MIB, **tuning: Any) -> Ranks:
    ranks = Ranks(num_ranks, kernels.Sizes(8, 2, 4, 256, ring), tuning=kernels.Tuning(**tuning))
    ranks.tuning.limit_blocks = max(2, ranks.tuning.limit_blocks)
    return ranks


def on_device(call: Call, rank: int, x: torch.Tensor) -> dict[str, Any]:
    ins = torch.tensor(call.splits[rank])
    outs = torch.tensor(outputs_of(call, rank))
    given = {
        "splits": {"input_splits": ins},
        "both": {"input_splits": ins, "output_splits": outs},
        "plan": {"plan": write_plan(ins, outs)},
        "even": {},
    }[call.how]
    return {"x": x, **{name: tensor.cuda() for name, tensor in given.items()}}


def to_device(x: torch.Tensor) -> torch.Tensor:
    """With the strides and the place in its storage that it has here."""
    held = torch.empty(0, dtype=words_of(x.dtype)).set_(x.untyped_storage())
    return held.cuda().as_strided(x.shape, x.stride(), x.storage_offset()).view(x.dtype)


def run(ranks: Ranks, call: Call, seed: int = 0, repeat: int = 1, tunings: Any = None) -> None:
    """``tunings``: one a rank, where they are not those of ``ranks``."""
    num_ranks = len(call.splits)
    xs = [inputs_of(call, rank, seed) for rank in range(num_ranks)]
    want = wanted(call, xs)
    given = [on_device(call, rank, to_device(x)) for rank, x in enumerate(xs)]

    def exchange(rank: int) -> Any:
        out_size, scatter_size = sizes_of(call, rank)
        return kernel_all_to_all.all_to_all(
            ranks.workspaces[rank], tunings[rank] if tunings else ranks.tuning, ranks.num_sms, **given[rank],
            out_size=out_size, scatter_size=scatter_size, scatter_dim=call.scatter, gather_dim=call.gather,
        )  # fmt: skip

    for turn in range(repeat):
        got = ranks.run(exchange)
        for rank in range(num_ranks):
            check(got[rank], want[rank], f"{call} seed {seed} rank {rank} turn {turn}")


def exchange_rows(ranks: Ranks, given: list[dict[str, Any]], size: int) -> list[Any]:
    """What each rank gets along dim 0, of room for ``size``."""
    return ranks.run(
        lambda rank: kernel_all_to_all.all_to_all(
            ranks.workspaces[rank], ranks.tuning, ranks.num_sms, **given[rank], out_size=size, scatter_size=size
        )
    )


def check(got: Any, want: Wanted, here: str) -> None:
    rows, counts, status = (part.cpu() for part in got)
    assert counts.tolist() == want.counts, here
    found = [want.bits, sum(want.counts), want.dropped, 0, 0, -1]
    assert status.tolist()[:6] == found, f"status {status.tolist()}, expected {found}; {here}"
    assert rows.shape == want.rows.shape, here
    rows = rows.view(want.rows.dtype)
    assert torch.equal(rows, want.rows), f"{int((rows != want.rows).sum())} elements differ; {here}"


def splits_of(kind: str, num_ranks: int, scale: int = 1) -> list[list[int]]:
    size = range(num_ranks)
    if kind == "to_one":
        return [[3 * scale * (d == num_ranks - 1) for d in size] for _ in size]
    if kind == "none":
        return [[0] * num_ranks for _ in size]
    if kind == "ring":
        return [[2 * scale * (d == (s + 1) % num_ranks) for d in size] for s in size]
    return [[(5 * s + 3 * d + s * d) % 4 * scale for d in size] for s in size]


def by_owner(num_ranks: int, scale: int = 1) -> list[list[int]]:
    """Splits where every rank gives rank d as much, as where two dims differ."""
    return [[(3 * d + 1) % 5 * scale for d in range(num_ranks)] for _ in range(num_ranks)]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 7, 8, 16])
def test_any_number_of_ranks(num_ranks):
    ranks = make_ranks(num_ranks)
    for kind in ("uneven", "to_one", "ring", "none"):
        for how in ("splits", "both", "plan"):
            run(ranks, Call(splits_of(kind, num_ranks, 7), (0, 40), how=how), repeat=2)
    run(ranks, Call([[3] * num_ranks] * num_ranks, (0, 24), how="even"))
    for scatter, gather in ((0, 1), (1, 0)):
        shape = (4, 4, 64)
        run(ranks, Call(by_owner(num_ranks), shape, scatter, gather, gathered=(4,) * num_ranks, how="plan"), repeat=2)
    for error in ranks.errors:
        assert kernels.take_error(error) is None


EITHER_KERNEL = pytest.mark.parametrize("small", [{}, {"small_bytes": 0}], ids=["small", "any"])


def of_bytes(num_ranks: int, size: int, unit: int) -> list[list[int]]:
    """Splits of rows of ``unit`` bytes; what every rank sends is ``size`` bytes, a part of it to each rank, none to one."""
    rows, splits = size // unit, []
    for source in range(num_ranks):
        parts = [rows // (2 * num_ranks) * (1 + (source + d) % 2) for d in range(num_ranks)]
        parts[(source + 2) % num_ranks] = 0
        parts[(source + 1) % num_ranks] += rows - sum(parts)
        splits.append(parts)
    return splits


@pytest.mark.parametrize("num_ranks", [2, 3, 5])
def test_little_below_at_and_above_the_limit_of_its_kernel(num_ranks):
    ranks = make_ranks(num_ranks)
    limit = min(ranks.tuning.small_bytes, ranks.workspaces[0].tagged_bytes)
    for size in (limit - 16, limit, limit + 16):
        for how in ("splits", "both", "plan"):
            run(ranks, Call(of_bytes(num_ranks, size, 16), (0, 8), how=how, spare=0))
        for to_one in (1, 0):  # all of it in one piece: the largest that travels as words, and the first that does not
            splits = [
                [size // 16 * (d == (s + to_one) % num_ranks) for d in range(num_ranks)] for s in range(num_ranks)
            ]
            run(ranks, Call(splits, (0, 8), spare=0), repeat=3)
    for size in (limit - 2, limit + 2):
        run(ranks, Call(of_bytes(num_ranks, size, 2), (0,), how="both", spare=0))
    for tokens in (limit // 256 - num_ranks, limit // 256 + num_ranks):
        each = [[tokens // num_ranks + (d == 0) for d in range(num_ranks)]] * num_ranks
        run(ranks, Call(each, (4, 0, 32), 1, 0, gathered=(4,) * num_ranks, how="plan", spare=0), repeat=2)
    for error in ranks.errors:
        assert kernels.take_error(error) is None


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_on_either_side_of_the_limit(num_ranks):
    """Some run one kernel and some the other, by what they have or by their settings; pieces that are no words come to either."""
    ranks = make_ranks(num_ranks, ring=1 * MIB)
    limit = ranks.workspaces[0].tagged_bytes
    rows = limit // 80
    for much in (rows + 1, 5 * rows, 40 * rows):
        splits = [[3 + 5 * d for d in range(num_ranks)] for _ in range(num_ranks)]
        splits[0] = [much // (d + 1) for d in range(num_ranks)]
        for how in ("splits", "both", "plan"):
            run(ranks, Call(splits, (0, 40), how=how), repeat=2)
        run(ranks, Call(splits, (0, 40), out_size=rows // 2))
        outs = [[split[rank] for split in splits] for rank in range(num_ranks)]
        outs[num_ranks - 1][0] += 1
        run(ranks, Call(splits, (0, 40), how="both", expected=outs))
    for rank in range(num_ranks):
        ranks.errors[rank].zero_()
    tunings = [dataclasses.replace(ranks.tuning, small_bytes=rank % 2 * limit) for rank in range(num_ranks)]
    for scale in (1, 20):
        for how in ("splits", "both", "plan"):
            run(ranks, Call(splits_of("uneven", num_ranks, scale), (0, 40), how=how), repeat=2, tunings=tunings)
            gathered = tuple(2 + rank for rank in range(num_ranks))
            call = Call(by_owner(num_ranks, scale), (4, 4, 24), 1, 0, gathered=gathered, how=how, strided=True)
            run(ranks, call, repeat=2, tunings=tunings)
    for error in ranks.errors:
        assert kernels.take_error(error) is None


@EITHER_KERNEL
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.complex64])
@pytest.mark.parametrize("width", [(), (1,), (3,), (7, 5), (2, 0, 3), (64,), (513,)])
def test_elements_and_rows_of_any_size(dtype, width, small):
    ranks = make_ranks(3, **small)
    for scale in (1, 50):
        run(ranks, Call(splits_of("uneven", 3, scale), (0, *width), dtype=dtype, how="both"))
        run(ranks, Call(splits_of("uneven", 3, scale), (0, *width), dtype=dtype, strided=True), seed=scale)


DIMS = [(s, g) for s in range(3) for g in range(3)]


@EITHER_KERNEL
@pytest.mark.parametrize(("scatter", "gather"), DIMS)
@pytest.mark.parametrize("strided", [False, True])
def test_any_two_dims(scatter, gather, strided, small):
    ranks = make_ranks(3, **small)
    for number, (shape, dtype) in enumerate(
        (
            ((4, 6, 8), torch.bfloat16),
            ((5, 3, 7), torch.uint8),
            ((2, 9, 16), torch.float32),
            ((3, 2, 33), torch.float64),
        )
    ):
        for scale in (1, 9):
            same = scatter == gather
            splits = splits_of("uneven", 3, scale) if same else by_owner(3, scale)
            gathered = None if same else tuple(n * scale for n in (2, 5, 3))
            for how in ("splits", "both", "plan"):
                call = Call(splits, shape, scatter, gather, dtype, gathered, how=how, strided=strided)
                run(ranks, call, seed=number)
            run(
                ranks, Call(splits, (2, *shape), scatter + 1, gather + 1, dtype, gathered, strided=strided), seed=number
            )


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("how", ["splits", "both"])
def test_exchanges_larger_than_the_ring(num_ranks, how):
    ranks = make_ranks(num_ranks, ring=1 * MIB, whole_bytes=0)
    ws = ranks.workspaces[0]
    scale = 4 * ws.ring_slots * ws.slot_bytes // 1024 // 3
    for kind in ("uneven", "to_one", "ring"):
        run(ranks, Call(splits_of(kind, num_ranks, scale), (0, 512), how=how), repeat=2)
    run(ranks, Call(splits_of("uneven", num_ranks, scale), (0, 1021), dtype=torch.uint8, how=how))
    gathered = tuple(2 + rank % 3 for rank in range(num_ranks))
    run(ranks, Call(by_owner(num_ranks, scale // 4), (4, 4, 256), 1, 0, gathered=gathered, how=how, strided=True))
    run(ranks, Call(by_owner(num_ranks, scale // 4), (4, 4, 256), 0, 1, gathered=gathered, how=how))
    # Rows longer than a chunk, of a size that is and of one that is not a multiple of it.
    for more in (0, 3):
        owners = [[n + more for n in row] for row in by_owner(num_ranks, scale // 2)]
        run(ranks, Call(owners, (4, 4, 64), 1, 0, gathered=gathered, how=how))


def test_ranks_of_very_different_sizes():
    """One sends from both ends of the ring, the others from few blocks."""
    ranks = make_ranks(3, ring=1 * MIB)
    splits = [[0, 9000, 7000], [3, 0, 2], [1, 1, 1]]
    run(ranks, Call(splits, (0, 512)), repeat=3)
    run(ranks, Call([list(row) for row in zip(*splits)], (0, 512), how="plan"), repeat=3)


@EITHER_KERNEL
def test_splits_that_disagree_are_reported_and_no_row_is_taken_for_another(small):
    ranks = make_ranks(3, ring=1 * MIB, whole_bytes=0, **small)
    for scale in (1, 300, 6000):
        splits = [[n * scale for n in row] for row in ([2, 1, 3], [0, 2, 1], [4, 1, 1])]
        outs = [[split[rank] for split in splits] for rank in range(3)]
        outs[0][1] += scale
        outs[2][0] -= 2 * scale
        run(ranks, Call(splits, (0, 40), how="both", expected=outs))
        by_dims = [[2 * scale, scale, scale], [2 * scale, 2 * scale, scale], [2 * scale, scale, scale]]
        run(ranks, Call(by_dims, (4, 4, 8), 1, 0, gathered=(4, 4, 4), how="both"))
        told = [kernels.take_error(error) for error in ranks.errors]
        assert any(error is not None and error.bits & words.STATUS_DISAGREE for error in told)
    run(ranks, Call(splits_of("uneven", 3, 5), (0, 40)))
    assert not any(kernels.take_error(error) for error in ranks.errors), "the next exchange is right again"


@EITHER_KERNEL
def test_splits_out_of_range_are_clamped_and_reported(small):
    ranks = make_ranks(2, **small)
    x = [torch.arange(8 * 16, dtype=torch.float32, device="cuda").view(8, 16) + 1000 * rank for rank in range(2)]
    for bad in ([-5, 3], [7, 7], [1 << 40, 1], [3, -(1 << 62)]):
        splits = [torch.tensor(bad).cuda(), torch.tensor([2, 3]).cuda()]
        got = exchange_rows(ranks, [{"x": rows, "input_splits": into} for rows, into in zip(x, splits)], 16)
        first = min(max(bad[0], 0), 8)
        sent = [first, min(max(bad[1], 0), 8 - first)]
        for rank in range(2):
            rows, counts, status = (part.cpu() for part in got[rank])
            assert counts.tolist() == [sent[rank], 2 + rank] and int(status[0]) == words.STATUS_BAD_INDEX
            at = sum(sent[:rank])
            want = torch.cat([x[0].cpu()[at : at + sent[rank]], x[1].cpu()[2 * rank : 2 + 3 * rank]])
            assert torch.equal(rows[: len(want)], want) and not rows[len(want) :].any()
    plan = write_plan(torch.tensor([4, 4]), torch.tensor([4, 4]))
    plan[0] = 9
    got = exchange_rows(ranks, [{"x": rows, "plan": plan.cuda()} for rows in x], 8)
    assert all(int(status[0]) & words.STATUS_BAD_INDEX and not rows.any() for rows, _, status in got)


@EITHER_KERNEL
def test_what_has_no_room_is_dropped_and_counted(small):
    ranks = make_ranks(3, **small)
    splits = splits_of("uneven", 3, 4)
    run(ranks, Call(splits, (0, 40), out_size=6))
    run(ranks, Call(by_owner(3, 3), (4, 4, 8), 1, 0, gathered=(4, 4, 4), out_size=7, scatter_size=5))


def test_calls_that_differ_are_reported_and_do_not_hang():
    ranks = make_ranks(2, ring=1 * MIB, whole_bytes=0)
    x = [torch.randn(60000, 64 if rank else 32, device="cuda") for rank in range(2)]
    got = exchange_rows(ranks, [{"x": rows} for rows in x], 60000)
    for rank in range(2):
        rows, counts, status = got[rank]
        half = x[rank][30000 * rank : 30000 * rank + 30000]
        assert int(status[0]) == words.STATUS_DISAGREE and counts.tolist() == [30000 * (1 - rank), 30000 * rank]
        assert torch.equal(rows[:30000], half) and not rows[30000:].any()
    run(ranks, Call(splits_of("uneven", 2, 5), (0, 40)))
    x = [torch.randn(30, 64 if rank else 32, device="cuda") for rank in range(2)]  # little on both ranks
    got = exchange_rows(ranks, [{"x": rows} for rows in x], 30)
    for rank in range(2):
        rows, counts, status = got[rank]
        half = x[rank][15 * rank : 15 * rank + 15]
        assert int(status[0]) == words.STATUS_DISAGREE and counts.tolist() == [15 * (1 - rank), 15 * rank]
        assert torch.equal(rows[:15], half) and not rows[15:].any()
    run(ranks, Call(splits_of("uneven", 2, 5), (0, 40)))


def test_a_graph_replays_with_any_splits():
    """Ops of three sizes in one graph, an odd number of them, with splits that change from replay to replay."""
    ranks = make_ranks(2, ring=1 * MIB, whole_bytes=64 << 10)
    widths, most = (8, 512, 5), 1500
    generator = torch.Generator().manual_seed(4)
    held = [
        [(bits_of((most, width), torch.bfloat16, 10 * n + r).cuda(), torch.zeros(2, dtype=torch.int64, device="cuda"))
         for n, width in enumerate(widths)]
        for r in range(2)
    ]  # fmt: skip
    graphs, outs = [], []
    for rank in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=ranks.streams[rank]):
            outs.append(
                [
                    kernel_all_to_all.all_to_all(
                        ranks.workspaces[rank],
                        ranks.tuning,
                        ranks.num_sms,
                        x,
                        splits,
                        out_size=2 * most,
                        scatter_size=2 * most,
                    )
                    for x, splits in held[rank]
                ]
            )
        graphs.append(graph)
    for turn in range(40):
        splits = [[torch.randint(0, most // 2, (2,), generator=generator) for _ in widths] for _ in range(2)]
        for rank in range(2):
            for (_, into), value in zip(held[rank], splits[rank], strict=True):
                into.copy_(value * (turn % 5 != 0))
        ranks.run(lambda rank: graphs[rank].replay())
        for rank in range(2):
            for n in range(len(widths)):
                scale = int(turn % 5 != 0)
                pieces = []
                for source in range(2):
                    first, second = (splits[source][n] * scale).tolist()
                    at = 0 if rank == 0 else first
                    pieces.append(held[source][n][0][at : at + (first, second)[rank]])
                want = torch.cat(pieces)
                rows, counts, status = outs[rank][n]
                assert counts.tolist() == [len(piece) for piece in pieces] and int(status[0]) == 0, (turn, rank, n)
                assert torch.equal(rows[: len(want)].view(torch.int16), want.view(torch.int16)), (turn, rank, n)
                assert not rows[len(want) :].view(torch.int16).any(), (turn, rank, n)


def test_random_exchanges():
    made = random.Random(3)
    for num_ranks in (2, 5):
        ranks = make_ranks(num_ranks, ring=1 * MIB, whole_bytes=100_000)
        for turn in range(60):
            num_dims = made.randint(1, 4)
            shape = tuple(made.choice((1, 2, 3, 8, 16, 33)) for _ in range(num_dims))
            scatter, gather = made.randrange(num_dims), made.randrange(num_dims)
            dtype = made.choice((torch.uint8, torch.bfloat16, torch.float32, torch.int64))
            scale = made.choice((1, 3, 16, 100))
            if scatter == gather:
                splits = [[made.randint(0, 3) * scale for _ in range(num_ranks)] for _ in range(num_ranks)]
                gathered = None
            else:
                splits = [[made.randint(0, 3) * scale for _ in range(num_ranks)]] * num_ranks
                gathered = tuple(made.randint(0, 6) for _ in range(num_ranks))
            call = Call(
                splits, shape, scatter, gather, dtype, gathered, spare=made.randint(0, 3),
                how=made.choice(("splits", "both", "plan")), strided=made.random() < 0.5,
            )  # fmt: skip
            run(ranks, call, seed=turn)


def test_even_parts_are_split_sizes_of_none():
    assert even_splits(9, 3) == [3, 3, 3]
    ranks = make_ranks(4)
    run(ranks, Call([[5] * 4] * 4, (0, 7, 3), how="even", dtype=torch.uint8))
    run(ranks, Call([[2] * 4] * 4, (4, 0, 8), 1, 0, gathered=(4,) * 4, how="even"))
