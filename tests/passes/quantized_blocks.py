"""MoE blocks that quantize around their dispatches, compiled for real and compared with eager bit for bit: on CPU and GPU ranks."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

import epops
from epops.testing import assert_fused, captured, normalized_graph
from tests.inputs import routing
from tests.passes import quantizers

TOKENS, HIDDEN, EXPERTS, TOP_K = 40, 256, 5, 2


def finegrained(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the fine-grained fp8 kernels of transformers compute, in torch: blocks of 128, no eps, no clamp."""
    view = x.float().unflatten(-1, (-1, 128))
    scale = view.abs().amax(-1) / quantizers.TOP
    return (view / scale[..., None]).flatten(-2).to(quantizers.FP8), scale


def per_token_of_epops(x: torch.Tensor) -> Any:
    return epops.quantize(x, block=0)


def blocks_of_epops(x: torch.Tensor) -> Any:
    return epops.quantize(x, scale_math="multiply")


def ue8m0_of_epops(x: torch.Tensor) -> Any:
    return epops.quantize(x, scale_format="ue8m0")


def ue8m0_by_hand(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, scale = quantizers.blocks_of_128_powers_of_two(x)
    return rows, scale.to(torch.float8_e8m0fnu)


QUANTIZERS: tuple[Callable[[torch.Tensor], Any], ...] = (
    quantizers.per_token,  # by hand
    finegrained,
    quantizers.per_token_in_float64,  # torchao's
    quantizers.per_token_scaled,
    quantizers.blocks_of_128,
    quantizers.of_the_amax_twice,
    quantizers.eps_in_the_dtype_of_the_rows,
    per_token_of_epops,
    blocks_of_epops,
    ue8m0_of_epops,
    ue8m0_by_hand,
)


def rows(rank: int) -> torch.Tensor:
    """(T, H) bfloat16: zeros of both signs, denormals, the largest, amax at powers of two, quotients between two fp8 numbers."""
    make = torch.Generator().manual_seed(rank)
    x = torch.randn(TOKENS, HIDDEN, generator=make)
    powers = torch.tensor([-126.0, -90, -75, -60, -20, -3, 0, 7, 60, 120]).exp2()
    count = len(powers)
    x[: 2 * count] = x[: 2 * count].tanh() * 0.99
    x[: 2 * count, ::7] = 1.0
    x[:count] *= powers[:, None]
    x[count : 2 * count] *= 448 * powers[:, None] / 64
    ugly = x[2 * count :]
    ugly[0], ugly[1], ugly[2] = 0.0, -0.0, ugly[2] * 1e-39
    ugly[3], ugly[4] = 2.0**-133, torch.finfo(torch.bfloat16).max
    ugly[5, ::2], ugly[6, :128] = -0.0, 0.0
    ugly[7] = torch.arange(HIDDEN) * 448 / 256  # after division by the scale, halfway between two numbers of fp8
    ugly[8] = torch.arange(HIDDEN)
    ugly[9:] *= torch.logspace(-12, 12, len(ugly) - 9)[:, None]
    return x.to(torch.bfloat16)


def inputs(rank: int, device: str) -> list[torch.Tensor]:
    idx, weights = routing("holes", TOKENS, TOP_K, EXPERTS, rank)
    return [item.to(device) for item in (rows(rank), idx, weights)]


def quantize_what_arrives(x: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor) -> list[torch.Tensor]:
    found = []
    for quantizer in QUANTIZERS:
        sent = epops.dispatch(x, idx, weights, group="ep")
        found += [sent.row_expert, *quantizer(sent.rows)]
    return found


def quantize_what_is_sent(x: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor) -> list[torch.Tensor]:
    found = []
    for quantizer in QUANTIZERS:
        q, scales = quantizer(x)
        sent = epops.dispatch(q, idx, weights, scales, group="ep")
        found += [sent.row_expert, sent.rows, sent.scales]
    return found


def whole_block(x: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor) -> list[torch.Tensor]:
    """dispatch, quantizer, products of what fp8 and scales stand for, combine; the rows are all near 1."""
    sent = epops.dispatch(x.clamp(-2, 2) + 3, idx, weights, group="ep")
    q, scales = quantizers.blocks_of_128(sent.rows)
    wide = (q.float().unflatten(1, (-1, 128)) * scales[..., None]).flatten(1)
    line = torch.linspace(-1, 1, HIDDEN, device=x.device)
    matrix = (line[:, None] + line[None] / 2).expand(sent.expert_ends.shape[0], -1, -1) / HIDDEN
    y = epops.grouped_mm(wide, matrix.contiguous(), sent.expert_ends)
    out = epops.combine(y, sent.route, sent.row_weights, group="ep", num_tokens=x.shape[0], top_k=TOP_K).out
    return [sent.row_expert, q, scales, out]


def bits(found: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
    """Bytes of the valid ones of fp8 rows or of their scales; a NaN is any NaN."""
    found, there = found.cpu().contiguous(), (expert >= 0).cpu()
    if found.dtype == torch.float32:
        return torch.where(found.isnan(), torch.nan, found).view(torch.int32)[there]
    found = found.view(torch.uint8)[there]
    return torch.where(found & 0x7F == 0x7F, 0x7F, found) if found.shape[1] == HIDDEN else found


def keeps_roundings(given: list[torch.Tensor]) -> bool:
    """Whether the graph that passes see says that a limit is rounded to the rows' own dtype; torch 2.11 drops such casts."""

    def block(x: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor) -> Any:
        return quantizers.eps_in_the_dtype_of_the_rows(epops.dispatch(x, idx, weights, group="ep").rows)

    with torch.no_grad():
        graph = normalized_graph(captured(block, *given)[0].before)
    return re.search(r"bf16\[.*\] = cast\(%clamp_min\b", graph) is not None


def compare(rank: int, device: str) -> None:
    """Every block, eager and compiled, of the group "ep".  A quantizer whose rounding torch's compiler drops is left to it, and
    its numbers are torch's."""
    given = inputs(rank, device)
    names = [quantizer.__name__ for quantizer in QUANTIZERS]
    left = set() if keeps_roundings(given) else {"eps_in_the_dtype_of_the_rows"}
    for block, count in ((quantize_what_arrives, len(names)), (quantize_what_is_sent, len(names)), (whole_block, 1)):
        with torch.no_grad():
            assert_fused(captured(block, *given), fuse_quant=count - (len(left) if count > 1 else 0))
            torch._dynamo.reset()
            expected = block(*given)
            got = torch.compile(block, fullgraph=True, backend="epops")(*given)
        for place in range(count):
            if count > 1 and names[place] in left:
                continue
            expert = got[3 * place]
            assert torch.equal(expert, expected[3 * place])
            for one, what in ((1, "rows"), (2, "scales")):
                pair = [bits(result[3 * place + one], expert) for result in (got, expected)]
                wrong = (pair[0] != pair[1]).any(1).nonzero().flatten().tolist()
                here = f"{block.__name__}, {what} of {names[place]} on rank {rank}"
                assert not wrong, f"{here}: {len(wrong)} of {len(pair[0])} differ, the first {wrong[:5]}"
        for one, other in zip(got[3 * count :], expected[3 * count :], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
