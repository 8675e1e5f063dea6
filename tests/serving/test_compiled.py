"""Compiled decode steps: one graph a bucket, whatever lengths, prompts and idle ranks come by, and the plain model's answers."""

from __future__ import annotations

import copy

import pytest
import torch

import epops
from epops.serving import Engine

from ..ranks import run_ranks
from .asked import answer, plain, requests
from .test_engine import run


def _graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def _check(rank: int, size: int, family: str, buckets: tuple[int, ...], counts: list[int]) -> None:
    whole = plain(family)
    asked = requests(whole, rank, counts[rank])
    expected = [answer(whole, **one) for one in asked]
    with epops.ExpertGroup(None, max_tokens=16, timeout=400.0) as group:
        model = epops.parallelize(copy.deepcopy(whole), group)
        engine = Engine(model, group, buckets=buckets, max_length=24)
        before = _graphs()
        engine.warm_up()
        assert _graphs() - before == len(buckets) == engine.report.graphs
        # From here on a recompilation would be an error, and so would a graph break have been.
        with torch.compiler.set_stance("fail_on_recompile"):
            for _ in range(2):
                assert run(engine, asked) == expected
        assert _graphs() - before == len(buckets)
        assert not torch._dynamo.utils.counters["graph_break"]
        steps = engine.report.decode_steps
        assert set(steps) == set(buckets), "requests that end one by one make the ranks go through all buckets"


def test_one_graph_a_bucket() -> None:
    run_ranks(_check, 2, "mixtral", (1, 3), [1, 4], timeout=550.0)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_one_graph_a_bucket_of_other_families(family: str) -> None:
    run_ranks(_check, 2, family, (1, 3), [1, 4], timeout=550.0)


@pytest.mark.slow
def test_more_buckets_than_dynamo_keeps_graphs_of_one_function() -> None:
    run_ranks(_check_many, 1, timeout=550.0)


def _check_many(rank: int, size: int) -> None:
    whole = plain("mixtral")
    buckets = tuple(range(1, 11))
    with epops.ExpertGroup(None, max_tokens=16, timeout=400.0) as group:
        model = epops.parallelize(copy.deepcopy(whole), group)
        engine = Engine(model, group, buckets=buckets, max_length=24, compile_options={"backend": "aot_eager"})
        before = _graphs()
        engine.warm_up()
        assert _graphs() - before == len(buckets)
