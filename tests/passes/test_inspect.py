# ruff: noqa: E501 (goldens)
"""epops.inspect and epops.testing: the text, the figures, and the page in a real browser."""

from __future__ import annotations

import dataclasses
import functools
import re
import shutil
import subprocess
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from expecttest import TestCase

import epops
from epops.inspection.page import for_script, page
from epops.inspection.report import summary_lines
from epops.inspection.text import _Naming
from epops.inspection.wire import overlaps, wire_bytes
from epops.passes.fuse_add import fuse_add
from epops.passes.fuse_quant import fuse_quant
from epops.testing import assert_fused, captured, count_ops, normalized_graph
from tests.passes import blocks, quantizers

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.fixture(autouse=True)
def ep():
    with blocks.group() as group:
        yield group


def block(given):
    return blocks.routed(given) + torch.relu(given["x"] @ given["shared"])


def training():
    return {name: item.requires_grad_(item.is_floating_point()) for name, item in blocks.inputs().items()}


class Golden(TestCase):
    def test_summary(self):
        self.assertExpectedInline(
            epops.inspect(block, training()).summary(),
            """\
joint graph
  rewrites: fuse_transpose 0, fuse_quant 0, fuse_add 1, skip_padding 0
  bytes that leave a rank, at most: 0 before, 0 after
  what runs are its two parts, the forward and the backward graph

forward graph
  rewrites: fuse_transpose 0, fuse_quant 0, fuse_add 0, overlap 1, skip_padding 0, keep_order 0
  bytes that leave a rank, at most: 0 after the joint graph's rewrites, 0 after all
  %dispatch_start runs beside %mm
  overlap left %combine alone: no product beside it is independent of it

backward graph
  rewrites: fuse_transpose 0, fuse_quant 0, fuse_add 0, overlap 2, skip_padding 0, keep_order 0
  bytes that leave a rank, at most: 0 after the joint graph's rewrites, 0 after all
  %combine_backward_start runs beside %mm, %mm.1
  %dispatch_backward_start runs beside %grouped_mm_backward_weight""",
        )

    def test_text(self):
        with torch.no_grad():
            self.assertExpectedInline(
                str(epops.inspect(block, blocks.inputs())),
                """\
inference graph
  rewrites: fuse_transpose 0, fuse_quant 0, fuse_add 1, overlap 1, skip_padding 0, keep_order 0
  bytes that leave a rank, at most: 0 before, 0 after
  %dispatch_start runs beside %mm
  overlap left %combine alone: no product beside it is independent of it

before:
  %input: f32[5, 16] = input
  %input.1: i64[5, 2] = input
  %input.2: f32[5, 2] = input
  %input.3: f32[3, 16, 16] = input
  %input.4: f32[16, 16] = input
  %dispatch: rows f32[16, 16], row_weights f32[16], expert_ends i32[3], route i32[59] = epops.dispatch(%input, %input.1, %input.2, group=ep, layout=expert)
  %grouped_mm: f32[16, 16] = epops.grouped_mm(%dispatch.rows, %input.3, %dispatch.expert_ends)
  %combine: out f32[5, 16] = epops.combine(%grouped_mm, %dispatch.route, %dispatch.row_weights, group=ep, layout=expert, out_dtype=f32)
  %mm: f32[5, 16] = mm(%input, %input.4)
  %relu: f32[5, 16] = relu(%mm)
  %add: f32[5, 16] = add(%combine.out, %relu)
  return [%add]

after:
  %input: f32[5, 16] = input
  %input.1: i64[5, 2] = input
  %input.2: f32[5, 2] = input
  %input.3: f32[3, 16, 16] = input
  %input.4: f32[16, 16] = input
  %dispatch_start: i64[4] = epops.dispatch_start(%input, %input.1, %input.2, group=ep, layout=expert)
  %mm: f32[5, 16] = mm(%input, %input.4) after %dispatch_start
  %dispatch_wait: rows f32[16, 16], row_weights f32[16], expert_ends i32[3], route i32[59] = epops.dispatch_wait(%dispatch_start, %input, %input.1, %input.2, group=ep, layout=expert) after %mm
  %grouped_mm: f32[16, 16] = epops.grouped_mm(%dispatch_wait.rows, %input.3, %dispatch_wait.expert_ends)
  %relu: f32[5, 16] = relu(%mm)
  %combine: out f32[5, 16] = epops.combine(%grouped_mm, %dispatch_wait.route, %dispatch_wait.row_weights, %relu, group=ep, layout=expert, out_dtype=f32)
  return [%combine.out]""",
            )


def test_before_of_a_training_graph_is_not_what_the_program_wrote_and_says_so():
    """The addition that the joint graph's pass folded is in the joint graph's before only."""
    shown = epops.inspect(block, training())
    text = str(shown)
    parts = [part.split(":\n", 1) for part in text.split("\n\n") if ":\n" in part]
    bodies = {}
    for head, body in parts:
        bodies.setdefault(head, []).append(body)
    (written,), (left,) = bodies["before any pass"], bodies["after the passes over the joint graph"]
    forward, backward = bodies["before its own passes, after the joint graph's rewrites"]
    assert "= add(%combine.out" in written and "= add(%combine.out" not in left + forward + backward
    assert "before" not in bodies, "no graph of a training step is called plainly that"
    with torch.no_grad():
        assert "\nbefore:\n" in str(epops.inspect(block, blocks.inputs()))


def test_bytes_that_the_joint_graph_saves_are_shown_there():
    """8 tokens of at most 1 other rank: 256 channels of 2 bytes as written, of 1 byte and a scale of 4 from then on."""

    def quantized(given):
        sent = torch.ops.epops.dispatch.default(
            given["x"].detach(), given["idx"], given["weights"].detach(),
            group="ep", num_experts=3, num_slots=2, ep_size=2, max_tokens=8, capacity=32, layout="expert", alignment=1,
        )  # fmt: skip
        q, scales = quantizers.per_token(sent[0])
        return q.float() * scales * given["shared"][0]

    given = {name: item.requires_grad_(item.is_floating_point()) for name, item in
             blocks.inputs(hidden=256, dtype=torch.bfloat16).items()}  # fmt: skip
    joint, forward, _ = epops.inspect(quantized, given, options={"passes": ["fuse_quant"]}).graphs
    assert (joint.rewrites["fuse_quant"], forward.rewrites["fuse_quant"]) == (1, 0)
    assert f"  bytes that leave a rank, at most: {8 * 512} before, {8 * 260} after" in summary_lines(joint)
    said = f"  bytes that leave a rank, at most: {8 * 260} after the joint graph's rewrites, {8 * 260} after all"
    assert said in summary_lines(forward)


def test_the_text_is_the_same_on_every_run():
    one, other = (str(epops.inspect(block, training())) for _ in range(2))
    assert one == other and "0x" not in one and "/" not in one.replace("//", "")


def test_nothing_runs(ep):
    before = ep.sequence if hasattr(ep, "sequence") else None
    given = training()
    epops.inspect(block, given)
    assert all(item.grad is None for item in given.values())
    assert before is None or ep.sequence == before


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        given = blocks.inputs()
        self.experts, self.shared = (torch.nn.Parameter(given[name]) for name in ("experts", "shared"))
        self.register_buffer("calls", torch.tensor(5.0))

    def forward(self, x, idx, weights):
        self.calls += 1
        return block({"x": x, "idx": idx, "weights": weights, "experts": self.experts, "shared": self.shared})


class Result(NamedTuple):
    out: object


@dataclasses.dataclass
class Held:
    out: object


def test_every_callable_shows_its_backward_graph_and_none_runs():
    """A module, what closes over one, what was compiled before or in place, what returns an object of the user's."""
    model, in_place, by_forward = Block(), Block(), Block()
    in_place.compile(backend="epops")
    by_forward.forward = torch.compile(by_forward.forward, backend="epops")
    given = [blocks.inputs()[name] for name in ("x", "idx", "weights")]
    text = str(epops.inspect(model, *given))
    programs = [
        model.forward, torch.compile(model, backend="epops"), in_place, by_forward, functools.partial(model),
        lambda *args: model(*args), lambda *args: in_place(*args),
    ]  # fmt: skip
    for program in programs:
        assert str(epops.inspect(program, *given)) == text
    for returned in (Result, Held):
        shown = epops.inspect(lambda *args, returned=returned: returned(model(*args)), *given)
        assert [graph.kind for graph in shown.graphs] == ["joint", "forward", "backward"]
    for one in (model, in_place, by_forward):
        assert one.calls == 5 and all(parameter.grad is None for parameter in one.parameters())


def test_a_compile_that_follows_knows_nothing_of_the_sizes_inspected():
    seen = []

    def backend(module, inputs):
        seen.extend(type(size) for item in inputs if isinstance(item, torch.Tensor) for size in item.shape)
        return module.forward

    def program(x):
        return x * 2

    epops.inspect(program, torch.ones(5, 3))
    torch.compile(program, backend=backend)(torch.ones(7, 3))
    assert seen == [int, int], "static, as a first compile is"


def test_a_model_that_breaks_and_one_without_work_say_so():
    def broken(given):
        out = block(given)
        torch._dynamo.graph_break()
        return block({**given, "x": out})

    shown = epops.inspect(broken, training())
    assert [graph.kind for graph in shown.graphs] == ["joint", "forward", "backward"] * 2
    assert shown.summary().startswith("2 graphs: torch.compile breaks the model between them")
    nothing = epops.inspect(lambda x: x, torch.ones(3))
    assert str(nothing) == nothing.summary() and "no graph was compiled" in str(nothing)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="graph_break"):
        epops.inspect(broken, training(), fullgraph=True)


def test_what_is_declined_has_names_of_the_text():
    """The second sum is declined for a node that the first rewrite made: it has a name in the graph after only."""

    def summed_and_used(given):
        once = given["x"][None] + blocks.routed(given)[None]
        return once + once.sin()

    (joint, *_) = epops.inspect(summed_and_used, training()).graphs
    said = "  fuse_add left %combine alone: %reshape (after) has 3 users, and only one of them is %add.1"
    assert said in summary_lines(joint)


def test_options_are_the_backends():
    from torch._inductor import config

    kept = config.max_autotune
    with torch.no_grad():
        shown = epops.inspect(block, blocks.inputs(), options={"passes": ["fuse_add"], "max_autotune": True})
        assert shown.rewrites == {"fuse_add": 1, "keep_order": 0} and config.max_autotune == kept
        with pytest.raises(ValueError, match="expected 'passes', 'share_compile' or names of .* got 'pases'"):
            epops.inspect(block, blocks.inputs(), options={"pases": ["fuse_add"]})
        with pytest.raises(ValueError, match="options: expected a dict such as .* got str"):
            epops.inspect(block, blocks.inputs(), options="fuse_add")


def test_a_pass_that_was_set_in_inductor_runs_first_as_in_the_backend():
    from torch._inductor import config

    seen = []
    with torch.no_grad(), config.patch(post_grad_custom_pre_pass=lambda graph: seen.append("earlier")):
        epops.inspect(block, blocks.inputs(), options={"passes": [lambda graph: seen.append("ours") or 0]})
    assert seen == ["earlier", "ours"]


def test_options_choose_the_passes():
    with torch.no_grad():
        shown = epops.inspect(block, blocks.inputs(), options={"passes": ["fuse_add"]})
    assert shown.rewrites == {"fuse_add": 1, "keep_order": 0}


def test_bytes_on_the_wire_shrink_with_the_rows():
    """8 tokens of at most 1 other rank: 256 channels of 2 bytes before, of 1 byte and a scale of 4 after."""
    with torch.no_grad():

        def quantized(given):
            sent = torch.ops.epops.dispatch.default(
                *(given[name] for name in ("x", "idx", "weights")),
                group="ep", num_experts=3, num_slots=2, ep_size=2, max_tokens=8, capacity=32, layout="expert", alignment=1,
            )  # fmt: skip
            return quantizers.per_token(sent[0])

        graph = captured(quantized, blocks.inputs(hidden=256, dtype=torch.bfloat16), passes=[fuse_quant])[0]
    assert (wire_bytes(graph.before.graph), wire_bytes(graph.after.graph)) == (8 * 512, 8 * 260)


def test_overlaps_name_what_runs_beside():
    with torch.no_grad():
        graph = captured(block, blocks.inputs())[0]
    (one,) = overlaps(graph.after.graph)
    assert "dispatch_start" in str(one.start.target) and len(one.beside) == 1


def test_assert_fused_says_what_was_declined():
    with torch.no_grad():
        graphs = captured(lambda given: blocks.routed(given) + given["x"][0], blocks.inputs(), passes=[fuse_add])
    assert_fused(graphs, fuse_add=0)
    with pytest.raises(
        AssertionError, match="fuse_add: expected 1 rewrites, got 0\n.*%combine alone: %add broadcasts"
    ) as said:
        assert_fused(graphs, fuse_add=1)
    shown = str(said.value).splitlines()
    assert "inference graph, before, what is around its exchanges:" in shown
    assert shown[-1] == "%add: f32[5, 16] = add(%combine.out, %select)", (
        "the sum that was not folded, by the reason's names"
    )
    with pytest.raises(AssertionError, match="no pass 'fuse_everything' ran"):
        assert_fused(graphs, fuse_everything=1)


def test_symbols_and_names_are_normalized():
    given = blocks.inputs()
    for name in ("x", "idx", "weights"):
        torch._dynamo.mark_dynamic(given[name], 0)
    with torch.no_grad():
        text = normalized_graph(captured(block, given, passes=[])[0])
    assert "bf16" not in text and re.findall(r"\bs\d+\b", text)[0] == "s0" and "primals" not in text
    with torch.no_grad():
        assert count_ops(captured(block, given, passes=[]), "epops.combine") == 1
        assert count_ops(epops.inspect(block, given), "epops.combine") == 1
        with pytest.raises(TypeError, match="normalized_graph: graph: expected one graph, got list"):
            normalized_graph(captured(block, given))


def test_a_size_is_written_the_same_whatever_torch_calls_its_symbols():
    import sympy

    class Size:
        def __init__(self, expr):
            self.node = SimpleNamespace(expr=expr)

        def __str__(self):
            return str(self.node.expr)

    texts = set()
    for names in (("s5", "s77"), ("s77", "s5"), ("s1", "s0"), ("u0", "s3")):
        naming = _Naming()
        a, b = (sympy.Symbol(name, integer=True, positive=True) for name in names)
        texts.add(tuple(naming._size(Size(expr)) for expr in (a, b, a * b + 16 * b + 34, sympy.Min(2, b) * a)))
    assert texts == {("s0", "s1", "s0*s1 + 16*s1 + 34", "s0*Min(2, s1)")}


# ---- the page ----------------------------------------------------------------------------------------------------------

EVIL = (
    '</script><script>document.body.dataset.evil="yes"</script><img src=x onerror=\'document.body.dataset.evil="yes"\'>'
)


def test_no_string_can_leave_its_script():
    text = for_script({"name": EVIL + "\u2028&amp;"})
    assert not set("<>&\u2028") & set(text)


def test_the_page_needs_no_network(tmp_path):
    saved = epops.inspect(block, training()).save(tmp_path / "graph.html").read_text()
    assert not re.search(r"\b(?:src|href)\s*=|@import|url\(|fetch\(|XMLHttpRequest", saved)
    assert set(re.findall(r"https?://[^\"' ]*", saved)) == {"http://www.w3.org/2000/svg"}


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome here to look at the page with")
def test_the_page_in_a_browser(tmp_path):
    text = page(epops.inspect(block, training()).graphs, title=EVIL)
    text = text.replace("%dispatch_start", "%dispatch_start" + for_script(EVIL)[1:-1].replace('\\"', "'"))
    probe = """<script>
      const say = (key, value) => document.body.setAttribute("data-" + key, value);
      const boxes = side => [...document.querySelectorAll(`#${side} .node`)];
      say("joint", [...document.querySelectorAll("#after .marked")].map(box => box.dataset.name).join(" "));
      say("headings", document.querySelector("h2#before-heading").textContent);
      document.querySelectorAll("#tabs button")[1].click();
      say("divided", document.querySelector("h2#before-heading").textContent);
      say("before", boxes("before").length); say("after", boxes("after").length);
      say("marked", document.querySelectorAll("#after .marked").length);
      const place = (side, name) => boxes(side).find(box => box.dataset.name === name).getAttribute("transform").split(",")[1];
      say("level", ["%mm", "%combine"].every(name => place("before", name) === place("after", name)));
      say("direct", document.querySelectorAll("#after path[data-from='%dispatch_wait'][data-to='%combine']").length);
      say("flights", document.querySelectorAll("#after .flight").length);
      const combine = boxes("after").find(box => box.dataset.name === "%combine");
      combine.dispatchEvent(new MouseEvent("mouseenter"));
      say("detail", document.getElementById("detail").textContent);
      say("lit", document.querySelectorAll("#after .lit").length);
      document.getElementById("all").click();
      say("all", boxes("after").length);
      document.querySelectorAll("#tabs button")[2].click();
      say("facts", document.getElementById("facts").textContent);
    </script></body>"""
    path = tmp_path / "graph.html"
    path.write_text(text.replace("</body>", probe), encoding="utf-8")
    seen = look_at(path, tmp_path)
    assert seen["ready"] == "yes" and "evil" not in seen
    assert (seen["headings"], seen["divided"]) == (
        "Before any pass",
        "Before its own passes, after the joint graph's rewrites",
    )
    assert (seen["before"], seen["after"], seen["flights"]) == ("4", "5", "1")
    assert "%combine" in seen["joint"].split(), "the combine took its addend in the joint graph"
    assert (seen["level"], seen["direct"]) == ("true", "1"), (
        "twins side by side; what a node reads itself keeps its edge"
    )
    assert int(seen["marked"]) >= 2 and int(seen["lit"]) >= 2 and int(seen["all"]) > 5
    assert seen["detail"].startswith("%combine: out f32[5, 16] = epops.combine(")
    assert "overlap 2" in seen["facts"]


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome here to look at the page with")
def test_edges_of_a_residual_stream_are_few(tmp_path):
    """Every product reads all earlier layers' results through the sums between them; the picture has the way from the last one."""

    def layers(given):
        x = given["x"]
        for _ in range(4):
            x = (x * 2 + blocks.routed({**given, "x": torch.relu(x.tanh() @ given["shared"])})).sin()
            x = x.tanh() * 3 - x
        return x

    with torch.no_grad():
        saved = epops.inspect(layers, blocks.inputs(), options={"passes": []}).save(tmp_path / "graph.html")
    probe = """<script>
      const to = name => [...document.querySelectorAll(`#after path[data-to='${name}']`)].map(path => path.dataset.from);
      document.body.setAttribute("data-edges", ["%mm.1", "%mm.2", "%mm.3"].map(name => to(name).join("+")).join(" "));
    </script></body>"""
    saved.write_text(saved.read_text().replace("</body>", probe), encoding="utf-8")
    assert look_at(saved, tmp_path)["edges"] == "%combine %combine.1 %combine.2"


def look_at(path, folder):
    """What the body's data attributes say once a browser has run the page."""
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'browser'}"]
    command += ["--virtual-time-budget=5000", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    body = re.search(r"<body([^>]*)>", done.stdout)
    assert body, done.stderr[-2000:]
    return dict(re.findall(r'data-(\w+)="([^"]*)"', body.group(1)))
