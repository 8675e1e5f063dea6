"""fuse_quant where dispatches and quantizers are put together in other ways: what is folded keeps its bits, on two ranks."""

from __future__ import annotations

import torch

import epops
from epops.passes import PASSES
from tests.passes import blocks, quantizers
from tests.passes.test_fuse_quant import rows, valid
from tests.ranks import run_ranks

FP8, TOP = quantizers.FP8, quantizers.TOP


def send(given, x=None, scales=None, **settings):
    x = given["x"] if x is None else x
    return epops.dispatch(x, given["idx"], given["weights"], scales, group="ep", **settings)


def arrived(change=lambda rows, sent: rows, **settings):
    """Quantizes what ``change`` makes of the rows that arrive."""

    def block(given):
        sent = send(given, **settings)
        return valid(sent, *quantizers.per_token(change(sent.rows, sent)))

    return block


def of_slabs(given):
    sent = send(given, layout="batched")
    scale = sent.rows.float().abs().amax(-1, keepdim=True).clamp(min=1e-6) / TOP
    there = (sent.row_expert >= 0).reshape(*sent.rows.shape[:2], 1)
    q = (sent.rows.float() / scale).to(FP8)
    return torch.where(there, q.view(torch.uint8), 0), torch.where(there, scale, 0)


def of_ranks(given):
    sent = send(given, layout="rank")
    q, scale = quantizers.per_token(sent.rows)
    there = (sent.row_expert >= 0).any(-1, keepdim=True)
    return torch.where(there, q.view(torch.uint8), 0), torch.where(there, scale, 0)


def of_a_batch(given):
    wide = given["x"].view(1, -1, 256).float().unflatten(-1, (-1, 128))
    scale = wide.abs().amax(-1) / TOP
    sent = send(given, (wide / scale[..., None]).flatten(-2).to(FP8).view(-1, 256), scale.view(-1, 2))
    return valid(sent, sent.rows, sent.scales)


def scales_first(given):
    q, scale = quantizers.per_token(given["x"])
    other, sent = send(given, scale), send(given, q)
    return *valid(sent, sent.rows), *valid(sent, other.rows)


def narrow_scales(given):
    q, scale = quantizers.blocks_of_128_powers_of_two(given["x"])
    sent = send(given, q, scale.to(torch.float8_e8m0fnu))
    return valid(sent, sent.rows, sent.scales)


def the_same_twice(given):
    sent = send(given)
    return *valid(sent, *quantizers.per_token(sent.rows)), *valid(sent, *quantizers.per_token(sent.rows))


def scales_written_later(given):
    sent = send(given)
    q, scale = quantizers.per_token(sent.rows)
    return *valid(sent, q, scale.mul_(2)), sent.row_weights


def tokens_written_later(given):
    x = given["x"].clone()
    q, scale = quantizers.per_token(x)
    x.zero_()
    sent = send(given, q, scale)
    return *valid(sent, sent.rows, sent.scales), x


def multiplied_back(given):
    sent = send(given)
    q, scale = quantizers.per_token(sent.rows)
    return torch.where((sent.row_expert >= 0)[:, None], q.float() * scale, 0)


def narrow_scales_of_no_powers(given):
    """UE8M0 scales that were not rounded before the rows were divided by them."""
    sent = send(given)
    q, scale = quantizers.per_token(sent.rows)
    return valid(sent, q, scale.to(torch.float8_e8m0fnu))


def wide_and_narrow_scales(given):
    sent = send(given)
    blocks = sent.rows.float().unflatten(-1, (-1, 64))
    scale = torch.exp2((blocks.abs().amax(-1, keepdim=True).clamp(1e-4) / TOP).log2().ceil())
    narrow = scale.to(torch.float8_e8m0fnu).squeeze(-1)
    return valid(sent, (blocks / scale).to(FP8).flatten(1), scale.squeeze(-1), narrow)


def all_results(given):
    """Of each dispatch the empty scales too."""
    q, scale = quantizers.per_token(given["x"])
    rows, scales = send(given, q), send(given, scale)
    return *valid(rows, rows.rows, scales.rows), rows.scales, scales.scales


def rounded_scales(given):
    q, scale = quantizers.per_token(given["x"])
    sent = send(given, q, scale.bfloat16().float())
    return valid(sent, sent.rows, sent.scales)


def two_dispatches(given):
    q, scale = quantizers.per_token(given["x"])
    one, other = send(given, q, scale), send({**given, "weights": given["weights"] * 2}, q, scale)
    return *valid(one, one.rows, one.scales), *valid(other, other.rows, other.row_weights[:, None])


def rounded_to_fp8_and_back(given):
    q, scale = quantizers.per_token(given["x"])
    sent = send(given, (q.float() * scale).to(given["x"].dtype))
    return torch.where((sent.row_expert >= 0)[:, None], sent.rows, 0)


def scale_of_all_tokens(given):
    sent = send(given)
    scale = given["x"].float().abs().amax() / TOP
    return valid(sent, (sent.rows.float() / scale).clamp(-TOP, TOP).to(FP8))


def there(rows, sent):
    return torch.where((sent.row_expert >= 0)[:, None], rows, 0).to(rows.dtype)


BLOCKS = {
    "slabs": (of_slabs, 1),
    "ranks": (of_ranks, 1),
    "a batch": (of_a_batch, 1),
    "scales first": (scales_first, 2),
    "narrow scales": (narrow_scales, 1),
    "the same twice": (the_same_twice, 1),
    "scales written later": (scales_written_later, 1),
    "tokens written later": (tokens_written_later, 1),
    "narrow scales of no powers of two": (narrow_scales_of_no_powers, 1),
    "wide and narrow scales": (wide_and_narrow_scales, 1),
    "multiplied back": (multiplied_back, 1),
    "detached and copied": (arrived(lambda rows, sent: rows.detach().clone()), 1),
    "viewed": (arrived(lambda rows, sent: rows.unflatten(1, (4, -1)).flatten(1)), 1),
    # What only looks like that.
    "weighed": (arrived(lambda rows, sent: there(rows * sent.row_weights[:, None].bfloat16(), sent)), 0),
    "relu": (arrived(lambda rows, sent: rows.relu()), 0),
    "half of the channels": (arrived(lambda rows, sent: torch.cat([rows[:, :128], rows[:, :128]], 1)), 0),
    "channels in another order": (
        arrived(lambda rows, sent: rows.view(-1, 2, 128).transpose(1, 2).reshape(-1, 256)),
        0,
    ),
    "rows turned round": (arrived(lambda rows, sent: there(rows, sent).flip(0).flip(0) * 2), 0),
    "written in place": (arrived(lambda rows, sent: rows.mul_(2)), 0),
    "all results": (all_results, 0),
    "rounded scales": (rounded_scales, 0),
    "two dispatches": (two_dispatches, 0),
    "to fp8 and back": (rounded_to_fp8_and_back, 0),
    "a scale of all tokens": (scale_of_all_tokens, 0),
}


def two_ranks(rank, size):
    wrong = []
    with blocks.group(timeout=60.0):
        for name, (block, count) in BLOCKS.items():
            graph = blocks.passed(block, rows(rank), passes=PASSES, exact=True)
            if graph.rewrites["fuse_quant"] != count:
                wrong.append((name, graph.rewrites, list(map(str, graph.declined))))
    return wrong


def a_batch_of_its_own(rank, size):
    """One entry on rank 0, where taking it takes all; two on rank 1, where it leaves rows out."""

    def block(given):
        q, scale = quantizers.per_token(given["x"].expand(rank + 1, -1, -1).contiguous())
        sent = send(given, q[0], scale[0])
        return valid(sent, sent.rows, sent.scales)

    given = rows(rank)
    given["x"] = given["x"].unsqueeze(0)
    with blocks.group(timeout=20.0):
        return blocks.passed(block, given, passes=PASSES, exact=True).rewrites["fuse_quant"]


def test_ranks_whose_batches_differ_come_to_one_exchange():
    assert run_ranks(a_batch_of_its_own, 2) == [0, 0]


def test_quantizers_around_dispatches():
    assert run_ranks(two_ranks, 2, timeout=300.0) == [[], []]
