# ruff: noqa: E501 (goldens)
"""fuse_add of sums that are spelled as something else: addmm, baddbmm, stacks summed over; and of what only looks like that."""

from __future__ import annotations

import pytest
import torch
from expecttest import TestCase

from epops.inspection.capture import capture
from epops.passes.fuse_add import fuse_add
from epops.passes.overlap import overlap
from epops.testing import count_ops
from tests.passes import blocks
from tests.ranks import run_ranks


@pytest.fixture(autouse=True)
def ep():
    with blocks.group() as group:
        yield group


ROUTED = blocks.routed


def shared(given):
    return given["x"] @ given["shared"]


def addmm(given):
    return torch.addmm(ROUTED(given), given["x"], given["shared"])


def addmm_scaled(given):
    return torch.addmm(ROUTED(given), given["x"], given["shared"], beta=2, alpha=-0.5)


def baddbmm(given):
    return torch.baddbmm(ROUTED(given)[None], given["x"][None], given["shared"][None])


def stacked(given):
    return torch.stack([ROUTED(given), given["x"]]).sum(0)


def stacked_in_the_middle(given):
    return torch.stack([given["x"], ROUTED(given), shared(given)], 1).sum(1)


def stacked_last(given):
    return torch.stack((ROUTED(given), given["x"]), dim=-1).sum(dim=-1, keepdim=True)


def joined(given):
    return torch.cat([ROUTED(given).unsqueeze(0), given["x"][None]]).sum(0)


def side_by_side(given):
    return torch.cat([given["x"], ROUTED(given)], 1).unflatten(1, (2, -1)).sum(1)


def stacked_after_scaling(given):
    return torch.stack([ROUTED(given) * 0.5, -given["x"]]).sum(0)


def summed_in_float32(given):
    return torch.stack([ROUTED(given).float(), given["x"].float()]).sum(0).to(given["x"].dtype)


FUSED = (
    addmm,
    addmm_scaled,
    baddbmm,
    stacked,
    stacked_in_the_middle,
    stacked_last,
    joined,
    side_by_side,
    stacked_after_scaling,
    summed_in_float32,
)


class Golden(TestCase):
    def test_addmm(self):
        graph = blocks.passed(addmm_scaled, blocks.inputs(), passes=[fuse_add])
        self.assertExpectedInline(
            blocks.text(graph),
            """\
%dispatch: rows f32[16, 16], row_weights f32[16], expert_ends i32[3], route i32[59] = epops.dispatch(..., ..., ..., group=ep, layout=expert)
%grouped_mm: f32[16, 16] = epops.grouped_mm(%dispatch.rows, ..., %dispatch.expert_ends)
%mm: f32[5, 16] = mm(..., ...)
%combine: out f32[5, 16] = epops.combine(%grouped_mm, %dispatch.route, %dispatch.row_weights, %mm, group=ep, layout=expert, out_dtype=f32, out_scale=2, addend_scale=-0.5)
return [%combine.out]""",
        )

    def test_stacked(self):
        graph = blocks.passed(stacked_in_the_middle, blocks.inputs(dtype=torch.bfloat16), passes=[fuse_add])
        self.assertExpectedInline(
            blocks.text(graph),
            """\
%dispatch: rows bf16[16, 16], row_weights f32[16], expert_ends i32[3], route i32[59] = epops.dispatch(..., ..., ..., group=ep, layout=expert)
%grouped_mm: bf16[16, 16] = epops.grouped_mm(%dispatch.rows, ..., %dispatch.expert_ends)
%mm: bf16[5, 16] = mm(..., ...)
%cast: f32[5, 16] = cast(..., f32)
%cast.1: f32[5, 16] = cast(%mm, f32)
%add: f32[5, 16] = add(%cast, %cast.1)
%combine: out bf16[5, 16] = epops.combine(%grouped_mm, %dispatch.route, %dispatch.row_weights, %add, group=ep, layout=expert, out_dtype=bf16)
return [%combine.out]""",
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", FUSED, ids=lambda block: block.__name__)
def test_fires(block, dtype):
    graph = blocks.passed(block, blocks.inputs(dtype=dtype), passes=[fuse_add])
    assert graph.rewrites == {"fuse_add": 1}, graph.declined
    assert not any(count_ops(graph, name) for name in ("cat", "stack", "sum", "addmm", "baddbmm"))


def test_the_product_of_an_addmm_runs_beside_the_exchange():
    graph = blocks.passed(addmm, blocks.inputs(), passes=[fuse_add, overlap])
    assert graph.rewrites == {"fuse_add": 1, "overlap": 1}


def pieces_of_a_piece(given):
    return torch.stack([ROUTED(given)[:4], given["x"][:4]]).view(4, 2, 16).sum(1)


def rows_below_one_another(given):
    return torch.cat([ROUTED(given), given["x"]]).view(5, 2, 16).sum(1)


def neighbours(given):
    return torch.cat([ROUTED(given), given["x"]], 1).view(5, 16, 2).sum(2)


def both_dims(given):
    return torch.stack([ROUTED(given), given["x"]]).sum((0, 1))


def over_channels(given):
    return torch.stack([ROUTED(given), given["x"]]).sum(-1)


def twice(given):
    out = ROUTED(given)
    return torch.stack([out, out, given["x"]]).sum(0)


def stack_used_besides(given):
    both = torch.stack([ROUTED(given), given["x"]])
    return both.sum(0), both * 2


def uneven_pieces(given):
    return torch.cat([ROUTED(given), given["x"].repeat(1, 3)], 1).view(5, 4, 16).sum(1)


def transposed_stack(given):
    return torch.stack([ROUTED(given), given["x"]]).transpose(0, 1).contiguous().view(2, 5, 16).sum(0)


def mean(given):
    return torch.stack([ROUTED(given), given["x"]]).mean(0)


def largest(given):
    return torch.stack([ROUTED(given), given["x"]]).amax(0)


def without_it(given):
    """What has the factor 0 is left out, even a NaN."""
    return torch.addmm(ROUTED(given), given["x"], given["shared"], beta=0)


def one_row_for_all(given):
    return torch.addmm(ROUTED(given)[:1], given["x"], given["shared"])


def product_of_itself(given):
    out = ROUTED(given)
    return torch.addmm(out, out, given["shared"])


def as_a_factor(given):
    return torch.addmm(given["x"], ROUTED(given), given["shared"])


def addmm_of_inexact_scalars(given):
    return torch.addmm(ROUTED(given) * 0.1, given["x"], given["shared"], beta=0.3)


def addmm_used_besides(given):
    out = ROUTED(given)
    return torch.addmm(out, given["x"], given["shared"]), out * 3


def wider_than_the_rows(given):
    narrow = {name: item.bfloat16() if name in ("x", "experts") else item for name, item in given.items()}
    return torch.stack([ROUTED(narrow), narrow["x"]]).sum(0, dtype=torch.float32)


def a_gate_for_each_token(given):
    return ROUTED(given) * given["x"][:, :1].sigmoid() + given["x"]


def sum_read_by_strides(given):
    total = given["x"].t().contiguous().t() + ROUTED(given)
    return torch.as_strided(total, total.shape, total.stride())


MISSES = {
    sum_read_by_strides: "read by strides",
    pieces_of_a_piece: None,
    rows_below_one_another: None,
    neighbours: None,
    both_dims: None,
    over_channels: None,
    twice: None,
    stack_used_besides: None,
    uneven_pieces: None,
    transposed_stack: None,
    mean: None,
    largest: None,
    without_it: None,
    one_row_for_all: None,
    product_of_itself: None,
    as_a_factor: None,
    addmm_of_inexact_scalars: "not exact",
    addmm_used_besides: None,
    wider_than_the_rows: None,
    a_gate_for_each_token: "no number known now",
}


@pytest.mark.parametrize("block", MISSES, ids=lambda block: block.__name__)
def test_leaves_alone(block):
    graph = blocks.passed(block, blocks.inputs(), passes=[fuse_add])
    assert graph.rewrites == {"fuse_add": 0}
    assert blocks.text(graph.before) == blocks.text(graph.after)
    assert (MISSES[block] or "") in " ".join(map(str, graph.declined))


def test_a_later_exchange_is_not_taken_for_an_addend():
    def later(given):
        out = ROUTED(given)
        return torch.stack([out, ROUTED({**given, "x": given["x"] * 3}).relu()]).sum(0)

    graph = blocks.passed(later, blocks.inputs(), passes=[fuse_add])
    assert graph.rewrites == {"fuse_add": 0}
    assert blocks.text(graph.before) == blocks.text(graph.after)


def test_an_input_that_the_sum_is_written_into():
    def residual(given):
        given["x"] += ROUTED(given)
        return given["x"] * 2

    given = blocks.inputs()
    with torch.no_grad():
        kept = given["x"].clone()
        expected = residual(given), given["x"]
        mine = {**given, "x": kept}
        graphs, got = capture(residual, mine, passes=[fuse_add], run=True)
    assert graphs[0].rewrites == {"fuse_add": 1}
    blocks.close(got, expected[0], 1e-5)
    blocks.close(mine["x"], expected[1], 1e-5)


def test_dynamic_shapes():
    for block in (addmm, stacked, stacked_in_the_middle):
        given = blocks.inputs()
        for name in ("x", "idx", "weights"):
            torch._dynamo.mark_dynamic(given[name], 0)
        graph = blocks.passed(block, given, passes=[fuse_add])
        assert graph.rewrites == {"fuse_add": 1}, graph.declined


def two_ranks(rank, size):
    with blocks.group():
        counts = []
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 4e-2)):
            given = blocks.inputs(rank, tokens=3 + 4 * rank, dtype=dtype)
            counts += [
                blocks.same_numbers(block, given, [fuse_add], tolerance)["fuse_add"]
                for block in (addmm_scaled, stacked_in_the_middle)
            ]
    return counts


def test_numbers_on_two_ranks():
    assert run_ranks(two_ranks, 2) == [[1, 1, 1, 1]] * 2


def scaled_into_zeros(given):
    total = torch.zeros_like(given["x"])
    total.add_(ROUTED(given), alpha=0.5)
    return total.add_(given["x"] @ given["shared"])


def zeros_of_a_batch(given):
    return torch.zeros(2, 5, 16) + ROUTED(given) + torch.stack([given["x"], given["x"] * 2])


def two_routed_results(given):
    return torch.stack([ROUTED(given), given["x"], ROUTED({**given, "x": given["x"] * 3})]).sum(0)


def test_zeros_that_scale_or_widen_what_they_are_added_to():
    """`passed` compares with eager, and runs the pass again."""
    for block, rewrites in ((scaled_into_zeros, 1), (zeros_of_a_batch, 0), (two_routed_results, 2)):
        assert blocks.passed(block, blocks.inputs(), passes=[fuse_add]).rewrites == {"fuse_add": rewrites}
    assert blocks.same_numbers(scaled_into_zeros, blocks.inputs(), [fuse_add], 1e-5)["fuse_add"]
