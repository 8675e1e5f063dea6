"""ExpertGroup: made collectively, found by name, closed once; what goes wrong is raised on every rank and never hangs."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

import epops
from epops.group import compiling
from tests import inputs
from tests.ranks import run_ranks


def call(group: object, rank: int, tokens: int = 3, **settings: object) -> epops.DispatchResult:
    x, (idx, w) = inputs.rows(tokens, 16, rank), inputs.routing("random", tokens, 2, 4, rank)
    return epops.dispatch(x, idx, w, group=group, **settings)


def error_of(do) -> str:
    try:
        do()
    except (epops.EpopsError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_a_group_says_what_it_is_and_closes_once() -> None:
    group = epops.ExpertGroup(None, "ep", max_tokens=8, num_experts=4)
    assert repr(group) == (
        "ExpertGroup('ep', rank 0 of 1, c10d (one rank, no wire), cpu, max_tokens=8, alignment=1, timeout=30 s)"
    )
    assert epops.get_group("ep") is group
    group.close()
    group.close()
    assert group.closed and "closed" in repr(group)
    said = error_of(lambda: call(group, 0))
    assert "group 'ep' is closed" in said or "expected the name of an open group" in said


def test_names_are_taken_once_and_free_again() -> None:
    with epops.ExpertGroup(None, "ep"):
        assert "expected one that is free" in error_of(lambda: epops.ExpertGroup(None, "ep"))
    with epops.ExpertGroup(None, "ep"):
        pass
    assert "open groups: none" in error_of(lambda: epops.get_group("ep"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_tokens": 0}, "max_tokens: expected at least 1"),
        ({"alignment": 0}, "alignment: expected at least 1"),
        ({"timeout": 0}, "timeout: expected seconds above 0"),
        ({"overflow": "drop"}, 'overflow: expected "raise" or "count"'),
        ({"transport": "ib"}, 'transport: expected "auto", "c10d" or "nvlink"'),
        ({"num_experts": 5, "num_slots": 3}, "num_slots: expected at least 5"),
        ({"name": ""}, "name: expected a str"),
        ({"ranks": 3}, "ranks: expected a ProcessGroup, a DeviceMesh or None"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings: dict[str, object], said: str) -> None:
    assert said in error_of(lambda: epops.ExpertGroup(**{"name": "ep", **settings}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"idx": torch.zeros(3, 2, dtype=torch.int64)},
            "topk_idx has 3 rows but x has 4; pass one row of experts a token",
        ),
        ({"idx": torch.zeros(4, 2)}, "topk_idx: expected int32 or int64, got torch.float32"),
        ({"w": torch.zeros(4, 2, dtype=torch.bfloat16)}, "topk_weights: expected float32"),
        ({"w": torch.zeros(4, 3)}, "topk_weights: expected shape (4, 2) like topk_idx"),
        ({"x": torch.zeros(4, 2, 2)}, "x: expected 2 dimensions, (T, H)"),
        (
            {"x": torch.zeros(9, 2), "idx": torch.zeros(9, 2, dtype=torch.int64), "w": torch.zeros(9, 2)},
            "at most max_tokens = 8",
        ),
        ({"layout": "row"}, "layout: expected one of expert, rank, batched"),
        ({"group": 7}, "group: expected an ExpertGroup"),
        ({"group": "other"}, "expected the name of an open group, got 'other' (open groups: ep)"),
        ({"num_experts": 0}, "num_experts: expected at least 1"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change: dict[str, object], said: str) -> None:
    with epops.ExpertGroup(None, "ep", max_tokens=8, num_experts=4) as group:
        args = {
            "x": torch.zeros(4, 2), "idx": torch.zeros(4, 2, dtype=torch.int64), "w": torch.zeros(4, 2), "group": group, **change,
        }  # fmt: skip
        text = error_of(lambda: epops.dispatch(args.pop("x"), args.pop("idx"), args.pop("w"), **args))
        assert said in text, text
        assert call(group, 0).rows.shape[0] == 16, "the group goes on after a bad call"


def one_rank_wrong(rank: int, size: int) -> tuple[str, float]:
    group = epops.ExpertGroup(None, "ep", max_tokens=4, num_experts=4, timeout=20)
    began = time.monotonic()
    said = error_of(lambda: call(group, rank, tokens=5 if rank == 1 else 3))
    took = time.monotonic() - began
    assert call(group, rank).rows.shape[0] == 16, "and the next call works on all ranks"
    group.close()
    return said, took


def test_a_bad_argument_on_one_rank_is_an_error_on_all_before_any_waits() -> None:
    said = run_ranks(one_rank_wrong, 2)
    assert "ValueError: epops.dispatch: x: expected at most max_tokens = 4 rows, got 5" in said[1][0]
    assert "PeerError" in said[0][0] and "peer 1" in said[0][0] and "its own call failed" in said[0][0]
    assert max(took for _, took in said) < 10


def disagree(rank: int, size: int) -> list[str]:
    group = epops.ExpertGroup(None, "ep", max_tokens=4, num_experts=4, timeout=20)
    sent = call(group, rank)
    said = []
    if rank == 0:
        said.append(error_of(lambda: call(group, rank)))
    else:
        said.append(
            error_of(lambda: epops.combine(sent.rows, sent.route, sent.row_weights, group=group, num_tokens=3, top_k=2))
        )
    said.append(error_of(lambda: call(group, rank, max_tokens=4 if rank == 0 else 3)))
    said.append(error_of(lambda: call(group, rank)))
    group.close()
    return said


def test_ranks_that_call_different_things_get_an_error_and_not_each_others_rows() -> None:
    for rank, (op, bound, after) in enumerate(run_ranks(disagree, 3)):
        assert "DisagreementError" in op and ("combine" in op and "dispatch" in op) or rank > 0
        assert "DisagreementError" in op
        assert "DisagreementError" in bound and "max_tokens: expected" in bound or rank == 2
        assert after == "nothing"


def unequal_settings(rank: int, size: int) -> str:
    said = error_of(lambda: epops.ExpertGroup(None, "ep", max_tokens=4 + rank))
    with epops.ExpertGroup(None, "ep", max_tokens=4):
        pass
    return said


def test_unequal_settings_are_an_error_on_every_rank() -> None:
    for said in run_ranks(unequal_settings, 2):
        assert "DisagreementError: epops.ExpertGroup: max_tokens: expected the same on every rank" in said


def subgroups(rank: int, size: int) -> list[int]:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    seen = []
    for name in ("dp", "ep"):
        with epops.ExpertGroup(mesh[name], name, max_tokens=4, num_experts=4) as group:
            assert call(group, rank).rows.shape[0] == 16
            seen.append(group.rank)
            assert group.host_all_gather([rank]) == [[r] for r in dist.get_process_group_ranks(mesh.get_group(name))]
    assert "DeviceMesh of one dimension" in error_of(lambda: epops.ExpertGroup(mesh, "both"))
    return seen


def test_groups_over_a_device_mesh() -> None:
    assert run_ranks(subgroups, 4) == [[0, 0], [0, 1], [1, 0], [1, 1]]


def absent(rank: int, size: int) -> tuple[str, str, float]:
    group = epops.ExpertGroup(None, "ep", max_tokens=4, num_experts=4, timeout=1.0)
    call(group, rank)
    if rank == 1:
        time.sleep(3)
        return "", "", 0.0
    began = time.monotonic()
    said = error_of(lambda: call(group, rank))
    took = time.monotonic() - began
    again = error_of(lambda: call(group, rank))
    group.close(raise_errors=False)
    return said, again, took


def test_a_peer_that_does_not_come_is_named_within_the_timeout() -> None:
    said, again, took = run_ranks(absent, 2, fresh=True)[0]
    assert "PeerError: epops.dispatch: rank 0 of group 'ep': peer 1 did not arrive within 1 s" in said
    assert "phase header, epoch 2" in said and "has failed: close it and make a new one" in again
    assert took < 5


def killed(rank: int, size: int) -> tuple[str, float]:
    group = epops.ExpertGroup(None, "ep", max_tokens=4, num_experts=4, timeout=5.0)
    call(group, rank)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    said = error_of(lambda: [call(group, rank) for _ in range(3)])
    group.close(raise_errors=False)
    return said, time.monotonic() - began


def test_a_killed_peer_is_an_error_on_the_others() -> None:
    for said, took in run_ranks(killed, 3, fresh=True, survivors={0, 2})[::2]:
        assert "PeerError" in said and took < 12


def latecomer(rank: int, size: int) -> tuple[str, float]:
    if rank == 1:
        time.sleep(3)
        return "", 0.0
    began = time.monotonic()
    return error_of(lambda: epops.ExpertGroup(None, "ep", timeout=1.0)), time.monotonic() - began


def test_a_rank_that_does_not_make_the_group_is_named_within_the_timeout() -> None:
    said, took = run_ranks(latecomer, 2, fresh=True)[0]
    assert "rank 1 of 2 did not make the group within 1 s" in said and took < 3


def slow_compiler(rank: int, size: int) -> tuple[str, str, list[list[int]], str]:
    """Rank 1 alone compiles, for three timeouts; later it is as late again and has no reason."""

    def backend(module: torch.fx.GraphModule, _: object) -> Any:
        time.sleep(3.0)
        return module.forward

    ends = torch.tensor([2], dtype=torch.int32)
    torch.compile(lambda x: x * 2, backend="eager")(torch.ones(2))  # the imports of a first compile take seconds
    dist.barrier()
    group = epops.ExpertGroup(None, "ep", max_tokens=4, num_experts=4, timeout=1.0)
    call(group, rank)
    if rank == 1:
        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
    first = error_of(lambda: call(group, rank))
    torch.compiler.reset()  # which forgets who asked to be told of compiles; tracing an op of ours asks again
    if rank == 1:
        torch.compile(lambda x: epops.grouped_mm(x, x[None], ends), backend=backend)(torch.ones(2, 2))
    told = group.host_all_gather([rank + 5, *range(20)])
    second = error_of(lambda: call(group, rank))
    if rank == 1:
        time.sleep(2.5)
    late = error_of(lambda: call(group, rank))
    group.close(raise_errors=False)
    return first, second, told, late


def test_a_rank_that_compiles_alone_keeps_its_peers_waiting_beyond_the_timeout() -> None:
    for first, second, told, late in run_ranks(slow_compiler, 2, fresh=True):
        assert (first, second) == ("nothing", "nothing")
        assert [values[0] for values in told] == [5, 6] and all(values[1:] == list(range(20)) for values in told)
        assert "PeerError" in late


@pytest.mark.parametrize("strict", [False, True])
def test_an_export_is_over_when_it_is_over(strict: bool) -> None:
    """Tracing for an export is no compile whose end torch tells: nobody may be told forever that this rank is busy."""

    class Doubled(torch.nn.Module):
        def forward(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
            return epops.grouped_mm(x, x[None], ends)

    torch.compiler.reset()
    torch.export.export(Doubled(), (torch.ones(2, 2), torch.tensor([2], dtype=torch.int32)), strict=strict)
    assert compiling._done is None


def unequal_facts(rank: int, size: int) -> str:
    with epops.ExpertGroup(None, "ep", max_tokens=4, num_experts=4, timeout=5.0) as group:
        return error_of(lambda: group.host_all_gather([1] * (rank + 1)))


def test_ranks_that_gather_different_numbers_of_values_are_told() -> None:
    for said in run_ranks(unequal_facts, 2, fresh=True):
        assert "DisagreementError" in said
