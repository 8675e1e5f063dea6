"""fuse_quant on GPUs: what the kernels and the eager arithmetic of CUDA make of the same formulas is the same, bit for bit."""

from __future__ import annotations

import pytest
import torch

from .test_nvlink import run_ranks

pytestmark = pytest.mark.gpu


def scenario(rank, world, transport):
    import epops
    from tests.passes import quantized_blocks

    with epops.ExpertGroup(
        None, "ep", max_tokens=quantized_blocks.TOKENS, num_experts=quantized_blocks.EXPERTS, device="cuda",
        transport=transport, timeout=100.0,
    ) as group:  # fmt: skip
        assert group.transport.name == transport, repr(group)
        quantized_blocks.compare(rank, "cuda")
        torch.cuda.synchronize()
        group.check()


@pytest.mark.parametrize("transport", ["nvlink", "c10d"])
def test_every_quantizer_has_the_bits_of_eager(transport):
    run_ranks(scenario, transport, world=2, limit=240.0)
