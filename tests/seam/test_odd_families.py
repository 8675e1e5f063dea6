"""Families whose experts are not on transformers' experts interface, and what is particular to some that are."""

from __future__ import annotations

import copy

import pytest
import torch

import epops
from epops import zoo

from ..ranks import run_ranks
from .compare import check_family, close

ODD = ["dbrx", "doge", "jetmoe", "llama4", "longcat_flash", "nllb_moe", "step3p7", "switch_transformers"]


def _check(rank: int, size: int, family: str, compiled: bool) -> None:
    check_family(family, rank, size, compiled=compiled, backend="aot_eager")


@pytest.mark.parametrize("family", ODD)
def test_output_and_gradients(family: str) -> None:
    run_ranks(_check, 2, family, False)


def _check_modalities(rank: int, size: int) -> None:
    whole = zoo.tiny("ernie4_5_vl_moe")
    block = next(m for m in whole.modules() if type(m).__name__ == "Ernie4_5_VLMoeMoeBlock")
    x = torch.randn(2, 5, whole.config.get_text_config().hidden_size, generator=torch.Generator().manual_seed(rank))
    vision = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 2, 0]]) if rank == 0 else None
    expected = block(x, vision)
    with epops.ExpertGroup(None, max_tokens=16) as group:
        got = epops.parallelize(copy.deepcopy(block), group)(x, vision)
    close(got[0], expected[0], "output", 1e-5)
    close(got[1], expected[1], "router logits", 1e-5)


def test_an_image_on_one_rank_only() -> None:
    run_ranks(_check_modalities, 2)


def _check_fp8(rank: int, size: int) -> None:
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
    from transformers.integrations.moe import use_experts_implementation

    config = zoo.tiny("mixtral").config
    kind = use_experts_implementation(
        experts_class=type("Experts", (FP8Experts,), {}), experts_interface=ALL_FP8_EXPERTS_FUNCTIONS
    )
    generator = torch.Generator().manual_seed(0)
    experts = kind(config, block_size=(8, 8))
    whole = {}
    with torch.no_grad():
        for name in ("gate_up_proj", "down_proj"):
            weight, scale = getattr(experts, name), getattr(experts, f"{name}_scale_inv")
            weight.copy_(torch.randn(weight.shape, generator=generator).to(weight.dtype))
            scale.copy_(torch.rand(scale.shape, generator=generator) * 0.2)
            wide = scale.repeat_interleave(8, -2)[:, : weight.shape[1]].repeat_interleave(8, -1)[
                :, :, : weight.shape[2]
            ]
            whole[name] = weight.float() * wide
    count = config.num_local_experts
    x = torch.randn(6, config.hidden_size, generator=torch.Generator().manual_seed(rank))
    idx = torch.rand(6, count, generator=torch.Generator().manual_seed(rank)).topk(2).indices
    expected = torch.zeros_like(x)
    for t in range(6):
        for e in idx[t].tolist():
            gate, up = (whole["gate_up_proj"][e] @ x[t]).chunk(2)
            expected[t] += 0.5 * (whole["down_proj"][e] @ (torch.nn.functional.silu(gate) * up))
    with epops.ExpertGroup(None, max_tokens=8) as group:
        model = epops.parallelize(experts, group)
        assert model.gate_up_proj.shape[0] == model.gate_up_proj_scale_inv.shape[0] == -(-count // size)
        with torch.no_grad():
            close(model(x, idx, torch.full((6, 2), 0.5)), expected, "output", 1e-5)


def test_scales_of_fp8_weights_are_sharded_with_them() -> None:
    run_ranks(_check_fp8, 2)
