# ruff: noqa: E501 (goldens)
"""overlap: exchanges start, independent products run, exchanges are waited for; and the order of exchanges stays."""

from __future__ import annotations

import re
import threading

import pytest
import torch
from expecttest import TestCase

import epops
from epops.inspection.text import graph_lines, names_of
from epops.inspection.wire import overlaps
from epops.passes.fuse_add import fuse_add
from epops.passes.keep_order import keep_order
from epops.passes.overlap import overlap
from epops.passes.work_estimate import work_of
from epops.testing import captured, count_ops, normalized_graph
from tests.passes import blocks
from tests.ranks import run_ranks

ALL = [fuse_add, overlap, keep_order]


@pytest.fixture(autouse=True)
def ep():
    with blocks.group() as group:
        yield group


def expert_of_everybody(given, x=None):
    return torch.relu((given["x"] if x is None else x) @ given["shared"]) @ given["shared"].t()


def shared_expert_last(given):
    return blocks.routed(given) + expert_of_everybody(given)


def shared_expert_first(given):
    shared = expert_of_everybody(given)
    weights = given["weights"] * given["x"].sum(-1, keepdim=True).sigmoid()
    return blocks.routed({**given, "weights": weights}) + shared


def two_layers(given):
    x = given["x"]
    for _ in range(2):
        x = blocks.routed({**given, "x": x}) + expert_of_everybody(given, x)
    return x


def ulysses(given):
    sent = epops.all_to_all(given["x"], group="ep", scatter_dim=1).rows
    return sent.relu(), given["x"] @ given["shared"]


def exchanges_and_products(graph):
    """The exchanges in order; behind a start the products that run before its wait, whatever their order."""
    flights = {one.start: one.beside for one in overlaps(graph.after.graph)}
    names, lines = names_of(graph.after), []
    ops = {line.name: line.op for line in graph_lines(graph.after)}
    for node, name in names.items():
        if name in ops and ops[name].startswith("epops.") and "grouped_mm" not in ops[name]:
            beside = sorted(ops[names[product]] for product in flights.get(node, ()))
            lines.append(f"{ops[name]}{' beside ' if beside else ''}{', '.join(beside)}")
    return "\n".join(lines)


class Golden(TestCase):
    def test_forward(self):
        graph = blocks.passed(shared_expert_first, blocks.inputs(), passes=ALL)
        self.assertExpectedInline(
            normalized_graph(graph.before),
            """\
%input: f32[5, 16] = input
%input.1: f32[5, 2] = input
%input.2: i64[5, 2] = input
%input.3: f32[3, 16, 16] = input
%input.4: f32[16, 16] = input
%sum: f32[5, 1] = sum(%input, [-1], True)
%sigmoid: f32[5, 1] = sigmoid(%sum)
%mul: f32[5, 2] = mul(%input.1, %sigmoid)
%dispatch: rows f32[16, 16], row_weights f32[16], expert_ends i32[3], route i32[59] = epops.dispatch(%input, %input.2, %mul, group=ep, layout=expert)
%grouped_mm: f32[16, 16] = epops.grouped_mm(%dispatch.rows, %input.3, %dispatch.expert_ends)
%combine: out f32[5, 16] = epops.combine(%grouped_mm, %dispatch.route, %dispatch.row_weights, group=ep, layout=expert, out_dtype=f32)
%mm: f32[5, 16] = mm(%input, %input.4)
%relu: f32[5, 16] = relu(%mm)
%permute: f32[16, 16] = permute(%input.4, [1, 0])
%mm.1: f32[5, 16] = mm(%relu, %permute)
%add: f32[5, 16] = add(%combine.out, %mm.1)
return [%add]""",
        )
        self.assertExpectedInline(
            normalized_graph(graph),
            """\
%input: f32[5, 16] = input
%input.1: f32[5, 2] = input
%input.2: i64[5, 2] = input
%input.3: f32[3, 16, 16] = input
%input.4: f32[16, 16] = input
%sum: f32[5, 1] = sum(%input, [-1], True)
%sigmoid: f32[5, 1] = sigmoid(%sum)
%mul: f32[5, 2] = mul(%input.1, %sigmoid)
%dispatch_start: i64[4] = epops.dispatch_start(%input, %input.2, %mul, group=ep, layout=expert)
%mm: f32[5, 16] = mm(%input, %input.4) after %dispatch_start
%relu: f32[5, 16] = relu(%mm)
%permute: f32[16, 16] = permute(%input.4, [1, 0])
%mm.1: f32[5, 16] = mm(%relu, %permute)
%dispatch_wait: rows f32[16, 16], row_weights f32[16], expert_ends i32[3], route i32[59] = epops.dispatch_wait(%dispatch_start, %input, %input.2, %mul, group=ep, layout=expert) after %mm.1
%grouped_mm: f32[16, 16] = epops.grouped_mm(%dispatch_wait.rows, %input.3, %dispatch_wait.expert_ends)
%combine: out f32[5, 16] = epops.combine(%grouped_mm, %dispatch_wait.route, %dispatch_wait.row_weights, %mm.1, group=ep, layout=expert, out_dtype=f32)
return [%combine.out]""",
        )

    def test_backward(self):
        given = {name: item.requires_grad_(item.is_floating_point()) for name, item in blocks.inputs().items()}
        graphs = captured(shared_expert_last, given, passes=ALL)
        found = [(graph.kind, graph.rewrites.get("overlap")) for graph in graphs]
        assert found == [("joint", None), ("forward", 1), ("backward", 2)]
        # What lies between the exchanges of a backward, and in which order, is the partitioner's and differs between torch
        # versions: the text has the exchanges, and how many products run beside each.
        self.assertExpectedInline(
            exchanges_and_products(graphs[2]),
            """\
epops.combine_backward_start beside mm, mm, mm, mm
epops.combine_backward_wait
epops.dispatch_backward_start beside epops.grouped_mm_backward_weight
epops.dispatch_backward_wait""",
        )

    def test_all_to_all(self):
        graph = blocks.passed(ulysses, blocks.inputs(), passes=ALL)
        self.assertExpectedInline(
            normalized_graph(graph),
            """\
%input: f32[5, 16] = input
%input.1: f32[16, 16] = input
%all_to_all_start: i64[4] = epops.all_to_all_start(%input, group=ep, out_size=5, scatter_size=16, scatter_dim=1)
%mm: f32[5, 16] = mm(%input, %input.1) after %all_to_all_start
%all_to_all_wait: rows f32[5, 16] = epops.all_to_all_wait(%all_to_all_start, %input, group=ep, out_size=5, scatter_size=16, scatter_dim=1) after %mm
%relu: f32[5, 16] = relu(%all_to_all_wait.rows)
return [%relu, %mm]""",
        )


def exchanges(graph):
    """Exchanges in graph order, halves by their start."""
    lines = [line.op for line in graph_lines(graph) if line.op.startswith("epops.") and "grouped_mm" not in line.op]
    return [op.removesuffix("_start") for op in lines if not op.endswith("_wait")]


def test_every_layer_overlaps_and_exchanges_keep_their_order():
    graph = blocks.passed(two_layers, blocks.inputs(), passes=ALL)
    assert graph.rewrites["overlap"] == 2
    assert exchanges(graph.after) == exchanges(graph.before)
    ops = [line.op for line in graph_lines(graph.after)]
    for index, op in enumerate(ops):
        if op.endswith("_start"):
            between = ops[index + 1 : ops.index(op.replace("_start", "_wait"), index)]
            assert between.count("mm") == 2 and not any(item.startswith("epops.") for item in between)


def test_a_covered_dispatch_leaves_the_rest_to_the_combine():
    """A shared expert that takes longer than both exchanges is divided between them."""

    def block(given):
        hidden = given["x"]
        for _ in range(6):
            hidden = hidden @ given["shared"]
        return blocks.routed(given) + hidden

    # A product's 16 MB of weights take 6.4 µs by the estimate, an exchange of a few rows a little more than 15.
    given = blocks.inputs(hidden=2000, tokens=2)
    graph = blocks.passed(block, given, passes=ALL)
    assert graph.rewrites["overlap"] == 2
    ops = [line.op for line in graph_lines(graph.after)]
    dispatch, combine = ops.index("epops.dispatch_start"), ops.index("epops.combine_start")
    beside = [
        ops[start : ops.index(op, start)].count("mm")
        for start, op in ((dispatch, "epops.dispatch_wait"), (combine, "epops.combine_wait"))
    ]
    assert beside == [3, 3]


def nothing_independent(given):
    return blocks.routed(given) @ given["shared"]


def in_need_of_the_rows(given):
    y, sent = blocks.experts(given)
    return blocks.combine(y, sent, given) + (sent.rows @ given["shared"])[: given["x"].shape[0]]


def needed_by_the_dispatch(given):
    return blocks.routed({**given, "x": given["x"] @ given["shared"]})


def with_an_exchange_inside(given):
    first = blocks.routed(given)
    inner = epops.all_reduce(given["x"], group="ep")
    return first.relu() + inner @ given["shared"]


def with_random_numbers(given):
    return blocks.routed(given).relu() + torch.nn.functional.dropout(given["x"], 0.0, True) * 2


@pytest.mark.parametrize(
    "block",
    [nothing_independent, in_need_of_the_rows, needed_by_the_dispatch, with_an_exchange_inside, with_random_numbers],
    ids=lambda block: block.__name__,
)
def test_leaves_alone(block):
    graph = blocks.passed(block, blocks.inputs(), passes=[overlap])
    assert graph.rewrites == {"overlap": 0}
    assert normalized_graph(graph.before) == normalized_graph(graph.after)
    assert {entry.rule for entry in graph.declined} == {"overlap"}


def test_nothing_moves_over_a_write():
    """A functional graph has writes at its end alone, so these are made by hand."""
    graph = blocks.passed(shared_expert_last, blocks.inputs(), passes=[]).after.graph
    product = next(node for node in graph.nodes if str(node.target) == "aten.mm.default")
    x = next(node for node in graph.nodes if node.op == "placeholder" and node.meta["val"].shape == (5, 16))
    for place in (product, product.next):
        with graph.inserting_before(place):
            graph.call_function(torch.ops.aten.zero_.default, (x,))
    assert overlap(graph) == 0


def test_estimates_ignore_the_tokens_of_a_rank():
    found = set()
    for tokens in (2, 5, 8):  # weights have 8 rows and columns, too
        graph = blocks.passed(shared_expert_last, blocks.inputs(tokens=tokens, hidden=8), passes=ALL)
        products = [node for node in graph.before.graph.nodes if str(node.target) == "aten.mm.default"]
        found.add(
            (
                *(work_of(node, tokens, 2) for node in products),
                tuple(exchanges(graph.after)),
                count_ops(graph, "epops.dispatch_start"),
            )
        )
    assert len(found) == 1


def test_dynamic_shapes():
    given = blocks.inputs()
    for name in ("x", "idx", "weights"):
        torch._dynamo.mark_dynamic(given[name], 0)
    graph = blocks.passed(shared_expert_first, given, passes=ALL)
    assert graph.rewrites["overlap"] == 1 and "s0" in normalized_graph(graph)


def two_ranks(rank, size):
    with blocks.group():
        given = blocks.inputs(rank, tokens=3 + 4 * rank)
        return [
            blocks.same_numbers(block, given, ALL, 1e-5)["overlap"]
            for block in (shared_expert_last, shared_expert_first, two_layers)
        ]


def test_numbers_on_two_ranks():
    assert run_ranks(two_ranks, 2) == [[3, 3, 6]] * 2


reached = threading.Event()
library = torch.library.Library("epops_test", "FRAGMENT")
library.define("reach(Tensor x) -> Tensor")


def reach(x):
    """Says that the shared expert runs."""
    reached.set()
    return x.clone()


library.impl("reach", reach, "CPU")
torch.library.register_fake("epops_test::reach", lambda x: torch.empty_like(x), lib=library)


def shared_expert_that_reports(given):
    shared = torch.ops.epops_test.reach.default(given["x"] @ given["shared"]) @ given["shared"].t()
    return blocks.routed(given) + shared


def test_inductor_keeps_the_overlap(ep):
    """In the generated code, in a profiler's trace, and in fact: the dispatch ends only once the shared expert has begun."""
    from torch._inductor.utils import run_and_get_code

    given = blocks.inputs()
    with torch.no_grad():
        compiled = torch.compile(shared_expert_that_reports, backend="epops", fullgraph=True, options={"passes": ALL})
        result, (code, *_) = run_and_get_code(compiled, given)
        blocks.close(result, shared_expert_that_reports(given), 1e-5)
        calls = ("dispatch_start.default(", "extern_kernels.mm(", "reach.default(", "dispatch_wait.default(")
        places = [code.index(text) for text in calls]
        assert places == sorted(places)
        sent = re.search(r"dispatch_start.default\((\w+), (\w+), (\w+)", code)
        assert sent is not None
        assert not any(f"del {name}\n" in code[: places[3]] for name in sent.groups()), (
            "what a start reads lives until its wait"
        )

        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
            compiled(given)
        seen = [event.name for event in sorted(trace.events(), key=lambda event: event.time_range.start)]
        order = [
            seen.index(name)
            for name in ("epops::dispatch_start", "aten::mm", "epops_test::reach", "epops::dispatch_wait")
        ]
        assert order == sorted(order)

        reached.clear()
        met = wait_in_the_first_exchange(ep)
        compiled(given)
        assert met == [True]


def wait_in_the_first_exchange(group):
    """The group's next exchange ends when the shared expert is reached, or after 20 seconds; tells which in the list."""
    swap = group.transport.swap
    met: list[bool] = []

    def patient(*args, **kwargs):
        if not met:
            met.append(reached.wait(20))
        return swap(*args, **kwargs)

    group.transport.swap = patient
    return met
