"""Near misses for all passes together: programs that look like what a pass rewrites and are something else, or are it in disguise.

What matters is that values and gradients are those of eager; what fires is the other tests' business.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import epops
from epops.inspection.capture import capture
from epops.passes import PASSES
from epops.passes.skip_padding import skip_padding_everywhere
from tests.passes import blocks

ALL = [*PASSES, skip_padding_everywhere]
BATCH, LENGTH, HIDDEN = 3, 4, 16

# ---- tokens in another order: what depends on a token's place must keep the order that the program has -------------------


def inputs():
    make = torch.Generator().manual_seed(1)
    shapes = {
        "x": (LENGTH, BATCH, HIDDEN),
        "router": (HIDDEN, 3),
        "experts": (3, HIDDEN, HIDDEN),
        "places": (LENGTH, HIDDEN),
        "row": (BATCH * LENGTH,),
        "channel": (HIDDEN,),
    }
    return {name: torch.randn(shape, generator=make) / 2 for name, shape in shapes.items()}


def experts(x, given, rows=lambda rows, sent: rows, **settings):
    """Router, dispatch, experts, combine of tokens (T, H)."""
    weights, chosen = torch.softmax(x @ given["router"], -1).topk(2, -1)
    sent = epops.dispatch(x, chosen, weights, group="ep", **settings)
    y = epops.grouped_mm(rows(sent.rows, sent), given["experts"], sent.expert_ends)
    return epops.combine(y, sent.route, sent.row_weights, group="ep", num_tokens=x.shape[0], top_k=2).out


def of_two_routings(x, given, rows, ends=lambda one, other: one.expert_ends):
    """Rows of one dispatch beside those of another, by their places."""
    weights, chosen = torch.softmax(x @ given["router"], -1).topk(2, -1)
    one, other = (epops.dispatch(x, idx, weights, group="ep") for idx in (chosen, (chosen + 1) % 3))
    y = epops.grouped_mm(rows(one, other), given["experts"], ends(one, other))
    return epops.combine(y, one.route, one.row_weights, group="ep", num_tokens=x.shape[0], top_k=2).out


def there(rows, sent):
    return torch.where((sent.row_expert >= 0)[:, None], rows, 0)


def batch_first(given):
    return given["x"].transpose(0, 1).reshape(-1, HIDDEN)


def sequence_first(y):
    return y.view(BATCH, LENGTH, HIDDEN).transpose(0, 1).contiguous()


def of_tokens(change):
    """``change(x, given)`` of batch-first tokens (T, H), between a transposition and the one back."""

    def program(given):
        return sequence_first(change(batch_first(given), given))

    return program


def spelled(to, back):
    return lambda given: back(experts(to(given["x"]).reshape(-1, HIDDEN), given).view(BATCH, LENGTH, HIDDEN)) * 1


ORDERS = {
    "plain": of_tokens(experts),
    "movedim": spelled(lambda x: x.movedim(1, 0), lambda y: y.movedim(0, 1)),
    "einsum": spelled(lambda x: torch.einsum("sbh->bsh", x), lambda y: torch.einsum("bsh->sbh", y)),
    "swapped and not back": spelled(lambda x: x.swapdims(0, 1), lambda y: y.reshape(LENGTH, BATCH, HIDDEN)),
    "back with channels": spelled(lambda x: x.permute(1, 0, 2), lambda y: y.unflatten(2, (4, 4)).permute(1, 0, 3, 2)),
    "a number a row": of_tokens(lambda x, given: experts(x, given) * given["row"][:, None]),
    "every other row": of_tokens(
        lambda x, given: torch.where((torch.arange(len(x)) % 2 == 0)[:, None], experts(x, given), x)
    ),
    "sums along rows": of_tokens(lambda x, given: experts(x.cumsum(0), given)),
    "the first row": of_tokens(lambda x, given: experts(x, given) + x[:1]),
    "the row before": of_tokens(lambda x, given: experts(x, given) + F.pad(x, (0, 0, 1, 0))[:-1]),
    "rows turned round": of_tokens(lambda x, given: experts(x, given) + x[torch.arange(len(x)).flip(0)]),
    "halves exchanged": of_tokens(lambda x, given: experts(torch.cat(x.chunk(2, 0)[::-1], 0), given)),
    "sorted": of_tokens(lambda x, given: experts(x, given) + x.sort(0)[0]),
    "number of the largest row": of_tokens(lambda x, given: experts(x, given) + x.argmax(0).float()),
    "largest row and its number": of_tokens(lambda x, given: experts(x, given) + x.max(0)[1].float() * x.max(0)[0]),
    "softmax over rows": of_tokens(lambda x, given: experts(x, given) * x.softmax(0)),
    "rows times rows": of_tokens(lambda x, given: experts(x, given) + x @ x.t() @ x),
    "tokens counted": of_tokens(
        lambda x, given: (
            experts(x, given) * torch.zeros(3).scatter_add(0, (x @ given["router"]).argmax(-1), torch.ones(len(x)))[0]
        )
    ),
    "normed over rows": of_tokens(lambda x, given: experts(F.layer_norm(x.t(), (len(x),)).t(), given)),
    "places": lambda given: sequence_first(
        experts((given["x"].transpose(0, 1) + given["places"]).reshape(-1, HIDDEN), given)
    ),
    "a mask of places": lambda given: (
        torch.where(
            (torch.arange(LENGTH) < 2)[None, :, None],
            experts(batch_first(given), given).view(BATCH, LENGTH, HIDDEN),
            given["x"].transpose(0, 1),
        )
        .transpose(0, 1)
        .contiguous()
    ),
    "softmax over places": lambda given: (
        (experts(batch_first(given), given).view(BATCH, LENGTH, HIDDEN) * given["x"].transpose(0, 1).softmax(1))
        .transpose(0, 1)
        .contiguous()
    ),
    "another view": lambda given: (
        experts(batch_first(given), given).view(LENGTH, BATCH, HIDDEN).transpose(0, 1).contiguous()
    ),
    "where a row came from": of_tokens(
        lambda x, given: experts(x, given, lambda rows, sent: rows * sent.row_source.clamp(min=0)[:, None].float())
    ),
    "sums along received rows": of_tokens(
        lambda x, given: experts(x, given, lambda rows, sent: there(rows, sent).cumsum(0))
    ),
    "less room than could be needed": of_tokens(lambda x, given: experts(x, given, capacity=15)),
    "two layers": of_tokens(lambda x, given: experts(experts(x, given) + x, given) + x),
    "rows of two routings": of_tokens(
        lambda x, given: of_two_routings(x, given, lambda one, other: one.rows + other.rows)
    ),
    "weights of another routing": of_tokens(
        lambda x, given: of_two_routings(x, given, lambda one, other: one.rows * other.row_weights[:, None])
    ),
    "ends of another routing": of_tokens(
        lambda x, given: of_two_routings(x, given, lambda one, other: one.rows, lambda one, other: other.expert_ends)
    ),
}


# ---- sums, scalars and weights around a combine --------------------------------------------------------------------------


def weighted(weigh):
    """A combine without weights of what ``weigh(rows, sent, given)`` makes of the expert rows."""

    def program(given):
        y, sent = blocks.experts(given)
        return blocks.combine(weigh(y, sent, given), sent, given, weigh=False)

    return program


def written_later(given):
    kept = given["x"].clone()
    out = blocks.routed(given) + kept
    return out + kept.mul_(3)


def written_before(given):
    kept, out = given["x"].clone(), blocks.routed(given)
    kept.mul_(3)
    return out + kept


def some_rows_written(given):
    out = blocks.routed(given)
    added = torch.zeros_like(out)
    added[1:3] = given["x"][1:3]
    return out + added


def halves_of_channels(given):
    first, second = blocks.routed(given).chunk(2, -1)
    return torch.cat([first + given["x"][:, :8], second], -1)


def of_another_dispatch(rows, sent, given):
    _, other = blocks.experts({**given, "weights": given["weights"].flip(1)})
    return rows * other.row_weights[:, None]


ROUTED = blocks.routed
SUMS = {
    "no tokens in common": lambda given: ROUTED(given) + given["x"].cumsum(0),
    "a row for all": lambda given: ROUTED(given) + given["x"].sum(0, keepdim=True).expand(5, -1),
    "strided": lambda given: ROUTED(given) + given["shared"].t()[:5],
    "a view of itself": lambda given: (lambda out: out + out.view(-1, 2, 8).flatten(1).flip(1))(ROUTED(given)),
    "addcmul": lambda given: torch.addcmul(ROUTED(given), given["x"], given["x"], value=0.5),
    "addmm": lambda given: torch.addmm(ROUTED(given), given["x"], given["shared"], beta=2, alpha=0.5),
    "alpha 0": lambda given: torch.add(ROUTED(given), given["x"], alpha=0),
    "scale 0": lambda given: ROUTED(given) * 0.0 + given["x"],
    "scales out of range": lambda given: ROUTED(given) * 1e30 * 1e30 * 0.0 + given["x"],
    "floor": lambda given: torch.div(ROUTED(given), 4, rounding_mode="floor") + given["x"],
    "a learned scale": lambda given: ROUTED(given) * given["shared"][0, 0] + given["x"],
    "a scale that is a tensor": lambda given: ROUTED(given) * torch.full((5, 1), 0.5) + given["x"],
    "einsum": lambda given: torch.einsum("th,h->th", ROUTED(given), given["x"][0]) + given["x"],
    "minus itself": lambda given: ROUTED(given) - ROUTED(given),
    "other rows": lambda given: ROUTED(given).roll(1, 0) + given["x"],
    "an aten alias": lambda given: torch.ops.aten.add.Tensor(torch.ops.aten.alias.default(ROUTED(given)), given["x"]),
    "a stack": lambda given: torch.stack([ROUTED(given), given["x"], given["x"] @ given["shared"]]).sum(0),
    "bits": lambda given: ROUTED(given).view(torch.int32).view(torch.float32) + given["x"],
    "a write after the sum": written_later,
    "a write before the sum": written_before,
    "some rows": some_rows_written,
    "halves": halves_of_channels,
    "weights turned round": weighted(lambda rows, sent, given: rows * sent.row_weights.flip(0)[:, None]),
    "weights of another dispatch": weighted(of_another_dispatch),
    "weights along channels": weighted(lambda rows, sent, given: rows * sent.row_weights[None, : rows.shape[1]]),
    "truth values": weighted(lambda rows, sent, given: rows * (sent.row_weights > 0.3)[:, None]),
    "whole numbers": weighted(lambda rows, sent, given: rows * sent.row_expert.clamp(min=0)[:, None]),
    "float64": weighted(lambda rows, sent, given: (rows * sent.row_weights.double()[:, None]).float()),
    "rounded": weighted(lambda rows, sent, given: (rows * sent.row_weights[:, None]).half().float()),
    "divided": weighted(lambda rows, sent, given: rows / (sent.row_weights + 1)[:, None]),
    "shifted": weighted(lambda rows, sent, given: rows * sent.row_weights[:, None] + 1),
    "twice": weighted(lambda rows, sent, given: rows * sent.row_weights[:, None] * sent.row_weights[:, None]),
}


# ---- between grouped products; there are as many rows as channels, which confuses nobody ----------------------------------


def between(gate):
    """Expert rows, ``gate(rows, sent, given)``, expert rows again."""

    def program(given):
        y, sent = blocks.experts(given)
        h = gate(y, sent, given)
        return blocks.combine(epops.grouped_mm(h, given["experts"][:3], sent.expert_ends), sent, given)

    return program


GATES = {
    "a number a channel": between(lambda y, sent, given: y + given["shared"][:, 0]),
    "a matrix of the same shape": between(lambda y, sent, given: y * given["shared"]),
    "transposed": between(lambda y, sent, given: there(y, sent).t() + there(y, sent)),
    "weights along channels": between(lambda y, sent, given: y * there(sent.row_weights[:, None], sent)[:, 0]),
    "weights of all rows": between(lambda y, sent, given: y * there(sent.row_weights[:, None], sent).sum()),
    "mean of rows": between(lambda y, sent, given: y - there(y, sent).mean(0, keepdim=True)),
    "softmax of rows": between(lambda y, sent, given: there(y, sent).softmax(0)),
    "rows read by number": between(lambda y, sent, given: y + there(y, sent)[sent.row_expert.clamp(min=0).long()]),
    "numbers from the end": between(lambda y, sent, given: y * given["shared"][:3][sent.row_expert.clamp(min=0) - 3]),
    "tokens read by number": between(
        lambda y, sent, given: y + given["x"][(sent.row_source.clamp(min=0) % blocks.MAX_TOKENS).long()]
    ),
    "rows mixed by views": between(lambda y, sent, given: there(y, sent).view(4, -1).flip(0).view(-1, 16) * 2),
    "views within a row": between(lambda y, sent, given: y.view(-1, 4, 4).transpose(1, 2).reshape(-1, 16) * 2),
    "rows rolled": between(lambda y, sent, given: there(y, sent).roll(1, 0)),
    "a number of all rows": between(lambda y, sent, given: y * sent.expert_counts.sum().float()),
    "which row it is": between(lambda y, sent, given: y * torch.arange(16.0)[:, None]),
    "whole numbers": between(
        lambda y, sent, given: y * ((sent.row_source.clamp(min=0) // 2 + sent.row_expert * 3) % 5).float()[:, None]
    ),
    "odd and even": between(lambda y, sent, given: torch.cat([F.silu(y[:, ::2]) * y[:, 1::2]] * 2, 1)),
    "padded the other way": between(lambda y, sent, given: F.pad(y, (-3, 3), value=0.5)),
}


def same(program, given):
    """Values and gradients are those of eager, within the rounding of sums in another order."""
    leaves = {name: item.clone().requires_grad_(item.is_floating_point()) for name, item in given.items()}
    wanted = [item for item in leaves.values() if item.requires_grad]
    expected = program(leaves)
    gradients = torch.autograd.grad(expected.sin().sum(), wanted, allow_unused=True)
    _, got = capture(program, leaves, passes=ALL, run=True)
    blocks.close(got.nan_to_num(), expected.nan_to_num(), 1e-5)
    assert torch.equal(got.isnan(), expected.isnan())
    for one, other in zip(torch.autograd.grad(got.sin().sum(), wanted, allow_unused=True), gradients, strict=True):
        if one is None or other is None:
            assert not any(item is not None and item.any() for item in (one, other))
        else:
            blocks.close(one.nan_to_num(), other.nan_to_num(), 1e-5)


@pytest.mark.parametrize("name", ORDERS)
def test_tokens_in_another_order(name):
    with epops.ExpertGroup(name="ep", num_experts=3, max_tokens=16, overflow="count"):
        same(ORDERS[name], inputs())


@pytest.mark.parametrize("name", SUMS)
def test_around_a_combine(name):
    with blocks.group():
        same(SUMS[name], blocks.inputs())


@pytest.mark.parametrize("name", GATES)
def test_between_grouped_products(name):
    with blocks.group():
        same(GATES[name], blocks.inputs())
