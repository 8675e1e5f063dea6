"""all_to_all_quant moves what quantizing each row by itself gives, in one exchange; its gradient is straight-through."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import epops
from epops.passes.graph_facts import op_name
from epops.reference.pack_rows import WHOLE, pack, unpack
from epops.reference.quantize import quantize_rows
from epops.testing import captured, count_ops
from tests.ops.test_all_to_all import table
from tests.ops.test_all_to_all_padded import padded_group
from tests.ranks import run_ranks

KINDS: tuple[dict[str, Any], ...] = (
    {"block": 0},
    {"block": 16},
    {"block": 16, "scale_format": "ue8m0", "scale_math": "multiply"},
    {"block": 8, "scale_format": "float32_pow2", "quant_dtype": torch.float8_e5m2, "eps_on": "scale", "clamp": False},
)


def rows_of(rank: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank))


def same(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Bit by bit: fp8 has no equality of its own."""
    return got.dtype == expected.dtype and torch.equal(got.view(torch.uint8), expected.view(torch.uint8))


def factor(scales: torch.Tensor, block: int, hidden: int) -> torch.Tensor:
    return scales.float().repeat_interleave(block or hidden, dim=-1)[..., :hidden]


@pytest.mark.parametrize("quant", KINDS)
@pytest.mark.parametrize("hidden", (8, 17, 40))
def test_what_is_packed_is_unpacked(quant: dict[str, Any], hidden: int) -> None:
    rows, scales = quantize_rows(rows_of(0, 5, hidden), **quant)
    packed = pack(rows, scales)
    assert packed.dtype == torch.uint8 and packed.shape[1] % WHOLE == 0
    assert packed.shape[1] < rows.shape[1] + scales.shape[1] * scales.element_size() + WHOLE
    for got, expected in zip(unpack(packed, hidden, scales.shape[1], rows.dtype, scales.dtype), (rows, scales)):
        assert same(got, expected) and got.is_contiguous()


def ragged(rank: int, size: int, padded: bool) -> None:
    """Uneven splits along one dim, planned and not, against the pieces that each rank quantizes by itself."""
    for number, quant in enumerate(KINDS):
        splits = table(size, "uneven")
        with padded_group("ep") if padded else epops.ExpertGroup(None, "ep") as group:
            ins = torch.tensor(splits[rank])
            outs = torch.tensor([splits[source][rank] for source in range(size)])
            x = rows_of(rank, max(sum(row) for row in splits) + 2, 3, 40)
            bound = max(sum(row[r] for row in splits) for r in range(size)) + 1
            if number % 2:
                got = epops.all_to_all_quant(x, ins, outs, group=group, out_size=bound, **quant)
            else:
                plan = epops.plan_all_to_all(ins, group=group).plan
                got = epops.all_to_all_quant(x, plan=plan, group=group, out_size=bound, **quant)
            at = 0
            for source in range(size):
                sent = rows_of(source, x.shape[0], 3, 40)
                rows, scales = quantize_rows(sent.view(-1, 40), **quant)
                first, count = sum(splits[source][:rank]), splits[source][rank]
                for ours, theirs in ((got.rows, rows), (got.scales, scales)):
                    piece = theirs.view(x.shape[0], 3, -1)[first : first + count]
                    assert same(ours[at : at + count], piece.contiguous()), (quant, source)
                at += count
            for rest in (got.rows[at:], got.scales[at:]):
                assert not rest.contiguous().view(torch.uint8).any()
            assert got.counts.tolist() == outs.tolist()
            group.check()


@pytest.mark.parametrize(("size", "padded"), ((1, False), (3, False), (2, True)))
def test_ragged_pieces_are_those_that_their_ranks_quantized(size: int, padded: bool) -> None:
    run_ranks(ragged, size, padded)


def tokens_to_heads(rank: int, size: int) -> None:
    """Tokens scattered, heads gathered, x with strides; forward and backward."""
    tokens, heads, hidden = 2 * size, 3, 32
    # Gradients of fp8 tensors are fp8 in torch, exact to 1/16 where they are not among the smallest: here they are larger.
    weight = 64 * torch.arange(1.0, hidden + 1)
    with epops.ExpertGroup(None, "ep") as group:
        x = rows_of(rank, heads, tokens, hidden).transpose(0, 1).requires_grad_()
        got = epops.all_to_all_quant(x, group=group, scatter_dim=0, gather_dim=1, block=16)
        assert got.rows.shape == (2, heads * size, hidden) and got.scales.shape == (2, heads * size, 2)
        for source in range(size):
            sent = rows_of(source, heads, tokens, hidden).transpose(0, 1)[2 * rank : 2 * rank + 2]
            rows, scales = quantize_rows(sent.reshape(-1, hidden), block=16)
            mine = slice(source * heads, (source + 1) * heads)
            assert same(got.rows[:, mine].contiguous().view(-1, hidden), rows)
            assert torch.equal(got.scales[:, mine].reshape(-1, 2), scales)
        assert not got.scales.requires_grad and not got.counts.requires_grad
        (grad,) = torch.autograd.grad((got.rows.float() * factor(got.scales, 16, hidden) * weight).sum(), x)
        torch.testing.assert_close(grad, weight.expand_as(x), rtol=7e-2, atol=0)


@pytest.mark.parametrize("size", (1, 2))
def test_one_dim_scattered_and_another_gathered(size: int) -> None:
    run_ranks(tokens_to_heads, size)


def ragged_gradient(rank: int, size: int) -> None:
    splits = table(size, "uneven")
    with epops.ExpertGroup(None, "ep") as group:
        x = rows_of(rank, sum(splits[rank]) + 2, 16).bfloat16().requires_grad_()
        bound = sum(row[rank] for row in splits) + 1
        got = epops.all_to_all_quant(x, torch.tensor(splits[rank]), group=group, out_size=bound, block=0)
        (grad,) = torch.autograd.grad((got.rows.float() * factor(got.scales, 0, 16)).sum() * 256.0, x)
        total = sum(splits[rank])
        assert grad.dtype == torch.bfloat16 and not grad[total:].any()
        torch.testing.assert_close(grad[:total].float(), torch.full((total, 16), 256.0), rtol=7e-2, atol=0)


def test_gradients_of_ragged_pieces_go_back_as_they_came() -> None:
    run_ranks(ragged_gradient, 3)


def test_a_graph_has_one_exchange_and_the_same_results() -> None:
    torch._dynamo.reset()

    def quantized(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        got = epops.all_to_all_quant(x, group="ep", block=32)
        return got.rows.view(torch.uint8), got.scales

    with epops.ExpertGroup(None, "ep"):
        x = rows_of(0, 6, 64)
        (graph,) = captured(quantized, x)
        assert count_ops(graph, "epops.all_to_all") == 1
        (exchange,) = [node for node in graph.after.graph.nodes if op_name(node) == "all_to_all"]
        sent = exchange.args[0].meta["val"]
        assert sent.dtype == torch.uint8 and sent.shape == (6, 64 + 2 * 4 + 8)
        for backend in ("aot_eager", "epops"):
            got = torch.compile(quantized, fullgraph=True, backend=backend)(x)
            assert all(map(torch.equal, got, quantized(x))), backend


def test_narrow_scales_go_through_inductor() -> None:
    torch._dynamo.reset()

    def quantized(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        got = epops.all_to_all_quant(x, group="ep", block=32, scale_format="ue8m0")
        return got.rows, got.scales

    with epops.ExpertGroup(None, "ep"):
        x = rows_of(0, 6, 64) * torch.logspace(-30, 30, 6)[:, None]
        got = torch.compile(quantized, fullgraph=True, backend="epops")(x)
        assert all(map(same, got, quantized(x)))


def halves(rank: int, size: int) -> None:
    with epops.ExpertGroup(None, "ep") as group:
        settings: dict[str, Any] = {"group": group, "scatter_dim": 0, "gather_dim": 1, "block": 16}
        x = rows_of(rank, 2 * size, 3, 32).requires_grad_()
        whole = epops.all_to_all_quant(x, **settings)
        started = epops.all_to_all_quant_start(x, **settings)
        got = epops.all_to_all_quant_wait(started, x, **settings)
        assert same(got.rows, whole.rows) and torch.equal(got.scales, whole.scales)
        grads = [torch.autograd.grad((one.rows.float() * 448.0).sum(), x)[0] for one in (got, whole)]
        assert torch.equal(*grads) and grads[0].all()


def test_halves_give_what_the_whole_gives() -> None:
    run_ranks(halves, 2)


def test_the_exchange_runs_beside_other_work_in_a_graph() -> None:
    def beside(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        got = epops.all_to_all_quant(x, group="ep", block=0)
        return got.scales, weight @ weight

    with epops.ExpertGroup(None, "ep"):
        (graph,) = captured(beside, rows_of(0, 6, 32), torch.ones(16, 16))
        assert graph.rewrites["overlap"] == 1 and count_ops(graph, "epops.all_to_all_start") == 1


def test_compiled_gradients_are_those_of_eager() -> None:
    torch._dynamo.reset()

    def loss(x: torch.Tensor) -> torch.Tensor:
        got = epops.all_to_all_quant(x, group="ep", block=0)
        return (got.rows.float() * factor(got.scales, 0, 32) * torch.arange(32.0)).sum()

    with epops.ExpertGroup(None, "ep"):
        x = rows_of(0, 6, 32).requires_grad_()
        (expected,) = torch.autograd.grad(loss(x), x)
        (got,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), x)
    assert torch.equal(got, expected)


def refused(rank: int, size: int) -> None:
    """A rank whose own checks fail tells its peer, which is in the exchange already."""
    with epops.ExpertGroup(None, "ep", timeout=60.0) as group:
        wrong = {"dim": {"scatter_dim": 1}, "format": {"scale_format": "int4"}}
        said = {"dim": "scatter_dim: expected a dim before the last", "format": "scale_format: expected one of"}
        for name, settings in wrong.items():
            if rank == 0:
                with pytest.raises(ValueError, match=f"epops.all_to_all_quant: {said[name]}"):
                    epops.all_to_all_quant(torch.ones(4, 16), group=group, **{"scatter_size": 8, **settings})
            else:
                with pytest.raises(epops.EpopsError):
                    epops.all_to_all_quant(torch.ones(4, 16), group=group)


def test_what_it_refuses_is_told_to_the_peers() -> None:
    run_ranks(refused, 2)
    with epops.ExpertGroup(None, "ep") as group:
        with pytest.raises(ValueError, match="expected float32, float16 or bfloat16, got torch.int64"):
            epops.all_to_all_quant(torch.ones(4, 16, dtype=torch.int64), group=group)
        with pytest.raises(ValueError, match="x: expected a tensor of at least one dimension"):
            epops.all_to_all_quant(torch.ones(()), group=group)
