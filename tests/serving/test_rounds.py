"""How rounds follow one another: what is overlapped with what, and a rank that does not come."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
import torch

import epops
from epops.serving import Engine

from ..ranks import run_ranks
from .asked import plain
from .test_engine import run

ONE = {"prompt_ids": [5, 6], "max_new_tokens": 4, "eos_token_id": None}


def _check_order(rank: int, size: int, overlap: bool) -> None:
    said: list[str] = []

    def told(engine: Engine, name: str) -> Any:
        method = getattr(engine, name)

        def call(*args: Any) -> Any:
            said.append(name.strip("_"))
            return method(*args)

        return call

    with epops.ExpertGroup(None, max_tokens=16) as group:
        model = epops.parallelize(plain("mixtral"), group)
        engine = Engine(model, group, buckets=(1,), max_length=16, compiled=False, overlap=overlap)
        for name in ("_launch", "_land"):
            setattr(engine, name, told(engine, name))
        start = engine._agreement.start
        engine._agreement.start = lambda need: (said.append("agree"), start(need))[1]  # type: ignore[method-assign]
        run(engine, [dict(ONE)])
        rounds = " ".join(said).split("launch ")[1:]
        if overlap:
            # While a round runs, the tokens of the round before are read and the next round is agreed on.
            assert rounds == ["agree ", *["land agree "] * 2, "land agree land"]
        else:
            assert rounds == [*["land agree "] * 3, "land agree"]


@pytest.mark.parametrize("overlap", [False, True])
def test_the_next_round_is_agreed_on_while_one_runs(overlap: bool) -> None:
    run_ranks(_check_order, 2, overlap)


def _check_absent(rank: int, size: int) -> None:
    with epops.ExpertGroup(None, max_tokens=16, timeout=2.0) as group:
        model = epops.parallelize(plain("mixtral"), group)
        engine = Engine(model, group, buckets=(1,), max_length=16, compiled=False)
        engine.submit(**ONE)
        if rank == 0:
            with pytest.raises(
                epops.PeerError, match=r"rank 0 of group 'ep': a peer did not come .*call run\(\) on every rank"
            ):
                list(engine.run())
        else:
            time.sleep(4.0)
        group.close(raise_errors=False)


def test_a_rank_that_does_not_run_is_an_error_and_no_hang() -> None:
    run_ranks(_check_absent, 2, fresh=True)


def _check_two_engines(rank: int, size: int) -> None:
    whole = plain("mixtral")
    with epops.ExpertGroup(None, max_tokens=16) as group:
        model = epops.parallelize(copy.deepcopy(whole), group)
        first = Engine(model, group, buckets=(1, 2), max_length=16, compiled=False)
        second = Engine(model, group, buckets=(2,), max_length=16, compiled=False)
        assert run(first, [dict(ONE)]) == run(second, [dict(ONE)] * 2)[:1]
        first.close()
        assert len(run(second, [dict(ONE)])[0]) == 4
        # Between runs the model is everybody's: plain calls and generate work as before.
        ids = torch.tensor([[5, 6]])
        assert model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0).shape == (1, 6)


def test_engines_of_one_group_and_the_model_beside_them() -> None:
    run_ranks(_check_two_engines, 2)
