"""generate over ranks: own prompts, own lengths, own ends; the tokens are the one-process model's."""

from __future__ import annotations

import copy

import pytest
import torch

import epops
from epops import zoo

from ..ranks import run_ranks
from .test_five_families import FIVE


def _arguments(model: torch.nn.Module, rank: int, cache: str | None) -> dict:
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(3, model.config.get_text_config().vocab_size, (1 + rank % 2, 3 + 2 * rank), generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        # Rank 0 ends first, in the middle of the others' work: its cache is full long before they are done.
        "max_new_tokens": 3 + 4 * rank,
        "do_sample": False,
        "cache_implementation": cache,
        "pad_token_id": 0,
        "eos_token_id": None,
    }


def _check(rank: int, size: int, family: str, cache: str | None) -> None:
    whole = zoo.tiny(family)
    arguments = _arguments(whole, rank, cache)
    expected = whole.generate(**arguments)
    prompt = 1 if whole.config.is_encoder_decoder else arguments["input_ids"].shape[1]
    assert expected.shape[1] == prompt + 3 + 4 * rank
    with epops.ExpertGroup(None, max_tokens=64) as group:
        model = epops.parallelize(copy.deepcopy(whole), group)
        for _ in range(2):
            assert torch.equal(model.generate(**arguments), expected)
        batch = zoo.inputs(family, whole, seed=rank)
        torch.testing.assert_close(model(**batch).logits, whole(**batch).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FIVE)
def test_static_cache_with_ends_at_different_steps(family: str) -> None:
    run_ranks(_check, 3, family, "static")


@pytest.mark.parametrize("family", ["mixtral", "switch_transformers", "jamba", "qwen3_next"])
def test_dynamic_cache_with_ends_at_different_steps(family: str) -> None:
    run_ranks(_check, 2, family, None)


def _check_returned_cache(rank: int, size: int) -> None:
    whole = zoo.tiny("mixtral")
    arguments = {**_arguments(whole, rank, "static"), "return_dict_in_generate": True}
    expected = whole.generate(**arguments).past_key_values
    with epops.ExpertGroup(None, max_tokens=64) as group:
        got = epops.parallelize(copy.deepcopy(whole), group).generate(**arguments).past_key_values
    for ours, theirs in zip(got.layers, expected.layers):
        assert torch.equal(ours.cumulative_length, theirs.cumulative_length)
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.values, theirs.values, rtol=1e-5, atol=1e-5)


def test_a_returned_cache_is_what_it_was_when_its_rank_finished() -> None:
    run_ranks(_check_returned_cache, 2)


def _check_end_token(rank: int, size: int) -> None:
    whole = zoo.tiny("mixtral")
    arguments = {**_arguments(whole, rank, "static"), "max_new_tokens": 12}
    plain = whole.generate(**arguments)
    # End where this rank's own third token comes up; other ranks go on.
    arguments["eos_token_id"] = int(plain[0, arguments["input_ids"].shape[1] + 2]) if rank == 0 else None
    expected = whole.generate(**arguments)
    with epops.ExpertGroup(None, max_tokens=64) as group:
        model = epops.parallelize(copy.deepcopy(whole), group)
        assert torch.equal(model.generate(**arguments), expected)
        assert torch.equal(model.generate(**arguments, num_beams=2), whole.generate(**arguments, num_beams=2))


def test_an_end_token_on_one_rank_and_beam_search() -> None:
    run_ranks(_check_end_token, 2)


def _check_compiled(rank: int, size: int, family: str, count_passes: bool) -> None:
    from transformers import CompileConfig

    from epops import passes

    # Transformers' cache of a sliding window compiles anew while it fills.
    whole = zoo.tiny(family, **({"sliding_window": None} if family == "mixtral" else {}))
    arguments = _arguments(whole, rank, "static")
    expected = whole.generate(**arguments)
    config = CompileConfig(backend="epops", fullgraph=True, mode=None)
    with epops.ExpertGroup(None, max_tokens=64, timeout=400.0) as group:
        model = epops.parallelize(copy.deepcopy(whole), group)
        passes.reports.clear()
        # A graph that comes out of the compile cache has been through the passes before; here they are to be seen.
        with torch._inductor.config.patch(force_disable_caches=count_passes):
            assert torch.equal(model.generate(**arguments, compile_config=config), expected)
        if count_passes:
            assert len(passes.reports) == 1, "one graph for all decode steps, those of an idle rank too"
            assert "keep_order" in passes.reports[0].rewrites
        compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert torch.equal(model.generate(**arguments, compile_config=config), expected)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled
        assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
def test_generate_runs_the_epops_backend() -> None:
    run_ranks(_check_compiled, 2, "mixtral", True, timeout=550.0)


@pytest.mark.slow
@pytest.mark.parametrize("family", FIVE[1:])
def test_compiled_generate(family: str) -> None:
    run_ranks(_check_compiled, 2, family, False, timeout=550.0)
