"""The five families that CI has, eager and compiled, against the one-process model."""

from __future__ import annotations

import copy

import pytest
import torch

import epops
from epops import zoo

from ..ranks import run_ranks
from .compare import check_family, close

FIVE = ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "olmoe"]


def _check(rank: int, size: int, family: str, compiled: bool, dtype: torch.dtype) -> None:
    check_family(family, rank, size, compiled=compiled, dtype=dtype)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("family", FIVE)
def test_eager_output_and_gradients_are_the_one_process_models(family: str, size: int) -> None:
    run_ranks(_check, size, family, False, torch.float32)


@pytest.mark.parametrize("family", FIVE)
def test_bfloat16_is_within_its_precision(family: str) -> None:
    run_ranks(_check, 2, family, False, torch.bfloat16)


def _compiled(rank: int, size: int, family: str, backend: str) -> None:
    check_family(family, rank, size, compiled=True, backend=backend)


def test_forward_and_backward_are_one_graph() -> None:
    run_ranks(_compiled, 2, "gpt_oss", "aot_eager", timeout=500.0)


@pytest.mark.slow
@pytest.mark.parametrize("family", FIVE)
def test_compiled_output_and_gradients_are_the_one_process_models(family: str) -> None:
    run_ranks(_compiled, 2, family, "epops", timeout=590.0)


def _dynamic(rank: int, size: int) -> None:
    from torch._dynamo.testing import EagerAndRecordGraphs

    whole = zoo.tiny("mixtral")
    recorded = EagerAndRecordGraphs()
    with epops.ExpertGroup(None, max_tokens=64, timeout=240.0) as group:
        model = torch.compile(
            epops.parallelize(copy.deepcopy(whole), group), fullgraph=True, dynamic=True, backend=recorded
        )
        for length in (5, 9, 13):
            batch = zoo.inputs("mixtral", whole, seqlen=length + rank, seed=rank)
            close(model(**batch).logits, whole(**batch).logits, "logits", 1e-5)
    assert len(recorded.graphs) == 1
    for node in recorded.graphs[0].graph.nodes:
        if node.target == "item":
            readers = "".join(str(user.meta.get("stack_trace")) for user in node.users)
            assert "epops" not in readers, f"a setting of ours became an input of the graph: {readers}"
        if node.op == "placeholder" and isinstance(node.meta["example_value"], torch.SymInt):
            assert "epops" not in node.name, node.name


def test_dynamic_shapes_make_one_graph_with_constant_settings() -> None:
    run_ranks(_dynamic, 2, timeout=500.0)
