"""fuse_quant around all_to_all: one exchange of fp8 rows with their scales in front of them, with the same bits, or none."""

from __future__ import annotations

import pytest
import torch
from expecttest import TestCase
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import epops
from epops.passes import PASSES
from epops.passes.decline_log import listen
from epops.passes.fuse_quant import fuse_quant
from epops.testing import assert_fused, captured, count_ops
from tests.passes import blocks, quantizers
from tests.ranks import run_ranks

HIDDEN = 256


@pytest.fixture(autouse=True)
def ep():
    with blocks.group() as group:
        yield group


def rows(rank: int = 0, tokens: int = 8, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Rows from 1e-8 to 1e4, with zeros and infinities."""
    x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(rank))
    x = x * torch.logspace(-8, 4, tokens).unsqueeze(1)
    x[0, ::3], x[1, :128], x[2] = 0, 0, -0.0
    x[3, 7] = torch.inf
    return x.to(dtype)


def bytes_of(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Bytes, for casts lose bits; a NaN is any NaN."""
    found = []
    for item in tensors:
        raw = item.contiguous().view(torch.uint8)
        if item.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            nan = 0x7F if item.dtype == torch.float8_e4m3fn else 0x7E
            raw = torch.where((raw & 0x7F) >= nan, 0x7F, raw)
        found.append(raw)
    return found


def after(quantizer, **settings):
    def quantize_what_arrived(x, *splits):
        sent = epops.all_to_all(x, *splits, group="ep", **settings)
        return *bytes_of(*quantizer(sent.rows)), sent.counts

    return quantize_what_arrived


def before(quantizer, **settings):
    def quantize_what_is_sent(x, *splits):
        sent = [epops.all_to_all(item, *splits, group="ep", **settings) for item in quantizer(x)]
        return *bytes_of(sent[0].rows, sent[1].rows), sent[1].counts

    return quantize_what_is_sent


class Golden(TestCase):
    def test_after(self):
        graph = blocks.passed(after(quantizers.per_token), rows(), passes=[fuse_quant], exact=True)
        self.assertExpectedInline(
            epops.testing.normalized_graph(graph.before, ops=("epops", "amax", "return")),
            """\
%all_to_all: rows bf16[8, 256], counts i64[1] = epops.all_to_all(..., group=ep, out_size=8, scatter_size=8)
%amax: bf16[8, 1] = amax(..., [-1], True)
return [..., ..., %all_to_all.counts]""",
        )
        self.assertExpectedInline(
            epops.testing.normalized_graph(graph, ops=("epops", "amax", "cat", "return")),
            """\
%amax: f32[8, 1] = amax(..., [-1])
%cat: u8[8, 272] = cat([..., ..., ...], 1)
%all_to_all: rows u8[8, 272], counts i64[1] = epops.all_to_all(..., group=ep, out_size=8, scatter_size=8)
%amax.1: f32[1, 1] = amax(..., [-1])
return [..., ..., %all_to_all.counts]""",
        )

    def test_before(self):
        graph = blocks.passed(before(quantizers.blocks_of_128), rows(), passes=[fuse_quant], exact=True)
        self.assertExpectedInline(
            epops.testing.normalized_graph(graph.before, ops=("epops", "amax", "return")),
            """\
%amax: f32[8, 2] = amax(..., [2])
%all_to_all: rows f8e4m3[8, 256] = epops.all_to_all(..., group=ep, out_size=8, scatter_size=8)
%all_to_all.1: rows f32[8, 2], counts i64[1] = epops.all_to_all(..., group=ep, out_size=8, scatter_size=8)
return [..., ..., %all_to_all.1.counts]""",
        )
        self.assertExpectedInline(
            epops.testing.normalized_graph(graph, ops=("epops", "amax", "cat", "return")),
            """\
%amax: f32[8, 2] = amax(..., [2])
%cat: u8[8, 272] = cat([..., ..., ...], 1)
%all_to_all: rows u8[8, 272], counts i64[1] = epops.all_to_all(..., group=ep, out_size=8, scatter_size=8)
return [..., ..., %all_to_all.counts]""",
        )


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.view(4, 2, HIDDEN)


@pytest.mark.parametrize("where", [after, before], ids=["after", "before"])
def test_every_quantizer_keeps_its_bits(where):
    for number, quantizer in enumerate(quantizers.KNOWN):
        given = rows(dtype=torch.float32 if number % 2 else torch.bfloat16)
        graph = blocks.passed(where(quantizer), given, passes=[fuse_quant], exact=True)
        assert graph.rewrites == {"fuse_quant": 1}, (quantizer.__name__, graph.declined)
        assert count_ops(graph, "epops.all_to_all") == 1, quantizer.__name__


@pytest.mark.parametrize("quantizer", quantizers.UNKNOWN, ids=lambda quantizer: quantizer.__name__)
def test_leaves_other_arithmetic_alone(quantizer):
    graph = blocks.passed(after(quantizer), rows(), passes=[fuse_quant], exact=True)
    assert graph.rewrites == {"fuse_quant": 0}
    assert [entry.rule for entry in graph.declined] == ["fuse_quant"]


def of_heads(x):
    scale = x.float().abs().amax(-1, keepdim=True) / quantizers.TOP
    return (x.float() / scale).clamp(-quantizers.TOP, quantizers.TOP).to(quantizers.FP8), scale


def of_heads_squeezed(x):
    scale = x.float().abs().amax(-1).clamp(min=1e-6) / quantizers.TOP
    return (x.float() / scale[..., None]).to(quantizers.FP8), scale


def as_bytes(x):
    rows, scale = of_heads(x)
    return rows.view(torch.uint8), scale


def in_front(quantizer):
    """Scales are sent first, and something else between them and the rows."""

    def scales_first(x):
        q, s = quantizer(x)
        scales = epops.all_to_all(s, group="ep").rows
        numbers = epops.all_to_all(torch.arange(8), group="ep").rows
        return *bytes_of(epops.all_to_all(q, group="ep").rows, scales), numbers

    return scales_first


@pytest.mark.parametrize(
    "block",
    [
        lambda x: after(of_heads, scatter_dim=0, gather_dim=1)(heads(x)),
        lambda x: after(of_heads, scatter_dim=1, gather_dim=1)(heads(x)),
        lambda x: after(of_heads_squeezed, scatter_dim=1, gather_dim=0)(heads(x)),
        lambda x: after(lambda y: epops.quantize(y.flatten(0, 1), block=64))(heads(x)),
        lambda x: before(of_heads, scatter_dim=0, gather_dim=1)(heads(x)),
        lambda x: before(of_heads_squeezed, scatter_dim=1, gather_dim=0)(heads(x)),
        before(as_bytes),
        in_front(quantizers.blocks_of_128),
        lambda x: after(of_heads)(x.t().contiguous().t()),
    ],
)
def test_other_dims_and_spellings(block):
    graph = blocks.passed(block, rows(), passes=[fuse_quant], exact=True)
    assert graph.rewrites == {"fuse_quant": 1}, graph.declined


def rows_used_besides(x):
    sent = epops.all_to_all(x, group="ep").rows
    return *bytes_of(*quantizers.per_token(sent)), sent


def the_largest_used_besides(x):
    sent = epops.all_to_all(x, group="ep").rows
    amax = sent.float().abs().amax(-1, keepdim=True).clamp(min=1e-10)
    return *bytes_of((sent.float() / (amax / 448.0)).to(quantizers.FP8), amax / 448.0), amax


def two_quantizers(x):
    sent = epops.all_to_all(x, group="ep").rows
    return bytes_of(*quantizers.per_token(sent), *quantizers.blocks_of_128(sent))


def other_lanes(x):
    q, s = quantizers.per_token(x)
    return bytes_of(epops.all_to_all(q, group="ep").rows, epops.all_to_all(s, group="ep", lane=1).rows)


def other_room(x):
    q, s = quantizers.per_token(x)
    return bytes_of(epops.all_to_all(q, group="ep").rows, epops.all_to_all(s, group="ep", out_size=11).rows)


def scales_of_what_arrived(x):
    q = epops.all_to_all(quantizers.per_token(x)[0], group="ep").rows
    return bytes_of(q, epops.all_to_all(q.float().amax(-1, keepdim=True), group="ep").rows)


def along_channels(x):
    sent = epops.all_to_all(x, group="ep", scatter_dim=0, gather_dim=1).rows
    return bytes_of(*quantizers.per_token(sent))


def along_channels_sent(x):
    q, s = quantizers.per_token(x)
    sent = epops.all_to_all(q, group="ep", scatter_dim=0, gather_dim=1).rows
    return bytes_of(sent, epops.all_to_all(s, group="ep", scatter_dim=0, gather_dim=1).rows)


def rows_of_few_channels(x):
    return bytes_of(*quantizers.per_token(epops.all_to_all(x[:, :8].contiguous(), group="ep").rows))


def rows_cut_and_padded(x):
    """Three blocks a row, each of them padded: not the blocks that rows of so many channels have."""
    sent = epops.all_to_all(x[:, :192].contiguous(), group="ep").rows
    wide = torch.nn.functional.pad(sent.float().view(-1, 64), (0, 64))
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=1e-6) / quantizers.TOP
    return bytes_of((wide / scale)[:, :64].to(quantizers.FP8), scale)


def wider_than_a_row(x):
    sent = epops.all_to_all(x, group="ep").rows
    return bytes_of(*quantizers.per_token(sent.view(-1, 2 * HIDDEN)))


@pytest.mark.parametrize(
    "block",
    [
        rows_used_besides,
        the_largest_used_besides,
        two_quantizers,
        other_lanes,
        other_room,
        scales_of_what_arrived,
        along_channels,
        along_channels_sent,
        rows_of_few_channels,
        rows_cut_and_padded,
        wider_than_a_row,
    ],
    ids=lambda block: block.__name__,
)
def test_leaves_others_alone(block):
    graph = blocks.passed(block, rows(), passes=[fuse_quant], exact=True)
    assert graph.rewrites == {"fuse_quant": 0}
    assert blocks.text(graph.before) == blocks.text(graph.after)


def test_another_group():
    def two_groups(x):
        q, s = quantizers.per_token(x)
        return bytes_of(epops.all_to_all(q, group="ep").rows, epops.all_to_all(s, group="other").rows)

    with epops.ExpertGroup(name="other"):
        graph = blocks.passed(two_groups, rows(), passes=[fuse_quant], exact=True)
    assert graph.rewrites == {"fuse_quant": 0} and graph.declined


@pytest.mark.parametrize("where", [after, before], ids=["after", "before"])
def test_a_write_in_between_is_not_crossed(where):
    """A functional graph has writes at its end alone, so this one is made by hand."""
    graph = blocks.passed(where(quantizers.per_token), rows(), passes=[]).after.graph
    first = next(node for node in graph.nodes if "all_to_all" in str(node.target))
    taken = next(node for node in graph.nodes if node.name.startswith("getitem"))
    with graph.inserting_after(taken if where is after else first):
        graph.call_function(torch.ops.aten.zero_.default, (taken if where is after else first.args[0],))
    assert fuse_quant(graph) == 0


def test_on_cuda_only_what_is_fp8_already():
    """On CUDA a compiled quotient is not always eager's: what quantizes stays where it is."""
    for where, count in ((after, 0), (before, 1)):
        with FakeTensorMode():
            given = torch.empty_like(rows(), device="cuda")
            module = make_fx(where(quantizers.blocks_of_128), decomposition_table=select_decomp_table())(given)
        module.graph.eliminate_dead_code()
        with listen() as declined:
            assert fuse_quant(module.graph) == count
        assert count or "call epops.all_to_all_quant" in declined[0].reason


def test_dynamic_token_count():
    for block in (after(quantizers.blocks_of_128), before(quantizers.per_token)):
        given = rows()
        torch._dynamo.mark_dynamic(given, 0)
        graph = blocks.passed(block, given, passes=[fuse_quant], exact=True)
        assert graph.rewrites == {"fuse_quant": 1}, graph.declined


def test_a_batch_of_symbolic_sizes():
    def block(x):
        sent = epops.all_to_all(x.flatten(0, 1), group="ep").rows
        return bytes_of(*quantizers.per_token(sent.view(x.shape)))

    given = rows().view(2, 4, HIDDEN)
    for dim in (0, 1):
        torch._dynamo.mark_dynamic(given, dim)
    graph = blocks.passed(block, given, passes=[fuse_quant], exact=True)
    assert graph.rewrites == {"fuse_quant": 1}, graph.declined


def test_gradients_of_what_is_quantized_beside_a_detached_copy():
    """The exchange has a gradient only through what does not go through fp8: then its rows are used besides, and it stays."""
    given = {"x": rows(dtype=torch.float32).nan_to_num(posinf=1.0).clamp(-5, 5)}

    def block(given):
        sent = epops.all_to_all(given["x"], group="ep").rows
        q, s = quantizers.per_token(sent.detach())
        return sent * 2 + q.float() * s

    def detached(given):
        q, s = quantizers.per_token(epops.all_to_all(given["x"].detach(), group="ep").rows)
        return q.float() * s * given["x"]

    assert blocks.same_numbers(block, given, [fuse_quant]) == {"fuse_quant": 0}
    assert blocks.same_numbers(detached, given, [fuse_quant]) == {"fuse_quant": 1}


# ---- several ranks -----------------------------------------------------------------------------------------------------


def by_other_splits(x, splits):
    q, s = quantizers.per_token(x)
    rows = epops.all_to_all(q, splits, group="ep", out_size=9).rows
    return bytes_of(rows, epops.all_to_all(s, splits.flip(0), group="ep", out_size=9).rows)


def ragged(rank, size):
    """Uneven splits, with room for more than comes: what lies behind has the bits that a quantizer gives zeros."""
    splits = [[3, 2], [0, 5]]
    with blocks.group():
        x = rows(rank, 6)
        ins = torch.tensor(splits[rank])
        for quantizer in (quantizers.per_token, quantizers.repeated_scales, quantizers.of_epops, quantizers.e5m2):
            for where in (after, before):
                graph = blocks.passed(where(quantizer, out_size=9), x, ins, passes=[fuse_quant], exact=True)
                assert graph.rewrites == {"fuse_quant": 1}, (quantizer.__name__, graph.declined)
        graph = blocks.passed(by_other_splits, x, ins, passes=[fuse_quant], exact=True)
        assert graph.rewrites == {"fuse_quant": 0} and graph.declined
        even = after(of_heads, scatter_dim=0, gather_dim=1, out_size=7)
        graph = blocks.passed(even, rows(rank, 12).view(4, 3, HIDDEN), passes=[fuse_quant], exact=True)
        assert graph.rewrites == {"fuse_quant": 1}, graph.declined
        uneven = after(of_heads, scatter_dim=0, gather_dim=1, scatter_size=5)
        splits = [[1, 3], [1, 3]]
        given = rows(rank, 12).view(4, 3, HIDDEN), torch.tensor(splits[rank])
        graph = blocks.passed(uneven, *given, passes=[fuse_quant], exact=True)
        assert graph.rewrites == {"fuse_quant": 0} and graph.declined
    return True


def test_ragged_pieces_on_two_ranks():
    assert run_ranks(ragged, 2) == [True, True]


def compiled(rank, size):
    """Through Inductor, of rows in bfloat16 that it computes itself: they are rounded before they are quantized."""

    def arrives(a, b):
        return of_heads(epops.all_to_all(a * b, group="ep", scatter_dim=0, gather_dim=1).rows)

    def is_sent(a, b):  # what quantizes stays where it is
        q, s = quantizers.per_token(a)
        return epops.all_to_all(q, group="ep").rows, epops.all_to_all(s, group="ep").rows

    def narrow(a, b):
        return tuple(quantizers.of_epops(epops.all_to_all(a * b, group="ep").rows))

    def without_eps(a, b):
        return tuple(quantizers.repeated_scales(epops.all_to_all(a * b, group="ep", out_size=11).rows))

    with blocks.group(timeout=100.0):
        a, b = rows(rank).nan_to_num(posinf=3.0), rows(rank + 5).nan_to_num(posinf=3.0)
        programs = (
            (arrives, (a.view(4, 2, HIDDEN), b.view(4, 2, HIDDEN))),
            (is_sent, (a, b)),
            (narrow, (a, b)),
            (without_eps, (a, b)),
        )
        for program, given in programs:
            with torch.no_grad():
                graphs = captured(program, *given)
                assert_fused(graphs, fuse_quant=1)
                torch._dynamo.reset()
                expected = program(*given)
                got = torch.compile(program, fullgraph=True, backend="epops")(*given)
            for one, other in zip(bytes_of(*got), bytes_of(*expected), strict=True):
                assert torch.equal(one, other), program.__name__
    return True


def test_bits_through_inductor_on_two_ranks():
    assert run_ranks(compiled, 2, timeout=300.0) == [True, True]


def test_all_passes_together():
    """Beside other work the one exchange is started, and waited for."""

    def beside(x, weight):
        q, s = quantizers.per_token(epops.all_to_all(x, group="ep").rows)
        return *bytes_of(q, s), weight @ weight

    graph = blocks.passed(beside, rows(), torch.randn(16, 16), passes=PASSES)
    assert graph.rewrites["fuse_quant"] == graph.rewrites["overlap"] == 1
    assert count_ops(graph, "epops.all_to_all_start") == 1


def test_no_rows_and_an_eps_without_a_reciprocal():
    def arrived(eps):
        def block(x):
            got = epops.all_to_all(x, torch.tensor([len(x)]), group="ep", out_size=8).rows
            scale = got.float().abs().amax(-1, keepdim=True).clamp(min=eps) / quantizers.TOP
            return *bytes_of((got.float() * (1.0 / scale)).to(quantizers.FP8)), scale

        return block

    for eps in (1e-30, torch.finfo(torch.float32).tiny):
        for tokens in (0, 5):
            x = rows(tokens=8)[:tokens]
            assert blocks.passed(arrived(eps), x, passes=[fuse_quant], exact=True).rewrites == {"fuse_quant": 1}
