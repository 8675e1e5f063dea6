"""The five families that CI has, eager and compiled, against the one-process model."""

from __future__ import annotations

import pytest
import torch

from ..ranks import run_ranks
from .compare import check_family

FIVE = ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "olmoe"]


def _check(rank: int, size: int, family: str, compiled: bool, dtype: torch.dtype) -> None:
    check_family(family, rank, size, compiled=compiled, dtype=dtype)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("family", FIVE)
def test_eager_output_and_gradients_are_the_one_process_models(family: str, size: int) -> None:
    run_ranks(_check, size, family, False, torch.float32)


@pytest.mark.parametrize("family", FIVE)
def test_bfloat16_is_within_its_precision(family: str) -> None:
    run_ranks(_check, 2, family, False, torch.bfloat16)
