"""Loops over uneven data: the ranks that run out serve on, and the weights are those of one process."""

from __future__ import annotations

import pytest
import torch

import epops
from epops import zoo

from ..ranks import run_ranks
from .compare import close, run

BATCHES = [3, 1, 2]


def _batches(model: torch.nn.Module, rank: int) -> list[dict]:
    return [
        zoo.inputs("mixtral", model, batch=1, seqlen=4 + rank + i, seed=10 * rank + i) for i in range(BATCHES[rank])
    ]


def _reference(size: int, clip: float) -> tuple[torch.nn.Module, list[float]]:
    """One process: in step i, the mean over all ranks of the losses of those that have a batch left."""
    model = zoo.tiny("mixtral")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    norms = []
    for i in range(max(BATCHES[:size])):
        optimizer.zero_grad()
        for rank in range(size):
            if i < BATCHES[rank]:
                (run(model, _batches(model, rank)[i])[1] / size).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip)))
        optimizer.step()
    return model, norms


def _check(rank: int, size: int, backend: str | None) -> None:
    expected, norms = _reference(size, 0.05)
    with epops.ExpertGroup(None, max_tokens=16, timeout=450.0) as group:
        model = epops.parallelize(zoo.tiny("mixtral"), group)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        called = torch.compile(model, fullgraph=True, backend=backend) if backend else model
        seen = []
        with epops.join(called, group, optimizer):
            for batch in _batches(model, rank):
                optimizer.zero_grad()
                run(called, batch)[1].backward()
                epops.average_gradients(model, group)
                seen.append(float(epops.clip_grad_norm_(model, 0.05, group)))
                optimizer.step()
        assert seen == pytest.approx(norms[: BATCHES[rank]], rel=1e-5)
        wanted = expected.state_dict()
        for name, value in model.state_dict().items():
            close(value.full_tensor() if hasattr(value, "full_tensor") else value, wanted[name], name, 1e-4)
        # The ranks take part again.
        batch = zoo.inputs("mixtral", expected, seed=rank)
        close(model(**batch).logits, expected(**batch).logits, "logits", 1e-3)


def test_training_over_uneven_data() -> None:
    run_ranks(_check, 3, None)


def test_training_over_uneven_data_compiled() -> None:
    run_ranks(_check, 2, "aot_eager", timeout=500.0)


def _check_inference(rank: int, size: int) -> None:
    whole = zoo.tiny("mixtral")
    with epops.ExpertGroup(None, max_tokens=16) as group:
        model = epops.parallelize(zoo.tiny("mixtral"), group)
        example = ((), _batches(model, 0)[0])
        count = 0 if rank == 1 else 2
        with epops.join(model, group, example=example), torch.no_grad():
            for batch in (_batches(model, 0) * 2)[:count]:
                close(model(**batch).logits, whole(**batch).logits, "logits", 1e-5)


def test_a_rank_without_any_batch_serves_from_an_example() -> None:
    run_ranks(_check_inference, 2)


def _check_disagreement(rank: int, size: int) -> None:
    with epops.ExpertGroup(None, max_tokens=16) as group:
        model = epops.parallelize(zoo.tiny("mixtral"), group)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(epops.DisagreementError, match="a forward on rank 0 and an optimizer step on rank 1"):
            with epops.join(model, group, optimizer):
                if rank == 0:
                    model(**_batches(model, 0)[0])
                else:
                    optimizer.step()


def test_ranks_that_do_different_things_are_told() -> None:
    run_ranks(_check_disagreement, 2)
