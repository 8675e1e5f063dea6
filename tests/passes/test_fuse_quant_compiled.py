"""fuse_quant through Inductor on two CPU ranks; tests/gpu/test_fuse_quant.py has the same on GPUs."""

from __future__ import annotations

import epops
from tests.passes import quantized_blocks
from tests.ranks import run_ranks


def two_ranks(rank, size):
    with epops.ExpertGroup(
        name="ep", num_experts=quantized_blocks.EXPERTS, max_tokens=quantized_blocks.TOKENS, timeout=100.0
    ):
        quantized_blocks.compare(rank, "cpu")
    return True


def test_every_quantizer_has_the_bits_of_eager():
    assert run_ranks(two_ranks, 2, timeout=300.0) == [True, True]
