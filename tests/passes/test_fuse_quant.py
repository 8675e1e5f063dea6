# ruff: noqa: E501 (goldens)
"""fuse_quant: quantizers around a dispatch become the quantizing dispatch, with the same bits, or stay."""

from __future__ import annotations

import pytest
import torch
from expecttest import TestCase
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import epops
from epops.passes.decline_log import listen
from epops.passes.fuse_quant import fuse_quant
from epops.testing import count_ops, normalized_graph
from tests.passes import blocks, quantizers
from tests.ranks import run_ranks

HIDDEN = 256


@pytest.fixture(autouse=True)
def ep():
    with blocks.group() as group:
        yield group


def rows(rank: int = 0, tokens: int = 7, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Rows from 1e-8 to 1e4, with zeros, scales at and just above powers of two, and a value below every eps."""
    given = blocks.inputs(rank, tokens, HIDDEN)
    x = given["x"] * torch.logspace(-8, 4, tokens).unsqueeze(1)
    ugly = [0.0, 448 * 2.0**-10, 448 * (1 + 2.0**-7), 1e-30]
    for token, value in zip(range(1, tokens), ugly):
        x[token, : HIDDEN // 2] = value
    x[0, ::3] = 0
    return {**given, "x": x.to(dtype)}


def valid(sent: epops.DispatchResult, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Tensors of rows with the invalid rows cleared, as bytes where a cast would lose bits."""
    there = (sent.row_expert >= 0).unsqueeze(1)
    return [torch.where(there, item.contiguous().view(torch.uint8), 0) for item in tensors]


def after(quantizer):
    def quantize_what_arrived(given):
        sent = epops.dispatch(given["x"], given["idx"], given["weights"], group="ep")
        q, scales = quantizer(sent.rows)
        return *valid(sent, q, scales), sent.row_weights, sent.expert_ends

    return quantize_what_arrived


def before(quantizer):
    def quantize_what_is_sent(given):
        q, scales = quantizer(given["x"])
        sent = epops.dispatch(q, given["idx"], given["weights"], scales, group="ep")
        return *valid(sent, sent.rows, sent.scales), sent.row_weights, sent.expert_ends

    return quantize_what_is_sent


def in_two_exchanges(quantizer):
    def send_rows_and_scales(given):
        q, scales = quantizer(given["x"])
        sent = epops.dispatch(q, given["idx"], given["weights"], group="ep")
        other = epops.dispatch(scales, given["idx"], given["weights"], group="ep")
        return *valid(sent, sent.rows, other.rows), other.row_weights, sent.expert_ends

    return send_rows_and_scales


def settings(graph):
    node = next(node for node in graph.after.graph.nodes if "dispatch_quant" in str(node.target))
    return dict(node.kwargs)


class Golden(TestCase):
    def test_after(self):
        graph = blocks.passed(after(quantizers.blocks_of_128), rows(), passes=[fuse_quant], exact=True)
        # Not its arithmetic: how torch writes ``1.0 / scale`` down differs between versions.
        self.assertExpectedInline(
            normalized_graph(graph.before, ops=("epops", "amax", "return")),
            """\
%dispatch: rows bf16[16, 256], row_weights f32[16], row_expert i32[16], expert_ends i32[3] = epops.dispatch(..., ..., ..., group=ep, layout=expert)
%amax: f32[16, 2] = amax(..., [2])
return [..., ..., %dispatch.row_weights, %dispatch.expert_ends]""",
        )
        self.assertExpectedInline(
            blocks.text(graph),
            """\
%dispatch_quant: rows f8e4m3[16, 256], scales f32[16, 2], row_weights f32[16], row_expert i32[16], expert_ends i32[3] = epops.dispatch_quant(..., ..., ..., group=ep, layout=expert, quant_dtype=f8e4m3, block=128, scale_format=float32, scale_layout=row, scale_math=multiply, eps_on=amax, eps=9.999999747378752e-05, clamp=False)
%reshape: u8[16, 256] = reshape(%dispatch_quant.rows, u8)
%reshape.1: u8[16, 8] = reshape(%dispatch_quant.scales, u8)
return [..., ..., %dispatch_quant.row_weights, %dispatch_quant.expert_ends]""",
        )

    def test_before(self):
        graph = blocks.passed(before(quantizers.per_token), rows(), passes=[fuse_quant], exact=True)
        self.assertExpectedInline(
            blocks.text(graph.before),
            """\
%cast: f32[7, 256] = cast(..., f32)
%cast.1: f32[7, 1] = cast(..., f32)
%div: f32[7, 1] = div(..., 448)
%div.1: f32[7, 256] = div(%cast, %div)
%cast.2: f8e4m3[7, 256] = cast(..., f8e4m3)
%dispatch: rows f8e4m3[16, 256], scales f32[16, 1], row_weights f32[16], row_expert i32[16], expert_ends i32[3] = epops.dispatch(%cast.2, ..., ..., %div, group=ep, layout=expert)
%reshape: u8[16, 256] = reshape(%dispatch.rows, u8)
%reshape.1: u8[16, 4] = reshape(%dispatch.scales, u8)
return [..., ..., %dispatch.row_weights, %dispatch.expert_ends]""",
        )
        self.assertExpectedInline(
            blocks.text(graph),
            """\
%dispatch_quant: rows f8e4m3[16, 256], scales f32[16, 1], row_weights f32[16], row_expert i32[16], expert_ends i32[3] = epops.dispatch_quant(..., ..., ..., group=ep, layout=expert, quant_dtype=f8e4m3, block=0, scale_format=float32, scale_layout=row, scale_math=divide, eps_on=amax, eps=1.000000013351432e-10, clamp=True)
%reshape: u8[16, 256] = reshape(%dispatch_quant.rows, u8)
%reshape.1: u8[16, 4] = reshape(%dispatch_quant.scales, u8)
return [..., ..., %dispatch_quant.row_weights, %dispatch_quant.expert_ends]""",
        )

    def test_in_two_exchanges(self):
        graph = blocks.passed(in_two_exchanges(quantizers.of_epops), rows(), passes=[fuse_quant], exact=True)
        self.assertExpectedInline(
            blocks.text(graph),
            """\
%dispatch_quant: rows f8e4m3[16, 256], scales f8e8m0[16, 2], row_weights f32[16], row_expert i32[16], expert_ends i32[3] = epops.dispatch_quant(..., ..., ..., group=ep, layout=expert, quant_dtype=f8e4m3, block=128, scale_format=ue8m0, scale_layout=row, scale_math=divide, eps_on=amax, eps=9.999999960041972e-13, clamp=True)
%reshape: u8[16, 256] = reshape(%dispatch_quant.rows, u8)
%reshape.1: u8[16, 2] = reshape(%dispatch_quant.scales, u8)
return [..., ..., %dispatch_quant.row_weights, %dispatch_quant.expert_ends]""",
        )


@pytest.mark.parametrize("quantizer", quantizers.KNOWN, ids=lambda quantizer: quantizer.__name__)
@pytest.mark.parametrize("where", [after, before], ids=["after", "before"])
def test_reads_the_quantizer_and_keeps_its_bits(quantizer, where):
    dtype = torch.float32 if where is after else torch.bfloat16
    graph = blocks.passed(where(quantizer), rows(dtype=dtype), passes=[fuse_quant], exact=True)
    assert graph.rewrites == {"fuse_quant": 1}, graph.declined
    assert count_ops(graph, "amax") == count_ops(graph, "epops.dispatch") == 0
    assert settings(graph).items() >= quantizers.KNOWN[quantizer].items()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_infinities_and_extremes_keep_their_bits(dtype):
    limits = torch.finfo(dtype)
    given = rows(dtype=dtype)
    x = given["x"]
    x[0], x[1], x[2] = -0.0, limits.max, limits.tiny / 2
    x[3, ::2], x[4, 5], x[5, 200] = limits.min, torch.inf, -torch.inf
    for quantizer in quantizers.KNOWN:
        graph = blocks.passed(after(quantizer), given, passes=[fuse_quant], exact=True)
        assert graph.rewrites == {"fuse_quant": 1}, (quantizer.__name__, graph.declined)


@pytest.mark.parametrize("quantizer", quantizers.UNKNOWN, ids=lambda quantizer: quantizer.__name__)
def test_leaves_other_arithmetic_alone(quantizer):
    graph = blocks.passed(after(quantizer), rows(), passes=[fuse_quant], exact=True)
    assert graph.rewrites == {"fuse_quant": 0}
    assert [entry.rule for entry in graph.declined] == ["fuse_quant"]


def rows_used_besides(given):
    sent = epops.dispatch(given["x"], given["idx"], given["weights"], group="ep")
    q, scales = quantizers.per_token(sent.rows)
    return *valid(sent, q, scales), torch.where(sent.row_expert[:, None] >= 0, sent.rows, 0).sum()


def amax_used_besides(given):
    sent = epops.dispatch(given["x"], given["idx"], given["weights"], group="ep")
    amax = sent.rows.abs().amax(-1, keepdim=True).float()
    scale = amax.clamp(min=1e-10) / 448.0
    return *valid(sent, (sent.rows.float() / scale).to(torch.float8_e4m3fn), scale), amax * 2


def two_quantizers(given):
    sent = epops.dispatch(given["x"], given["idx"], given["weights"], group="ep")
    return valid(sent, *quantizers.per_token(sent.rows), *quantizers.blocks_of_128(sent.rows))


def of_blocks_of(width, x):
    wide = x.float().unflatten(-1, (-1, width))
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=1e-4) / quantizers.TOP
    return (wide / scale).flatten(-2).to(quantizers.FP8), scale.squeeze(-1)


def one_formula_of_two_widths(given):
    sent = epops.dispatch(given["x"], given["idx"], given["weights"], group="ep")
    return valid(sent, *of_blocks_of(128, sent.rows), of_blocks_of(64, sent.rows)[0])


def scales_of_another_width(given):
    q, scales = of_blocks_of(128, given["x"])[0], of_blocks_of(64, given["x"])[1]
    sent = epops.dispatch(q, given["idx"], given["weights"], scales, group="ep")
    return valid(sent, sent.rows, sent.scales)


def widened_scales(given):
    sent = epops.dispatch(given["x"], given["idx"], given["weights"], group="ep")
    amax = sent.rows.float().abs().amax(-1, keepdim=True)
    q = (sent.rows.float() / (amax.clamp(min=1e-4) / quantizers.TOP)).to(quantizers.FP8)
    return valid(sent, q, torch.maximum(amax, torch.full((1, 4), 1e-4)) / quantizers.TOP)


def sent_rows_used_besides(given):
    q, scales = quantizers.per_token(given["x"])
    sent = epops.dispatch(q, given["idx"], given["weights"], scales, group="ep")
    return *valid(sent, sent.rows, sent.scales), q.float().sum()


def scales_of_other_rows(given):
    q, _ = quantizers.per_token(given["x"])
    _, scales = quantizers.per_token(given["x"] * 2)
    sent = epops.dispatch(q, given["idx"], given["weights"], scales, group="ep")
    return valid(sent, sent.rows, sent.scales)


def other_routing(given):
    q, scales = quantizers.per_token(given["x"])
    sent = epops.dispatch(q, given["idx"], given["weights"], group="ep")
    other = epops.dispatch(scales, given["idx"].flip(0), given["weights"], group="ep")
    return *valid(sent, sent.rows), *valid(other, other.rows)


@pytest.mark.parametrize(
    "block",
    [
        rows_used_besides,
        amax_used_besides,
        two_quantizers,
        one_formula_of_two_widths,
        scales_of_another_width,
        widened_scales,
        sent_rows_used_besides,
        scales_of_other_rows,
        other_routing,
        before(quantizers.other_scales_returned),
    ],
    ids=lambda block: block.__name__,
)
def test_leaves_partial_uses_alone(block):
    graph = blocks.passed(block, rows(), passes=[fuse_quant], exact=True)
    assert graph.rewrites == {"fuse_quant": 0}
    assert graph.declined
    assert blocks.text(graph.before) == blocks.text(graph.after)


def of_cut_and_padded_rows(x):
    """Three parts a row, each of them padded: not the blocks that rows of so many channels have."""
    wide = torch.nn.functional.pad(x.float().view(-1, 64), (0, 64))
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=1e-6) / quantizers.TOP
    return (wide / scale)[:, :64].to(quantizers.FP8).view(-1, 192), scale.view(-1, 3)


def of_cut_blocks(x):
    """What is left out are channels of every block, not those that lengthened the rows."""
    wide = torch.nn.functional.pad(x.float(), (0, 64)).view(-1, 2, 128)
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=1e-6) / quantizers.TOP
    return (wide / scale)[..., :64].to(quantizers.FP8).flatten(1), scale[..., 0]


def of_blocks_across_rows(x):
    wide = x.float().reshape(-1, 384)
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=1e-6) / quantizers.TOP
    return (wide / scale).to(quantizers.FP8).view(-1, 192), scale.view(-1, 1).expand(-1, 2).reshape(-1, 1)


@pytest.mark.parametrize("quantizer", [of_cut_and_padded_rows, of_cut_blocks, of_blocks_across_rows])
@pytest.mark.parametrize("where", [after, before], ids=["after", "before"])
def test_blocks_of_other_channels(quantizer, where):
    given = rows(tokens=8)
    given["x"] = given["x"][:, :192].contiguous()
    graph = blocks.passed(where(quantizer), given, passes=[fuse_quant], exact=True)
    assert graph.rewrites == {"fuse_quant": 0}
    assert graph.declined


def test_one_formula_of_the_scales_is_used_but_not_both():
    """Rows by a reciprocal: of its inverse and of the quotient of amax, either is the scale, and the other one is something else."""

    def both(given):
        sent = epops.dispatch(given["x"], given["idx"], given["weights"], group="ep")
        amax = sent.rows.float().abs().amax(-1, keepdim=True).clamp(1e-4)
        inverse = quantizers.TOP / amax
        return valid(sent, (sent.rows * inverse).to(quantizers.FP8), inverse.reciprocal(), amax / quantizers.TOP)

    graph = blocks.passed(both, rows(), passes=[fuse_quant], exact=True)
    assert graph.rewrites == {"fuse_quant": 0} and graph.declined


def test_scales_derived_from_the_scales_are_no_obstacle():
    def dequantized(given):
        sent = epops.dispatch(given["x"], given["idx"], given["weights"], group="ep")
        q, scales = quantizers.per_token(sent.rows)
        return torch.where(sent.row_expert[:, None] >= 0, q.float() * scales, 0), scales.reciprocal()[:0]

    graph = blocks.passed(dequantized, rows(), passes=[fuse_quant], exact=True)
    assert graph.rewrites == {"fuse_quant": 1}


def test_a_write_in_between_is_not_crossed():
    """A functional graph has writes at its end alone, so this one is made by hand."""
    graph = blocks.passed(after(quantizers.per_token), rows(), passes=[])
    nodes = graph.after.graph.nodes
    cast = next(
        node
        for node in nodes
        if node.meta.get("val") is not None and "float8" in str(getattr(node.meta["val"], "dtype", ""))
    )
    taken = next(node for node in nodes if node.name.startswith("getitem"))
    with graph.after.graph.inserting_before(cast):
        graph.after.graph.call_function(torch.ops.aten.zero_.default, (taken,))
    assert fuse_quant(graph.after.graph) == 0


def on_cuda(quantizer):
    """The graph of `after` for a GPU, on fake tensors."""
    with FakeTensorMode():
        given = {name: torch.empty_like(item, device="cuda") for name, item in rows().items()}
        module = make_fx(after(quantizer), decomposition_table=select_decomp_table())(given)
    module.graph.eliminate_dead_code()
    return module.graph


@pytest.mark.parametrize(
    ("quantizer", "fused"), [(quantizers.eps_in_the_dtype_of_the_rows, 0), (quantizers.magnitude_in_the_rows_dtype, 1)]
)
def test_a_rounding_that_the_graph_no_longer_names(quantizer, fused):
    """torch 2.11 makes one cast, of a dtype to itself, of one down and up again: what eager rounded to is lost with it."""
    graph = on_cuda(quantizer)
    convert, lost = torch.ops.prims.convert_element_type.default, 0
    for node in graph.find_nodes(op="call_function", target=convert):
        up = [user for user in node.users if user.target == convert]
        if node.args[1] == torch.bfloat16 and len(up) == len(node.users):
            for user in up:
                user.replace_input_with(node, node.args[0])
            lost += 1
    graph.eliminate_dead_code()
    assert lost == 1
    assert fuse_quant(graph) == fused


def by_a_tensor_of_the_device(x):
    """A quotient on CUDA, where division by a number is multiplication by its reciprocal."""
    scale = x.float().abs().amax(-1, keepdim=True) / torch.full((1,), quantizers.TOP, device=x.device)
    return (x.float() / scale).clamp(-quantizers.TOP, quantizers.TOP).to(quantizers.FP8), scale


def overflowing_e5m2(x):
    scale = x.float().abs().amax(-1, keepdim=True) / torch.finfo(torch.float8_e5m2).max
    return (x.float() / scale).to(torch.float8_e5m2), scale


@pytest.mark.parametrize(
    "quantizer, count",
    [
        (quantizers.per_token, 1),
        (quantizers.blocks_of_128, 1),
        (quantizers.blocks_of_128_powers_of_two, 1),
        (quantizers.log2_of_a_minimum, 0),
        (by_a_tensor_of_the_device, 0),
        (overflowing_e5m2, 0),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_on_cuda_what_the_kernels_have(quantizer, count):
    graph = on_cuda(quantizer)
    assert fuse_quant(graph) == count
    assert fuse_quant(graph) == 0


def powers_of_two_by_log2(x):
    scale = torch.exp2(torch.ceil(torch.log2(x.float().abs().amax(-1, keepdim=True).clamp(min=1e-4) / quantizers.TOP)))
    return (x.float() / scale).clamp(-quantizers.TOP, quantizers.TOP).to(quantizers.FP8), scale


def test_it_says_why_log2_stays_on_cuda():
    with listen() as declined:
        assert fuse_quant(on_cuda(powers_of_two_by_log2)) == 0
    assert "2 ** ceil(log2(s))" in declined[0].reason and "scale_format='ue8m0'" in declined[0].reason


def test_dynamic_token_count():
    given = rows()
    for name in ("x", "idx", "weights"):
        torch._dynamo.mark_dynamic(given[name], 0)
    graph = blocks.passed(before(quantizers.blocks_of_128), given, passes=[fuse_quant], exact=True)
    assert graph.rewrites == {"fuse_quant": 1}, graph.declined


def two_ranks(rank, size):
    with blocks.group():
        given = rows(rank, 3 + 4 * rank)
        for block in (
            after(quantizers.of_epops),
            before(quantizers.per_token),
            in_two_exchanges(quantizers.blocks_of_128),
        ):
            graph = blocks.passed(block, given, passes=[fuse_quant], exact=True)
            assert count_ops(graph, "epops.dispatch_quant") == 1
    return True


def test_bits_on_two_ranks():
    assert run_ranks(two_ranks, 2) == [True, True]


def test_quantize_names_what_is_wrong():
    with pytest.raises(ValueError, match="x: expected float rows"):
        epops.quantize(torch.zeros(3, 4, dtype=torch.int32))


def test_quantize_keeps_leading_dimensions():
    x = torch.randn(2, 3, 200)
    q, scales = epops.quantize(x)
    assert q.shape == (2, 3, 200) and scales.shape == (2, 3, 2)
    flat, flat_scales = epops.quantize(x.view(6, 200))
    assert torch.equal(q.view(6, 200).float(), flat.float()) and torch.equal(scales.view(6, 2), flat_scales)
