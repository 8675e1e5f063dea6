# ruff: noqa: E501 (goldens)
"""fuse_add: what it folds into a combine, what it leaves alone, and that numbers stay."""

from __future__ import annotations

import pytest
import torch
from expecttest import TestCase

import epops
from epops.inspection.capture import capture
from epops.passes.fuse_add import fuse_add
from tests.passes import blocks
from tests.ranks import run_ranks


@pytest.fixture(autouse=True)
def ep():
    with blocks.group() as group:
        yield group


def shared_expert(given):
    return blocks.routed(given) + given["x"] @ given["shared"]


def shared_expert_scaled_in_float32(given):
    routed = blocks.routed(given)
    return ((given["x"] @ given["shared"]).float() * 0.5 - 2.5 * routed.float()).to(routed.dtype)


def residual_of_a_batch(given):
    residual = given["x"].view(1, -1, blocks.HIDDEN)
    return residual + blocks.routed(given).view(1, -1, blocks.HIDDEN) / 4


def weights_outside(given):
    y, sent = blocks.experts(given)
    return blocks.combine(y * sent.row_weights[:, None], sent, given, weigh=False)


def weights_outside_in_float32(given):
    y, sent = blocks.experts(given)
    return blocks.combine((sent.row_weights.unsqueeze(-1) * y).to(y.dtype), sent, given, weigh=False)


FUSED = {
    shared_expert: 1,
    shared_expert_scaled_in_float32: 1,
    residual_of_a_batch: 1,
    weights_outside: 1,
    weights_outside_in_float32: 1,
}


class Golden(TestCase):
    def test_shared_expert(self):
        graph = blocks.passed(shared_expert, blocks.inputs(), passes=[fuse_add])
        self.assertExpectedInline(
            blocks.text(graph.before),
            """\
%dispatch: rows f32[16, 16], row_weights f32[16], expert_ends i32[3], route i32[59] = epops.dispatch(..., ..., ..., group=ep, layout=expert)
%grouped_mm: f32[16, 16] = epops.grouped_mm(%dispatch.rows, ..., %dispatch.expert_ends)
%combine: out f32[5, 16] = epops.combine(%grouped_mm, %dispatch.route, %dispatch.row_weights, group=ep, layout=expert, out_dtype=f32)
%mm: f32[5, 16] = mm(..., ...)
%add: f32[5, 16] = add(%combine.out, %mm)
return [%add]""",
        )
        self.assertExpectedInline(
            blocks.text(graph),
            """\
%dispatch: rows f32[16, 16], row_weights f32[16], expert_ends i32[3], route i32[59] = epops.dispatch(..., ..., ..., group=ep, layout=expert)
%grouped_mm: f32[16, 16] = epops.grouped_mm(%dispatch.rows, ..., %dispatch.expert_ends)
%mm: f32[5, 16] = mm(..., ...)
%combine: out f32[5, 16] = epops.combine(%grouped_mm, %dispatch.route, %dispatch.row_weights, %mm, group=ep, layout=expert, out_dtype=f32)
return [%combine.out]""",
        )

    def test_scalars_and_casts(self):
        graph = blocks.passed(shared_expert_scaled_in_float32, blocks.inputs(dtype=torch.bfloat16), passes=[fuse_add])
        self.assertExpectedInline(
            blocks.text(graph.before),
            """\
%dispatch: rows bf16[16, 16], row_weights f32[16], expert_ends i32[3], route i32[59] = epops.dispatch(..., ..., ..., group=ep, layout=expert)
%grouped_mm: bf16[16, 16] = epops.grouped_mm(%dispatch.rows, ..., %dispatch.expert_ends)
%combine: out bf16[5, 16] = epops.combine(%grouped_mm, %dispatch.route, %dispatch.row_weights, group=ep, layout=expert, out_dtype=bf16)
%mm: bf16[5, 16] = mm(..., ...)
%cast: f32[5, 16] = cast(%mm, f32)
%mul: f32[5, 16] = mul(%cast, 0.5)
%cast.1: f32[5, 16] = cast(%combine.out, f32)
%mul.1: f32[5, 16] = mul(%cast.1, 2.5)
%sub: f32[5, 16] = sub(%mul, %mul.1)
%cast.2: bf16[5, 16] = cast(%sub, bf16)
return [%cast.2]""",
        )
        self.assertExpectedInline(
            blocks.text(graph),
            """\
%dispatch: rows bf16[16, 16], row_weights f32[16], expert_ends i32[3], route i32[59] = epops.dispatch(..., ..., ..., group=ep, layout=expert)
%grouped_mm: bf16[16, 16] = epops.grouped_mm(%dispatch.rows, ..., %dispatch.expert_ends)
%mm: bf16[5, 16] = mm(..., ...)
%combine: out bf16[5, 16] = epops.combine(%grouped_mm, %dispatch.route, %dispatch.row_weights, %mm, group=ep, layout=expert, out_dtype=bf16, out_scale=-2.5, addend_scale=0.5)
return [%combine.out]""",
        )

    def test_residual_of_a_batch(self):
        graph = blocks.passed(residual_of_a_batch, blocks.inputs(), passes=[fuse_add])
        self.assertExpectedInline(
            blocks.text(graph.before),
            """\
%dispatch: rows f32[16, 16], row_weights f32[16], expert_ends i32[3], route i32[59] = epops.dispatch(..., ..., ..., group=ep, layout=expert)
%grouped_mm: f32[16, 16] = epops.grouped_mm(%dispatch.rows, ..., %dispatch.expert_ends)
%combine: out f32[5, 16] = epops.combine(%grouped_mm, %dispatch.route, %dispatch.row_weights, group=ep, layout=expert, out_dtype=f32)
%reshape: f32[1, 5, 16] = reshape(..., [1, -1, 16])
%reshape.1: f32[1, 5, 16] = reshape(%combine.out, [1, -1, 16])
%div: f32[1, 5, 16] = div(%reshape.1, 4)
%add: f32[1, 5, 16] = add(%reshape, %div)
return [%add]""",
        )
        self.assertExpectedInline(
            blocks.text(graph),
            """\
%dispatch: rows f32[16, 16], row_weights f32[16], expert_ends i32[3], route i32[59] = epops.dispatch(..., ..., ..., group=ep, layout=expert)
%grouped_mm: f32[16, 16] = epops.grouped_mm(%dispatch.rows, ..., %dispatch.expert_ends)
%combine: out f32[5, 16] = epops.combine(%grouped_mm, %dispatch.route, %dispatch.row_weights, ..., group=ep, layout=expert, out_dtype=f32, out_scale=0.25)
%reshape: f32[1, 5, 16] = reshape(%combine.out, [1, 5, 16])
return [%reshape]""",
        )

    def test_weights(self):
        graph = blocks.passed(weights_outside_in_float32, blocks.inputs(dtype=torch.bfloat16), passes=[fuse_add])
        self.assertExpectedInline(
            blocks.text(graph.before),
            """\
%dispatch: rows bf16[16, 16], row_weights f32[16], expert_ends i32[3], route i32[59] = epops.dispatch(..., ..., ..., group=ep, layout=expert)
%grouped_mm: bf16[16, 16] = epops.grouped_mm(%dispatch.rows, ..., %dispatch.expert_ends)
%mul: f32[16, 16] = mul(..., %grouped_mm)
%cast: bf16[16, 16] = cast(%mul, bf16)
%combine: out bf16[5, 16] = epops.combine(%cast, %dispatch.route, group=ep, layout=expert, out_dtype=bf16)
return [%combine.out]""",
        )
        self.assertExpectedInline(
            blocks.text(graph),
            """\
%dispatch: rows bf16[16, 16], row_weights f32[16], expert_ends i32[3], route i32[59] = epops.dispatch(..., ..., ..., group=ep, layout=expert)
%grouped_mm: bf16[16, 16] = epops.grouped_mm(%dispatch.rows, ..., %dispatch.expert_ends)
%combine: out bf16[5, 16] = epops.combine(%grouped_mm, %dispatch.route, %dispatch.row_weights, group=ep, layout=expert, out_dtype=bf16)
return [%combine.out]""",
        )


def other_spellings():
    def add_of_aten(given):
        return torch.ops.aten.add.Tensor(given["x"], blocks.routed(given), alpha=-2)

    def subtracted_from(given):
        return torch.rsub(blocks.routed(given), given["x"])

    def negated(given):
        return given["x"] + -blocks.routed(given).unflatten(1, (4, 4)).flatten(1)

    def a_sum_of_a_list(given):
        return sum([blocks.routed(given), given["x"]])

    def in_the_order_of_a_chain(given):
        return blocks.routed(given).add(given["x"]).add(given["x"] @ given["shared"])

    def true_divide(given):
        return torch.true_divide(blocks.routed(given), 4).add_(given["x"])

    def in_place(given):
        out = blocks.routed(given)
        out += given["x"]
        return out

    def addcmul(given):
        return torch.addcmul(blocks.routed(given), given["x"], given["x"][:, :1].sigmoid(), value=-0.5)

    def addcmul_in_bfloat16(given):
        narrow = {name: item.bfloat16() if name in ("x", "experts") else item for name, item in given.items()}
        return torch.addcmul(blocks.routed(narrow), narrow["x"], narrow["x"].sigmoid())

    def addcmul_widened_and_back(given):
        narrow = {name: item.bfloat16() if name in ("x", "experts") else item for name, item in given.items()}
        return torch.addcmul(blocks.routed(narrow).float(), given["x"], given["x"]).bfloat16()

    def weights_of_einsum(given):
        y, sent = blocks.experts(given)
        return blocks.combine(torch.einsum("ch,c->ch", y, sent.row_weights), sent, given, weigh=False)

    def weights_expanded(given):
        y, sent = blocks.experts(given)
        return blocks.combine(y * sent.row_weights.unsqueeze(1).expand_as(y), sent, given, weigh=False)

    def both(given):
        y, sent = blocks.experts(given)
        return given["x"] + blocks.combine(y * sent.row_weights[:, None], sent, given, weigh=False)

    return {
        add_of_aten: 1,
        subtracted_from: 1,
        negated: 1,
        a_sum_of_a_list: 1,
        in_the_order_of_a_chain: 1,
        true_divide: 1,
        in_place: 1,
        addcmul: 1,
        addcmul_in_bfloat16: 1,
        addcmul_widened_and_back: 1,
        weights_of_einsum: 1,
        weights_expanded: 1,
        both: 2,
    }


@pytest.mark.parametrize("block", [*FUSED, *other_spellings()], ids=lambda block: block.__name__)
def test_fires(block):
    expected = {**FUSED, **other_spellings()}
    expected = {one.__name__: count for one, count in expected.items()}
    given = blocks.inputs()
    graph = blocks.passed(block, given, passes=[fuse_add])
    assert graph.rewrites == {"fuse_add": expected[block.__name__]}, graph.declined


def near_misses():
    def second_user(given):
        out = blocks.routed(given)
        return out + given["x"], out * 2

    def added_to_itself(given):
        out = blocks.routed(given)
        return out + out

    def broadcast(given):
        return blocks.routed(given) + given["x"][0]

    def widened(given):
        return blocks.routed(given).double() + given["x"].double()

    def needs_the_combine(given):
        y, sent = blocks.experts(given)
        found = epops.combine(y, sent.route, sent.row_weights, group="ep", num_tokens=given["x"].shape[0], top_k=2)
        return found.out + given["x"] * found.status[1]

    def later_exchange(given):
        first, second = blocks.routed(given), blocks.routed({**given, "x": given["x"] * 3})
        return first + second.relu()

    def inexact_scalars(given):
        return blocks.routed(given) * 0.1 * 0.3 + given["x"]

    def weights_with_another_user(given):
        y, sent = blocks.experts(given)
        weighted = y * sent.row_weights[:, None]
        return blocks.combine(weighted, sent, given, weigh=False), weighted.sum(0)

    def weights_of_channels(given):
        y, sent = blocks.experts(given)
        return blocks.combine(y * given["x"][0], sent, given, weigh=False)

    def weights_of_the_rank_layout(given):
        sent = epops.dispatch(given["x"], given["idx"], given["weights"], group="ep", layout="rank")
        y = sent.rows * sent.row_weights[:, :1]
        return epops.combine(y, sent.route, group="ep", num_tokens=given["x"].shape[0], top_k=2, layout="rank").out

    def weights_twice(given):
        y, sent = blocks.experts(given)
        return blocks.combine(y * sent.row_weights[:, None], sent, given)

    def divided_by_three(given):
        return blocks.routed(given) / 3 + given["x"]

    def rounded_on_the_way(given):
        return blocks.routed(given).bfloat16().float() + given["x"]

    def of_another_width(given):
        return blocks.routed(given) + given["x"][:, :1]

    def transposed_before(given):
        square = torch.nn.functional.pad(given["x"], (0, 0, 0, 11))
        return torch.nn.functional.pad(blocks.routed(given), (0, 0, 0, 11)).t() + square

    def compared(given):
        out = blocks.routed(given)
        return torch.where(out > 0, out, given["x"])

    def addcmul_of_itself(given):
        out = blocks.routed(given)
        return torch.addcmul(out, out, given["x"])

    def addcmul_inexact(given):
        return torch.addcmul(blocks.routed(given) * (1 / 3) * (1 / 3), given["x"], given["x"])

    def addcmul_broadcast(given):
        return torch.addcmul(blocks.routed(given), given["x"][:, :1], given["x"][:1, :1])

    def addcmul_wider(given):
        narrow = {name: item.bfloat16() if name in ("x", "experts") else item for name, item in given.items()}
        return torch.addcmul(blocks.routed(narrow).float(), given["x"], given["x"])

    return {
        divided_by_three: None,
        addcmul_of_itself: None,
        addcmul_inexact: "not exact",
        addcmul_broadcast: "broadcasts",
        addcmul_wider: "wider than",
        rounded_on_the_way: "rounds it to",
        of_another_width: "broadcasts",
        transposed_before: None,
        compared: None,
        second_user: "2 users",
        added_to_itself: None,
        broadcast: "broadcasts",
        widened: None,
        needs_the_combine: "needs the combine",
        inexact_scalars: "not exact",
        weights_with_another_user: "other users",
        weights_of_channels: None,
        weights_of_the_rank_layout: "rank layout",
        weights_twice: None,
        later_exchange: None,
    }


@pytest.mark.parametrize("block", near_misses(), ids=lambda block: block.__name__)
def test_leaves_alone(block):
    reason = next(said for one, said in near_misses().items() if one.__name__ == block.__name__)
    graph = blocks.passed(block, blocks.inputs(), passes=[fuse_add])
    assert graph.rewrites == {"fuse_add": 0}
    assert blocks.text(graph.before) == blocks.text(graph.after)
    if reason:
        assert reason in " ".join(map(str, graph.declined))


def test_an_addend_of_a_later_exchange_is_fused_into_that_one():
    def sum_of_two(given):
        return blocks.routed(given) + blocks.routed({**given, "x": given["x"] * 3})

    graph = blocks.passed(sum_of_two, blocks.inputs(), passes=[fuse_add])
    assert graph.rewrites == {"fuse_add": 1}
    lines = [line for line in blocks.text(graph).splitlines() if "epops.combine" in line]
    assert "%combine.out" in lines[1] and "addend" not in lines[0]


def test_a_write_in_between_is_not_crossed():
    """A functional graph has writes at its end alone, so this one is made by hand."""
    graph = blocks.passed(shared_expert, blocks.inputs(), passes=[])
    module = graph.after
    add = next(node for node in module.graph.nodes if node.target is torch.ops.aten.add.Tensor)
    x = next(node for node in module.graph.nodes if node.op == "placeholder" and node.meta["val"].shape == (5, 16))
    with module.graph.inserting_before(add):
        module.graph.call_function(torch.ops.aten.zero_.default, (x,))
    assert fuse_add(module.graph) == 0


@pytest.mark.parametrize("crosses", [False, True])
def test_random_numbers_are_drawn_in_their_order(crosses):
    """An addend with dropout moves before the combine, but not before other numbers that the program draws first."""
    from torch._inductor import config

    def block(given):
        out = blocks.routed(given)
        first = torch.dropout(given["x"], 0.5, True) if crosses else given["x"]
        return (out + torch.dropout(given["x"] * 2, 0.5, True)) * first

    with config.patch(fallback_random=True), torch.no_grad():
        given = blocks.inputs()
        torch.manual_seed(0)
        expected = block(given)
        torch.manual_seed(0)
        graphs, got = capture(block, given, passes=[fuse_add], run=True)
    blocks.close(got, expected, 1e-5)
    assert graphs[0].rewrites == {"fuse_add": int(not crosses)}


def test_dynamic_shapes():
    given = blocks.inputs()
    torch._dynamo.mark_dynamic(given["x"], 0)
    torch._dynamo.mark_dynamic(given["idx"], 0)
    torch._dynamo.mark_dynamic(given["weights"], 0)

    def block(given):
        y, sent = blocks.experts(given)
        out = blocks.combine(y * sent.row_weights[:, None], sent, given, weigh=False)
        return (out.view(-1, 1, blocks.HIDDEN) + given["x"].unsqueeze(1)).squeeze(1)

    graph = blocks.passed(block, given, passes=[fuse_add])
    assert graph.rewrites == {"fuse_add": 2}, graph.declined
    assert "s0" in blocks.text(graph)


def of_a_batch(given, tokens):
    return blocks.routed({**given, "x": tokens.reshape(-1, tokens.shape[-1])}).view(tokens.shape)


def residual_of_symbolic_sizes(given, tokens):
    return tokens + of_a_batch(given, tokens)


def heads_of_symbolic_sizes(given, tokens):
    return (of_a_batch(given, tokens).unflatten(-1, (4, -1)) + tokens.unflatten(-1, (4, -1))).flatten(2)


def stacked_with_symbolic_sizes(given, tokens):
    return torch.stack([tokens, of_a_batch(given, tokens)], 2).sum(2, keepdim=True)


@pytest.mark.parametrize("dims", [(0, 1), (0, 1, 2)], ids=["batch and length", "channels too"])
@pytest.mark.parametrize("block", [residual_of_symbolic_sizes, heads_of_symbolic_sizes, stacked_with_symbolic_sizes])
def test_a_batch_of_symbolic_sizes(block, dims):
    """Of several symbolic sizes a reshape needs all but one, and has them where it stands."""
    given = blocks.inputs(tokens=6)
    tokens = given["x"].view(2, 3, -1)
    for dim in dims:
        torch._dynamo.mark_dynamic(tokens, dim)
    for name in ("experts",) if 2 in dims else ():
        torch._dynamo.mark_dynamic(given[name], 1)
        torch._dynamo.mark_dynamic(given[name], 2)
    graph = blocks.passed(block, given, tokens, passes=[fuse_add])
    assert graph.rewrites == {"fuse_add": 1}, graph.declined


def two_ranks(rank, size):
    with blocks.group():
        given = blocks.inputs(rank, tokens=3 + 4 * rank)
        wide = [blocks.same_numbers(block, given, [fuse_add], 1e-5)["fuse_add"] for block in FUSED]
        given = blocks.inputs(rank, tokens=3 + 4 * rank, dtype=torch.bfloat16)
        narrow = [blocks.same_numbers(block, given, [fuse_add], 4e-2)["fuse_add"] for block in list(FUSED)[1:2]]
    return wide, narrow


def test_numbers_on_two_ranks():
    for wide, narrow in run_ranks(two_ranks, 2):
        assert wide == [1, 1, 1, 1, 1] and narrow == [1]
