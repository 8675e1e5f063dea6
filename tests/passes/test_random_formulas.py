"""fuse_quant and fuse_add on formulas made up at random: fused or not, the result is that of eager."""

from __future__ import annotations

import random

import pytest
import torch

from epops.passes.fuse_add import fuse_add
from epops.passes.fuse_quant import fuse_quant
from tests.passes import blocks
from tests.passes.test_fuse_quant import after, before, rows
from tests.ranks import run_ranks

FP8 = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def ep():
    with blocks.group() as group:
        yield group


def quantizer(make: random.Random):
    """Steps of quantizers put together at random: half are quantizers, the others are so but for a step or two."""

    def pick(good, bad):
        return make.choice(good) if make.random() < 0.88 else make.choice(bad)

    block = make.choice([0, 0, 64, 128])
    magnitude = pick(
        [
            lambda x: x.abs().amax(-1, keepdim=True),
            lambda x: x.abs().max(-1, keepdim=True)[0],
            lambda x: torch.maximum(x.amax(-1, keepdim=True).abs(), x.amin(-1, keepdim=True).abs()),
            lambda x: x.norm(float("inf"), -1, keepdim=True),
        ],
        [
            lambda x: torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True)),
            lambda x: x.pow(2).amax(-1, keepdim=True).sqrt(),
            lambda x: x.amax(-1, keepdim=True),
            lambda x: x.abs().amax(-2, keepdim=True).expand(x.shape)[..., :1],
        ],
    )
    eps, eps_on = make.choice([None, 1e-12, 1e-4, 0.5]), pick(["amax", "scale"], ["both"])
    top = pick([448.0], [447.0, 240.0])
    scaling = pick(
        [lambda amax: amax / top, lambda amax: amax.div(torch.tensor(top))],
        [
            lambda amax: amax * (1 / top),
            lambda amax: (top / amax).reciprocal(),
            lambda amax: amax.double().div(top).float(),
        ],
    )
    rounding = pick(
        [
            lambda s: s,
            lambda s: s,
            lambda s: torch.exp2(torch.ceil(torch.log2(s))),
            lambda s: torch.pow(2.0, s.log2().ceil()),
        ],
        [lambda s: torch.exp2(torch.log2(s).round()), lambda s: s * 2],
    )
    divide = make.choice(
        [lambda x, s: x / s, lambda x, s: x * (1 / s), lambda x, s: x * s.reciprocal(), lambda x, s: x.div(s)]
    )
    clamp = pick([None, (-448.0, 448.0)], [(-448.0, None), (-440.0, 440.0)])
    wide_first = make.random() < 0.8

    def run(x):
        y = x.float() if wide_first else x
        y = y.unflatten(-1, (-1, block)) if block else y
        amax = magnitude(y).float()
        if eps is not None and eps_on in ("amax", "both"):
            amax = amax.clamp(min=eps)
        scale = scaling(amax)
        if eps is not None and eps_on in ("scale", "both"):
            scale = torch.maximum(scale, torch.tensor(eps))
        scale = rounding(scale)
        q = divide(y, scale)
        if clamp is not None:
            q = q.clamp(*clamp)
        q = q.to(FP8)
        return (q.flatten(-2), scale.squeeze(-1)) if block else (q, scale)

    return run


@pytest.mark.parametrize("where", [after, before], ids=["after", "before"])
@pytest.mark.parametrize("seed", range(16))
def test_quantizers(seed, where):
    blocks.passed(where(quantizer(random.Random(seed))), rows(), passes=[fuse_quant], exact=True)


def test_some_of_them_fuse():
    """Or else nothing was compared."""
    fused = 0
    for seed in range(100, 116):
        block = before(quantizer(random.Random(seed)))
        fused += blocks.passed(block, rows(tokens=5), passes=[fuse_quant], exact=True).rewrites["fuse_quant"]
    assert fused >= 3


def sums(make: random.Random):
    """What is done with a combine's rows: scalars, casts, views, additions of this and that."""

    def other(given):
        return [given["x"], given["x"] @ given["shared"], given["x"].relu(), given["x"] * 3][kind]

    kind = make.randrange(4)
    steps = [
        lambda z, given: z * make_scalar,
        lambda z, given: -z,
        lambda z, given: z / 4,
        lambda z, given: z.float(),
        lambda z, given: z.unflatten(-1, (4, 4)).flatten(-2),
        lambda z, given: z.unsqueeze(0).squeeze(0),
        lambda z, given: z.clone(),
        lambda z, given: z.t().contiguous().t(),
    ]
    make_scalar = make.choice([0.5, 2.0, 0.3, 1.1])
    additions = [
        lambda z, given: z + other(given),
        lambda z, given: other(given) + z,
        lambda z, given: torch.add(z, other(given), alpha=make_scalar),
        lambda z, given: torch.sub(other(given), z, alpha=2),
        lambda z, given: sum([z, other(given), given["x"]]),
        lambda z, given: other(given).clone().add_(z),
        lambda z, given: z + other(given)[0],
        lambda z, given: z + other(given)[:, :1],
        lambda z, given: z + z,
        lambda z, given: z + z.sum(),
        lambda z, given: z + 1.0,
        lambda z, given: torch.lerp(z, other(given).to(z.dtype), 0.25),
        lambda z, given: torch.addcmul(other(given), z, z),
        lambda z, given: torch.where(other(given) > 0, z, other(given)),
    ]
    chosen = [make.choice(steps) for _ in range(make.randint(0, 3))]
    end = [make.choice(steps) for _ in range(make.randint(0, 2))]
    addition, twice, weigh = make.choice(additions), make.random() < 0.2, make.random() < 0.5

    def block(given):
        y, sent = blocks.experts(given)
        out = z = blocks.combine(y if weigh else y * sent.row_weights[:, None], sent, given, weigh=weigh)
        for step in chosen:
            z = step(z, given)
        z = addition(z, given)
        for step in end:
            z = step(z, given)
        return (z, out) if twice else (z,)

    return block


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("seed", range(16))
def test_sums(seed, dtype):
    blocks.passed(sums(random.Random(seed)), blocks.inputs(seed, dtype=dtype), passes=[fuse_add])


def two_ranks(rank, size):
    with blocks.group():
        for seed in range(200, 208):
            blocks.passed(sums(random.Random(seed)), blocks.inputs(rank, 3 + 2 * rank), passes=[fuse_add])
            given = rows(rank, 3 + 4 * rank)
            blocks.passed(after(quantizer(random.Random(seed))), given, passes=[fuse_quant], exact=True)
    return True


def test_on_two_ranks():
    assert run_ranks(two_ranks, 2) == [True, True]
