"""grouped_mm with scales: what it means, the rows of a quantizing dispatch, compiled, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import epops
from epops.quantizer import Quantized
from epops.reference.quantize import dequantize_rows


def factors(experts: int = 3, width: int = 32, out: int = 48, rows: int = 7) -> tuple[Any, Any, torch.Tensor]:
    """Quantized rows, a quantized weight as (L, out, in), and ends."""
    made = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=made)
    weight = torch.randn(experts, out, width, generator=made)
    return epops.quantize(x, block=0), epops.quantize(weight, block=0), torch.tensor([2, 2, 6], dtype=torch.int32)


def product(x: Any, weight: Any, ends: torch.Tensor, **changed: Any) -> torch.Tensor:
    given = {"row_scales": x.scales, "weight_scales": weight.scales, **changed}
    return epops.grouped_mm(x.rows, weight.rows.transpose(1, 2), ends, **given)


def test_it_is_the_product_of_what_was_quantized() -> None:
    x, weight, ends = factors()
    plain = epops.grouped_mm(dequantize_rows(*x), dequantize_rows(*weight).transpose(1, 2).contiguous(), ends)
    got = product(x, weight, ends)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, plain.bfloat16(), rtol=1e-2, atol=1e-2)
    assert not bool(got[6:].any())
    narrow = {"row_scales": x.scales[:, 0], "weight_scales": weight.scales[..., 0]}
    assert torch.equal(product(x, weight, ends, **narrow), got)


def layer(group: epops.ExpertGroup, x: torch.Tensor, idx: torch.Tensor, w: torch.Tensor, weight: Any) -> torch.Tensor:
    common: Any = {"group": group, "num_experts": weight.rows.shape[0]}
    sent = epops.dispatch_quant(x, idx, w, block=0, **common)
    y = product(Quantized(sent.rows, sent.scales), weight, sent.expert_ends)
    return epops.combine(y, sent.route, sent.row_weights, num_tokens=x.shape[0], top_k=2, **common).out


def test_rows_of_a_quantizing_dispatch_compiled_and_not() -> None:
    torch._dynamo.reset()
    made = torch.Generator().manual_seed(1)
    x, dense = torch.randn(5, 32, generator=made), torch.randn(4, 48, 32, generator=made) / 6
    w, idx = torch.rand(5, 4, generator=made).softmax(-1).topk(2)
    expected = sum(w[:, k, None] * torch.einsum("th,toh->to", x, dense[idx[:, k]]) for k in range(2))
    weight = epops.quantize(dense, block=0)
    with epops.ExpertGroup(None, "fp8", max_tokens=5) as group:
        got = layer(group, x, idx, w, weight)
        compiled = torch.compile(layer, backend="epops", fullgraph=True)(group, x, idx, w, weight)
    assert (got.float() - expected).norm() < 5e-2 * expected.norm()
    torch.testing.assert_close(compiled, got)


def test_what_it_refuses() -> None:
    x, weight, ends = factors()
    wide, odd = epops.quantize(torch.ones(7, 32), block=16), epops.quantize(torch.ones(3, 20, 32), block=0)
    flat = weight.rows.transpose(1, 2).contiguous().transpose(1, 2)
    for call, said in (
        (lambda: product(x, weight, ends, row_scales=None), "row_scales: expected scales of both factors, got None"),
        (lambda: product(x, weight, ends, row_scales=wide.scales), r"row_scales: expected float32 \(7,\), got .*\(7, 2\)"),
        (lambda: product(x, weight, ends, weight_scales=x.scales), r"weight_scales: expected float32 \(3, 48\)"),
        (lambda: product(x, odd, ends), r"weight: expected in and out multiples of 16, got \(32, 20\)"),
        (lambda: product(x, weight._replace(rows=flat), ends), r"weight: .*strides .*weight.transpose\(1, 2\)"),
        (lambda: product(x._replace(rows=x.rows.float()), weight, ends), "rows, weight: expected torch.float8_e4m3fn"),
        (lambda: product(x, weight, ends.long()), r"expert_ends: expected int32 \(3,\)"),
        (lambda: product(x, weight, ends[:2]), r"expert_ends: expected int32 \(3,\)"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="epops.grouped_mm: .*" + said):
            call()


def test_a_pass_knows_which_rows_it_reads() -> None:
    """What is computed before it, on received rows, is computed for those that came."""
    from epops.passes.skip_padding import skip_padding_everywhere
    from epops.testing import captured

    x, weight, ends = factors()

    def block(rows: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return product(Quantized(rows, scales.sigmoid() * 2), weight, ends)

    with torch.no_grad():
        (graph,) = captured(block, x.rows, x.scales[:, 0], passes=[skip_padding_everywhere])
    assert graph.rewrites == {"skip_padding_everywhere": 1}, graph.declined
