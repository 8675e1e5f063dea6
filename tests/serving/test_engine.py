"""The engine answers as the plain one-process model's generate does, whatever the other requests and ranks do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import epops
from epops import zoo
from epops.serving import Engine

from ..ranks import run_ranks
from .asked import answer, plain, requests

FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")


def run(engine: Engine, asked: list[dict[str, Any]]) -> list[list[int]]:
    """Submit, run to the end, and return each request's tokens as its events told them."""
    submitted = [engine.submit(**one) for one in asked]
    told: dict[int, list[int]] = {request.number: [] for request in submitted}
    for event in engine.run():
        assert event.index == len(told[event.request.number])
        assert event.finished == (event.request.finished if len(event.request.tokens) == event.index + 1 else "")
        told[event.request.number].append(event.token)
    assert all(request.finished for request in submitted)
    assert [told[request.number] for request in submitted] == [request.tokens for request in submitted]
    return [request.tokens for request in submitted]


def _check(rank: int, size: int, family: str, counts: list[int], overlap: bool) -> None:
    whole = plain(family)
    asked = requests(whole, rank, counts[rank])
    expected = [answer(whole, **one) for one in asked]
    with epops.ExpertGroup(None, max_tokens=16) as group:
        model = epops.parallelize(copy.deepcopy(whole), group)
        with Engine(model, group, buckets=(1, 2, 4), max_length=24, compiled=False, overlap=overlap) as engine:
            assert run(engine, asked) == expected
            # A second run in the same cache, the other way round: what the first left there disturbs nothing.
            assert run(engine, asked[::-1]) == expected[::-1]
            assert engine.report.requests == 2 * len(asked)
            assert engine.report.tokens == 2 * sum(map(len, expected))
        assert group.token_mask is None


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("counts", [[5], [1, 6], [7, 0, 2]], ids=lambda counts: f"{counts} requests")
def test_every_answer_is_that_of_the_plain_model(family: str, counts: list[int]) -> None:
    run_ranks(_check, len(counts), family, counts, False)


def test_reading_tokens_one_step_late_changes_none() -> None:
    run_ranks(_check, 2, "mixtral", [3, 6], True)


def _check_end_tokens(rank: int, size: int, overlap: bool) -> None:
    whole = plain("qwen3_moe")
    asked = requests(whole, rank, 5)
    for one in asked:
        one["max_new_tokens"] = 8
        # Ends early where this request's own third token comes up for the first time.
        one["eos_token_id"] = answer(whole, **one)[2]
    expected = [answer(whole, **one) for one in asked]
    assert any(len(tokens) < 8 for tokens in expected)
    with epops.ExpertGroup(None, max_tokens=16) as group:
        model = epops.parallelize(copy.deepcopy(whole), group)
        engine = Engine(model, group, buckets=(1, 3), max_length=24, compiled=False, overlap=overlap)
        ended: list[str] = []
        for one in asked:
            one["on_token"] = lambda event: ended.append(event.finished) if event.finished else None
        assert run(engine, asked) == expected
        assert ended.count("eos") == sum(tokens[-1] == one["eos_token_id"] for tokens, one in zip(expected, asked))


@pytest.mark.parametrize("overlap", [False, True])
def test_an_end_token_ends_an_answer(overlap: bool) -> None:
    run_ranks(_check_end_tokens, 2, overlap)


def _check_long_prompt(rank: int, size: int) -> None:
    whole = plain("mixtral")
    asked = requests(whole, rank, 3, longest=3)
    asked.insert(1, {**requests(whole, 9, 1)[0], "prompt_ids": list(range(3, 26)), "max_new_tokens": 5})
    expected = [answer(whole, **one) for one in asked]
    # Prefills have room for 5 tokens: the long prompt takes several, with decode steps of the others between.
    with epops.ExpertGroup(None, max_tokens=5) as group:
        model = epops.parallelize(copy.deepcopy(whole), group)
        engine = Engine(model, group, buckets=(1, 2, 4), max_length=30, compiled=False)
        assert run(engine, asked if rank == 0 else asked[:1]) == (expected if rank == 0 else expected[:1])
        assert engine.report.prefills >= 5


def test_a_prompt_longer_than_a_prefill_is_read_in_parts() -> None:
    run_ranks(_check_long_prompt, 2)


def _check_submitted_on_the_way(rank: int, size: int) -> None:
    whole = plain("mixtral")
    asked = requests(whole, rank, 4)
    expected = [answer(whole, **one) for one in asked]
    with epops.ExpertGroup(None, max_tokens=16) as group:
        model = epops.parallelize(copy.deepcopy(whole), group)
        engine = Engine(model, group, buckets=(2,), max_length=24, compiled=False)
        heard: list[int] = []
        submitted = [engine.submit(**asked[0], on_token=lambda event: heard.append(event.token))]
        dropped = engine.submit(**{**asked[1], "max_new_tokens": 9})
        for event in engine.run():
            if event.request is submitted[0] and event.finished:
                submitted += [engine.submit(**one) for one in asked[1:]]
            if event.request is dropped and event.index == 1:
                engine.cancel(dropped)
        assert dropped.finished == "cancelled" and len(dropped.tokens) == 2
        assert [request.tokens for request in submitted] == expected
        assert heard == expected[0]


def test_requests_come_and_go_while_it_runs() -> None:
    run_ranks(_check_submitted_on_the_way, 2)


def _check_leaving(rank: int, size: int) -> None:
    whole = plain("mixtral")
    asked = requests(whole, 0, 2)
    expected = [answer(whole, **one) for one in asked]
    with epops.ExpertGroup(None, max_tokens=16) as group:
        model = epops.parallelize(copy.deepcopy(whole), group)
        engine = Engine(model, group, buckets=(1, 2), max_length=24, compiled=False)
        submitted = [engine.submit(**one) for one in asked]
        for _ in engine.run():
            if rank == 1:
                break
        if rank == 0:
            assert [request.tokens for request in submitted] == expected
        else:
            assert {request.finished for request in submitted} <= {"cancelled", "length"}
        assert run(engine, asked) == expected


def test_a_rank_that_leaves_the_loop_goes_on_serving() -> None:
    run_ranks(_check_leaving, 2)


def _check_sampling(rank: int, size: int) -> None:
    whole = plain("mixtral")
    asked = [{**one, "max_new_tokens": 6} for one in requests(whole, 0, 3)]
    settings = {"temperature": 1.3, "top_p": 0.9}
    with epops.ExpertGroup(None, max_tokens=16) as group:
        model = epops.parallelize(copy.deepcopy(whole), group)
        engine = Engine(model, group, buckets=(1, 4), max_length=24, compiled=False)
        together = run(engine, [{**one, **settings, "seed": 7 + i} for i, one in enumerate(asked)])
        alone = [run(engine, [{**one, **settings, "seed": 7 + i}])[0] for i, one in enumerate(asked)]
        assert together == alone, "a request's seed decides, not what is beside it"
        others = run(engine, [{**one, **settings, "seed": 70 + i} for i, one in enumerate(asked)])
        assert others != together
        mixed = run(engine, [asked[0], {**asked[1], **settings, "seed": 8}])
        assert mixed == [answer(whole, **asked[0]), together[1]], "greedy and sampled requests in one batch"


def test_sampling_depends_on_nothing_but_the_request() -> None:
    run_ranks(_check_sampling, 2)


def _check_wire(rank: int, size: int) -> None:
    whole = plain("mixtral")
    layers, top_k = whole.config.num_hidden_layers, whole.config.num_experts_per_tok
    sent: list[int] = []
    with epops.ExpertGroup(None, max_tokens=64) as group:
        model = epops.parallelize(copy.deepcopy(whole), group)
        engine = Engine(model, group, buckets=(16,), max_length=24, compiled=False)
        swap = group.transport.swap

        def counted(call: Any, sequence: int, bits: int, rows: Any, *more: Any, **named: Any) -> Any:
            if call.op == "dispatch":
                sent.append(sum(part.shape[0] for part in rows))
                assert call.max_tokens in (16, 64)
            return swap(call, sequence, bits, rows, *more, **named)

        group.transport.swap = counted
        run(engine, [{"prompt_ids": [5], "max_new_tokens": 4, "eos_token_id": None}] if rank == 0 else [])
        decoded = sent[layers:]
        assert len(decoded) == 3 * layers and sent[:layers]
        # One row for each rank that holds an expert of the one token; 15 rows of padding and an idle rank send nothing.
        assert all(1 <= rows <= min(top_k, size) for rows in decoded) if rank == 0 else not any(sent)


def test_padding_and_idle_ranks_put_no_rows_on_the_wire() -> None:
    run_ranks(_check_wire, 2)


def _check_errors(rank: int, size: int) -> None:
    whole = plain("mixtral")
    with epops.ExpertGroup(None, max_tokens=4) as group:
        with pytest.raises(
            ValueError, match=r"Engine: model: .*MixtralForCausalLM with no sharded experts; call epops.para"
        ):
            Engine(whole, group)
        model = epops.parallelize(copy.deepcopy(whole), group)
        with pytest.raises(
            ValueError, match=r"buckets: expected rising sizes from 1 to the group's max_tokens 4, got \(8,\)"
        ):
            Engine(model, group, buckets=(8,))
        with pytest.raises(ValueError, match=r"max_length: expected 2 to \d+ .*, got 1000000"):
            Engine(model, group, max_length=1000000)
        with pytest.raises(ValueError, match=r"capture: expected a group on CUDA"):
            Engine(model, group, capture=True)
        engine = Engine(model, group, max_length=8, compiled=False)
        assert engine.buckets == (1, 2, 4)
        for wrong, said in (
            ({"prompt_ids": [3] * 7, "max_new_tokens": 2}, r"prompt_ids: expected at most 6 tokens .*got 7; shorten"),
            ({"prompt_ids": []}, "prompt_ids: expected at least one token"),
            ({"prompt_ids": [10**6]}, "prompt_ids: expected ids from 0 to"),
            ({"prompt_ids": [0.5]}, "prompt_ids: expected integers"),
            ({"prompt_ids": [3], "max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0"),
            ({"prompt_ids": [3], "max_new_tokens": 1, "temperature": -1.0}, "temperature: expected 0 or more"),
            ({"prompt_ids": [3], "max_new_tokens": 1, "top_p": 0.0}, "top_p: expected a share"),
        ):
            with pytest.raises(ValueError, match=f"epops.serving.Engine.submit: {said}"):
                engine.submit(**wrong)
        running = engine.run()
        engine.submit(torch.tensor([[3, 4]]), max_new_tokens=1)
        next(running)
        with pytest.raises(epops.GroupError, match="expected one run at a time"):
            next(engine.run())
        list(running)
        engine.close()
        engine.close()
        for call in (lambda: engine.submit([3]), lambda: next(engine.run()), engine.warm_up):
            with pytest.raises(epops.GroupError, match="expected an open engine, got a closed one"):
                call()


def test_errors_name_the_argument_and_the_remedy() -> None:
    run_ranks(_check_errors, 1)


def _check_refused(rank: int, size: int, family: str, said: str) -> None:
    with epops.ExpertGroup(None, max_tokens=4) as group:
        model = epops.parallelize(plain(family), group)
        with pytest.raises(ValueError, match=said):
            Engine(model, group)


def _check_any_family(rank: int, size: int, family: str) -> str:
    whole = plain(family)
    asked = requests(whole, rank, 5)
    with epops.ExpertGroup(None, max_tokens=16) as group:
        model = epops.parallelize(copy.deepcopy(whole), group)
        try:
            engine = Engine(model, group, buckets=(1, 2, 4), max_length=24, compiled=False)
        except ValueError as error:
            return str(error)
        assert run(engine, asked) == [answer(whole, **one) for one in asked]
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("family", zoo.families())
def test_a_family_is_served_right_or_refused(family: str) -> None:
    if "CausalLM" not in zoo.build.model_class(family).__name__:
        pytest.skip("no causal language model")
    refusals = run_ranks(_check_any_family, 2, family)
    assert all("use model.generate" in said for said in refusals if said), refusals


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("switch_transformers", "decoder-only model, got Switch.*an encoder-decoder; use model.generate"),
        ("qwen3_next", "layers of full_attention and sliding_attention, got Qwen3Next.*linear_attention too"),
        ("doge", "causal attention, got DogeForCausalLM, whose tokens see later ones"),
        ("deepseek_v4", "compressed_sparse_attention"),
        ("jamba", "layers of full_attention and sliding_attention, got Jamba"),
    ],
)
def test_models_with_other_state_than_keys_and_values_are_refused(family: str, said: str) -> None:
    run_ranks(_check_refused, 1, family, said)
