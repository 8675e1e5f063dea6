"""Whole training steps, compiled: one graph forward and one backward on every rank, the one-process model's numbers."""

from __future__ import annotations

from typing import Any

import pytest

from epops import zoo
from epops.zoo import check

from ..ranks import run_ranks
from .test_families import assert_equal_within_limits

OUTSIDE_THE_EXPERTS = {"qwen4_exp"}
"""Families whose one-process model does not capture whole for reasons that are not its experts."""


def _gradients(rank: int, size: int, family: str, compiler: str) -> dict[str, Any]:
    return check.gradients(family, compiler=compiler)


@pytest.mark.parametrize("family", sorted(set(zoo.families(False)) - OUTSIDE_THE_EXPERTS))
def test_families_with_loops_of_their_own_capture_whole(family: str) -> None:
    """Their expert loops break the one-process model's graph; sharded there is nothing to break."""
    assert_equal_within_limits(run_ranks(_gradients, 2, family, "graph", timeout=300.0))


@pytest.mark.slow
@pytest.mark.parametrize("family", zoo.MAIN)
def test_a_training_step_through_inductor(family: str) -> None:
    assert_equal_within_limits(run_ranks(_gradients, 2, family, "epops", timeout=550.0))
