# ruff: noqa: E501 (goldens)
"""fuse_transpose: views, permutes and copies around an all-to-all become its dims; every rank's elements stay in place."""

from __future__ import annotations

import random

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from expecttest import TestCase
from torch._inductor.fx_passes.post_grad import view_to_reshape
from torch.fx.experimental.proxy_tensor import make_fx

import epops
from epops.group import process_groups as open_process_groups
from epops.inspection.capture import apply_passes, capture
from epops.inspection.text import graph_lines
from epops.passes import process_groups
from epops.passes.fuse_transpose import fuse_transpose
from epops.testing import count_ops, normalized_graph
from tests.passes import lockstep
from tests.ranks import run_ranks

RANKS = 2


@pytest.fixture(autouse=True, scope="module")
def ranks():
    """Graphs of two ranks, captured in one process by torch's fake process group."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    before = process_groups.known
    with epops.ExpertGroup(name="ep", num_experts=2):
        process_groups.known = open_process_groups
        yield
    process_groups.known = before
    dist.destroy_process_group()


def numbered(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def passed(program, *shape):
    """The graph of a program after the pass; run for all ranks at once it puts every element where it was before."""
    module = make_fx(lambda x: (program(x) * 1,), tracing_mode="fake")(numbered(*shape))
    view_to_reshape(module)
    graph = apply_passes(module, [fuse_transpose], "inference")
    elements = numbered(*shape).numel()
    given = [[torch.arange(elements).view(shape) + 1000 * rank] for rank in range(RANKS)]
    for expected, got in zip(lockstep.run(graph.before, given), lockstep.run(graph.after, given)):
        assert expected[0].shape == got[0].shape and torch.equal(expected[0], got[0])
    assert apply_passes(module, [fuse_transpose], "again").rewrites == {"fuse_transpose": 0}
    return graph


def exchanged(x, splits=None):
    return collectives.all_to_all_single(x, splits, splits, dist.group.WORLD)


def exchanged_by_epops(x, **dims):
    return epops.all_to_all(x, group="ep", **dims).rows


def tokens_to_heads(x):
    batch, tokens, heads, width = x.shape
    x = x.reshape(batch, tokens, RANKS, heads // RANKS, width).permute(2, 0, 1, 3, 4).contiguous()
    return exchanged(x).permute(1, 0, 2, 3, 4).reshape(batch, RANKS * tokens, heads // RANKS, width)


def heads_to_tokens(x):
    batch, tokens, heads, width = x.shape
    x = x.unflatten(1, (RANKS, -1)).movedim(1, 0).contiguous()
    return exchanged(x).movedim(0, 2).flatten(2, 3)


def sequence_first(x):
    batch, tokens, heads, width = x.shape
    x = x.reshape(batch, tokens, RANKS, heads // RANKS, width).permute(2, 1, 0, 3, 4).contiguous()
    return exchanged(x).reshape(RANKS * tokens, batch, heads // RANKS, width)


def transposed_for_attention(x):
    return tokens_to_heads(x).transpose(1, 2)


def dims_of_epops(x):
    return exchanged_by_epops(x.permute(1, 0, 2).contiguous()).permute(1, 0, 2).contiguous()


def uneven(x):
    return exchanged(x.t().contiguous(), [2, 5]).t()


class Golden(TestCase):
    def test_tokens_to_heads(self):
        graph = passed(tokens_to_heads, 2, 3, 8, 5)
        self.assertExpectedInline(
            normalized_graph(graph.before),
            """\
%input: i64[2, 3, 8, 5] = input
%reshape: i64[2, 3, 2, 4, 5] = reshape(%input, [2, 3, 2, 4, 5])
%permute: i64[2, 2, 3, 4, 5] = permute(%reshape, [2, 0, 1, 3, 4])
%clone: i64[2, 2, 3, 4, 5] = clone(%permute, memory_format=contiguous_format)
%all_to_all_single: i64[2, 2, 3, 4, 5] = _c10d_functional.all_to_all_single(%clone, [1, 1], [1, 1], 0)
%wait_tensor: i64[2, 2, 3, 4, 5] = _c10d_functional.wait_tensor(%all_to_all_single)
%permute.1: i64[2, 2, 3, 4, 5] = permute(%wait_tensor, [1, 0, 2, 3, 4])
%clone.1: i64[2, 2, 3, 4, 5] = clone(%permute.1, memory_format=contiguous_format)
%reshape.1: i64[2, 6, 4, 5] = reshape(%clone.1, [2, 6, 4, 5])
%mul: i64[2, 6, 4, 5] = mul(%reshape.1, 1)
return [%mul]""",
        )
        self.assertExpectedInline(
            normalized_graph(graph),
            """\
%input: i64[2, 3, 8, 5] = input
%all_to_all: rows i64[2, 6, 4, 5] = epops.all_to_all(%input, group=ep, out_size=6, scatter_size=4, scatter_dim=2, gather_dim=1)
%mul: i64[2, 6, 4, 5] = mul(%all_to_all.rows, 1)
return [%mul]""",
        )

    def test_heads_to_tokens(self):
        self.assertExpectedInline(
            normalized_graph(passed(heads_to_tokens, 2, 4, 3, 5)),
            """\
%input: i64[2, 4, 3, 5] = input
%all_to_all: rows i64[2, 2, 6, 5] = epops.all_to_all(%input, group=ep, out_size=6, scatter_size=2, scatter_dim=1, gather_dim=2)
%mul: i64[2, 2, 6, 5] = mul(%all_to_all.rows, 1)
return [%mul]""",
        )

    def test_sequence_first(self):
        self.assertExpectedInline(
            normalized_graph(passed(sequence_first, 2, 3, 8, 5)),
            """\
%input: i64[2, 3, 8, 5] = input
%permute: i64[3, 2, 8, 5] = permute(%input, [1, 0, 2, 3])
%all_to_all: rows i64[6, 2, 4, 5] = epops.all_to_all(%permute, group=ep, out_size=6, scatter_size=4, scatter_dim=2)
%mul: i64[6, 2, 4, 5] = mul(%all_to_all.rows, 1)
return [%mul]""",
        )

    def test_transposed_for_attention(self):
        self.assertExpectedInline(
            normalized_graph(passed(transposed_for_attention, 2, 3, 8, 5)),
            """\
%input: i64[2, 3, 8, 5] = input
%permute: i64[2, 8, 3, 5] = permute(%input, [0, 2, 1, 3])
%all_to_all: rows i64[2, 4, 6, 5] = epops.all_to_all(%permute, group=ep, out_size=6, scatter_size=4, scatter_dim=1, gather_dim=2)
%mul: i64[2, 4, 6, 5] = mul(%all_to_all.rows, 1)
return [%mul]""",
        )

    def test_dims_of_epops(self):
        self.assertExpectedInline(
            normalized_graph(passed(dims_of_epops, 3, 4, 5)),
            """\
%input: i64[3, 4, 5] = input
%all_to_all: rows i64[3, 4, 5], counts i64[2], status i32[8] = epops.all_to_all(%input, group=ep, out_size=4, scatter_size=4, scatter_dim=1, gather_dim=1)
%mul: i64[3, 4, 5] = mul(%all_to_all.rows, 1)
return [%mul]""",
        )

    def test_uneven(self):
        module = make_fx(lambda x: (uneven(x) * 1,), tracing_mode="fake")(numbered(3, 7))
        graph = apply_passes(module, [fuse_transpose], "inference")
        self.assertExpectedInline(
            normalized_graph(graph),
            """\
%input: i64[3, 7] = input
%full: i64[1] = full([1], 2, dtype=i64, device=cpu, pin_memory=False)
%full.1: i64[1] = full([1], 5, dtype=i64, device=cpu, pin_memory=False)
%cat: i64[2] = cat([%full, %full.1])
%full.2: i64[1] = full([1], 2, dtype=i64, device=cpu, pin_memory=False)
%full.3: i64[1] = full([1], 5, dtype=i64, device=cpu, pin_memory=False)
%cat.1: i64[2] = cat([%full.2, %full.3])
%all_to_all: rows i64[3, 7] = epops.all_to_all(%input, %cat, %cat.1, group=ep, out_size=7, scatter_size=7, scatter_dim=1, gather_dim=1)
%mul: i64[3, 7] = mul(%all_to_all.rows, 1)
return [%mul]""",
        )


def by_chunks(x):
    """Cut up, sent, cut up and put together: lists of pieces instead of permutes."""
    sent = exchanged(torch.cat([piece.contiguous() for piece in x.chunk(RANKS, 2)], 0))
    return torch.cat(sent.chunk(RANKS, 0), 1)


def by_narrow(x):
    share = x.shape[2] // RANKS
    sent = exchanged(torch.cat([x.narrow(2, rank * share, share) for rank in range(RANKS)], 0))
    return torch.cat([sent[: x.shape[0]], sent[x.shape[0] :]], 1)


def by_stacks(x):
    sent = exchanged(torch.stack([piece.contiguous() for piece in x.tensor_split(RANKS, 2)]))
    return torch.cat(sent.unbind(0), 1)


def by_swapaxes(x):
    batch, tokens, heads, width = x.shape
    x = x.unflatten(2, (RANKS, heads // RANKS)).swapaxes(0, 2).swapaxes(1, 2).contiguous()
    return exchanged(x).swapaxes(0, 1).clone().flatten(1, 2)


def by_aten(x):
    aten = torch.ops.aten
    batch, tokens, heads, width = x.shape
    x = aten.view.default(x, [batch, tokens, RANKS, heads // RANKS, width])
    x = exchanged(aten.clone.default(aten.permute.default(x, [2, 0, 1, 3, 4])))
    return aten.reshape.default(
        aten.permute.default(x, [1, 0, 2, 3, 4]), [batch, RANKS * tokens, heads // RANKS, width]
    )


def by_einops(x):
    einops = pytest.importorskip("einops")
    sent = exchanged(einops.rearrange(x, "b t (r h) d -> r b t h d", r=RANKS).contiguous())
    return einops.rearrange(sent, "r b t h d -> b (r t) h d")


def by_waiting_once_more(x):
    batch, tokens, heads, width = x.shape
    x = x.unflatten(2, (RANKS, -1)).movedim(2, 0).contiguous()
    return collectives.wait_tensor(exchanged(x)).movedim(0, 1).flatten(1, 2)


SPELLINGS = [by_waiting_once_more, by_chunks, by_narrow, by_stacks, by_swapaxes, by_aten, by_einops]


@pytest.mark.parametrize("program", SPELLINGS, ids=lambda program: program.__name__)
def test_other_spellings_of_tokens_to_heads(program):
    graph = passed(program, 2, 3, 8, 5)
    assert graph.rewrites == {"fuse_transpose": 1}, graph.declined
    ops = [line.op for line in graph_lines(graph.after)]
    assert ops in (
        ["input", "epops.all_to_all", "mul", "return"],
        ["input", "epops.all_to_all", "reshape", "mul", "return"],
    )


def pieces_of_pieces(x):
    rows = torch.cat(x.chunk(4, 1), 0).t()
    return exchanged_by_epops(torch.cat(rows.split(4, 1)), scatter_dim=1, gather_dim=1)


def a_stack_behind_a_stack(x):
    rows = torch.stack([x[:, place : place + 1] for place in range(4)], 2).permute(2, 0, 1)
    return exchanged_by_epops(torch.stack(rows.unbind(1), 2), scatter_dim=2, gather_dim=2).permute(2, 0, 1)


@pytest.mark.parametrize("program", [pieces_of_pieces, a_stack_behind_a_stack], ids=lambda program: program.__name__)
def test_pieces_of_pieces_are_joined_in_one_run(program):
    """`passed` runs the pass a second time, which finds nothing."""
    graph = passed(program, 2, 4)
    assert count_ops(graph, "cat") == count_ops(graph, "stack") == 0


def there_and_back_by_epops(x):
    """A transposition between two exchanges goes in front of the first one, and meets what is there."""
    heads = exchanged_by_epops(x, scatter_dim=2, gather_dim=1).transpose(1, 2).contiguous()
    return exchanged_by_epops(heads, scatter_dim=2, gather_dim=1).transpose(1, 2)


def test_one_exchange_behind_another():
    """`passed` runs the pass a second time, which finds nothing."""
    graph = passed(there_and_back_by_epops, 2, 3, 4, 5)
    assert graph.rewrites == {"fuse_transpose": 2} and count_ops(graph, "permute") == 0


@pytest.mark.parametrize("program", [heads_to_tokens, tokens_to_heads], ids=lambda program: program.__name__)
def test_no_tokens(program):
    assert passed(program, 2, 0, 4, 5).rewrites == {"fuse_transpose": 1}


def other_order(x):
    pieces = x.chunk(4, 2)
    return torch.cat(exchanged(torch.cat([pieces[place] for place in (1, 0, 2, 3)], 0)).chunk(4, 0), 1)


def one_piece_twice(x):
    pieces = x.chunk(4, 2)
    return exchanged(torch.cat([pieces[place] for place in (0, 1, 2, 2)], 0)) * 1


def one_piece_left_out(x):
    return exchanged(torch.cat(x.chunk(4, 2)[:2], 0)) * 1


def unequal_pieces(x):
    return exchanged(torch.cat(x.split([4, 4, 8 - 8], 2)[:2], 0)[:, :, :3].flatten(0, 1)) * 1


def overlapping_slices(x):
    return exchanged(torch.cat([x[:, :, :4], x[:, :, 3:7]], 0)) * 1


def of_two_tensors(x):
    return exchanged(torch.cat([x.chunk(2, 2)[0], (x + 1).chunk(2, 2)[1]], 0)) * 1


@pytest.mark.parametrize(
    "program",
    [other_order, one_piece_twice, one_piece_left_out, unequal_pieces, overlapping_slices, of_two_tensors],
    ids=lambda program: program.__name__,
)
def test_pieces_that_are_not_all_of_it_in_order(program):
    """`passed` compares where every element goes."""
    graph = passed(program, 2, 3, 8, 5)
    before, after = (count_ops(one, "cat") for one in (graph.before, graph))
    assert after >= min(before, 1)


def test_symbolic_splits_are_fused_like_known_ones():
    """Of ranks that run one program some may know their splits while compiling: all must come to the same exchange."""

    def program(x, y):
        x = x.view(3, -1)
        splits = [y.shape[0], x.shape[1] - y.shape[0]]
        return (exchanged(x.t().contiguous(), splits).t() * 1,)

    module = make_fx(program, tracing_mode="symbolic")(numbered(21), numbered(2))
    graph = apply_passes(module, [fuse_transpose], "inference")
    assert graph.rewrites == {"fuse_transpose": 1}, graph.declined
    assert count_ops(graph, "epops.all_to_all") == 1 and count_ops(graph, "_c10d_functional.all_to_all_single") == 0
    assert "permute" not in normalized_graph(graph), normalized_graph(graph)


def flat(x):
    return exchanged(x.flatten()).view(x.shape)


def seen_in_between(x):
    y = exchanged(x.permute(1, 0, 2).contiguous())
    return y.permute(1, 0, 2) + y.sum()


def reduced_in_between(x):
    return exchanged(x.permute(1, 0, 2).contiguous().relu()).relu().permute(1, 0, 2)


def arrived_by_strides(x):
    y = exchanged(x.permute(1, 0, 2).contiguous()).permute(1, 0, 2)
    return torch.as_strided(y, y.shape, y.stride())


def test_what_is_read_by_strides_lies_as_it_did():
    graph = passed(arrived_by_strides, 3, 4, 5)
    assert any("read by strides" in one.reason for one in graph.declined)


def counts_used(x):
    sent = epops.all_to_all(x.permute(1, 0, 2).contiguous(), group="ep")
    return sent.rows.permute(1, 0, 2) * sent.counts[0]


@pytest.mark.parametrize("program", [flat, reduced_in_between], ids=lambda program: program.__name__)
def test_leaves_alone(program):
    shape = (4, 6) if program is flat else (3, 4, 5)
    graph = passed(program, *shape)
    assert graph.rewrites == {"fuse_transpose": 0}
    assert normalized_graph(graph.before) == normalized_graph(graph.after)


def counts_used_where_pieces_are_cut(x):
    sent = epops.all_to_all(x.view(3, RANKS, -1).permute(1, 0, 2).contiguous(), group="ep")
    return sent.rows.permute(1, 0, 2).flatten(1) * sent.counts[0]


def test_what_others_see_stays():
    module = make_fx(lambda x: (seen_in_between(x),), tracing_mode="fake")(numbered(3, 4, 5))
    graph = apply_passes(module, [fuse_transpose], "inference")
    assert count_ops(graph, "permute") == 2 and count_ops(graph, "clone") == 0


@pytest.mark.parametrize("program", [counts_used, counts_used_where_pieces_are_cut], ids=lambda one: one.__name__)
def test_counts_stay_those_of_the_gathered_dim(program):
    """Whole dims keep their pieces; parts that are cut out of a dim and merged again would be counted otherwise."""
    graph = passed(program, *((3, 4, 5) if program is counts_used else (3, 8)))
    assert graph.rewrites == {"fuse_transpose": 1}
    assert count_ops(graph, "clone") == 0
    cut = program is counts_used_where_pieces_are_cut
    assert any("its counts are used" in one.reason for one in graph.declined) == cut


def test_another_process_group_is_left_alone():
    process_groups.known = dict
    try:
        assert passed(tokens_to_heads, 2, 3, 8, 5).rewrites == {"fuse_transpose": 0}
    finally:
        process_groups.known = open_process_groups


def test_a_write_in_between_is_not_crossed():
    module = make_fx(lambda x: (tokens_to_heads(x) * 1,), tracing_mode="fake")(numbered(2, 3, 8, 5))
    x, first = list(module.graph.nodes)[:2]
    exchange = next(node for node in module.graph.nodes if "all_to_all_single" in str(node.target))
    with module.graph.inserting_before(exchange):
        module.graph.call_function(torch.ops.aten.zero_.default, (x,))
    assert fuse_transpose(module.graph) == 0 and first.users


@pytest.mark.parametrize("seed", range(40))
def test_random_programs_keep_every_element(seed):
    """Random views, permutes and copies around an exchange of random dims: fused or not, nothing moves."""
    make = random.Random(seed)

    def chain(shape, length):
        steps: list = []
        for _ in range(length):
            kind = make.choice(["permute", "permute", "split", "merge", "copy"])
            if kind == "permute":
                order = list(range(len(shape)))
                make.shuffle(order)
                shape = [shape[place] for place in order]
                steps.append(lambda x, order=order: x.permute(order))
            elif kind == "copy":
                steps.append(lambda x: x.contiguous())
            else:
                place = make.randrange(len(shape))
                if kind == "split":
                    part = make.choice([size for size in range(1, shape[place] + 1) if shape[place] % size == 0])
                    shape = [*shape[:place], part, shape[place] // part, *shape[place + 1 :]]
                elif place + 1 < len(shape):
                    shape = [*shape[:place], shape[place] * shape[place + 1], *shape[place + 2 :]]
                steps.append(lambda x, shape=tuple(shape): x.reshape(shape))
        return steps, shape

    for _ in range(100):
        shape = [make.choice([1, 2, 3, 4]) for _ in range(make.randint(1, 4))]
        before, middle = chain(shape, make.randint(0, 4))
        by_epops = make.random() < 0.5
        scatter, gather = (make.randrange(len(middle)), make.randrange(len(middle))) if by_epops else (0, 0)
        if middle[scatter] % RANKS == 0:
            break
    arrived = list(middle)
    if scatter != gather:
        arrived[scatter], arrived[gather] = arrived[scatter] // RANKS, arrived[gather] * RANKS
    after, _ = chain(arrived, make.randint(0, 4))

    def program(x):
        for step in before:
            x = step(x)
        x = exchanged_by_epops(x, scatter_dim=scatter, gather_dim=gather) if by_epops else exchanged(x.contiguous())
        for step in after:
            x = step(x)
        return x

    passed(program, *shape)


def on_two_ranks(rank, size):
    global RANKS
    with epops.ExpertGroup(name="ep", num_experts=2):
        x = torch.randn(2, 3, 8, 5, generator=torch.Generator().manual_seed(rank), requires_grad=True)
        rewrites = 0
        for program in (tokens_to_heads, sequence_first):
            plain = program_with_gradients(program, x)
            expected = torch.autograd.grad(plain.sin().sum(), x)[0]
            graphs, result = capture(program_with_gradients, program, x, passes=[fuse_transpose], run=True)
            got = torch.autograd.grad(result.sin().sum(), x)[0]
            assert torch.equal(result, plain) and torch.equal(got, expected)
            rewrites += sum(graph.rewrites["fuse_transpose"] for graph in graphs)
        y = torch.arange(21).view(3, 7)[:, : 4 + 3 * rank] * (rank + 1)
        splits = [[1, 3], [2, 5]][rank]
        came = [[1, 2], [3, 5]][rank]

        def ragged(y):
            return collectives.all_to_all_single(y.t().contiguous(), came, splits, dist.group.WORLD).t() * 1

        graphs, result = capture(ragged, y, passes=[fuse_transpose], run=True)
        assert torch.equal(result, ragged(y))
        return rewrites, graphs[0].rewrites["fuse_transpose"]


def program_with_gradients(program, x):
    global exchanged
    plain = exchanged
    try:
        exchanged = exchanged_with_gradients
        return program(x)
    finally:
        exchanged = plain


def exchanged_with_gradients(x):
    rows = [x.shape[0] // RANKS] * RANKS
    return collectives.all_to_all_single_autograd(x, rows, rows, dist.group.WORLD)


def test_numbers_and_gradients_on_two_ranks():
    assert run_ranks(on_two_ranks, 2) == [(4, 1)] * 2
