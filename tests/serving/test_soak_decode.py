"""The soak, short: random buckets, rows and idle ranks over two and three CPU ranks."""

from __future__ import annotations

import re

import pytest

from ..demo.test_demo import run

SHORT = ("--device", "cpu", "--every", "20", "--buckets", "1", "3", "4", "--length", "12")


@pytest.mark.parametrize(("ranks", "model"), [("2", "deepseek_v3"), ("3", "mixtral")])
def test_a_short_soak_finds_no_difference(ranks: str, model: str) -> None:
    options = ("--ranks", ranks, "--model", model, "--steps", "60", "--how", "eager")
    done = run("benchmarks.soak_decode", *options, *SHORT)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = re.findall(r"^step (\d+): largest relative difference (\S+) over (\d+) rows", done.stdout, re.M)
    assert [int(step) for step, *_ in lines] == [20, 40, 60]
    assert 0.0 < float(lines[-1][1]) < 1e-4 and int(lines[-1][2]) > 3


def test_a_difference_ends_it_with_an_error() -> None:
    options = ("--ranks", "2", "--steps", "20", "--how", "eager", "--tolerance", "-1")
    done = run("benchmarks.soak_decode", *options, *SHORT)
    assert done.returncode == 1 and "WRONG" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_a_compiled_soak() -> None:
    options = ("--ranks", "2", "--steps", "400", "--how", "compiled")
    done = run("benchmarks.soak_decode", *options, *SHORT)
    assert done.returncode == 0, done.stdout + done.stderr
