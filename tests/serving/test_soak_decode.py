"""The soak, short: random buckets, rows and idle ranks over two and three CPU ranks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.soak_decode import Found, Options, difference

from ..demo.test_demo import run

SHORT = ("--device", "cpu", "--every", "20", "--buckets", "1", "3", "4", "--length", "12")


@pytest.mark.parametrize(("ranks", "model"), [("2", "deepseek_v3"), ("3", "mixtral")])
def test_a_short_soak_finds_no_difference(ranks: str, model: str, tmp_path: Path) -> None:
    out = tmp_path / "soak.json"
    options = ("--ranks", ranks, "--model", model, "--steps", "60", "--how", "eager", "--out", str(out))
    done = run("benchmarks.soak_decode", *options, *SHORT)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = re.findall(r"step (\d+): largest relative difference (\S+) over (\d+) rows", done.stdout, re.M)
    assert [int(step) for step, *_ in lines] == [20, 40, 60]
    assert 0.0 < float(lines[-1][1]) < 1e-4 and int(lines[-1][2]) > 3
    told = json.loads(out.read_text())
    assert told["steps"] == 60 and not told["wrong"] and not told["missed"]
    assert sum(told["steps_by_bucket"].values()) == 60 and list(told["memory_by_rank"]) == ["20", "40", "60"]


def test_a_difference_ends_it_with_an_error() -> None:
    options = ("--ranks", "2", "--steps", "20", "--how", "eager", "--tolerance", "-1")
    done = run("benchmarks.soak_decode", *options, *SHORT)
    assert done.returncode == 1 and "WRONG" in done.stdout, done.stdout + done.stderr


def test_a_soak_that_is_cut_short_says_so() -> None:
    options = ("--ranks", "2", "--steps", "60", "--how", "eager", "--seconds", "0.001")
    done = run("benchmarks.soak_decode", *options, *SHORT)
    assert done.returncode == 1 and "not shown: 0 of 60 steps" in done.stdout, done.stdout + done.stderr


def found(steps: int = 1000, every: int = 10) -> Found:
    return Found(2, Options("", steps, every, 12, (1, 4), "", 1e-4, "", 0.0, "", ""))


def told(error: float = 0.0, rows: int = 1, idle: int = 1, **memory: int) -> tuple:
    return error, rows, idle, {"allocated": 5, "reserved": 5, "host": 5, **memory}


def test_what_a_soak_calls_wrong() -> None:
    one = found()
    one.add(10, 4, [told(1e-5), told()])
    assert not one.wrong()
    one.add(20, 4, [told(), told(allocated=6)])
    assert one.wrong() == "allocated memory has grown by 0.0 MiB"
    one.add(30, 4, [told(), told()])
    assert not one.wrong()
    one.add(40, 4, [told(), told(host=2**27)])
    assert one.wrong() == "host memory has grown by 128.0 MiB"
    one.add(50, 4, [told(), told(float("inf"))])
    assert one.wrong().startswith("logits differ by inf")


def test_what_a_soak_has_not_shown() -> None:
    one = found()
    for step in range(10, 1010, 10):
        assert one.missed() == f"{max(step - 10, 0)} of 1000 steps"
        one.add(step, 4, [told(), told()])
    assert one.missed() == "no row compared in buckets [1]"
    one.add(1000, 1, [told(), told()])
    assert not one.missed()
    one.add(1000, 1, [told(), told(idle=0)])
    assert one.missed() == "steps in which each rank was idle: [1, 0]"


def test_a_nan_is_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.soak_decode.decode_step", lambda *_: torch.ones(2, 3))
    logits = torch.tensor([[1.0, float("nan"), 1.0], [1.0, 1.0, 1.0]])
    steps = SimpleNamespace(control=torch.zeros(2, 2), cache=SimpleNamespace(place=SimpleNamespace()), dtype=None)
    options = found().options
    assert difference(None, steps, 2, {0: 1}, torch.zeros(2), logits, options) == float("inf")
    assert difference(None, steps, 2, {1: 1}, torch.zeros(2), logits, options) == 0.0


@pytest.mark.slow
def test_a_compiled_soak() -> None:
    options = ("--ranks", "2", "--steps", "400", "--how", "compiled")
    done = run("benchmarks.soak_decode", *options, *SHORT)
    assert done.returncode == 0, done.stdout + done.stderr
