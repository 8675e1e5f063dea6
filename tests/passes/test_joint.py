"""Passes over the joint graph of forward and backward: what fires there, and what the division into two makes of it."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import epops
from epops import passes
from epops.passes.fuse_add import fuse_add
from epops.passes.fuse_quant import fuse_quant
from epops.testing import assert_fused, captured, count_ops
from tests.passes import blocks, quantizers


@pytest.fixture(autouse=True)
def ep():
    with blocks.group() as group:
        yield group


def training(**settings):
    return {name: item.requires_grad_(item.is_floating_point()) for name, item in blocks.inputs(**settings).items()}


def residual(given):
    return given["x"] + blocks.routed(given)


def weights_outside(given):
    y, sent = blocks.experts(given)
    return blocks.combine(y * sent.row_weights[:, None], sent, given, weigh=False)


def by_graph(graphs, name):
    return {graph.kind: graph.rewrites[name] for graph in graphs}


@pytest.mark.parametrize("block", [residual, weights_outside], ids=lambda block: block.__name__)
def test_fires_once_in_the_joint_graph(block):
    graphs = captured(block, training())
    assert [graph.kind for graph in graphs] == ["joint", "forward", "backward"]
    assert by_graph(graphs, "fuse_add") == {"joint": 1, "forward": 0, "backward": 0}
    assert_fused(graphs, fuse_add=1)
    assert count_ops(graphs, "epops.combine") == 1, "the joint graph does not run, and is not counted"
    assert set(graphs[0].rewrites) == {"fuse_transpose", "fuse_quant", "fuse_add", "skip_padding"}


def test_the_forward_alone_could_not_fold_the_weights():
    """It has to keep the weighted rows, or their weights, for a backward that was made before."""
    from epops.inspection.capture import apply_passes

    before = captured(weights_outside, training(), passes=[])
    forward = next(graph for graph in before if graph.kind == "forward")
    assert apply_passes(forward.after, [fuse_add], "forward").rewrites == {"fuse_add": 0}
    after = captured(weights_outside, training())
    kept = [len(next(graph for graph in graphs if graph.kind == "forward").after.graph.output_node().args[0])
            for graphs in (before, after)]  # fmt: skip
    assert kept[1] <= kept[0]


def test_inference_has_no_joint_graph():
    with torch.no_grad():
        assert [graph.kind for graph in captured(residual, blocks.inputs())] == ["inference"]


@pytest.mark.parametrize("block", [residual, weights_outside], ids=lambda block: block.__name__)
def test_numbers(block):
    assert blocks.same_numbers(block, blocks.inputs(), [fuse_add], 1e-5) == {"fuse_add": 1}


def test_a_quantizing_dispatch_of_detached_rows():
    def block(given):
        sent = epops.dispatch(given["x"].detach(), given["idx"], given["weights"], group="ep")
        q, scales = quantizers.per_token(sent.rows.detach())
        y = epops.grouped_mm(q.float() * scales, given["experts"], sent.expert_ends)
        return blocks.combine(y, sent, given)

    assert blocks.same_numbers(block, blocks.inputs(), [fuse_quant], 1e-6) == {"fuse_quant": 1}
    assert by_graph(captured(block, training()), "fuse_quant") == {"joint": 1, "forward": 0, "backward": 0}


# ---- activation checkpointing ------------------------------------------------------------------------------------------


def inside(given, **settings):
    return checkpoint(residual, given, use_reentrant=False, **settings)


def outside(given, **settings):
    return checkpoint(blocks.routed, given, use_reentrant=False, **settings) + given["x"]


def exchanges(graphs, kind):
    (graph,) = (graph for graph in graphs if graph.kind == kind)
    return [
        count_ops(graph, f"epops.{name}") + count_ops(graph, f"epops.{name}_start") for name in ("dispatch", "combine")
    ]


@pytest.mark.parametrize("block", [inside, outside], ids=lambda block: block.__name__)
def test_saved_exchanges_stay_saved(block):
    """One dispatch and one combine forward, none again in the backward, with the addition folded in the joint graph."""
    settings = {"context_fn": epops.checkpoint_contexts()}
    graphs = captured(lambda given: block(given, **settings), training())
    assert by_graph(graphs, "fuse_add") == {"joint": 1, "forward": 0, "backward": 0}
    assert exchanges(graphs, "forward") == [1, 1] and exchanges(graphs, "backward") == [0, 0]
    assert blocks.same_numbers(lambda given: block(given, **settings), blocks.inputs(), None, 1e-5)["fuse_add"] == 1


def test_a_combine_that_is_computed_again_keeps_no_addend_of_outside_for_it():
    joint, forward, backward = captured(outside, training())
    assert (joint.rewrites["fuse_add"], forward.rewrites["fuse_add"]) == (0, 1)
    assert "computed again in the backward" in " ".join(map(str, joint.declined))
    assert exchanges([backward], "backward")[0] == 1
    assert blocks.same_numbers(outside, blocks.inputs(), None, 1e-5)["fuse_add"] == 1


def test_new_nodes_carry_the_choice_of_what_is_saved():
    def block(given):
        def quantized(given):
            sent = epops.dispatch(given["x"].detach(), given["idx"], given["weights"], group="ep")
            q, scales = quantizers.per_token(sent.rows.detach())
            y = epops.grouped_mm(q.float() * scales, given["experts"], sent.expert_ends)
            return blocks.combine(y, sent, given)

        return checkpoint(quantized, given, use_reentrant=False, context_fn=epops.checkpoint_contexts())

    joint, forward, backward = captured(block, training())
    made = next(node for node in joint.after.graph.nodes if "dispatch_quant" in str(node.target))
    assert made.meta["recompute"].name == "MUST_SAVE" and "ac_graph_id" in made.meta
    assert count_ops(backward, "epops.dispatch_quant") == count_ops(backward, "epops.dispatch") == 0
    assert joint.rewrites["fuse_quant"] == 1


# ---- in the backend ----------------------------------------------------------------------------------------------------


def test_the_backend_runs_them():
    """Compiled for real: the joint graph is reported, order is pinned in the divided graphs, and the numbers are those of eager."""
    given = training()
    passes.reports.clear()
    torch._dynamo.reset()
    compiled = torch.compile(residual, backend="epops", fullgraph=True, options={"force_disable_caches": True})
    blocks.close(compiled(given), residual(given), 1e-5)
    assert [report.joint for report in passes.reports] == [True, False, False]
    assert passes.reports[0].rewrites == {"fuse_transpose": 0, "fuse_quant": 0, "fuse_add": 1, "skip_padding": 0}
    assert "keep_order" in passes.reports[1].rewrites


def test_a_joint_pass_that_was_set_before_runs_first():
    from torch._inductor import config
    from torch._inductor.custom_graph_pass import CustomGraphPass

    seen = []

    class Before(CustomGraphPass):
        def __call__(self, graph):
            seen.append(len(graph.nodes))

        def uuid(self):
            return "before"

    runner = passes.JointRunner(passes.PASSES, [Before()])
    assert "before" in repr(runner.uuid())
    with config.patch(joint_custom_pre_pass=Before()):
        captured(residual, training())
    assert seen


def test_a_pass_of_the_users_joins_by_an_attribute():
    kinds = []

    def mine(graph):
        kinds.append(len(graph.nodes))
        return 0

    captured(residual, training(), passes=[mine])
    assert len(kinds) == 2
    mine.joint = True
    captured(residual, training(), passes=[mine])
    assert len(kinds) == 5


def transposed_for_the_caller(given):
    """Tokens, batch first, of which the caller gets a view that is sequence first."""
    x = given["x"].view(-1, 2, blocks.HIDDEN).transpose(0, 1).reshape(-1, blocks.HIDDEN)
    return blocks.routed({**given, "x": x}).view(2, -1, blocks.HIDDEN).transpose(0, 1)


def transposed_residual(given):
    return given["x"].t().contiguous().t() + blocks.routed(given)


def scaled_residual(given):
    """What is computed element by element lies as what it is computed from."""
    return transposed_residual(given).relu() * 2


@pytest.mark.parametrize(
    "block, dynamic",
    [
        (transposed_for_the_caller, None),
        (transposed_residual, None),
        (transposed_residual, True),
        (scaled_residual, None),
    ],
)
def test_results_lie_in_memory_as_in_eager(block, dynamic):
    given = training(tokens=8)
    torch._dynamo.reset()
    plain = block(given)
    options = {"force_disable_caches": True}
    got = torch.compile(block, fullgraph=True, backend="epops", dynamic=dynamic, options=options)(given)
    done = next(report.rewrites for report in reversed(passes.reports) if report.joint)
    assert done["fuse_transpose"] + done["fuse_add"] == 1
    assert got.stride() == plain.stride() != got.contiguous().stride()
    torch.testing.assert_close(got, plain)
    torch.testing.assert_close(*(torch.autograd.grad(result.sin().sum(), given["x"])[0] for result in (got, plain)))


def test_what_is_computed_of_a_sum_and_read_by_strides_lies_as_it_did():
    def block(given):
        total = scaled_residual(given)
        return torch.as_strided(total, total.shape, total.stride()) + 1

    given = training(tokens=8)
    torch._dynamo.reset()
    got = torch.compile(block, fullgraph=True, backend="epops")(given)
    torch.testing.assert_close(got, block(given))
