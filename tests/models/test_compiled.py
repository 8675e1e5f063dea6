"""Families whose own loops break their graphs today: sharded, a training step is one graph forward and one backward.

The graphs run node by node after the passes.  The five families of the issue go through Inductor in tests/seam.
"""

from __future__ import annotations

from typing import Any

import pytest

from epops import zoo
from epops.zoo import check

from ..ranks import run_ranks
from .test_families import assert_equal_within_limits


def _gradients(rank: int, size: int, family: str) -> dict[str, Any]:
    return check.gradients(family, compiler="graph")


@pytest.mark.slow
@pytest.mark.parametrize("family", zoo.families(False))
def test_families_with_loops_of_their_own_capture_whole(family: str) -> None:
    assert_equal_within_limits(run_ranks(_gradients, 2, family, timeout=300.0))
