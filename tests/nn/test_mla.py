"""Latent attention over ranks gives what the plain model gives, in R times less cache."""

from __future__ import annotations

import pytest
import torch

import epops
from epops import nn
from tests.nn import plain
from tests.ranks import run_ranks

BOUNDS = {"max_tokens": 9, "rank_tokens": 8, "num_slots": 4, "chunk_tokens": 4, "max_length": 10}


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to 1e-5 of the largest."""
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def like_the_plain_model(rank: int, size: int, heads: int, q_lora_rank: int | None, core: str) -> None:
    whole = plain.model(heads, q_lora_rank=q_lora_rank)
    with epops.ExpertGroup(name="mla", timeout=60) as group, torch.no_grad():
        model = plain.copied(whole)
        assert nn.shard_mla(model, group, core=core) == 2
        requests = plain.Requests(whole)
        cache = nn.LatentCache(
            model.config, BOUNDS["num_slots"] * (size if core == "heads" else 1), BOUNDS["max_length"]
        )
        for chunks in plain.steps(size):
            if core == "heads":  # one cache for the requests of all ranks, on every rank
                bounds = {**BOUNDS, "num_slots": 4 * size, "rank_tokens": 9}
                as_one = [chunk._replace(rank=0, slot=chunk.rank * 4 + chunk.slot) for chunk in chunks]
                batch, places = nn.lay_out(as_one, rank=0, ep_size=1, **bounds)
            else:
                batch, places = nn.lay_out(chunks, rank=rank, ep_size=size, **BOUNDS)
            step = nn.begin(model, batch, cache)
            got = model.model(
                input_ids=batch.input_ids, position_ids=batch.position_ids, past_key_values=step.cache, mla_step=step
            ).last_hidden_state[0]
            for chunk, place in zip(chunks, places):
                close(got[place], requests.hidden(chunk))


@pytest.mark.parametrize("size", (1, 2, 3))
def test_prefill_and_decode(size: int) -> None:
    run_ranks(like_the_plain_model, size, 6, 16, "requests")


@pytest.mark.parametrize("heads", (3, 5))
def test_heads_that_ranks_do_not_divide(heads: int) -> None:
    run_ranks(like_the_plain_model, 3, heads, None, "requests")


def test_the_tensor_parallel_core() -> None:
    run_ranks(like_the_plain_model, 2, 6, 16, "heads")
