"""all_to_all over transport nvlink, one process a GPU: the public op, its gradient, plans, halves, CUDA graphs, wrong splits."""

from __future__ import annotations

import pytest
import torch

from .test_nvlink import run_ranks

pytestmark = pytest.mark.gpu


def group_of(name, transport="nvlink", **settings):
    import epops

    return epops.ExpertGroup(None, name, device="cuda", transport=transport, **settings)


def rows_of(rank, count, *width, dtype=torch.bfloat16):
    made = torch.Generator().manual_seed(100 * count + rank)
    return torch.randint(-99, 100, (count, *width), generator=made).to(dtype)


def splits_of(world, seed):
    made = torch.Generator().manual_seed(seed)
    return torch.randint(0, 40, (world, world), generator=made)


def expected_rows(splits, rank, out_size, *width, dtype=torch.bfloat16):
    pieces = []
    for source, row in enumerate(splits.tolist()):
        at = sum(row[:rank])
        pieces.append(rows_of(source, sum(row), *width, dtype=dtype)[at : at + row[rank]])
    out = torch.zeros(out_size, *width, dtype=dtype)
    came = torch.cat(pieces)
    out[: len(came)] = came
    return out


def public_scenario(rank, world):
    """Splits alone, with what is expected, as a plan; whole and in halves with work beside; float64 gradients."""
    import epops

    square = torch.randn(512, 512, device="cuda")
    with group_of("public", timeout=20) as group:
        assert group.transport.name == "nvlink"
        for seed in range(6):
            splits = splits_of(world, seed)
            ins, outs = splits[rank].cuda(), splits[:, rank].contiguous().cuda()
            out_size = int(outs.sum()) + 3
            for width, dtype in (((33,), torch.bfloat16), ((2, 64), torch.float32), ((5,), torch.uint8)):
                x = rows_of(rank, int(ins.sum()), *width, dtype=dtype).cuda()
                want = expected_rows(splits, rank, out_size, *width, dtype=dtype)
                plan = epops.plan_all_to_all(ins, group=group).plan
                assert plan.tolist() == epops.plan_all_to_all(ins, outs, group=group).plan.tolist()
                for given in ({"input_splits": ins}, {"input_splits": ins, "output_splits": outs}, {"plan": plan}):
                    got = epops.all_to_all(x, **given, group=group, out_size=out_size)
                    assert torch.equal(got.rows.cpu(), want) and got.counts.tolist() == outs.tolist(), (seed, width)
                    ticket = epops.all_to_all_start(x, **given, group=group, out_size=out_size)
                    beside = [square @ square for _ in range(4)]
                    late = epops.all_to_all_wait(ticket, x, **given, group=group, out_size=out_size)
                    assert torch.equal(late.rows.cpu(), want) and len(beside) == 4, (seed, width)
        group.check()
        splits = splits_of(world, 50)
        ins, outs = splits[rank].cuda(), splits[:, rank].contiguous().cuda()
        plan = epops.plan_all_to_all(ins, group=group).plan
        for given in ({"input_splits": ins}, {"input_splits": ins, "output_splits": outs}, {"plan": plan}):
            x = rows_of(rank, int(ins.sum()) + 2, 6, dtype=torch.float64).cuda().requires_grad_()
            rows = epops.all_to_all(x, **given, group=group, out_size=int(outs.sum())).rows
            (rows * 3).sum().backward()
            want = torch.full_like(x, 3.0)
            want[int(ins.sum()) :] = 0
            assert torch.equal(x.grad, want), given
        group.check()


def heads_scenario(rank, world):
    """Tokens to heads and back again, on views: the rows of every rank, and the gradient of the way there and back."""
    import epops

    with group_of("heads", timeout=20) as group:
        heads, width = 3, 24
        for seed in range(4):
            tokens = torch.randint(0, 30, (world,), generator=torch.Generator().manual_seed(seed))
            total, mine = int(tokens.sum()), int(tokens[rank])
            all_heads = rows_of(9, total, heads * world, width, dtype=torch.float32).cuda()
            first = int(tokens[:rank].sum())
            x = all_heads[:, heads * rank : heads * (rank + 1)].detach().requires_grad_()  # a view of other heads' rows
            each = torch.full((world,), heads, device="cuda")
            ins = tokens.cuda()
            there = epops.all_to_all(
                x, ins, each, group=group, scatter_dim=0, gather_dim=1, scatter_size=mine, out_size=heads * world
            ).rows
            assert torch.equal(there, all_heads[first : first + mine]), seed
            back = epops.all_to_all(
                there.transpose(0, 1),
                each,
                ins,
                group=group,
                scatter_dim=0,
                gather_dim=1,
                scatter_size=heads,
                out_size=total,
            ).rows
            assert torch.equal(back, x.transpose(0, 1)), seed
            weights = torch.randn(heads, total, width, device="cuda")
            (back * weights).sum().backward()
            assert torch.equal(x.grad, weights.transpose(0, 1)), seed
        group.check()


def quant_scenario(rank, world):
    """fp8 and scales in one exchange, from a replayed graph too: what quantizing every rank's rows by themselves gives."""
    import epops
    from epops.reference.quantize import quantize_rows

    width = 256
    kinds = ({}, {"block": 0}, {"scale_format": "ue8m0"})
    with group_of("quant", timeout=20) as group:
        for number, quant in enumerate(kinds):
            splits = splits_of(world, number)
            bound = int(splits.sum(dim=0).max()) + 3
            xs = [rows_of(source, int(splits[source].sum()), width).cuda() for source in range(world)]
            x, ins = xs[rank], splits[rank].cuda()
            outs = splits[:, rank].contiguous().cuda()
            made = [quantize_rows(one, **{"block": 128, **quant}) for one in xs]
            starts = [int(splits[source, :rank].sum()) for source in range(world)]
            pieces = [slice(starts[source], starts[source] + int(splits[source, rank])) for source in range(world)]
            want = [torch.cat([pair[part][piece] for pair, piece in zip(made, pieces)]) for part in (0, 1)]
            given = {"group": group, "out_size": bound, **quant}

            def check(got, want=want, outs=outs):
                assert got.counts.tolist() == outs.tolist()
                for ours, theirs in zip(got[:2], want):
                    assert ours.dtype == theirs.dtype
                    ours, theirs = ours.view(torch.uint8), theirs.view(torch.uint8)
                    assert torch.equal(ours[: len(theirs)], theirs) and not ours[len(theirs) :].any()

            check(epops.all_to_all_quant(x, ins, outs, **given))
            plan = epops.plan_all_to_all(ins, group=group).plan
            started = epops.all_to_all_quant_start(x, plan=plan, **given)
            check(epops.all_to_all_quant_wait(started, x, plan=plan, **given))
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                got = epops.all_to_all_quant(x, ins, outs, **given)
            for _ in range(3):
                graph.replay()
            torch.cuda.synchronize()
            check(got)
        group.check()


def graph_scenario(rank, world):
    """A dispatch, exchanges below and above the ring's turn, and a combine in one graph; splits change from replay to replay."""
    import epops

    from .ranks import Shape
    from .test_nvlink import Step, make, same

    shape = Shape(world, 40, 4, 8 * world, 8, 256, alignment=4)
    with make("mixed", shape, timeout=20) as group:
        group.transport.tune(ring_bytes=2 << 20, whole_bytes=128 << 10)
        step = Step(group, shape, rank)
        cases = [(60, 33), (9000, 256)]
        xs = [rows_of(rank, most * world, width).cuda() for most, width in cases]
        held = [torch.zeros(world, dtype=torch.int64, device="cuda") for _ in cases]

        def run():
            got = [epops.all_to_all(xs[0], held[0], group=group, out_size=cases[0][0] * world)]
            step()
            ticket = epops.all_to_all_start(xs[1], held[1], group=group, out_size=cases[1][0] * world)
            again = epops.all_to_all(xs[0], held[0], group=group, out_size=cases[0][0] * world)
            got.append(epops.all_to_all_wait(ticket, xs[1], held[1], group=group, out_size=cases[1][0] * world))
            return [*got, again], step.out

        step.load(0)
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results, out = run()
        for turn in range(60):
            made = torch.Generator().manual_seed(turn)
            splits = [torch.randint(0, most, (world, world), generator=made) for most, _ in cases]
            for into, value in zip(held, splits, strict=True):
                into.copy_(value[rank])
            step.load(turn)
            graph.replay()
            if turn % 10 == 9 or turn < 3:
                same(out, step.expected(turn), f"turn {turn}")
                for number in (0, 1):
                    most, width = cases[number]
                    pieces = []
                    for source, row in enumerate(splits[number].tolist()):
                        at = sum(row[:rank])
                        pieces.append(rows_of(source, most * world, width)[at : at + row[rank]])
                    want = torch.cat(pieces)
                    for result in results[number::2]:
                        assert result.counts.tolist() == [len(piece) for piece in pieces], (turn, number)
                        assert torch.equal(result.rows[: len(want)].cpu(), want), (turn, number)
                        assert not result.rows[len(want) :].any(), (turn, number)
        torch.cuda.synchronize()
        group.check()
    graph.reset()


def hostile_scenario(rank, world):
    """Splits that disagree or lie outside x raise on check, take no time, and leave the group in use."""
    import epops

    with group_of("hostile", timeout=20) as group:
        x = rows_of(rank, 4000, 256).cuda()
        each = torch.full((world,), 1000, device="cuda")
        wrong = each.clone()
        wrong[(rank + 1) % world] = 999
        got = epops.all_to_all(x, each, wrong, group=group, out_size=1000 * world)
        own = x[1000 * rank : 1000 * rank + 1000]
        at = int(wrong[:rank].sum())
        assert torch.equal(got.rows[at : at + 1000], own)
        with pytest.raises(epops.DisagreementError, match="disagree"):
            group.check()
        got = epops.all_to_all(x, torch.full((world,), -(1 << 60) + rank, device="cuda"), group=group, out_size=8)
        assert not got.rows.any() and got.counts.tolist() == [0] * world
        with pytest.raises(epops.EpopsError, match="out of range"):
            group.check()
        got = epops.all_to_all(x, each, each, group=group, out_size=1000 * world)
        want = torch.cat([rows_of(r, 4000, 256)[1000 * rank : 1000 * rank + 1000] for r in range(world)])
        assert torch.equal(got.rows.cpu(), want)
        group.check()


def lost_scenario(rank, world):
    """A rank that stalls past the timeout: the others get zeros and an error after one timeout, later exchanges go on."""
    import time

    import epops

    with group_of("lost", timeout=1.0) as group:
        x = rows_of(rank, 3000 * world, 256).cuda()
        each = torch.full((world,), 3000, device="cuda")
        epops.all_to_all(x, each, group=group, out_size=3000 * world)
        torch.cuda.synchronize()
        if rank == world - 1:
            time.sleep(2.0)
        start = time.monotonic()
        got = epops.all_to_all(x, each, group=group, out_size=3000 * world)
        torch.cuda.synchronize()
        assert time.monotonic() - start < 3.0
        with pytest.raises(epops.PeerError, match="excluded" if rank == world - 1 else "did not arrive"):
            group.check()
        if rank != world - 1:
            assert not got.rows.any(), "never a row that may be another's"
    torch.cuda.synchronize()


def test_the_public_ops_with_plans_halves_and_gradients():
    run_ranks(public_scenario)


def test_tokens_to_heads_and_back_on_views():
    run_ranks(heads_scenario)


def test_a_graph_with_dispatch_and_combine_replays_with_new_splits():
    run_ranks(graph_scenario)


def test_fp8_and_scales_in_one_exchange():
    run_ranks(quant_scenario)


def test_hostile_splits_are_reported():
    run_ranks(hostile_scenario)


def test_a_rank_that_stalls_is_left_behind():
    run_ranks(lost_scenario)
