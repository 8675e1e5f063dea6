# ruff: noqa: E501 (goldens)
"""skip_padding: which computations over received rows become a map_rows, which are left alone, and that bits stay."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from expecttest import TestCase

import epops
from epops.passes import PASSES, choose
from epops.passes.skip_padding import skip_padding, skip_padding_everywhere
from epops.testing import assert_fused, captured, count_ops
from tests.passes import blocks
from tests.ranks import run_ranks

INNER = 12
SHOWN = (*blocks.SHOWN, "silu", "exp", "slice", "split", "getitem", "sigmoid", "sum")


@pytest.fixture(autouse=True)
def ep():
    with blocks.group() as group:
        yield group


def inputs(rank=0, tokens=5, dtype=torch.float32):
    """A block's inputs with up, down and bias of ``INNER`` channels."""
    make = torch.Generator().manual_seed(7)
    slots, hidden = blocks.EXPERTS, blocks.HIDDEN
    return {
        **blocks.inputs(rank, tokens, dtype=dtype),
        "up": (torch.randn(slots, hidden, 2 * INNER, generator=make) / 4).to(dtype),
        "down": (torch.randn(slots, INNER, hidden, generator=make) / 4).to(dtype),
        "up_bias": torch.randn(slots, 2 * INNER, generator=make).to(dtype),
        "down_bias": torch.randn(slots, hidden, generator=make).to(dtype),
    }


def around(gate, given, bias=False, capacity=None):
    """dispatch → up → ``gate`` → down → combine."""
    sent = epops.dispatch(given["x"], given["idx"], given["weights"], group="ep", capacity=capacity)
    slots = sent.expert_ends.shape[0]
    up = epops.grouped_mm(sent.rows, given["up"][:slots], sent.expert_ends)
    if bias:
        up = up + row_bias(given["up_bias"][:slots], sent)
    h = gate(up, sent)
    y = epops.grouped_mm(h, given["down"][:slots], sent.expert_ends)
    if bias:
        y = y + row_bias(given["down_bias"][:slots], sent)
    return blocks.combine(y, sent, given)


def row_bias(values, sent):
    padded = F.pad(values, (0, 0, 0, 1))
    return padded[torch.where(sent.row_expert < 0, values.shape[0], sent.row_expert).long()]


def swiglu(given):
    def gate(up, sent):
        a, b = up.chunk(2, dim=-1)
        return F.silu(a) * b

    return around(gate, given)


def gpt_oss(given):
    def gate(up, sent):
        a, b = up[..., ::2].clamp(max=0.7), up[..., 1::2].clamp(-0.7, 0.7)
        return (b + 1) * (a * torch.sigmoid(a * 1.702))

    return around(gate, given, bias=True)


def gelu_in_float32(given):
    return around(lambda up, sent: F.gelu(up[:, :INNER].float()).to(up.dtype), given)


def gelu_tanh_of_last_half(given):
    return around(lambda up, sent: F.gelu(up.narrow(1, INNER, INNER), approximate="tanh"), given)


def squared_relu(given):
    return around(lambda up, sent: F.relu(up.unflatten(1, (INNER, 2))[:, :, 0]).square(), given)


def weighted_rows(given):
    return around(lambda up, sent: up[:, :INNER] * sent.row_weights[:, None].to(up.dtype) * 0.5, given)


def per_channel(given):
    return around(lambda up, sent: (up * given["up_bias"][0] + given["up_bias"][1:2]).split(INNER, 1)[1], given)


FUSED = {
    swiglu: 1,
    gpt_oss: 2,
    gelu_in_float32: 1,
    gelu_tanh_of_last_half: 1,
    squared_relu: 1,
    weighted_rows: 1,
    per_channel: 1,
}


class Golden(TestCase):
    maxDiff = None

    def test_swiglu(self):
        graph = blocks.passed(swiglu, inputs(dtype=torch.bfloat16), passes=[skip_padding_everywhere])
        self.assertExpectedInline(
            text(graph.before),
            """\
%dispatch: rows bf16[16, 16], row_weights f32[16], expert_ends i32[3], route i32[59] = epops.dispatch(..., ..., ..., group=ep, layout=expert)
%grouped_mm: bf16[16, 24] = epops.grouped_mm(%dispatch.rows, ..., %dispatch.expert_ends)
%split: 0 bf16[16, 12], 1 bf16[16, 12] = split(%grouped_mm, 12, -1)
%cast: f32[16, 12] = cast(%split[0], f32)
%neg: f32[16, 12] = neg(%cast)
%exp: f32[16, 12] = exp(%neg)
%add: f32[16, 12] = add(%exp, 1)
%div: f32[16, 12] = div(%cast, %add)
%cast.1: bf16[16, 12] = cast(%div, bf16)
%mul: bf16[16, 12] = mul(%cast.1, %split[1])
%grouped_mm.1: bf16[16, 16] = epops.grouped_mm(%mul, ..., %dispatch.expert_ends)
%combine: out bf16[5, 16] = epops.combine(%grouped_mm.1, %dispatch.route, %dispatch.row_weights, group=ep, layout=expert, out_dtype=bf16)
return [%combine.out]""",
        )
        self.assertExpectedInline(
            text(graph),
            """\
%dispatch: rows bf16[16, 16], row_weights f32[16], expert_ends i32[3], route i32[59] = epops.dispatch(..., ..., ..., group=ep, layout=expert)
%grouped_mm: bf16[16, 24] = epops.grouped_mm(%dispatch.rows, ..., %dispatch.expert_ends)
%map_rows: 0 bf16[16, 12] = epops.map_rows([%grouped_mm], %dispatch.expert_ends, program=x0: bf16[*, 24] = rows()
v0: bf16[*, 12] = slice(x0, 1, 0, 1)
v1: f32[*, 12] = cast(v0)
v2: f32[*, 12] = neg(v1)
v3: f32[*, 12] = exp(v2)
v4: f32[*, 12] = add(v3, 1)
v5: f32[*, 12] = div(v1, v4)
v6: bf16[*, 12] = cast(v5)
v7: bf16[*, 12] = slice(x0, 1, 12, 1)
v8: bf16[*, 12] = mul(v6, v7)
return v8)
%grouped_mm.1: bf16[16, 16] = epops.grouped_mm(%map_rows[0], ..., %dispatch.expert_ends)
%combine: out bf16[5, 16] = epops.combine(%grouped_mm.1, %dispatch.route, %dispatch.row_weights, group=ep, layout=expert, out_dtype=bf16)
return [%combine.out]""",
        )

    def test_gpt_oss(self):
        graph = blocks.passed(gpt_oss, inputs(), passes=[skip_padding_everywhere])
        self.assertExpectedInline(
            text(graph),
            """\
%dispatch: rows f32[16, 16], row_weights f32[16], row_expert i32[16], expert_ends i32[3], route i32[59] = epops.dispatch(..., ..., ..., group=ep, layout=expert)
%grouped_mm: f32[16, 24] = epops.grouped_mm(%dispatch.rows, ..., %dispatch.expert_ends)
%map_rows: 0 f32[16, 12] = epops.map_rows([%grouped_mm, ..., %dispatch.row_expert], %dispatch.expert_ends, program=x0: f32[*, 24] = rows()
x1: f32[4, 24] = whole()
x2: i32[*] = rows()
v0: b8[*] = lt(x2, 0)
v1: i32[] = full(3)
v2: i32[*] = where(v0, v1, x2)
v3: i64[*] = cast(v2)
v4: f32[*, 24] = index(x1, v3)
v5: f32[*, 24] = add(x0, v4)
v6: f32[*, 12] = slice(v5, 1, 1, 2)
v7: f32[*, 12] = clamp_min(v6, -0.7)
v8: f32[*, 12] = clamp_max(v7, 0.7)
v9: f32[*, 12] = add(v8, 1)
v10: f32[*, 12] = slice(v5, 1, 0, 2)
v11: f32[*, 12] = clamp_max(v10, 0.7)
v12: f32[*, 12] = mul(v11, 1.702)
v13: f32[*, 12] = sigmoid(v12)
v14: f32[*, 12] = mul(v11, v13)
v15: f32[*, 12] = mul(v9, v14)
return v15)
%grouped_mm.1: f32[16, 16] = epops.grouped_mm(%map_rows[0], ..., %dispatch.expert_ends)
%map_rows.1: 0 f32[16, 16] = epops.map_rows([%grouped_mm.1, ..., %dispatch.row_expert], %dispatch.expert_ends, program=x0: f32[*, 16] = rows()
x1: f32[4, 16] = whole()
x2: i32[*] = rows()
v0: b8[*] = lt(x2, 0)
v1: i32[] = full(3)
v2: i32[*] = where(v0, v1, x2)
v3: i64[*] = cast(v2)
v4: f32[*, 16] = index(x1, v3)
v5: f32[*, 16] = add(x0, v4)
return v5)
%combine: out f32[5, 16] = epops.combine(%map_rows.1[0], %dispatch.route, %dispatch.row_weights, group=ep, layout=expert, out_dtype=f32)
return [%combine.out]""",
        )

    def test_backward(self):
        graphs = captured(swiglu, training(), passes=[skip_padding_everywhere])
        self.assertExpectedInline(
            text(graphs[-1]),
            """\
%combine_backward: grad_y f32[16, 16], grad_row_weights f32[16] = epops.combine_backward(..., ..., ..., ..., group=ep, layout=expert)
%grouped_mm: f32[16, 12] = epops.grouped_mm(%combine_backward.grad_y, ..., ...)
%grouped_mm_backward_weight: f32[3, 12, 16] = epops.grouped_mm_backward_weight(%combine_backward.grad_y, ..., ...)
%map_rows: 0 f32[16, 24] = epops.map_rows([%grouped_mm, ...], ..., program=x0: f32[*, 12] = rows()
x1: f32[*, 24] = rows()
v0: f32[*, 12] = slice(x1, 1, 12, 1)
v1: f32[*, 12] = mul(x0, v0)
v2: f32[*, 12] = slice(x1, 1, 0, 1)
v3: f32[*, 12] = sigmoid(v2)
v4: f32[*, 12] = mul(v1, v3)
v5: f32[*, 12] = sub(1, v3)
v6: f32[*, 12] = mul(v2, v5)
v7: f32[*, 12] = add(v6, 1)
v8: f32[*, 12] = mul(v4, v7)
v9: f32[*, 12] = neg(v2)
v10: f32[*, 12] = exp(v9)
v11: f32[*, 12] = add(v10, 1)
v12: f32[*, 12] = div(v2, v11)
v13: f32[*, 12] = mul(x0, v12)
v14: f32[*, 24] = cat([v8, v13], 1)
return v14)
%grouped_mm.1: f32[16, 16] = epops.grouped_mm(%map_rows[0], ..., ...)
%grouped_mm_backward_weight.1: f32[3, 16, 24] = epops.grouped_mm_backward_weight(%map_rows[0], ..., ...)
%dispatch_backward: grad_x f32[5, 16], grad_topk_weights f32[5, 2] = epops.dispatch_backward(%grouped_mm.1, %combine_backward.grad_row_weights, ..., group=ep, layout=expert)
return [None, %dispatch_backward.grad_x, %dispatch_backward.grad_topk_weights, %grouped_mm_backward_weight.1, %grouped_mm_backward_weight]""",
        )


def text(graph):
    from epops.testing import normalized_graph

    return normalized_graph(graph, ops=SHOWN)


def training(**settings):
    return {name: t.requires_grad_(t.is_floating_point()) for name, t in inputs(**settings).items()}


@pytest.mark.parametrize("block", FUSED, ids=lambda block: block.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_fires_with_the_bits_of_eager_graphs(block, dtype):
    """The graph run node by node, as captured, is what its bits must be; `passed` compares with eager besides."""
    from epops.inspection.capture import capture

    given = inputs(dtype=dtype)
    graph = blocks.passed(block, given, passes=[skip_padding_everywhere])
    assert graph.rewrites == {"skip_padding_everywhere": FUSED[block]}, graph.declined
    with torch.no_grad():
        _, plain = capture(block, given, passes=[], run=True)
        _, fused = capture(block, given, passes=[skip_padding_everywhere], run=True)
    blocks.close(fused, plain, 0.0)


def test_it_runs_unasked_and_on_cpu_by_the_other_name():
    assert blocks.passed(swiglu, inputs(), passes=[skip_padding]).rewrites == {"skip_padding": 0}
    assert PASSES[-1] is skip_padding and skip_padding_everywhere not in PASSES
    assert choose([*PASSES, "skip_padding_everywhere"])[-2:] == (skip_padding, skip_padding_everywhere)


@pytest.mark.parametrize("block", FUSED, ids=lambda block: block.__name__)
def test_numbers_in_training(block):
    """Values and gradients are those of eager."""
    count = blocks.same_numbers(block, inputs(), [skip_padding_everywhere], 1e-5)["skip_padding_everywhere"]
    assert count >= FUSED[block]


def test_the_joint_graph_is_where_training_is_rewritten():
    """The forward alone cannot know that the backward reads valid rows of what is kept for it."""
    graphs = captured(swiglu, training(), passes=[skip_padding_everywhere])
    assert [(graph.kind, graph.rewrites["skip_padding_everywhere"]) for graph in graphs] == [
        ("joint", 2),
        ("forward", 0),
        ("backward", 0),
    ]
    assert count_ops(graphs, "epops.map_rows") == 2


def clamped_bias(given):
    """What padding adds reaches the first expert's bias, unless it is zero."""
    bias = given["up_bias"][..., :INNER]
    return around(lambda up, sent: (up[:, :INNER] + bias[sent.row_expert.clamp(min=0).long()]).exp(), given)


def test_gradients_of_gathered_biases():
    """Their sums read all rows; where what padding adds is cut off, that does no harm, and the gate's gradient is rewritten."""
    joint = captured(gpt_oss, training(), passes=[skip_padding_everywhere])[0]
    assert joint.rewrites == {"skip_padding_everywhere": 3}, "both biases and the gate, and the gradient of the gate"
    joint = captured(clamped_bias, training(), passes=[skip_padding_everywhere])[0]
    assert joint.rewrites == {"skip_padding_everywhere": 1}, "the zeros beside the gradient, which only a product reads"
    assert "index_put may read rows of it" in " ".join(map(str, joint.declined))


def test_capacity_of_sixteen_times_the_valid_rows_gives_the_same():
    given = inputs(dtype=torch.bfloat16)

    def wide(given):
        def gate(up, sent):
            a, b = up.chunk(2, dim=-1)
            return F.silu(a) * b

        return around(gate, given, capacity=16 * 10)

    with torch.no_grad():
        narrow = swiglu(given)
    graph = blocks.passed(wide, given, passes=[skip_padding_everywhere])
    assert graph.rewrites == {"skip_padding_everywhere": 1}
    from epops.inspection.capture import capture

    with torch.no_grad():
        blocks.close(capture(wide, given, passes=[skip_padding_everywhere], run=True)[1], narrow, 4e-2)
        blocks.close(capture(wide, given, passes=[], run=True)[1], narrow, 4e-2)


def test_padding_that_holds_nan_does_not_matter():
    """On CUDA, rows after the last end are whatever memory held."""
    rows = torch.full((6, 4), torch.nan)
    rows[:3] = torch.arange(12.0).view(3, 4)
    program = "x0: f32[*, 4] = rows()\nv0: f32[*, 2] = slice(x0, 1, 1, 2)\nv1: f32[*, 2] = mul(v0, 2.0)\nreturn v1"
    (out,) = torch.ops.epops.map_rows([rows], torch.tensor([1, 3], dtype=torch.int32), program=program)
    assert out.tolist() == [[2, 6], [10, 14], [18, 22], [0, 0], [0, 0], [0, 0]]


# ---- what it leaves alone --------------------------------------------------------------------------------------------


def near_misses():
    def returned(given):
        kept = []

        def gate(up, sent):
            kept.append(up[:, :INNER].exp())
            return kept[0]

        return around(gate, given), kept[0]

    def summed_over_rows(given):
        kept = []

        def gate(up, sent):
            kept.append(up[:, :INNER].exp())
            return kept[0]

        return around(gate, given), kept[0].sum(0)

    def centred(given):
        return around(lambda up, sent: (up - up.mean(0))[:, :INNER].cumsum(0), given)

    def product_between(given):
        return around(lambda up, sent: up.relu() @ torch.ones(2 * INNER, INNER), given)

    def normed(given):
        return around(lambda up, sent: F.layer_norm(up[:, :INNER], (INNER,)), given)

    def shifted_rows(given):
        return around(lambda up, sent: up[:, :INNER].roll(1, 0), given)

    def reversed_rows(given):
        return around(lambda up, sent: up.relu().flatten().view(2, -1).t().reshape(up.shape)[:, :INNER], given)

    def two_dispatches(given):
        other = epops.dispatch(given["x"] * 2, given["idx"], given["weights"], group="ep")

        def gate(up, sent):
            h = up[:, :INNER].exp()
            return h, epops.grouped_mm(h, given["down"], other.expert_ends)

        sent = epops.dispatch(given["x"], given["idx"], given["weights"], group="ep")
        h, y = gate(epops.grouped_mm(sent.rows, given["up"], sent.expert_ends), sent)
        return blocks.combine(y + epops.grouped_mm(h, given["down"], sent.expert_ends), sent, given)

    def views_alone(given):
        return around(lambda up, sent: up[:, ::2], given)

    def random_rows(given):
        return around(lambda up, sent: F.dropout(up[:, :INNER], 0.5), given)

    return {
        returned: ("the graph's caller may read rows", 0),
        summed_over_rows: ("may read rows of it that no expert has", 0),
        centred: ("cumsum", 0),
        product_between: (None, 0),
        normed: (None, None),
        shifted_rows: ("reads other rows", 0),
        reversed_rows: ("mixes rows", 0),
        two_dispatches: ("different expert_ends", None),
        views_alone: (None, 0),
        random_rows: (None, None),
    }


def test_bounds_before_the_first_channel():
    """As slices take them: from the first channel on, in slices that read and in those that write."""

    def gate(up, sent):
        first = up[:, -100:INNER]
        second = torch.ops.aten.slice.Tensor(up, 1, -100, -INNER, 1)
        every_other = torch.ops.aten.slice.Tensor(up, 1, -99, 2 * INNER, 2)
        return torch.slice_scatter(first * second, every_other * 2, 1, -100)

    counts = blocks.same_numbers(lambda given: around(gate, given), inputs(), [skip_padding_everywhere], 1e-6)
    assert counts == {"skip_padding_everywhere": 2}


@pytest.mark.parametrize("block", near_misses(), ids=lambda block: block.__name__)
def test_leaves_alone(block):
    """``None`` rewrites: some part of it may be rewritten, and the numbers stay."""
    reason, count = next(said for one, said in near_misses().items() if one.__name__ == block.__name__)
    if block.__name__ == "random_rows":
        with torch.no_grad():
            graph = captured(block, inputs(), passes=[skip_padding_everywhere])[0]
    else:
        graph = blocks.passed(block, inputs(), passes=[skip_padding_everywhere])
    if count is not None:
        assert graph.rewrites == {"skip_padding_everywhere": count}
        assert text(graph.before) == text(graph.after)
    if reason:
        assert reason in " ".join(map(str, graph.declined)), graph.declined


def test_a_write_in_between_is_not_crossed():
    """A functional graph has writes at its end alone, so this one is made by hand."""
    graph = blocks.passed(swiglu, inputs(), passes=[])
    module = graph.after
    mul = next(node for node in reversed(module.graph.nodes) if node.target is torch.ops.aten.mul.Tensor)
    x = next(node for node in module.graph.nodes if node.op == "placeholder" and node.meta["val"].shape == (5, 16))
    with module.graph.inserting_before(mul):
        module.graph.call_function(torch.ops.aten.zero_.default, (x,))
    assert skip_padding_everywhere(module.graph) == 0


def test_dynamic_shapes():
    given = inputs()
    for name in ("x", "idx", "weights"):
        torch._dynamo.mark_dynamic(given[name], 0)

    def block(given):
        """With room for as many rows as tokens choose experts, so that the rows of the graph are symbolic."""

        def gate(up, sent):
            a, b = up.chunk(2, dim=-1)
            return F.silu(a) * b

        return around(gate, given, bias=True, capacity=given["x"].shape[0] * blocks.TOP_K)

    graph = blocks.passed(block, given, passes=[skip_padding_everywhere])
    assert graph.rewrites == {"skip_padding_everywhere": 2}, graph.declined
    (one, two) = (line for line in text(graph).splitlines() if "epops.map_rows" in line)
    assert "s0" in one and "[*, 24] = rows()" in one, "the program does not name the number of rows"


def two_ranks(rank, size):
    with blocks.group():
        return [
            blocks.same_numbers(block, inputs(rank, tokens=3 + 4 * rank), [skip_padding_everywhere], 1e-5)[
                "skip_padding_everywhere"
            ]
            for block in (swiglu, gpt_oss, weighted_rows)
        ]


def test_numbers_on_two_ranks():
    for done in run_ranks(two_ranks, 2):
        assert done[0] == 2 and done[1] >= 2 and done[2] >= 1


# ---- models ----------------------------------------------------------------------------------------------------------

# Family → map_rows in the tiny model's two MoE layers (forward, no gradients): a gate in each; GPT-OSS's second bias too.
FAMILIES = {"mixtral": 2, "qwen3_moe": 2, "deepseek_v3": 2, "gpt_oss": 4, "olmoe": 2}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_of_a_family(family):
    pytest.importorskip("transformers")
    from epops import zoo
    from epops.zoo.build import tiny

    torch.manual_seed(0)
    with epops.ExpertGroup(None, name="families", max_tokens=32) as group:
        model = epops.parallelize(tiny(family), group)
        model.config.use_cache = False
        with torch.no_grad():
            graphs = captured(
                model,
                passes=[*PASSES, skip_padding_everywhere],
                **zoo.inputs(family, model, batch=1, seqlen=5, seed=0),
            )
    assert_fused(graphs, skip_padding_everywhere=FAMILIES[family])


def test_in_the_backend():
    """Compiled for real, forward and backward."""
    given = training()
    torch._dynamo.reset()
    options = {"passes": [*PASSES, skip_padding_everywhere], "force_disable_caches": True}
    compiled = torch.compile(gpt_oss, backend="epops", fullgraph=True, options=options)
    wanted = [t for t in given.values() if t.requires_grad]
    plain, fused = gpt_oss(given), compiled(given)
    blocks.close(fused, plain, 1e-5)
    pairs = (torch.autograd.grad(out.sin().sum(), wanted, allow_unused=True) for out in (fused, plain))
    for got, expected in zip(*pairs):
        if expected is not None:
            blocks.close(got, expected, 1e-5)
