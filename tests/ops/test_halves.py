"""start … wait give what the whole op gives, bit for bit, with other work and other exchanges in between."""

from __future__ import annotations

import threading
import time

import pytest
import torch

import epops
from tests import inputs
from tests.ranks import run_ranks


def same(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> None:
    for left, right in zip(a, b):
        assert torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


def all_halves(rank: int, size: int) -> None:
    tokens = (5, 0, 3)[rank]
    with epops.ExpertGroup(None, "ep", max_tokens=5, num_experts=5) as group:
        x = inputs.rows(tokens, 128, rank)
        idx, w = inputs.routing("random", tokens, 2, 5, rank)
        sent = epops.dispatch(x, idx, w, group=group)
        ticket = epops.dispatch_start(x, idx, w, group=group)
        same(sent, epops.dispatch_wait(ticket, x, idx, w, group=group))
        ticket = epops.dispatch_quant_start(x, idx, w, group=group, block=64)
        same(
            epops.dispatch_quant(x, idx, w, group=group, block=64),
            epops.dispatch_quant_wait(ticket, x, idx, w, group=group, block=64),
        )
        args = {"group": group, "num_tokens": tokens, "top_k": 2}
        ticket = epops.combine_start(sent.rows, sent.route, sent.row_weights, **args)
        ahead = epops.combine(sent.rows, sent.route, sent.row_weights, x, **args)
        same(ahead, epops.combine_wait(ticket, sent.rows, sent.route, sent.row_weights, x, **args))
        splits = torch.tensor([rank + d for d in range(size)])
        y = torch.randn(30, 4)
        ticket = epops.all_to_all_start(y, splits, group=group, out_size=30)
        same(
            epops.all_to_all(y, splits, group=group, out_size=30),
            epops.all_to_all_wait(ticket, y, splits, group=group, out_size=30),
        )
        common = {
            "group": "ep", "num_experts": 5, "num_slots": group.num_slots, "ep_size": size, "max_tokens": 5, "top_k": 2,
            "layout": "expert",
        }  # fmt: skip
        grad = torch.randn(tokens, 128)
        ops = torch.ops.epops
        ticket = ops.combine_backward_start(grad, sent.rows, sent.route, sent.row_weights, **common)
        same(
            ops.combine_backward(grad, sent.rows, sent.route, sent.row_weights, **common),
            ops.combine_backward_wait(ticket, grad, sent.rows, sent.route, sent.row_weights, **common),
        )
        back = {**common, "num_tokens": tokens}
        grad_rows = torch.randn(sent.rows.shape)
        ticket = ops.dispatch_backward_start(grad_rows, sent.row_weights, sent.route, **back)
        same(
            ops.dispatch_backward(grad_rows, sent.row_weights, sent.route, **back),
            ops.dispatch_backward_wait(ticket, grad_rows, sent.row_weights, sent.route, **back),
        )


@pytest.mark.parametrize("size", (1, 3))
def test_halves_are_the_whole(size: int) -> None:
    run_ranks(all_halves, size)


def halves_have_gradients(rank: int, size: int) -> None:
    with epops.ExpertGroup(None, "ep", max_tokens=4, num_experts=4) as group:
        idx, w = inputs.routing("random", 4, 2, 4, rank)
        grads = []
        for split in (False, True):
            x = inputs.rows(4, 16, rank).requires_grad_()
            weights = w.clone().requires_grad_()
            if split:
                ticket = epops.dispatch_start(x, idx, weights, group=group)
                sent = epops.dispatch_wait(ticket, x, idx, weights, group=group)
                args = {"group": group, "num_tokens": 4, "top_k": 2}
                y = sent.rows * 2
                ticket = epops.combine_start(y, sent.route, sent.row_weights, **args)
                out = epops.combine_wait(ticket, y, sent.route, sent.row_weights, x, **args).out
            else:
                sent = epops.dispatch(x, idx, weights, group=group)
                y = sent.rows * 2
                out = epops.combine(y, sent.route, sent.row_weights, x, group=group, num_tokens=4, top_k=2).out
            grads.append(torch.autograd.grad(out.pow(2).sum(), [x, weights]))
        assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_halves_have_the_gradients_of_the_whole() -> None:
    run_ranks(halves_have_gradients, 2)


def really_beside(rank: int, size: int) -> tuple[float, float]:
    with epops.ExpertGroup(None, "ep", max_tokens=4, num_experts=2) as group:
        x, (idx, w) = inputs.rows(4, 16, rank), inputs.routing("random", 4, 1, 2, rank)
        if rank == 1:
            time.sleep(0.5)
        began = time.monotonic()
        ticket = epops.dispatch_start(x, idx, w, group=group)
        started = time.monotonic() - began
        epops.dispatch_wait(ticket, x, idx, w, group=group)
        return started, time.monotonic() - began


def test_a_started_exchange_runs_beside_its_caller() -> None:
    (started, waited), _ = run_ranks(really_beside, 2)
    assert started < 0.25 < 0.4 < waited, "start came back before the peer was there, wait did not"


def misused(rank: int, size: int) -> list[str]:
    said = []
    group = epops.ExpertGroup(None, "ep", max_tokens=4, num_experts=2)
    x, (idx, w) = inputs.rows(4, 16, rank), inputs.routing("random", 4, 1, 2, rank)
    ticket = epops.dispatch_start(x, idx, w, group=group)
    for wrong in (
        lambda: epops.dispatch_wait(ticket + 5, x, idx, w, group=group),
        lambda: epops.dispatch_wait(ticket, x[:2], idx[:2], w[:2], group=group),
        group.close,
    ):
        try:
            wrong()
            said.append("nothing")
        except epops.GroupError as error:
            said.append(str(error))
    return said


def test_tickets_of_nothing_and_starts_without_a_wait_are_reported() -> None:
    for unknown, other, unfinished in run_ranks(misused, 2):
        assert "got no started exchange" in unknown
        assert "with other settings" in other
        assert "never waited for" in unfinished and "dispatch_start" in unfinished


def test_groups_are_used_from_several_threads() -> None:
    with epops.ExpertGroup(None, "ep", max_tokens=8, num_experts=4) as group:
        failures = []

        def work(seed: int) -> None:
            for step in range(20):
                x, (idx, w) = inputs.rows(5, 16, seed), inputs.routing("random", 5, 2, 4, seed + step)
                sent = epops.dispatch(x, idx, w, group="ep")
                back = epops.combine(sent.rows, sent.route, sent.row_weights, group=group, num_tokens=5, top_k=2)
                if not torch.equal(back.out, x * w.sum(1, keepdim=True)):
                    failures.append((seed, step))

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
