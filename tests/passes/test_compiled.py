"""Spellings and near misses through the code that Inductor generates: values and gradients are those of eager, and the counts of
`epops.inspect` say that what should be folded was, and what only looks like it was left alone.

Programs of one kind are compiled together: a graph with ten exchanges takes hardly longer than one with one.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F

import epops
from epops.testing import assert_fused
from tests.passes import blocks, quantizers
from tests.ranks import run_ranks

aten = torch.ops.aten
ROUTED = blocks.routed


def together(programs):
    """Tuple of the results of all programs, of the same inputs."""
    return lambda given: tuple(program(given) for program in programs.values())


def same_as_eager(programs, given, tolerance=1e-5, **options):
    """Compiled by Inductor, values and gradients are those of eager; returns the report of `epops.inspect`."""
    leaves = {name: item.clone().requires_grad_(item.is_floating_point()) for name, item in given.items()}
    wanted = {name: item for name, item in leaves.items() if item.requires_grad}

    def differentiated(run):
        torch.manual_seed(5)
        results = run(leaves)
        loss = sum(item.float().sin().sum() for item in results)
        return results, torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)

    block = together(programs)
    expected, gradients = differentiated(block)
    torch._dynamo.reset()
    got, grads = differentiated(torch.compile(block, backend="epops", fullgraph=True, options=options))
    for name, one, other in zip(programs, got, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape, name
        limit = tolerance if one.dtype == torch.float32 else 2e-2
        torch.testing.assert_close(one, other, rtol=limit, atol=limit, msg=lambda text, name=name: f"{name}: {text}")
    for name, one, other in zip(wanted, grads, gradients, strict=True):
        if other is None:
            assert one is None or not one.any(), name
        else:
            blocks.close(one, other, 20 * tolerance)
    return epops.inspect(block, leaves)


# ---- sums and weights around a combine -----------------------------------------------------------------------------------


def weighted(weigh):
    """A combine without weights of what ``weigh(rows, weights)`` makes of the expert rows and their weights (C,)."""

    def program(given):
        y, sent = blocks.experts(given)
        return blocks.combine(weigh(y, sent.row_weights), sent, given, weigh=False)

    return program


def shared(given):
    return torch.relu(given["x"] @ given["shared"]) @ given["shared"].t()


def in_bfloat16(given):
    return {name: item.bfloat16() if name in ("x", "experts", "shared") else item for name, item in given.items()}


FOLDED = {
    "alpha": lambda given: torch.add(given["x"], ROUTED(given), alpha=-0.5),
    "addcmul": lambda given: torch.addcmul(ROUTED(given), given["x"], given["x"].sigmoid(), value=0.5),
    "unflatten": lambda given: (ROUTED(given).unflatten(0, (1, -1)) + shared(given)[None]).flatten(0, 1),
    "aten": lambda given: aten.sub.Tensor(aten.view.default(ROUTED(given), [-1, 16]), shared(given)),
    "in place": lambda given: ROUTED(given).clone().add_(given["x"]).mul_(0.5),
    "widened and back": lambda given: (ROUTED(in_bfloat16(given)).float() + given["x"]).bfloat16(),
    "weights by einsum": weighted(lambda rows, weights: torch.einsum("ch,c->ch", rows, weights)),
    "both": lambda given: weighted(lambda rows, weights: rows.mul_(weights.view(-1, 1)))(given) + given["x"],
}
TWICE = ("both",)


def summed_and_used(given):
    out = ROUTED(given)
    return (out + given["x"]) * out


def written_between(given):
    kept, out = given["x"].clone(), ROUTED(given)
    kept.view(-1)[::3].mul_(-1)
    total = out * 2 - out.roll(1, 0) * kept.clone()
    kept.add_(1)
    return total + kept


def drawn_in_order(given):
    """Random numbers before, beside and after the exchanges."""
    before = torch.rand_like(given["x"])
    out = ROUTED({**given, "x": given["x"] + before})
    beside = F.dropout(shared(given), 0.5)
    return out * torch.rand_like(out) + beside.sum(0, keepdim=True)


LEFT = {
    "a row for all": lambda given: ROUTED(given) + given["shared"][0],
    "wider, transposed": lambda given: (ROUTED(in_bfloat16(given)).t() + given["x"].t()).t(),
    "scales whose product is rounded": lambda given: ROUTED(given) * (1 / 3) * (1 / 3) + given["x"],
    "summed and used": summed_and_used,
    "written between": written_between,
    "random numbers": drawn_in_order,
    "weights after a bias": weighted(lambda rows, weights: rows * weights[:, None] + 1),
}


def test_sums_and_weights_are_folded_however_they_are_spelled():
    with blocks.group():
        report = same_as_eager(FOLDED, blocks.inputs())
        assert_fused(report, fuse_add=len(FOLDED) + len(TWICE))


def test_what_looks_like_them_is_left_alone():
    with blocks.group():
        report = same_as_eager(LEFT, blocks.inputs(), fallback_random=True)
        assert_fused(report, fuse_add=0)


# ---- quantizers ----------------------------------------------------------------------------------------------------------

NO_QUANTIZERS = (
    quantizers.eps_added,
    quantizers.rounded_before_the_cast,
    quantizers.blocks_spread_by_the_wrong_width,
)


@pytest.mark.slow
def test_what_looks_like_a_quantizer_is_left_alone():
    def program(quantizer):
        def quantized(given):
            q, scales = quantizer(given["x"])
            sent = epops.dispatch(q, given["idx"], given["weights"], scales, group="ep")
            width = scales.shape[1] if scales.shape[1] < sent.rows.shape[1] else sent.rows.shape[1]
            wide = sent.rows.float() * sent.scales.repeat_interleave(sent.rows.shape[1] // width, 1)
            return torch.where(sent.row_expert[:, None] >= 0, wide, 0)

        return quantized

    with blocks.group(), torch.no_grad():
        given = blocks.inputs(hidden=256)
        block = together({quantizer.__name__: program(quantizer) for quantizer in NO_QUANTIZERS})
        got = torch.compile(block, backend="epops", fullgraph=True)(given)
        for quantizer, one, other in zip(NO_QUANTIZERS, got, block(given), strict=True):
            assert torch.equal(one, other), quantizer.__name__
        assert_fused(epops.inspect(block, given), fuse_quant=0)


# ---- tokens and heads, by torch's own collective ---------------------------------------------------------------------------

TOKENS, HEADS, RANKS = 4, 6, 2


def exchanged(x, group=None):
    return collectives.all_to_all_single_autograd(x, None, None, group or dist.group.WORLD)


def with_movedim(x):
    return exchanged(x.unflatten(1, (RANKS, -1)).movedim(1, 0).contiguous()).flatten(0, 1)


def with_aten(x):
    parts = aten.clone.default(
        aten.permute.default(aten.view.default(x, [TOKENS, RANKS, HEADS // RANKS, -1]), [1, 0, 2, 3])
    )
    return aten.view.default(exchanged(parts), [TOKENS * RANKS, HEADS // RANKS, -1])


def there_and_back(x):
    """Ulysses: all tokens of some heads, something along the tokens, and back."""
    heads = with_movedim(x).cumsum(0)
    return exchanged(heads.unflatten(0, (RANKS, -1))).movedim(0, 1).flatten(1, 2)


def with_einops(x):
    from einops import rearrange

    parts = rearrange(x, "t (r h) d -> r t h d", r=RANKS).contiguous()
    return rearrange(exchanged(parts), "r t h d -> (r t) h d")


HEADS_OUT = {with_movedim: 1, with_aten: 1, there_and_back: 2}
if importlib.util.find_spec("einops"):
    HEADS_OUT[with_einops] = 1


def parts_turned_round(x):
    return exchanged(x.unflatten(1, (RANKS, -1)).movedim(1, 0).flip(0).contiguous()).flip(0).flatten(0, 1)


def written_on_the_way(x):
    parts = x.unflatten(1, (RANKS, -1)).movedim(1, 0).contiguous()
    came = exchanged(parts)
    return came.mul_(2).flatten(0, 1) + parts.sum()


def tokens_and_heads(rank, size):
    """What is folded and what is left, in one graph."""
    with epops.ExpertGroup(name="ep", timeout=60.0):
        other = dist.new_group([0, 1])

        def over_another_group(x):
            return exchanged(x.unflatten(1, (RANKS, -1)).movedim(1, 0).contiguous(), other).flatten(0, 1)

        left = dict.fromkeys((parts_turned_round, written_on_the_way, over_another_group), 0)
        programs = {entry.__name__: lambda given, entry=entry: entry(given["x"]) * 1 for entry in {**HEADS_OUT, **left}}
        given = {"x": torch.randn(TOKENS, HEADS, 3, generator=torch.Generator().manual_seed(rank))}
        report = same_as_eager(programs, given)
        assert_fused(report, fuse_transpose=2 * sum(HEADS_OUT.values()))  # forward and backward
    return True


def test_tokens_and_heads():
    assert run_ranks(tokens_and_heads, 2, timeout=400.0) == [True, True]
