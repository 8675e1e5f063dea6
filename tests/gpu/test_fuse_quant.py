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


def sent_together(rank, world, transport):
    import epops
    from epops.testing import assert_fused, captured
    from tests.passes import quantizers

    def two_exchanges(q, scales):
        return epops.all_to_all(q, group="ep").rows, epops.all_to_all(scales, group="ep").rows

    with epops.ExpertGroup(None, "ep", max_tokens=64, device="cuda", transport=transport, timeout=100.0) as group:
        x = torch.randn(64, 256, generator=torch.Generator().manual_seed(rank)).cuda().bfloat16()
        for quantizer in (quantizers.per_token, quantizers.blocks_of_128, quantizers.of_epops):
            given = quantizer(x)
            with torch.no_grad():
                assert_fused(captured(two_exchanges, *given), fuse_quant=1)
                torch._dynamo.reset()
                expected = two_exchanges(*given)
                got = torch.compile(two_exchanges, fullgraph=True, backend="epops")(*given)
            for one, other in zip(got, expected, strict=True):
                assert one.dtype == other.dtype, quantizer.__name__
                assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)), quantizer.__name__
        torch.cuda.synchronize()
        group.check()


@pytest.mark.parametrize("transport", ["nvlink", "c10d"])
def test_fp8_and_scales_travel_in_one_exchange(transport):
    run_ranks(sent_together, transport, world=2, limit=240.0)
