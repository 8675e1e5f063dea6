"""combine brings weighted rows back to their tokens; gradients of both directions are those of the one-process layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import epops
from tests import inputs
from tests.ops import meaning
from tests.ranks import run_ranks

TOKENS = (5, 0, 7, 3)


def experts_of(rows: torch.Tensor, slot: torch.Tensor, rank: int, factors: torch.Tensor, slots: int) -> torch.Tensor:
    mine = torch.nn.functional.pad(factors[rank * slots : (rank + 1) * slots], (0, slots))
    return rows * mine[slot.clamp(min=0).long()].masked_fill(slot < 0, 0.0).unsqueeze(-1)


def round_trip(rank: int, size: int, layout: str) -> None:
    tokens = TOKENS[rank]
    for kind in ("random", "one", "holes", "skewed", "none"):
        for top_k, experts in ((2, 7), (4, 3), (1, 5)):
            factors = torch.arange(1.0, experts + 1)
            with epops.ExpertGroup(None, "ep", max_tokens=7, num_experts=experts) as group:
                x = inputs.rows(tokens, 16, rank).requires_grad_()
                idx, w = inputs.routing(kind, tokens, top_k, experts, rank)
                w.requires_grad_()
                extra = inputs.rows(tokens, 16, rank + 50).requires_grad_()
                sent = epops.dispatch(x, idx, w, group=group, layout=layout)
                if layout == "rank":
                    slots = group.num_slots
                    per_k = [experts_of(sent.rows, sent.row_expert[:, k], rank, factors, slots) for k in range(top_k)]
                    y = sum(row * sent.row_weights[:, k, None] for k, row in enumerate(per_k))
                    weights = None
                else:
                    y = experts_of(sent.rows, sent.row_expert, rank, factors, group.num_slots)
                    weights = sent.row_weights
                back = epops.combine(
                    y, sent.route, weights, extra, group=group, num_tokens=tokens, top_k=top_k, layout=layout,
                    out_scale=0.5, addend_scale=2.0,
                )  # fmt: skip
                expected = 0.5 * meaning.layer(x, idx, w, factors) + 2.0 * extra
                where = f"{layout} {kind} K={top_k} E={experts} rank {rank} of {size}"
                assert torch.equal(back.out, expected), where
                loss = torch.linspace(-1, 1, 16)
                got = torch.autograd.grad((back.out.pow(2) * loss).sum(), [x, w, extra])
                want = torch.autograd.grad((expected.pow(2) * loss).sum(), [x, w, extra], allow_unused=True)
                for name, a, b in zip(("x", "topk_weights", "addend"), got, want):
                    b = torch.zeros_like(a) if b is None else b
                    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4, msg=lambda m: f"{where} d{name}: {m}")  # noqa: B023


@pytest.mark.parametrize("layout", ("expert", "rank", "batched"))
@pytest.mark.parametrize("size", (1, 2, 4))
def test_dispatch_experts_combine_is_the_one_process_layer(size: int, layout: str) -> None:
    run_ranks(round_trip, size, layout)


def scaled_gradients(rank: int, size: int) -> None:
    with epops.ExpertGroup(None, "ep", max_tokens=4, num_experts=4) as group:
        x = inputs.rows(4, 16, rank).requires_grad_()
        idx, w = inputs.routing("random", 4, 2, 4, rank)
        factor = torch.full((1,), 3.0, requires_grad=True)
        grads = []
        for scale in (1.0, 4.0):
            sent = epops.dispatch(x, idx, w, group=group, grad_scale=scale)
            y = sent.rows * factor
            back = epops.combine(
                y, sent.route, sent.row_weights, group=group, num_tokens=4, top_k=2, grad_scale=1.0 / scale
            )
            grads.append(torch.autograd.grad(back.out.sum(), [x, factor]))
        assert torch.equal(grads[0][0], grads[1][0]), "the two scales cancel on the way to x"
        assert torch.equal(grads[0][1], 4.0 * grads[1][1]), "expert gradients have the scale between them"


def test_grad_scale_reaches_the_experts_and_not_the_tokens() -> None:
    run_ranks(scaled_gradients, 2)


def low_precision(rank: int, size: int) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        with epops.ExpertGroup(None, "ep", max_tokens=8, num_experts=4) as group:
            x = torch.randn(8, 32, generator=torch.Generator().manual_seed(rank)).to(dtype)
            idx, w = inputs.routing("random", 8, 4, 4, rank)
            sent = epops.dispatch(x, idx, w, group=group)
            back = epops.combine(sent.rows, sent.route, sent.row_weights, group=group, num_tokens=8, top_k=4)
            again = epops.combine(sent.rows, sent.route, sent.row_weights, group=group, num_tokens=8, top_k=4)
            assert back.out.dtype == dtype and torch.equal(back.out, again.out), "same inputs, same bits"
            expected = (x.double() * w.sum(1, keepdim=True)).float()
            assert (back.out.float() - expected).abs().max() <= expected.abs().max() * (
                2e-2 if dtype == torch.bfloat16 else 2e-3
            )
            wide = epops.combine(
                sent.rows, sent.route, sent.row_weights, group=group, num_tokens=8, top_k=4, out_dtype=torch.float32
            )
            torch.testing.assert_close(wide.out, expected, rtol=1e-5, atol=1e-5)


def test_low_precision_rows_are_summed_in_float32() -> None:
    run_ranks(low_precision, 2)


def seam_ops(rank: int, size: int) -> None:
    with epops.ExpertGroup(None, "ep", max_tokens=8) as group:
        x = torch.full((3, 2), float(rank + 1), requires_grad=True)
        total = epops.all_reduce(x, group=group)
        assert torch.equal(total, torch.full((3, 2), float(sum(range(1, size + 1)))))
        (grad,) = torch.autograd.grad((total * (rank + 1)).sum(), x)
        assert torch.equal(grad, torch.full((3, 2), float(sum(range(1, size + 1)))))
        part = -(-7 // size)
        slice_ = torch.arange(rank * part, (rank + 1) * part, dtype=torch.float32).view(-1, 1).requires_grad_()
        whole = epops.gather_tokens(slice_, group=group, num_tokens=7)
        assert whole.flatten().tolist() == list(range(7))
        (grad,) = torch.autograd.grad((whole * torch.arange(7.0).view(7, 1)).sum(), slice_)
        assert torch.equal(grad, slice_.detach() * (slice_.detach() < 7))


@pytest.mark.parametrize("size", (1, 3))
def test_all_reduce_and_gather_tokens_and_their_gradients(size: int) -> None:
    run_ranks(seam_ops, size)


def test_grouped_mm_adds_a_bias_before_it_rounds() -> None:
    torch.manual_seed(0)
    ends = torch.tensor([3, 3, 8], dtype=torch.int32)
    rows, weight, bias = (torch.randn(*shape).bfloat16().requires_grad_() for shape in ((9, 16), (3, 16, 5), (3, 5)))
    out = torch.ops.epops.grouped_mm.default(rows, weight, ends, bias)
    parts = [F.linear(rows[a:b], weight[e].t(), bias[e]) for e, (a, b) in enumerate(((0, 3), (3, 3), (3, 8)))]
    assert torch.equal(out, torch.cat([*parts, torch.zeros(1, 5)]).bfloat16())
    grads = torch.autograd.grad(out.float().pow(2).sum(), [rows, weight, bias])
    expected = torch.autograd.grad(sum(part.float().pow(2).sum() for part in parts), [rows, weight, bias])
    assert all(torch.equal(a, b) for a, b in zip(grads, expected))
    with pytest.raises(ValueError, match="epops.grouped_mm: bias: expected torch.bfloat16 \\(3, 5\\), a row an expert"):
        torch.ops.epops.grouped_mm.default(rows, weight, ends, bias.float())


def test_grouped_mm_is_a_matmul_for_each_expert() -> None:
    torch.manual_seed(0)
    for ends in ([0, 0, 0], [2, 2, 5], [1, 3, 6], [6, 6, 6]):
        rows = torch.randn(6, 4, requires_grad=True)
        weight = torch.randn(3, 4, 5, requires_grad=True)
        expected = torch.zeros(6, 5)
        start = 0
        for expert, end in enumerate(ends):
            expected = torch.cat([expected[:start], rows[start:end] @ weight[expert], expected[end:]])
            start = end
        got = epops.grouped_mm(rows, weight, torch.tensor(ends, dtype=torch.int32))
        torch.testing.assert_close(got, expected)
        for a, b in zip(
            torch.autograd.grad(got.pow(2).sum(), [rows, weight]),
            torch.autograd.grad(expected.pow(2).sum(), [rows, weight], allow_unused=True),
        ):
            torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)
