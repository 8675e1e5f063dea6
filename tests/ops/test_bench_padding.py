"""The padding benchmark: its computations are what the pass rewrites, and without a GPU it says so."""

from __future__ import annotations

import pytest
import torch

from benchmarks import bench_padding
from epops.passes.skip_padding import skip_padding_everywhere
from epops.testing import captured

from ..demo.test_demo import run


@pytest.mark.parametrize("name", bench_padding.CASES)
def test_the_pass_takes_what_is_between_the_products(name: str) -> None:
    case = bench_padding.CASES[name]._replace(hidden=16, inner=8, experts=3)
    given = bench_padding.inputs(case, 6, 11, "cpu")
    assert given[4].tolist() == [0, 0, 1, 1, 2, 2, -1, -1, -1, -1, -1] and given[5].tolist() == [2, 4, 6]
    with torch.no_grad():
        (graph,) = captured(bench_padding.layer(case), *given, passes=[skip_padding_everywhere])
    assert graph.rewrites == {"skip_padding_everywhere": 1}, graph.declined


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what it needs where there is no GPU")
def test_it_needs_a_gpu() -> None:
    done = run("benchmarks.bench_padding")
    assert done.returncode == 2 and "expected a GPU" in done.stderr, done.stdout + done.stderr
