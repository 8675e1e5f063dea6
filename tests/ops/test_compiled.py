"""Graphs with the ops: one of them, no host sync in it, few of them, cached, exported; in order; with checkpoints."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import epops
from epops import passes
from epops.passes.identity import identity
from epops.passes.keep_order import exchange_name
from tests.ranks import run_ranks


class Layer(torch.nn.Module):
    """A small MoE layer: router, experts that are one matrix each, residual."""

    def __init__(self, group: epops.ExpertGroup, experts: int = 4, hidden: int = 16, **settings: Any) -> None:
        super().__init__()
        make = torch.Generator().manual_seed(0)
        slots = -(-experts // group.size)
        self.router = torch.nn.Parameter(torch.randn(hidden, experts, generator=make))
        self.weight = torch.nn.Parameter(torch.randn(slots, hidden, hidden, generator=make) / 4)
        self.experts, self.settings, self.group = experts, settings, group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w, idx = (x @ self.router).softmax(-1).topk(2)
        common = {"group": self.group, "num_experts": self.experts}
        sent = epops.dispatch(x, idx, w, **common, **self.settings)
        y = epops.grouped_mm(sent.rows, self.weight, sent.expert_ends).relu()
        return epops.combine(y, sent.route, sent.row_weights, x, num_tokens=x.shape[0], top_k=2, **common).out


@pytest.fixture
def group() -> Iterator[epops.ExpertGroup]:
    torch._dynamo.reset()
    with epops.ExpertGroup(None, "ep", max_tokens=8, num_experts=4) as made:
        yield made


class NoHostSync(TorchDispatchMode):
    """Raises on operations that read a tensor's values on the host, or whose result sizes depend on them."""

    FORBIDDEN = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "unique",
        "item",
        "is_nonzero",
        "repeat_interleave.Tensor",
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(word in str(func) for word in self.FORBIDDEN):
            raise AssertionError(f"{func} reads the device on the host")
        return func(*args, **(kwargs or {}))


def under_no_sync(graphs: list[torch.fx.GraphModule]) -> Any:
    def compiler(module: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(module)

        def run(*args: Any) -> Any:
            with NoHostSync():
                return module(*args)

        return run

    return aot_autograd(fw_compiler=compiler, bw_compiler=compiler)


def test_graphs_read_nothing_on_the_host_forward_and_backward(group: epops.ExpertGroup) -> None:
    graphs: list[torch.fx.GraphModule] = []
    model = torch.nn.Sequential(Layer(group), Layer(group))
    compiled = torch.compile(model, fullgraph=True, backend=under_no_sync(graphs))
    x = torch.randn(5, 16, requires_grad=True)
    compiled(x).sum().backward()
    assert len(graphs) == 2, "one forward and one backward graph"
    names = [[exchange_name(node) for node in graph.graph.nodes if exchange_name(node)] for graph in graphs]
    assert names == [["dispatch", "combine"] * 2, ["combine_backward", "dispatch_backward"] * 2]
    with pytest.raises(AssertionError, match="reads the device on the host"), NoHostSync():
        torch.ones(1).item()


def eager_and_compiled(rank: int, size: int) -> list[int]:
    torch.manual_seed(rank)
    with epops.ExpertGroup(None, "ep", max_tokens=8, num_experts=5, timeout=300) as group:
        model = torch.nn.Sequential(Layer(group, 5), Layer(group, 5))
        compiled = torch.compile(model, fullgraph=True, backend="epops")
        passes.reports.clear()
        torch._dynamo.utils.counters.clear()
        for tokens in (5 + rank, 7 - rank, 4 + rank, 3):
            x = torch.randn(tokens, 16, requires_grad=True)
            out, expected = compiled(x), model(x)
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
            leaves = [x, *model.parameters()]
            for a, b in zip(
                torch.autograd.grad(out.pow(2).sum(), leaves), torch.autograd.grad(expected.pow(2).sum(), leaves)
            ):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=5e-5 * float(b.abs().max()))
        stats = torch._dynamo.utils.counters
        assert not stats["graph_break"]
        return [stats["stats"]["unique_graphs"], len(passes.reports), sum(stats["aot_autograd"].values()) > 0]


def test_compiled_equals_eager_on_ranks_with_different_tokens_and_two_graphs_serve_all() -> None:
    for graphs, _, traced in run_ranks(eager_and_compiled, 2, timeout=500):
        assert graphs == 2, "static shapes first, then dynamic ones for every other batch"
        assert traced


def test_dynamic_shapes_make_inputs_of_sizes_only(group: epops.ExpertGroup) -> None:
    seen: list[torch.fx.GraphModule] = []

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.append(module)
        return module.forward

    model = Layer(group)
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    compiled(torch.randn(5, 16))
    compiled(torch.randn(3, 16))
    assert len(seen) == 1
    symbols = [
        n for n in seen[0].graph.nodes if n.op == "placeholder" and isinstance(n.meta["example_value"], torch.SymInt)
    ]
    assert len(symbols) == 1, "the number of tokens, and no setting of the group"
    assert "item" not in seen[0].code.replace("getitem", "")


def test_compile_cache_hits_and_knows_the_passes(group: epops.ExpertGroup, tmp_path: Any, monkeypatch: Any) -> None:
    from torch._inductor.utils import fresh_cache

    def custom(graph: torch.fx.Graph) -> int:
        return 0

    def compiled_once(**options: Any) -> dict[str, int]:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        with torch.inference_mode():
            torch.compile(Layer(group), fullgraph=True, backend="epops", options=options or None)(torch.ones(3, 16))
        return dict(torch._dynamo.utils.counters["inductor"])

    with fresh_cache():
        assert compiled_once()["fxgraph_cache_miss"] == 1
        again = compiled_once()
        assert again.get("fxgraph_cache_miss", 0) == 0
        assert compiled_once(passes=[custom])["fxgraph_cache_miss"] == 1, "other passes, another entry"


def adding(number: int) -> Any:
    return lambda graph: number * 0


class Adds:
    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self, graph: torch.fx.Graph) -> int:
        return self.number * 0


def with_default(graph: torch.fx.Graph, number: int = 0) -> int:
    return number * 0


def written_by_hand(source: str) -> Any:
    space: dict[str, Any] = {"__name__": "by_hand"}
    exec(source, space)
    return space["mine"]


BY_HAND = "def helper(graph): return graph.{}\ndef mine(graph): return helper(graph) and 0"


def test_a_pass_made_with_other_values_is_another_pass() -> None:
    pairs = [
        (adding(3), adding(3), adding(4)),
        (Adds(3), Adds(3), Adds(4)),
        (Adds(3).__call__, Adds(3).__call__, Adds(4).__call__),
        (functools.partial(with_default, number=3), functools.partial(with_default, number=3), with_default),
        (Adds({1, 2}), Adds({2, 1}), Adds({1, 3})),  # type: ignore[arg-type]
        (Adds([[1], 2]), Adds([[1], 2]), Adds([[1, 2]])),  # type: ignore[arg-type]
        (*(written_by_hand(BY_HAND.format(name)) for name in ("nodes", "nodes", "owning_module")),),
    ]
    for one, same, other in pairs:
        assert identity(one) == identity(same) != identity(other), one
    for unknown in (functools.partial(with_default, number=object()), Adds(torch.ones(3))):  # type: ignore[arg-type]
        assert identity(unknown) is None and passes.PassRunner((unknown,)).uuid() is None, "nothing is cached"
    joint = functools.partial(with_default)
    joint.joint = True  # type: ignore[attr-defined]
    assert identity(joint) != identity(functools.partial(with_default)), "it runs over other graphs"


SCRIPT = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from my_pass import mine
from epops import passes
torch.compile(lambda x: x.sin() * 2, backend="epops", options={"passes": [mine]})(torch.ones(3))
counters = torch._dynamo.utils.counters["inductor"]
print(counters["fxgraph_cache_hit"], counters["fxgraph_cache_miss"], [report.rewrites.get("mine") for report in passes.reports])
"""


@pytest.mark.slow
def test_a_changed_pass_runs_in_the_next_process(tmp_path: Any) -> None:
    def compiled(**files: str) -> str:
        for name, text in files.items():
            (tmp_path / f"{name}.py").write_text(text)
        space = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
        space["PYTHONPATH"] = str(Path(epops.__file__).parent.parent)
        command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
        done = subprocess.run(command, env=space, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.strip()

    mine = "from my_helper import count\ndef mine(graph): return count(graph)\n"
    assert compiled(my_pass=mine, my_helper="def count(graph): return 1\n") == "0 1 [1]"
    assert compiled() == "1 0 []"
    assert compiled(my_pass=mine.replace("(graph)\n", "(graph) + 1\n")) == "0 1 [2]"
    assert compiled(my_helper="def count(graph): return 5\n") == "0 1 [6]"


def test_a_bad_pass_is_named(group: epops.ExpertGroup) -> None:
    def raises(graph: torch.fx.Graph) -> int:
        raise KeyError("mine")

    def nothing(graph: torch.fx.Graph) -> None:
        pass

    def breaks(graph: torch.fx.Graph) -> int:
        first = next(node for node in graph.nodes if node.op == "placeholder")
        next(iter(reversed(graph.nodes))).prepend(first)
        return 1

    said = {
        raises: "epops backend: pass raises: raised KeyError: 'mine'",
        nothing: "epops backend: pass nothing: expected the number of its rewrites, an int, got NoneType",
        breaks: "epops backend: pass breaks: expected a graph that holds together, got: ",
    }
    for entry, message in said.items():
        options = {"passes": [entry]}
        with pytest.raises(Exception, match=message), torch.no_grad():
            torch.compile(Layer(group), backend="epops", options=options)(torch.ones(3, 16))
        with pytest.raises(Exception, match=message), torch.no_grad():
            epops.inspect(Layer(group), torch.ones(3, 16), options=options)


def test_passes_are_chosen_by_name_or_given() -> None:
    def custom(graph: torch.fx.Graph) -> int:
        return 0

    assert passes.choose(None) == passes.PASSES
    assert passes.choose(["keep_order", custom]) == (passes.keep_order, custom)
    assert passes.choose([custom])[0] is passes.keep_order, "keep_order is always on"
    with pytest.raises(ValueError, match="expected names among keep_order"):
        passes.choose(["fuse_everything"])
    with pytest.raises(ValueError, match="expected names or functions"):
        passes.choose([3])  # type: ignore[list-item]
    for unordered in ({"fuse_add"}, (name for name in ["fuse_add"]), 3):
        with pytest.raises(ValueError, match="expected a list or tuple .* in their order, got"):
            passes.choose(unordered)  # type: ignore[arg-type]


def independent(x: torch.Tensor, group: epops.ExpertGroup) -> torch.Tensor:
    """Three exchanges that do not depend on one another."""
    idx = torch.zeros(x.shape[0], 1, dtype=torch.int64)
    weights = torch.ones(x.shape[0], 1)
    parts = [epops.dispatch(x * scale, idx, weights, group=group).rows for scale in (1.0, 2.0, 3.0)]
    return parts[2] + parts[0] + parts[1]


def test_keep_order_pins_exchanges_that_data_leaves_free(group: epops.ExpertGroup) -> None:
    torch._dynamo.reset()
    passes.reports.clear()
    x = torch.ones(3, 16)
    got = torch.compile(independent, fullgraph=True, backend="epops", options={"force_disable_caches": True})(x, group)
    assert torch.equal(got, independent(x, group))
    assert passes.reports[-1].rewrites["keep_order"] == 2


def test_keep_order_pins_exchanges_of_different_groups(group: epops.ExpertGroup) -> None:
    """Ranks that wait in different groups for one another would wait for ever."""

    def by_turns(x: torch.Tensor) -> list[torch.Tensor]:
        return [epops.all_to_all(x * n, group=name).rows for n, name in ((1, group), (2, other), (3, group))]

    torch._dynamo.reset()
    passes.reports.clear()
    x = torch.ones(3, 16)
    with epops.ExpertGroup(name="other", max_tokens=8, num_experts=4) as other:
        got = torch.compile(by_turns, fullgraph=True, backend="epops", options={"force_disable_caches": True})(x)
        assert all(map(torch.equal, got, by_turns(x)))
    assert passes.reports[-1].rewrites["keep_order"] == 2


def beside_collectives(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """An exchange before, between and after collectives of torch.distributed, one of them in place in the compiled code."""
    idx, weights = torch.zeros(x.shape[0], 1, dtype=torch.int64), torch.ones(x.shape[0], 1)
    whole = collectives.all_gather_tensor(weight, 0, dist.group.WORLD)
    one = epops.dispatch(x, idx, weights, group="ep").rows
    total = collectives.all_reduce(x.sum(0), "sum", dist.group.WORLD)
    two = epops.dispatch(x * 2, idx, weights, group="ep").rows
    return one, two, torch.relu(x @ whole).sum() + total


def two_ranks_of_different_batches(rank: int, size: int) -> list[str]:
    torch._dynamo.reset()
    x, weight = torch.ones([5, 400][rank], 64), torch.ones(32, 64)
    with epops.ExpertGroup(name="ep", max_tokens=400, num_experts=4), torch.no_grad():
        compiled = torch.compile(beside_collectives, fullgraph=True, backend="epops", dynamic=False)
        got, (code, *_) = run_and_get_code(compiled, x, weight)
        assert all(map(torch.allclose, got, beside_collectives(x, weight)))
    return re.findall(r"ops\.(?:epops|_c10d_functional)\.(all_\w+?|dispatch)_?\.default\(", code)


def test_keep_order_pins_collectives_of_torch_beside_exchanges() -> None:
    """Inductor orders by sizes, so that ranks would come to different orders, and wait in different groups."""
    order = ["all_gather_into_tensor", "dispatch", "all_reduce", "dispatch"]
    assert run_ranks(two_ranks_of_different_batches, 2) == [order, order]


def test_graphs_of_eight_ranks_are_captured_in_one_process() -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch._dynamo.reset()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    try:
        with epops.ExpertGroup(None, "ep", max_tokens=8, num_experts=20) as group:
            assert "fake (captures graphs only)" in repr(group)
            seen: list[torch.fx.GraphModule] = []

            def keep(module: torch.fx.GraphModule, inputs: Any) -> Any:
                seen.append(module)
                return lambda *args: [node.meta["val"] for node in module.graph.find_nodes(op="output")[0].args[0]]

            with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
                layer = Layer(group, 20)
                x = mode.from_tensor(torch.randn(5, 16))
                from torch.fx.experimental.proxy_tensor import make_fx

                graph = make_fx(lambda x: layer(x))(x)
            dispatch = next(node for node in graph.graph.nodes if exchange_name(node) == "dispatch")
            assert dispatch.kwargs["ep_size"] == 8 and dispatch.kwargs["num_slots"] == 3
            assert dispatch.meta["val"][0].shape == (8 * 8 * 2, 16)
            with pytest.raises(epops.GroupError, match="captures graphs and moves no bytes"):
                Layer(group, 20)(torch.randn(5, 16))
    finally:
        dist.destroy_process_group()


def test_checkpointing_repeats_exchanges_unless_they_are_saved(group: epops.ExpertGroup) -> None:
    layer = Layer(group)
    x = torch.randn(5, 16, requires_grad=True)
    expected = torch.autograd.grad(layer(x).pow(2).sum(), [x, *layer.parameters()])
    for context, exchanges in ((None, 6), (epops.checkpoint_contexts(), 4)):
        before = group.sequence
        extra = {} if context is None else {"context_fn": context}
        out = checkpoint(layer, x, use_reentrant=False, **extra)
        got = torch.autograd.grad(out.pow(2).sum(), [x, *layer.parameters()])
        assert group.sequence - before == exchanges
        for a, b in zip(got, expected):
            torch.testing.assert_close(a, b)


def test_compiled_checkpoints_keep_exchanges_too(group: epops.ExpertGroup) -> None:
    layer = Layer(group)
    for context, again in ((None, True), (epops.checkpoint_contexts(), False)):
        torch._dynamo.reset()
        graphs: list[torch.fx.GraphModule] = []
        extra = {} if context is None else {"context_fn": context}
        compiled = torch.compile(
            lambda x: checkpoint(layer, x, use_reentrant=False, **extra),  # noqa: B023
            fullgraph=True,
            backend=under_no_sync_min_cut(graphs),
        )
        x = torch.randn(5, 16, requires_grad=True)
        compiled(x).sum().backward()
        backward = [exchange_name(node) for node in graphs[1].graph.nodes]
        assert ("dispatch" in backward) == again


def under_no_sync_min_cut(graphs: list[torch.fx.GraphModule]) -> Any:
    from functorch.compile import min_cut_rematerialization_partition

    def compiler(module: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(module)
        return module.forward

    return aot_autograd(fw_compiler=compiler, bw_compiler=compiler, partition_fn=min_cut_rematerialization_partition)


def test_export_and_aot_inductor_have_the_ops_and_run(group: epops.ExpertGroup, tmp_path: Path) -> None:
    layer = Layer(group)
    tokens = torch.export.Dim("tokens", min=2, max=8)
    with torch.no_grad():
        exported = torch.export.export(layer, (torch.randn(5, 16),), dynamic_shapes=({0: tokens},))
        names = [exchange_name(node) for node in exported.graph.nodes if exchange_name(node)]
        assert names == ["dispatch", "combine"]
        package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "layer.pt2"))
        packaged = torch._inductor.aoti_load_package(package)
        for count in (2, 5, 8):
            x = torch.randn(count, 16)
            torch.testing.assert_close(exported.module()(x), layer(x))
            torch.testing.assert_close(packaged(x), layer(x))


def test_inference_mode(group: epops.ExpertGroup) -> None:
    layer = Layer(group)
    x = torch.randn(5, 16)
    with torch.inference_mode():
        inside = layer(x)
    torch.testing.assert_close(inside, layer(x).detach())
