"""Every MoE family of transformers over two ranks, eager: outputs, gradients and generated tokens of the one-process model.

Ranks have batches and lengths of their own.  That the checks can fail is a test too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from epops import zoo
from epops.zoo import check

from ..ranks import RankError, run_ranks

GENERATE = zoo.families(False)
"""Families with experts of their own; tests/seam has the five of the issue."""


def _gradients(rank: int, size: int, family: str, dtype: torch.dtype) -> dict[str, Any]:
    return check.gradients(family, dtype)


def _generate(rank: int, size: int, family: str) -> dict[str, Any]:
    return check.generate(family)


def _gradients_with_other_weights(rank: int, size: int, family: str) -> dict[str, Any]:
    """The sharded model of a check gets a bias that the one-process model has not."""
    import epops

    sharded = epops.parallelize

    def spoiled(model: Any, group: Any) -> Any:
        model = sharded(model, group)
        with torch.no_grad():
            model.model.layers[1].mlp.experts.down_proj_bias.mul_(1.001)
        return model

    epops.parallelize = spoiled
    try:
        return check.gradients(family)
    finally:
        epops.parallelize = sharded


def assert_equal_within_limits(results: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(results):
        where = found["worst"] or "the output"
        assert found["error"] <= found["limit"], f"rank {rank}: {where} differs by {found['error']:.1e}"
        assert found["breaks"] == 0


@pytest.mark.parametrize("family", zoo.families())
def test_outputs_and_gradients(family: str) -> None:
    assert_equal_within_limits(run_ranks(_gradients, 2, family, torch.float32, timeout=300.0))


ROUNDING = {
    "mixtral": "float32 router weights, summed in float32",
    "phimoe": "router weights in bf16",
    "step3p7": "a loop that rounds each expert's rows",
    "nllb_moe": "biases inside nn.Linear",
    "jetmoe": "experts in the attention",
    "doge": "a matmul over a token's neurons",
    "openai_privacy_filter": "experts in float32",
}
"""Family → what its experts round, and where."""


def _bfloat16(rank: int, size: int, family: str, exact: bool) -> dict[str, Any]:
    import epops

    sharded = epops.parallelize
    epops.parallelize = lambda model, group: sharded(model, group, exact=exact)
    try:
        return check.gradients(family, torch.bfloat16)
    finally:
        epops.parallelize = sharded


@pytest.mark.parametrize("family", ROUNDING)
def test_bfloat16_is_rounded_where_the_one_process_model_rounds(family: str) -> None:
    for found in run_ranks(_bfloat16, 2, family, True, timeout=300.0):
        assert found["flips"] == 0
        assert found["error"] < 1.5e-2, f"{found['worst']} differs by {found['error']:.1e}"


def test_bfloat16_over_a_narrow_wire_is_within_its_noise() -> None:
    results = run_ranks(_bfloat16, 2, "phimoe", False, timeout=300.0)
    assert_equal_within_limits(results)
    # How much it is depends on how the processor rounds products; the exact way is nearer on all of them.
    exact = run_ranks(_bfloat16, 2, "phimoe", True, timeout=300.0)
    errors = [max(found["error"] for found in those) for those in (results, exact)]
    assert errors[0] > 2 * errors[1], f"exact=False was not heard: {errors}"


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "dbrx"])
def test_experts_that_ranks_do_not_divide(family: str) -> None:
    assert_equal_within_limits(run_ranks(_gradients, 4, family, torch.float32, timeout=300.0))


@pytest.mark.parametrize("family", GENERATE)
def test_generate_with_a_static_cache(family: str) -> None:
    results = run_ranks(_generate, 2, family, timeout=300.0)
    assert {found["cache"] for found in results} == {"static"}
    assert results[0]["tokens"] != results[1]["tokens"], "the ranks were to end at different steps"


def test_the_check_sees_a_bias_that_is_off_by_a_thousandth() -> None:
    results = run_ranks(_gradients_with_other_weights, 2, "gpt_oss")
    assert max(found["error"] / found["limit"] for found in results) > 3
    assert all(found["over"][found["worst"]] == found["error"] for found in results), (
        "what is beyond the limit is named"
    )


def test_the_check_sees_a_family_that_is_not_sharded() -> None:
    with pytest.raises(RankError, match="nothing was sharded"):
        run_ranks(_not_sharded, 2)


def _not_sharded(rank: int, size: int) -> None:
    import epops

    sharded, epops.parallelize = epops.parallelize, lambda model, group: model
    try:
        check.forward("mixtral")
    finally:
        epops.parallelize = sharded
