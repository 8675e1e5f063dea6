"""fp8 rows times fp8 weights on GPUs: the meaning on CPU, no host sync, graphs whose routing changes, a whole layer over ranks."""

from __future__ import annotations

import pytest
import torch

import epops
from epops.quantizer import Quantized
from epops.reference.quantize import dequantize_rows

from .test_nvlink import run_ranks

pytestmark = pytest.mark.gpu


def product(x, weight, ends):
    return epops.grouped_mm(x.rows, weight.rows.transpose(1, 2), ends, row_scales=x.scales, weight_scales=weight.scales)


def to(quantized, device):
    return type(quantized)(*(t.to(device) for t in quantized))


def test_it_means_what_it_means_on_a_cpu_in_a_graph_with_any_rows():
    made = torch.Generator().manual_seed(0)
    x = epops.quantize(torch.randn(300, 2048, generator=made), block=0)
    weight = epops.quantize(torch.randn(4, 272, 2048, generator=made) / 45, block=0)
    ends = torch.tensor([16, 16, 100, 300], dtype=torch.int32)
    here, there, moved = to(x, "cuda"), to(weight, "cuda"), ends.cuda()
    product(here, there, moved)
    torch.cuda.set_sync_debug_mode("error")
    try:
        product(here, there, moved)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = product(here, there, moved)
    for values in ([16, 16, 100, 300], [0, 0, 0, 0], [1, 2, 3, 4], [0, 250, 250, 251]):
        ends = torch.tensor(values, dtype=torch.int32)
        moved.copy_(ends)
        graph.replay()
        last = values[-1]
        torch.testing.assert_close(out[:last].cpu(), product(x, weight, ends)[:last], rtol=2e-2, atol=2e-2)


def meaning(x, idx, w, up, down):
    """The same layer on a CPU, token by token: its rows and weights quantized alike, its sums in float32."""
    dense_up, dense_down = dequantize_rows(*up), dequantize_rows(*down)
    seen = dequantize_rows(*epops.quantize(x, block=0))
    out = torch.zeros(seen.shape)
    for k in range(idx.shape[1]):
        h = torch.einsum("toh,th->to", dense_up[idx[:, k]], seen).bfloat16().relu()
        h = dequantize_rows(*epops.quantize(h, block=0))
        out += w[:, k, None] * torch.einsum("toi,ti->to", dense_down[idx[:, k]], h)
    return out


def layer_scenario(rank, world):
    """Dispatch in fp8, both products in fp8, combine; replayed with other tokens and routing."""
    tokens, hidden, inner, experts = 24, 256, 128, 4 * world
    made = torch.Generator().manual_seed(0)
    up, down = (
        torch.randn(experts, inner, hidden, generator=made) / 16,
        torch.randn(experts, hidden, inner, generator=made) / 11,
    )
    mine = slice(4 * rank, 4 * rank + 4)
    whole = [epops.quantize(weight, block=0) for weight in (up, down)]
    q_up, q_down = (Quantized(*(t[mine].cuda() for t in weight)) for weight in whole)
    static = [
        torch.zeros(tokens, hidden).cuda(),
        torch.zeros(tokens, 2, dtype=torch.int64).cuda(),
        torch.zeros(tokens, 2).cuda(),
    ]
    with epops.ExpertGroup(None, "fp8", max_tokens=tokens, num_experts=experts, timeout=60.0) as group:
        assert group.transport.name == "nvlink", repr(group)

        def layer(x, idx, w):
            sent = epops.dispatch_quant(x.bfloat16(), idx, w, group=group, block=0)
            h = product(Quantized(sent.rows, sent.scales), q_up, sent.expert_ends).relu()
            y = product(epops.quantize(h, block=0), q_down, sent.expert_ends)
            return epops.combine(y, sent.route, sent.row_weights, group=group, num_tokens=tokens, top_k=2).out

        def draw(seed):
            made = torch.Generator().manual_seed(10 * seed + rank)
            w, idx = torch.rand(tokens, experts, generator=made).topk(2)
            for buffer, values in zip(static, (torch.randn(tokens, hidden, generator=made), idx, w)):
                buffer.copy_(values)

        draw(0)
        compiled = torch.compile(layer, fullgraph=True, backend="epops")
        compiled(*static)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = compiled(*static)
        for seed in (1, 2, 3):
            draw(seed)
            graph.replay()
            group.check()
            x, idx, w = (t.cpu() for t in static)
            expected = meaning(x.bfloat16(), idx, w, *whole)
            error = (out.cpu().float() - expected).norm() / expected.norm()
            assert error < 2e-2, f"seed {seed}: {error}"


def test_a_layer_in_fp8_over_ranks():
    run_ranks(layer_scenario, world=2, limit=90.0)
