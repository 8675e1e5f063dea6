"""Where transport nvlink is refused when a group is made, and what is said of it; GPUs and driver are stood in for."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from epops import transport
from epops.torch_private import OVERLAPPING_GPUS
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


def place(host: str, uuid: str, number: int, overlaps: bool = False, refusal: str = "") -> Place:
    return Place(host, uuid, number, overlaps, "", refusal)


def test_gpus_of_their_own_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    places = [place("a", "0", 0), place("a", "1", 1), place("b", "2", 0), place("b", "3", 1)]
    assert refusals(monkeypatch, places) == [""] * 4


@pytest.mark.parametrize("setting", ["", "1"])
def test_a_gpu_that_two_ranks_share_is_refused(monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    places = [place("a", "0", 0), place("a", "1", 1), place("a", "1", 1)]
    for reason in refusals(monkeypatch, places, setting):
        assert reason.startswith("ranks 1 and 2 share a GPU of a") and f"{OVERLAPPING_GPUS}=1 on every rank" in reason
    assert refusals(monkeypatch, [one._replace(overlaps=True) for one in places], setting) == [""] * 3


def test_gpus_of_one_number_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process sees one GPU, its own."""
    places = [place("a", "0", 0), place("b", "1", 0), place("b", "2", 0)]
    for reason in refusals(monkeypatch, places):
        assert reason.startswith("ranks 1 and 2 of b both call their GPU cuda:0 (by CUDA_VISIBLE_DEVICES)")
        assert "let every process see all GPUs" in reason and f"{OVERLAPPING_GPUS}=1 on every rank" in reason
    some = [places[0], places[1]._replace(overlaps=True), places[2]]
    assert all(refusals(monkeypatch, some)), "torch asks on every rank"


def test_a_rank_that_cannot_take_part_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    places = [place("a", "0", 0), place("a", "0", 0, refusal="EPOPS_NVLINK=0 forbids it")]
    assert refusals(monkeypatch, places) == ["rank 1: EPOPS_NVLINK=0 forbids it"] * 2


class FakeDriver:
    def fabric(self, uuid: str) -> str:
        return f"fabric of {uuid}"

    def close(self) -> None:
        pass


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process seems to have a GPU, and kernels for it."""
    kernels = SimpleNamespace(MAX_RANKS=72, ARCHS=["80", "90a"])
    monkeypatch.setitem(sys.modules, "epops.transport.kernels", kernels)
    monkeypatch.setattr(transport, "kernels", kernels, raising=False)
    facts = SimpleNamespace(major=9, minor=0, uuid="1234")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(domain, "Driver", FakeDriver)
    monkeypatch.delenv(OVERLAPPING_GPUS, raising=False)


def my_place(device: str = "cuda:1", size: int = 2, setting: str = "") -> Place:
    return domain._my_place(SimpleNamespace(device=torch.device(device), size=size), setting)


def test_a_rank_says_where_it_is(monkeypatch: pytest.MonkeyPatch, a_gpu: None) -> None:
    mine = my_place()
    assert mine[1:] == ("1234", 1, False, "fabric of 1234", "") and mine.host
    monkeypatch.setenv(OVERLAPPING_GPUS, "1")
    assert my_place("cuda")[2:4] == (3, True)


@pytest.mark.parametrize(
    ("size", "setting", "says"),
    [
        (2, "0", "EPOPS_NVLINK=0 forbids it"),
        (2, "yes", "EPOPS_NVLINK: expected 0 or 1, got 'yes'"),
        (73, "", "it serves at most 72 ranks, and the group has 73"),
    ],
)
def test_why_a_rank_cannot_take_part(a_gpu: None, size: int, setting: str, says: str) -> None:
    assert my_place(size=size, setting=setting).refusal == says


def test_gpus_that_nothing_was_built_for(monkeypatch: pytest.MonkeyPatch, a_gpu: None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=10, minor=0))
    assert my_place().refusal == "the kernels are built for sm_80, sm_90a, and this GPU is sm_100"


def test_without_the_drivers_library(monkeypatch: pytest.MonkeyPatch, a_gpu: None) -> None:
    def none() -> None:
        raise OSError("no libnvidia-ml.so.1")

    monkeypatch.setattr(domain, "Driver", none)
    assert my_place().refusal == "the driver cannot be asked for links (no libnvidia-ml.so.1)"
    assert my_place(setting="1").refusal == ""
