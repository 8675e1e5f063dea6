# ruff: noqa: E501 (goldens)
"""fuse_transpose around dispatch and combine: tokens are sent in the order in which they lie, when nothing sees the difference."""

from __future__ import annotations

import random

import pytest
import torch
from expecttest import TestCase

from epops.passes.fuse_add import fuse_add
from epops.passes.fuse_transpose import fuse_transpose
from epops.testing import captured, count_ops, normalized_graph
from tests.passes import blocks
from tests.ranks import run_ranks

SEQUENCE, BATCH = 3, 2


@pytest.fixture(autouse=True)
def ep():
    with blocks.group() as group:
        yield group


def inputs(rank: int = 0, sequence: int = SEQUENCE, batch: int = BATCH):
    """``xs`` (S, B, H), sequence first, beside what a block takes for S * B tokens, batch first."""
    given = blocks.inputs(rank, sequence * batch)
    return {**given, "xs": given["x"].view(sequence, batch, blocks.HIDDEN), "router": given["shared"][:, :3].clone()}


def flat(given):
    return given["xs"].transpose(0, 1).reshape(-1, blocks.HIDDEN)


def back(given, out):
    sequence, batch, hidden = given["xs"].shape
    return out.view(batch, sequence, hidden).transpose(0, 1)


def given_choices(given):
    return back(given, blocks.routed({**given, "x": flat(given)}))


def routed(given, x):
    weights, idx = (x @ given["router"]).softmax(-1).topk(2)
    return blocks.routed({**given, "x": x, "idx": idx, "weights": weights})


def with_router(given):
    x = flat(given)
    return back(given, routed(given, x)) + given["xs"]


def with_shared_expert(given):
    x = flat(given)
    return back(given, routed(given, x) + torch.relu(x @ given["shared"]))


def residual_batch_first(given):
    """The residual is added while batch and positions are two dims."""
    x = given["xs"].transpose(0, 1).contiguous()
    out = routed(given, x.flatten(0, 1)).unflatten(0, x.shape[:2])
    return (out + x).movedim(0, 1)


def normed(given):
    x = given["xs"].swapaxes(0, 1)
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return back(given, routed(given, x.reshape(-1, blocks.HIDDEN))) * 2


def masked(given):
    """Tokens that are padding choose nobody; the mask, batch first, is small."""
    x = flat(given)
    weights, idx = (x @ given["router"]).softmax(-1).topk(2)
    idx = torch.where(given["idx"][:, :1] >= 0, idx, -1)
    return back(given, blocks.routed({**given, "x": x, "idx": idx, "weights": weights}))


def chosen_by_experts(given):
    """What experts choose by depends on the order of tokens: that small part is transposed back, and sees the order as it was."""
    x = flat(given)
    first = (x @ given["router"])[:, :1].argsort(0) % 3
    return back(given, blocks.routed({**given, "x": x, "idx": torch.cat([first, (first + 1) % 3], 1)}))


def two_layers(given):
    once = with_router(given)
    return with_router({**given, "xs": once})


FUSED = {
    given_choices: 1,
    with_router: 1,
    with_shared_expert: 1,
    residual_batch_first: 1,
    normed: 1,
    masked: 1,
    chosen_by_experts: 1,
    two_layers: 2,
}


class Golden(TestCase):
    def test_given_choices(self):
        graph = blocks.passed(given_choices, inputs(), passes=[fuse_transpose])
        self.assertExpectedInline(
            normalized_graph(graph.before),
            """\
%input: f32[3, 2, 16] = input
%input.1: i64[6, 2] = input
%input.2: f32[6, 2] = input
%input.3: f32[3, 16, 16] = input
%permute: f32[2, 3, 16] = permute(%input, [1, 0, 2])
%clone: f32[2, 3, 16] = clone(%permute, memory_format=contiguous_format)
%reshape: f32[6, 16] = reshape(%clone, [6, 16])
%dispatch: rows f32[16, 16], row_weights f32[16], expert_ends i32[3], route i32[61] = epops.dispatch(%reshape, %input.1, %input.2, group=ep, layout=expert)
%grouped_mm: f32[16, 16] = epops.grouped_mm(%dispatch.rows, %input.3, %dispatch.expert_ends)
%combine: out f32[6, 16] = epops.combine(%grouped_mm, %dispatch.route, %dispatch.row_weights, group=ep, layout=expert, out_dtype=f32)
%reshape.1: f32[2, 3, 16] = reshape(%combine.out, [2, 3, 16])
%permute.1: f32[3, 2, 16] = permute(%reshape.1, [1, 0, 2])
return [%permute.1]""",
        )
        self.assertExpectedInline(
            normalized_graph(graph),
            """\
%input: f32[3, 2, 16] = input
%input.1: i64[6, 2] = input
%input.2: f32[6, 2] = input
%input.3: f32[3, 16, 16] = input
%reshape: f32[6, 16] = reshape(%input, [6, 16])
%reshape.1: i64[2, 3, 2] = reshape(%input.1, [2, 3, 2])
%permute: i64[3, 2, 2] = permute(%reshape.1, [1, 0, 2])
%reshape.2: i64[6, 2] = reshape(%permute, [6, 2])
%reshape.3: f32[2, 3, 2] = reshape(%input.2, [2, 3, 2])
%permute.1: f32[3, 2, 2] = permute(%reshape.3, [1, 0, 2])
%reshape.4: f32[6, 2] = reshape(%permute.1, [6, 2])
%dispatch: rows f32[16, 16], row_weights f32[16], expert_ends i32[3], route i32[61] = epops.dispatch(%reshape, %reshape.2, %reshape.4, group=ep, layout=expert)
%grouped_mm: f32[16, 16] = epops.grouped_mm(%dispatch.rows, %input.3, %dispatch.expert_ends)
%combine: out f32[6, 16] = epops.combine(%grouped_mm, %dispatch.route, %dispatch.row_weights, group=ep, layout=expert, out_dtype=f32)
%reshape.5: f32[3, 2, 16] = reshape(%combine.out, [3, 2, 16])
return [%reshape.5]""",
        )

    def test_residual_batch_first(self):
        graph = blocks.passed(residual_batch_first, inputs(), passes=[fuse_transpose, fuse_add])
        self.assertExpectedInline(
            normalized_graph(graph, ops=("epops", "reshape", "permute", "clone", "add", "return")),
            """\
%reshape: f32[6, 16] = reshape(..., [6, 16])
%dispatch: rows f32[16, 16], row_weights f32[16], expert_ends i32[3], route i32[61] = epops.dispatch(%reshape, ..., ..., group=ep, layout=expert)
%grouped_mm: f32[16, 16] = epops.grouped_mm(%dispatch.rows, ..., %dispatch.expert_ends)
%reshape.1: f32[6, 16] = reshape(..., [6, 16])
%combine: out f32[6, 16] = epops.combine(%grouped_mm, %dispatch.route, %dispatch.row_weights, %reshape.1, group=ep, layout=expert, out_dtype=f32)
%reshape.2: f32[3, 2, 16] = reshape(%combine.out, [3, 2, 16])
return [%reshape.2]""",
        )


@pytest.mark.parametrize("block", FUSED, ids=lambda block: block.__name__)
def test_fires(block):
    graph = blocks.passed(block, inputs(), passes=[fuse_transpose])
    assert graph.rewrites == {"fuse_transpose": FUSED[block]}, graph.declined
    large = [line for line in normalized_graph(graph).splitlines() if "permute" in line and "16]" in line]
    assert not large, "only choices and weights are transposed"


@pytest.mark.parametrize("block", FUSED, ids=lambda block: block.__name__)
def test_gradients(block):
    """Training fuses in the joint graph, where the gradient's transpositions go too."""
    assert blocks.same_numbers(block, inputs(), [fuse_transpose], 2e-6) == {"fuse_transpose": FUSED[block]}


def test_no_transposed_copy_is_left_in_the_backward():
    given = {name: item.requires_grad_(item.is_floating_point()) for name, item in inputs().items()}
    _, forward, backward = captured(with_shared_expert, given, passes=[fuse_transpose])
    turned = [
        [line for line in normalized_graph(graph).splitlines() if "permute" in line and "3, 2, 16]" in line]
        for graph in (forward, backward)
    ]
    assert not turned[1]
    (result,) = (line.partition(":")[0] for line in turned[0])
    assert f"return [{result}," in normalized_graph(forward), "only the result, which lies as in eager"


# ---- what has to stay ----------------------------------------------------------------------------------------------------


def batch_first_all_along(given):
    """Nothing transposes back: the copy would only move."""
    return torch.relu(routed(given, flat(given)))


def rows_seen(given):
    x = flat(given)
    y, sent = blocks.experts({**given, "x": x})
    return back(given, blocks.combine(y, sent, {**given, "x": x})), torch.where(
        sent.row_expert[:, None] >= 0, sent.rows, 0
    )


def sources_seen(given):
    x = flat(given)
    y, sent = blocks.experts({**given, "x": x})
    return back(given, blocks.combine(y, sent, {**given, "x": x})), sent.row_source


def rows_by_their_place(given):
    x = flat(given)
    y, sent = blocks.experts({**given, "x": x})
    y = y * torch.arange(y.shape[0])[:, None]
    return back(given, blocks.combine(y, sent, {**given, "x": x}))


def sum_along_the_rows(given):
    x = flat(given)
    y, sent = blocks.experts({**given, "x": x})
    return back(given, blocks.combine(y.cumsum(0), sent, {**given, "x": x}))


def room_for_fewer(given):
    x = flat(given)
    y, sent = blocks.experts({**given, "x": x}, capacity=9)
    return back(given, blocks.combine(y, sent, {**given, "x": x}))


def positions_after_the_transposition(given):
    x = flat(given) + torch.arange(SEQUENCE * BATCH)[:, None]
    return back(given, routed(given, x))


def another_transposition_back(given):
    """(B * S, H) taken for (S, B, H): no transposition back, whatever its shape says."""
    return routed(given, flat(given)).view(SEQUENCE, BATCH, blocks.HIDDEN) + given["xs"]


def attended_in_between(given):
    x = flat(given)
    x = (x @ x.t()).tril().softmax(-1) @ x
    return back(given, routed(given, x))


def read_by_strides(given):
    out = back(given, routed(given, flat(given)))
    return torch.as_strided(out, out.shape, out.stride())


LEFT_ALONE = [
    read_by_strides,
    batch_first_all_along,
    rows_seen,
    sources_seen,
    rows_by_their_place,
    sum_along_the_rows,
    positions_after_the_transposition,
    another_transposition_back,
    attended_in_between,
]


@pytest.mark.parametrize("block", LEFT_ALONE, ids=lambda block: block.__name__)
def test_leaves_alone(block):
    graph = blocks.passed(block, inputs(), passes=[fuse_transpose])
    assert graph.rewrites == {"fuse_transpose": 0}
    assert normalized_graph(graph.before) == normalized_graph(graph.after)


def test_room_for_fewer_rows_is_left_alone():
    """Which rows are dropped depends on the order of tokens."""
    with torch.no_grad():
        (graph,) = captured(room_for_fewer, inputs(), passes=[fuse_transpose])
    assert graph.rewrites == {"fuse_transpose": 0}


def test_the_reason_is_said():
    graph = blocks.passed(rows_seen, inputs(), passes=[fuse_transpose])
    assert "in the order of the received rows" in " ".join(map(str, graph.declined))
    graph = blocks.passed(batch_first_all_along, inputs(), passes=[fuse_transpose])
    assert "would have to be transposed elsewhere" in " ".join(map(str, graph.declined))


def test_a_write_in_between_is_not_crossed():
    graph = blocks.passed(with_router, inputs(), passes=[]).after.graph
    dispatch = next(node for node in graph.nodes if "dispatch" in str(node.target))
    x = next(node for node in graph.nodes if node.op == "placeholder" and node.meta["val"].dim() == 3)
    with graph.inserting_before(dispatch):
        graph.call_function(torch.ops.aten.zero_.default, (x,))
    assert fuse_transpose(graph) == 0


def test_dynamic_shapes():
    given = inputs()
    torch._dynamo.mark_dynamic(given["xs"], 0)

    def block(given):
        x = flat(given)
        return back(given, routed(given, x)) + given["xs"]

    graph = blocks.passed(block, given, passes=[fuse_transpose])
    assert graph.rewrites == {"fuse_transpose": 1}, graph.declined
    assert "s0" in normalized_graph(graph)


# ---- at random -----------------------------------------------------------------------------------------------------------


def random_block(make: random.Random):
    """A block between two transpositions with steps that treat tokens alike, and now and then one that does not."""
    alike = [
        lambda x, given: x * 2 + 1,
        lambda x, given: x @ given["shared"],
        lambda x, given: torch.softmax(x, -1),
        lambda x, given: x - x.mean(-1, keepdim=True),
        lambda x, given: x + given["shared"][0],
        lambda x, given: x.unflatten(-1, (4, 4)).transpose(-1, -2).flatten(-2),
        lambda x, given: torch.cat([x[:, 4:], x[:, :4]], -1),
        lambda x, given: x.gather(1, x.argmax(-1, keepdim=True).expand(-1, 16)),
        lambda x, given: x * x.sum(0, keepdim=True),
        lambda x, given: x.cumsum(1),
        lambda x, given: torch.where(x > 0, x, 0.1 * x),
        lambda x, given: x.topk(16, -1).values,
        lambda x, given: x + given["xs"].transpose(0, 1).flatten(0, 1),
    ]
    unlike = [
        lambda x, given: x.cumsum(0),
        lambda x, given: x.flip(0),
        lambda x, given: x + torch.arange(x.shape[0])[:, None],
        lambda x, given: x.roll(1, 0),
        lambda x, given: x.softmax(0),
        lambda x, given: (x @ x.t()).tril() @ x,
        lambda x, given: x.sort(0).values,
        lambda x, given: x + given["x"],
        lambda x, given: x.view(SEQUENCE, BATCH, 16).sum(0, keepdim=True).expand(SEQUENCE, BATCH, 16).reshape(-1, 16),
        lambda x, given: torch.cat([x[1:], x[:1]]),
        lambda x, given: x.t().reshape(-1, 16),
    ]
    rows = [
        lambda y, sent: y.relu(),
        lambda y, sent: y * sent.row_weights[:, None],
        lambda y, sent: y + torch.arange(3.0)[sent.row_expert.clamp(min=0).long()][:, None],
        lambda y, sent: y - y.amax(-1, keepdim=True),
    ]
    pick = lambda chance: make.choice(unlike) if make.random() < chance else make.choice(alike)  # noqa: E731
    before = [pick(0.1) for _ in range(make.randint(0, 3))]
    inner = [make.choice(rows) for _ in range(make.randint(0, 2))]
    after = [pick(0.1) for _ in range(make.randint(0, 3))]
    own_choices, leave = make.random() < 0.5, make.random() < 0.2

    def block(given):
        x = flat(given)
        for step in before:
            x = step(x, given)
        here = {**given, "x": x}
        if not own_choices:
            weights, idx = (x @ given["router"]).softmax(-1).topk(2)
            here.update(idx=idx, weights=weights)
        y, sent = blocks.experts(here)
        for step in inner:
            y = step(y, sent)
        out = blocks.combine(y, sent, here)
        for step in after:
            out = step(out, given)
        return out if leave else back(given, out)

    return block


@pytest.mark.parametrize("seed", range(30))
def test_random_blocks(seed):
    make = random.Random(seed)
    graph = blocks.passed(random_block(make), inputs(seed), passes=[fuse_transpose])
    assert count_ops(graph, "epops.dispatch") == 1


def two_ranks(rank, size):
    with blocks.group():
        given = inputs(rank, 1 + 2 * rank, 3 - rank)
        fixed = [
            blocks.same_numbers(block, given, [fuse_transpose], 5e-6)["fuse_transpose"] for block in list(FUSED)[:3]
        ]
        given = inputs(rank)
        for seed in range(6):
            blocks.passed(random_block(random.Random(100 + seed)), given, passes=[fuse_transpose])
    return fixed


def test_numbers_on_two_ranks():
    """Ranks may come to different decisions here: one dim of the first rank is 1, which needs no transposing."""
    assert run_ranks(two_ranks, 2) == [[0, 0, 0], [1, 1, 1]]


def scattered_to_the_first_tokens(given):
    x = flat(given)
    return back(given, routed(given, x.scatter(1, torch.zeros(2, 1, dtype=torch.long), 0.0)))


def gathered_from_the_first_tokens(given):
    x = flat(given)
    return back(given, routed(given, x) + x.gather(1, torch.zeros(2, 1, dtype=torch.long)).sum(0))


@pytest.mark.parametrize("block", [scattered_to_the_first_tokens, gathered_from_the_first_tokens])
def test_numbers_for_the_first_tokens_alone(block):
    assert blocks.passed(block, inputs(), passes=[fuse_transpose]).rewrites == {"fuse_transpose": 0}


def test_slices_that_keep_every_token():
    """Where there are more positions than sequences: the slice's end is of one of the two dims."""
    batch, sequence = 2, 3
    given = inputs(sequence=sequence, batch=batch)

    def mean_of_all(given):
        out = routed(given, flat(given)).view(batch, sequence, 16)
        mean = out.detach().narrow(0, 0, batch).mean((0, 1))
        return (out + mean).transpose(0, 1)

    def cut_to_the_batch(given):
        x = given["xs"].transpose(0, 1).narrow(0, 0, batch)
        return routed(given, x.reshape(-1, 16)).view(batch, sequence, 16).transpose(0, 1)

    for block in (mean_of_all, cut_to_the_batch):
        assert blocks.same_numbers(block, given, [fuse_transpose], 1e-5)["fuse_transpose"]
