"""dispatch_quant sends what dispatch of the quantized rows would send, bit for bit."""

from __future__ import annotations

import pytest
import torch

import epops
from epops.reference.quantize import ceil_to_power_of_two, dequantize_rows, quantize_rows
from tests import inputs
from tests.ranks import run_ranks

SPECS = [
    {"block": 0},
    {"block": 128},
    {"block": 128, "scale_format": "ue8m0"},
    {"block": 64, "scale_format": "float32_pow2", "scale_math": "multiply"},
    {"block": 128, "scale_math": "reciprocal", "eps_on": "scale", "eps": 1e-4},
    {"block": 128, "scale_layout": "column", "clamp": False},
]


def sent_as_quantized(rank: int, size: int) -> None:
    tokens = (5, 0, 3)[rank]
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for spec in SPECS:
            make = torch.Generator().manual_seed(rank)
            x = (torch.randn(tokens, 256, generator=make) * 3).to(dtype)
            if tokens:
                x[0] = 0
            idx, w = inputs.routing("random", tokens, 2, 5, rank)
            quant = {name: value for name, value in spec.items() if name != "scale_layout"}
            q, s = quantize_rows(x, **{"eps": 1e-12, **quant})
            with epops.ExpertGroup(None, "ep", max_tokens=5, num_experts=5) as group:
                fused = epops.dispatch_quant(x, idx, w, group=group, **spec)
                plain = epops.dispatch(q, idx, w, s.contiguous(), group=group)
            assert fused.rows.dtype == torch.float8_e4m3fn
            assert torch.equal(fused.rows.view(torch.uint8), plain.rows.view(torch.uint8)), spec
            assert torch.equal(
                fused.scales.contiguous().view(torch.uint8), plain.scales.contiguous().view(torch.uint8)
            ), spec
            assert torch.equal(fused.route[32:], plain.route[32:])
            if spec.get("scale_layout") == "column":
                assert fused.scales.stride() == (1, fused.scales.shape[0])


def test_the_wire_carries_the_quantized_rows_and_their_scales() -> None:
    run_ranks(sent_as_quantized, 3)


def test_quantized_values_are_within_half_a_step() -> None:
    x = torch.randn(64, 256) * torch.logspace(-3, 3, 64).unsqueeze(1)
    for spec in SPECS:
        q, s = quantize_rows(x, **{k: v for k, v in spec.items() if k != "scale_layout"})
        back = dequantize_rows(q, s)
        step = s.float().repeat_interleave(256 // s.shape[1], 1) * 448 / 14
        assert ((back - x).abs() <= step / 2 + x.abs() * 2**-4).all(), spec


def test_ue8m0_scales_are_the_next_power_of_two() -> None:
    values = torch.tensor([1.0, 1.0000001, 0.75, 2.0, 3.0, 1e-45, 0.0])
    assert ceil_to_power_of_two(values).tolist() == [1.0, 2.0, 1.0, 2.0, 4.0, 2.0**-126, 2.0**-126]


def straight_through(rank: int, size: int) -> None:
    with epops.ExpertGroup(None, "ep", max_tokens=4, num_experts=4) as group:
        x = torch.randn(4, 128, generator=torch.Generator().manual_seed(rank)).requires_grad_()
        idx, w = inputs.routing("random", 4, 2, 4, rank)
        w.requires_grad_()
        got = epops.dispatch_quant(x, idx, w, group=group, scale_format="float32_pow2")
        values = dequantize_rows(got.rows, got.scales)
        (values.sum() + got.row_weights.sum()).backward()
        assert x.grad is not None and w.grad is not None
        copies = (idx >= 0).sum(1, keepdim=True).float()
        torch.testing.assert_close(x.grad, copies.expand_as(x), rtol=7e-2, atol=0)
        assert torch.equal(w.grad, torch.ones_like(w))


def test_the_gradient_is_straight_through() -> None:
    run_ranks(straight_through, 2)


def combine_of_fp8(rank: int, size: int) -> None:
    with epops.ExpertGroup(None, "ep", max_tokens=4, num_experts=4) as group:
        x = torch.randn(4, 256, generator=torch.Generator().manual_seed(rank))
        idx, w = inputs.routing("random", 4, 2, 4, rank)
        sent = epops.dispatch(x, idx, w, group=group)
        q, s = quantize_rows(sent.rows)
        plain = dequantize_rows(q, s)
        args = {"group": group, "num_tokens": 4, "top_k": 2, "out_dtype": torch.float32}
        fused = epops.combine(q, sent.route, sent.row_weights, None, s, **args)
        assert torch.equal(fused.out, epops.combine(plain, sent.route, sent.row_weights, **args).out)


def test_combine_dequantizes_rows_that_come_with_scales() -> None:
    run_ranks(combine_of_fp8, 2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"block": -1}, "block: expected 0 (per token)"),
        ({"scale_format": "int8"}, "scale_format: expected one of float32, ue8m0, float32_pow2"),
        ({"quant_dtype": torch.int8}, "quant_dtype: expected torch.float8_e4m3fn"),
    ],
)
def test_settings_that_no_quantizer_has_are_named(change: dict[str, object], said: str) -> None:
    with epops.ExpertGroup(None, "ep", max_tokens=4, num_experts=2) as group:
        with pytest.raises(ValueError, match="epops.dispatch_quant: ") as raised:
            epops.dispatch_quant(
                torch.ones(1, 128), torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1), group=group, **change
            )
    assert said in str(raised.value)
