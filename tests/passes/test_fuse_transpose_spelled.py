"""fuse_transpose on tokens ↔ heads as people and libraries write it, by torch's collective and ours, on two ranks: elements and
gradients are where they were, whatever is folded."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives

import epops
from epops.inspection.capture import capture
from epops.passes import PASSES
from tests.ranks import run_ranks

aten = torch.ops.aten
BATCH, TOKENS, HEADS, WIDTH, RANKS = 2, 4, 6, 8, 2
HERE = HEADS // RANKS


def exchanged(x):
    return collectives.all_to_all_single_autograd(x, None, None, dist.group.WORLD)


def ours(x, **dims):
    return epops.all_to_all(x, group="ep", **dims).rows


def parts(x):
    """(R, B, S, h, D): the heads of each rank."""
    return x.unflatten(2, (RANKS, -1)).movedim(2, 0).contiguous()


def together(y):
    return y.movedim(0, 1).flatten(1, 2)


def of_einops(x, heads="outer", tokens="outer"):
    """What einops makes of "b s (r h) d -> r b s h d" and back, or of "(h r)" and "(s r)"."""
    x = (
        x.reshape(BATCH, TOKENS, RANKS, HERE, WIDTH)
        if heads == "outer"
        else x.reshape(BATCH, TOKENS, HERE, RANKS, WIDTH).permute(0, 1, 3, 2, 4)
    )
    y = exchanged(x.permute(2, 0, 1, 3, 4).contiguous())
    order = (1, 0, 2, 3, 4) if tokens == "outer" else (1, 2, 0, 3, 4)
    return y.permute(order).reshape(BATCH, RANKS * TOKENS, HERE, WIDTH)


def of_aten(x):
    x = aten.permute.default(aten.view.default(x, [BATCH, TOKENS, RANKS, HERE, WIDTH]), [2, 0, 1, 3, 4])
    y = exchanged(aten.clone.default(x, memory_format=torch.contiguous_format))
    y = aten.clone.default(aten.permute.default(y, [1, 0, 2, 3, 4]), memory_format=torch.contiguous_format)
    return aten._unsafe_view.default(y, [BATCH, RANKS * TOKENS, HERE, WIDTH])


def of_strides(x):
    v = x.contiguous().unflatten(2, (RANKS, -1))
    order = (2, 0, 1, 3, 4)
    v = torch.as_strided(v, [v.shape[dim] for dim in order], [v.stride(dim) for dim in order])
    return together(exchanged(v.contiguous()))


def of_einsum(x):
    y = exchanged(torch.einsum("bsrhd->rbshd", x.unflatten(2, (RANKS, -1))).contiguous())
    return torch.einsum("rbshd->brshd", y).flatten(1, 2)


def queries_keys_values(x):
    y = exchanged(torch.stack([x, x * 2, x * 3]).unflatten(3, (RANKS, -1)).movedim(3, 0).contiguous())
    query, key, value = y.movedim(0, 2).flatten(2, 3).unbind(0)
    return query * key + value


def pieces(x, take, join=lambda pieces: torch.cat(pieces, 1)):
    return join(list(exchanged(torch.stack(take(x))).unbind(0)))


def part_written_into(x):
    sent = parts(x)
    sent[0].add_(1)
    return together(exchanged(sent))


def result_written_into(x):
    y = exchanged(parts(x))
    view = y.movedim(0, 1)
    y.mul_(2)
    return view.flatten(1, 2)


def source_written_into(x):
    x = x.clone()
    view = x.unflatten(2, (RANKS, -1)).movedim(2, 0)
    x.mul_(3)
    return together(exchanged(view.contiguous()))


def sent_and_used(x):
    sent = parts(x)
    return together(exchanged(sent)) + sent.sum()


def used_twice(x):
    y = exchanged(parts(x))
    return together(y) + y.sum()


PROGRAMS = {
    "einops": of_einops,
    "einops, inner heads": lambda x: of_einops(x, heads="inner"),
    "einops, inner tokens": lambda x: of_einops(x, tokens="inner"),
    "aten": of_aten,
    "strides": of_strides,
    "einsum": of_einsum,
    "queries, keys and values": queries_keys_values,
    "swapaxes": lambda x: (
        exchanged(x.unflatten(2, (RANKS, -1)).swapaxes(0, 2).contiguous()).swapaxes(0, 2).flatten(1, 2)
    ),
    "dims from the end": lambda x: together(exchanged(torch.movedim(x.unflatten(-2, (RANKS, -1)), -3, 0).contiguous())),
    "chunks": lambda x: pieces(x, lambda x: x.chunk(RANKS, 2)),
    "narrowed": lambda x: pieces(x, lambda x: [x.narrow(2, HERE * rank, HERE) for rank in range(RANKS)]),
    "split and joined": lambda x: torch.cat(
        torch.chunk(exchanged(torch.cat(x.tensor_split(RANKS, 2), 0)), RANKS, 0), 1
    ),
    "chunks turned round": lambda x: pieces(x, lambda x: x.chunk(RANKS, 2)[::-1]),
    "joined the other way": lambda x: pieces(x, lambda x: x.chunk(RANKS, 2), lambda pieces: torch.cat(pieces[::-1], 1)),
    "pieces that overlap": lambda x: pieces(x, lambda x: [x[:, :, :3], x[:, :, 2:5]]),
    "every other head": lambda x: pieces(x, lambda x: [x[:, :, ::2], x[:, :, 1::2]]),
    "tokens between the heads": lambda x: (
        exchanged(parts(x)).permute(1, 2, 3, 0, 4).reshape(BATCH, TOKENS, HEADS, WIDTH)
    ),
    "two in one": lambda x: together(exchanged(parts(x)) + exchanged(parts(x) * 2)),
    "ours": lambda x: ours(x.permute(2, 0, 1, 3).contiguous()).permute(1, 2, 0, 3).contiguous(),
    "ours of a matrix": lambda x: ours(x.flatten(0, 1).flatten(1).mT.contiguous()).mT,
    "ours along other dims": lambda x: (
        ours(x.transpose(1, 2).contiguous(), scatter_dim=1, gather_dim=2).transpose(1, 2).contiguous()
    ),
    "ours, expanded": lambda x: (
        ours(x[:1].expand(2, -1, -1, -1).permute(2, 0, 1, 3).contiguous()).permute(1, 2, 0, 3).contiguous()
    ),
    "ours, rolled": lambda x: ours(x.roll(1, 2).permute(2, 0, 1, 3).contiguous()).permute(1, 2, 0, 3),
    "ours, turned": lambda x: ours(torch.rot90(x[0, :, :, 0]).contiguous()),
    "ours, rounded": lambda x: ours(x.permute(2, 0, 1, 3).contiguous().bfloat16()).permute(1, 2, 0, 3).float(),
    "a part written into": part_written_into,
    "the result written into": result_written_into,
    "the source written into": source_written_into,
    "sent and used": sent_and_used,
    "used twice": used_twice,
}
FOLDED = {
    *("einops", "aten", "strides", "einsum", "queries, keys and values", "swapaxes", "dims from the end", "chunks"),
    *("narrowed", "split and joined", "ours", "ours along other dims"),
}


# What libraries of sequence parallelism write, in place and without gradients.


def in_place(x):
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x)
    return out


def heads_scattered(x):
    x = x.reshape(BATCH, TOKENS, RANKS, HERE, WIDTH).transpose(0, 2).contiguous()
    y = in_place(x).reshape(RANKS * TOKENS, BATCH, HERE, WIDTH)
    return y.transpose(0, 1).contiguous().reshape(BATCH, RANKS * TOKENS, HERE, WIDTH) * 1


def tokens_scattered(x):
    x = x.reshape(BATCH, RANKS, TOKENS // RANKS, HEADS, WIDTH).transpose(0, 3).transpose(0, 1).contiguous()
    y = in_place(x.reshape(RANKS, HEADS, TOKENS // RANKS, BATCH, WIDTH))
    y = y.reshape(HEADS * RANKS, TOKENS // RANKS, BATCH, WIDTH).transpose(0, 2).contiguous()
    return y.reshape(BATCH, TOKENS // RANKS, HEADS * RANKS, WIDTH) * 1


def tokens_first(x):
    y = in_place(x[0].reshape(RANKS, TOKENS // RANKS, HEADS, WIDTH).contiguous()).transpose(0, 1).contiguous()
    return y.reshape(TOKENS // RANKS, HEADS * RANKS, WIDTH) * 1


IN_PLACE = (heads_scattered, tokens_scattered, tokens_first)


def two_ranks(rank, size):
    with epops.ExpertGroup(name="ep", timeout=60.0):
        given = torch.randn(BATCH, TOKENS, HEADS, WIDTH, generator=torch.Generator().manual_seed(rank))
        for name, program in PROGRAMS.items():

            def last(x, program=program):
                return program(x) * 1

            x = given.clone().requires_grad_()
            expected = last(x)
            (gradient,) = torch.autograd.grad(expected.sin().sum(), x)
            graphs, got = capture(last, x, passes=PASSES, run=True)
            (grad,) = torch.autograd.grad(got.sin().sum(), x)
            assert torch.equal(got, expected), name
            torch.testing.assert_close(grad, gradient, msg=name)
            folded = sum(graph.rewrites["fuse_transpose"] for graph in graphs)
            assert folded >= 2 or name not in FOLDED, f"{name}: {folded}, {[graph.declined for graph in graphs]}"
        for program in IN_PLACE:
            with torch.no_grad():
                expected = program(given)
                graphs, got = capture(program, given, passes=PASSES, run=True)
            assert torch.equal(got, expected) and graphs[0].rewrites["fuse_transpose"] == 1, program.__name__
    return True


def test_tokens_and_heads_however_they_are_spelled():
    assert run_ranks(two_ranks, 2, timeout=300.0) == [True, True]
