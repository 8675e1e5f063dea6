"""Transport nvlink is refused, before anything is mapped, where torch's symmetric memory would refuse the ranks' GPUs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from epops.transport import domain
from epops.transport.domain import Place


def refusals(monkeypatch: pytest.MonkeyPatch, places: list[Place], setting: str = "") -> list[str]:
    """What `domain.refusal` says on each rank, of ranks whose GPUs are all joined."""
    reasons = []
    for mine in places:
        gathered = [list(map(tuple, places)), [""] * len(places)]

        def gather(to: list[Any], own: Any, group: Any, gathered: list[list[Any]] = gathered) -> None:
            to[:] = gathered.pop(0)

        monkeypatch.setattr(domain.dist, "all_gather_object", gather)
        monkeypatch.setattr(domain, "_my_place", lambda group, setting, mine=mine: mine)
        monkeypatch.setattr(domain, "_linked", lambda mine, theirs: True)
        group = SimpleNamespace(size=len(places), rank=places.index(mine), control=None)
        reasons.append(domain.refusal(group, setting))
    return reasons


def place(host: str, uuid: str, index: int, overlaps: bool = False, refusal: str = "") -> Place:
    return Place(host, uuid, index, overlaps, "", refusal)


def test_gpus_of_their_own_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    places = [place("a", "0", 0), place("a", "1", 1), place("b", "2", 0), place("b", "3", 1)]
    assert refusals(monkeypatch, places) == [""] * 4


@pytest.mark.parametrize("setting", ["", "1"])
def test_a_gpu_that_two_ranks_share_is_refused(monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    places = [place("a", "0", 0), place("a", "1", 1), place("a", "1", 1)]
    for reason in refusals(monkeypatch, places, setting):
        assert reason.startswith("ranks 1 and 2 share a GPU of a") and f"{domain.OVERLAP}=1 on every rank" in reason
    assert refusals(monkeypatch, [one._replace(overlaps=True) for one in places], setting) == [""] * 3


def test_gpus_of_one_number_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process sees one GPU, its own."""
    places = [place("a", "0", 0), place("b", "1", 0), place("b", "2", 0)]
    for reason in refusals(monkeypatch, places):
        assert reason.startswith("ranks 1 and 2 of b both call their GPU cuda:0 (by CUDA_VISIBLE_DEVICES)")
        assert "let every process see all GPUs" in reason and f"{domain.OVERLAP}=1 on every rank" in reason
    some = [places[0], places[1]._replace(overlaps=True), places[2]]
    assert all(refusals(monkeypatch, some)), "torch asks on every rank"


def test_a_rank_that_cannot_take_part_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    places = [place("a", "0", 0), place("a", "0", 0, refusal="EPOPS_NVLINK=0 forbids it")]
    assert refusals(monkeypatch, places) == ["rank 1: EPOPS_NVLINK=0 forbids it"] * 2
