"""fuse_transpose where ranks of one program differ in sizes and splits: all come to one exchange, or it is left alone."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch.fx.experimental.proxy_tensor import make_fx

import epops
from epops.group import process_groups as open_process_groups
from epops.inspection.capture import apply_passes, capture
from epops.passes import process_groups
from epops.passes.decline_log import listen
from epops.passes.fuse_transpose import fuse_transpose
from epops.testing import count_ops
from tests.ranks import run_ranks


def torchs(x, came, sent):
    """torch's own collective, with gradients."""
    return collectives.all_to_all_single_autograd(x, came, sent, dist.group.WORLD)


def ours(x, splits=None, came=None, **settings):
    return epops.all_to_all(x, splits, came, group="ep", **settings).rows


def numbered(rank, *shape):
    return torch.arange(float(torch.Size(shape).numel())).view(shape) + 1000 * rank


# Each case: for a rank its program and inputs.  Splits of torch's are numbers, even on rank 0 and uneven on rank 1.


def even_here_only(rank):
    splits = [[2, 2], [2, 5]][rank]
    return lambda y: torchs(y.permute(0, 2, 1).contiguous(), splits, splits).permute(0, 2, 1).contiguous(), (
        numbered(rank, (4, 7)[rank], 4, 3),
    )


def even_here_only_and_viewed(rank):
    """Followed through the view, rank 0 would send rows of (A, B) and rank 1 of (B, A), as many bytes of each."""
    splits = [[2, 2], [2, 5]][rank]
    return lambda y: torchs(y.permute(0, 2, 1).contiguous(), splits, splits).view(-1, 3, 2, 2).permute(0, 2, 3, 1), (
        numbered(rank, (4, 7)[rank], 4, 3),
    )


def one_each_here_only(rank):
    splits = [[1, 1], [1, 5]][rank]
    return lambda y: torchs(y.t().contiguous(), splits, splits), (numbered(rank, 3, (2, 6)[rank]),)


def one_row_here(rank):
    """Nothing to copy where the transposed dim has one entry."""
    sent, came = ([0, 1], [0, 2]) if rank == 0 else ([2, 4], [1, 4])
    return lambda y: torchs(y.t().contiguous(), came, sent).t(), (numbered(rank, 3, (1, 6)[rank]),)


def no_row_here(rank):
    sent, came = ([0, 0], [0, 2]) if rank == 0 else ([2, 4], [0, 4])
    return lambda y: torchs(y.t().contiguous(), came, sent).t(), (numbered(rank, 3, (0, 6)[rank]),)


def even_numbers_and_entries_of_a_tensor(rank):
    """What is sent even and known, what comes uneven and read from a tensor."""
    came = torch.tensor([[2, 2], [2, 2]][rank])

    def program(y, came):
        return torchs(y.permute(0, 2, 1).contiguous(), came.tolist(), [2, 2]).permute(0, 2, 1)

    return program, (numbered(rank, 4, 4, 3), came)


def tensor_here_numbers_there(rank):
    """Rank 0 knows its even splits, rank 1 reads uneven ones from a tensor."""
    y = numbered(rank, (4, 7)[rank], 4, 3)
    if rank == 0:
        return lambda y: torchs(y.permute(0, 2, 1).contiguous(), [2, 2], [2, 2]).permute(0, 2, 1).contiguous(), (y,)

    def program(y, splits):
        splits = splits.tolist()
        return torchs(y.permute(0, 2, 1).contiguous(), splits, splits).permute(0, 2, 1).contiguous()

    return program, (y, torch.tensor([2, 5]))


def more_room(rank):
    return lambda y: ours(y.permute(1, 0, 2).contiguous(), out_size=9).permute(1, 0, 2).contiguous(), (
        numbered(rank, 4, 6, 2),
    )


def room_for_other_lengths(rank):
    """Heads out, tokens in: room for as many tokens as ranks have together, and more."""
    settings = {"scatter_dim": 1, "gather_dim": 0, "out_size": 7}
    return lambda y: ours(y.permute(1, 0, 2).contiguous(), **settings).permute(1, 0, 2).contiguous(), (
        numbered(rank, 4, (2, 3)[rank], 2),
    )


def one_token_here(rank):
    settings = {"scatter_dim": 0, "gather_dim": 1, "out_size": 4}
    return lambda y: ours(y.permute(1, 0, 2).contiguous(), **settings).permute(1, 0, 2).contiguous(), (
        numbered(rank, (1, 3)[rank], 4, 3),
    )


def one_token_here_by_plan(rank):
    def program(y, tokens, heads):
        plan = epops.plan_all_to_all(tokens, heads, group="ep").plan
        settings = {"scatter_dim": 0, "gather_dim": 1, "scatter_size": 5, "out_size": 8}
        return ours(y.permute(1, 0, 2).contiguous(), plan=plan, **settings).permute(1, 0, 2).contiguous()

    return program, (numbered(rank, 4, (1, 5)[rank], 3), torch.tensor([0, 1]), torch.tensor([4, 4]))


def one_token_here_and_only_views(rank):
    def program(y, tokens, heads):
        plan = epops.plan_all_to_all(tokens, heads, group="ep").plan
        settings = {"scatter_dim": 0, "gather_dim": 1, "scatter_size": 5, "out_size": 8}
        return ours(y.permute(1, 0, 2), plan=plan, **settings).permute(2, 0, 1)

    return program, (numbered(rank, 4, (1, 5)[rank], 3), torch.tensor([0, 1]), torch.tensor([4, 4]))


CASES = {
    case.__name__: case
    for case in (
        *(even_here_only, even_here_only_and_viewed, one_each_here_only, one_row_here, no_row_here),
        *(tensor_here_numbers_there, even_numbers_and_entries_of_a_tensor, more_room, room_for_other_lengths),
        *(one_token_here, one_token_here_by_plan, one_token_here_and_only_views),
    )
}


def same(rank, size, name):
    """Rewrites of the forward graph, and whether values and gradients are those of eager."""
    with epops.ExpertGroup(name="ep", timeout=20.0), torch._dynamo.config.patch(capture_scalar_outputs=True):
        program, given = CASES[name](rank)
        given = [item.requires_grad_(item.is_floating_point()) for item in given]
        wanted = [item for item in given if item.requires_grad]

        def weighed(*given):
            return program(*given) * 1

        plain = weighed(*given)
        expected = torch.autograd.grad(plain.sin().sum(), wanted)
        graphs, got = capture(weighed, *given, passes=[fuse_transpose], run=True)
        grads = torch.autograd.grad(got.sin().sum(), wanted)
        assert got.shape == plain.shape and torch.equal(got, plain), "values"
        assert all(map(torch.equal, grads, expected)), "gradients"
        again = [apply_passes(graph.after, [fuse_transpose], graph.kind).rewrites["fuse_transpose"] for graph in graphs]
        assert not any(again), "idempotent"
        return sum(graph.rewrites["fuse_transpose"] for graph in graphs)


@pytest.mark.parametrize("name", CASES)
def test_ranks_that_differ_come_to_one_exchange(name):
    counts = run_ranks(same, 2, name, timeout=90)
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("even", [False, True])
def test_torchs_own_with_parts_that_may_differ_stays_on_devices(even):
    """There ours moves equal parts; parts that a reshape cut out are equal on every rank.  (The device is "meta": no CUDA here.)"""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def program(x):
        if even:
            return (collectives.all_to_all_single(x.view(3, 2, -1).transpose(0, 1).contiguous(), None, None, dist.group.WORLD)
                    .transpose(0, 1).flatten(1) * 1,)  # fmt: skip
        return (collectives.all_to_all_single(x.t().contiguous(), [2, 4], [2, 4], dist.group.WORLD).t() * 1,)

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    before = process_groups.known
    try:
        with epops.ExpertGroup(name="ep"):
            process_groups.known = open_process_groups
            module = make_fx(program, tracing_mode="fake")(torch.empty(3, 6, device="meta"))
            with listen() as said:
                assert fuse_transpose(module.graph) == int(even)
    finally:
        process_groups.known = before
        dist.destroy_process_group()
    assert count_ops(module, "_c10d_functional.all_to_all_single") == int(not even)
    assert even or "padded to one size" in said[0].reason


def own_tokens_in_blocks(rank):
    """As many blocks as ranks on rank 0 alone, which no graph tells from blocks for the ranks."""
    splits = [[1, 1], [1, 5]][rank]

    def program(x):
        y = torchs(x.view(-1, 4, 3).transpose(1, 2).contiguous(), splits, splits)
        return y.view(-1, 3, 2, 2).permute(0, 2, 3, 1) * 1

    return program, numbered(rank, (4, 12)[rank], 6)


def refused_by_the_exchange(rank, size):
    with epops.ExpertGroup(name="ep", timeout=20.0), torch.no_grad():
        program, x = own_tokens_in_blocks(rank)
        try:
            capture(program, x, passes=[fuse_transpose], run=True)
        except Exception as error:
            return "disagrees on x, the sizes of its dims" in str(error)
        return False


def test_other_exchanges_of_as_many_bytes_are_an_error_and_no_numbers():
    assert run_ranks(refused_by_the_exchange, 2) == [True, True]


def known_here_symbolic_there(rank, size):
    def program(x):
        y = torchs(x.view(2, -1, 4, 3).transpose(2, 3).contiguous(), [1, 1], [1, 1])
        return y.view(2, -1, 3, 2, 2).permute(0, 1, 3, 4, 2) * 1

    with epops.ExpertGroup(name="ep", timeout=20.0), torch.no_grad():
        x = numbered(rank, 6, 4, 3)
        expected = program(x)
        if rank == 1:
            torch._dynamo.mark_dynamic(x, 0)
        graphs, got = capture(program, x, passes=[fuse_transpose], run=True)
        return torch.equal(got, expected), graphs[0].rewrites["fuse_transpose"]


def test_tokens_known_on_one_rank_and_symbolic_on_another():
    assert run_ranks(known_here_symbolic_there, 2) == [(True, 1), (True, 1)]
