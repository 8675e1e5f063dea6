# ruff: noqa: E501 (goldens)
"""fuse_transpose where splits are ragged and one dim is scattered while another is gathered."""

from __future__ import annotations

import itertools

import pytest
import torch
from expecttest import TestCase

import epops
from epops.inspection.capture import apply_passes, capture
from epops.passes.fuse_transpose import fuse_transpose
from epops.testing import count_ops, normalized_graph
from tests.ranks import run_ranks

TOKENS, HEADS, WIDTH, OWN = 6, 4, 3, 5


def around(x, tokens, heads, to_exchange, to_result, size):
    """x in some order of (tokens, heads, width) → tokens scattered, heads gathered → the result in some order."""
    plan = epops.plan_all_to_all(tokens, heads, group="ep").plan
    rows = epops.all_to_all(
        x.permute(to_exchange).contiguous(),
        plan=plan,
        group="ep",
        scatter_dim=0,
        gather_dim=1,
        scatter_size=OWN,
        out_size=HEADS * size,
    ).rows
    return rows.permute(to_result).contiguous() * 1


class Golden(TestCase):
    def test_heads_first_on_both_sides(self):
        with epops.ExpertGroup(name="ep"):
            given = torch.zeros(HEADS, TOKENS, WIDTH), torch.tensor([5]), torch.tensor([4])
            graphs, _ = capture(around, *given, (1, 0, 2), (1, 0, 2), 1, passes=[fuse_transpose])
        self.assertExpectedInline(
            normalized_graph(graphs[0]),
            """\
%input: i64[1] = input
%input.1: i64[1] = input
%input.2: f32[4, 6, 3] = input
%plan_all_to_all: plan i64[8] = epops.plan_all_to_all(%input, %input.1, group=ep)
%all_to_all: rows f32[4, 5, 3] = epops.all_to_all(%input.2, plan=%plan_all_to_all.plan, group=ep, out_size=4, scatter_size=5, scatter_dim=1)
%mul: f32[4, 5, 3] = mul(%all_to_all.rows, 1)
return [%mul]""",
        )

    def test_only_in_front(self):
        with epops.ExpertGroup(name="ep"):
            given = torch.zeros(HEADS, TOKENS, WIDTH), torch.tensor([5]), torch.tensor([4])
            graphs, _ = capture(around, *given, (1, 0, 2), (0, 1, 2), 1, passes=[fuse_transpose])
        self.assertExpectedInline(
            normalized_graph(graphs[0]),
            """\
%input: i64[1] = input
%input.1: i64[1] = input
%input.2: f32[4, 6, 3] = input
%plan_all_to_all: plan i64[8] = epops.plan_all_to_all(%input, %input.1, group=ep)
%permute: f32[6, 4, 3] = permute(%input.2, [1, 0, 2])
%all_to_all: rows f32[5, 4, 3] = epops.all_to_all(%permute, plan=%plan_all_to_all.plan, group=ep, out_size=4, scatter_size=5, gather_dim=1)
%mul: f32[5, 4, 3] = mul(%all_to_all.rows, 1)
return [%mul]""",
        )


def every_order(rank, size):
    tokens, heads = torch.tensor([2, 1, 0][:size]), torch.full((size,), HEADS)
    rewrites = 0
    with epops.ExpertGroup(name="ep"):
        orders = list(itertools.permutations(range(3)))
        for place, to_result in enumerate(orders):
            to_exchange = orders[(place * 2 + 1) % 6]
            shape = [0, 0, 0]
            for dim, length in zip(to_exchange, (TOKENS, HEADS, WIDTH)):
                shape[dim] = length
            x = torch.randn(shape, generator=torch.Generator().manual_seed(rank), requires_grad=True)
            plain = around(x, tokens, heads, to_exchange, to_result, size)
            expected = torch.autograd.grad(plain.sin().sum(), x)[0]
            graphs, got = capture(
                around, x, tokens, heads, to_exchange, to_result, size, passes=[fuse_transpose], run=True
            )
            grad = torch.autograd.grad(got.sin().sum(), x)[0]
            assert torch.equal(got, plain) and torch.equal(grad, expected) and got.stride() == plain.stride()
            assert expected.any() and bool(plain.any()) == bool(tokens[rank])
            assert count_ops(graphs, "clone") == 0, "no copy is left around the exchanges, there and back"
            assert apply_passes(graphs[0].after, [fuse_transpose], "again").rewrites == {"fuse_transpose": 0}
            rewrites += sum(graph.rewrites["fuse_transpose"] for graph in graphs)
    return rewrites


@pytest.mark.parametrize("size", (2, 3))
def test_any_order_in_front_and_behind_gives_the_same_numbers(size):
    assert run_ranks(every_order, size) == [12] * size, "there and back in each order"


def merged_behind(x, tokens, heads):
    plan = epops.plan_all_to_all(tokens, heads, group="ep").plan
    settings = {"scatter_dim": 0, "gather_dim": 1, "scatter_size": OWN, "out_size": HEADS}
    rows = epops.all_to_all(x.permute(1, 0, 2).contiguous(), plan=plan, group="ep", **settings).rows
    return rows.flatten(1) * 1


def a_view_in_front(x, tokens, heads):
    return merged_behind(x.view(HEADS, TOKENS, WIDTH), tokens, heads)


def only_views(x, tokens, heads):
    plan = epops.plan_all_to_all(tokens, heads, group="ep").plan
    settings = {"scatter_dim": 0, "gather_dim": 1, "scatter_size": OWN, "out_size": HEADS}
    return epops.all_to_all(x.permute(1, 0, 2), plan=plan, group="ep", **settings).rows.permute(2, 0, 1) * 1


@pytest.mark.parametrize("program", [merged_behind, a_view_in_front, only_views])
def test_views_of_other_dims_stay_outside(program):
    """Permutes behind the exchange fold where they are only views too: a rank with one token sees no copy where others do."""
    shape = (HEADS * TOKENS, WIDTH) if program is a_view_in_front else (HEADS, TOKENS, WIDTH)
    x = torch.randn(shape)
    with epops.ExpertGroup(name="ep"):
        graphs, got = capture(program, x, torch.tensor([5]), torch.tensor([4]), passes=[fuse_transpose], run=True)
        assert torch.equal(got, program(x, torch.tensor([5]), torch.tensor([4])))
    assert graphs[0].rewrites == {"fuse_transpose": 1}
    assert count_ops(graphs[0], "clone") == 0
