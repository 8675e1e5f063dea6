"""Hand-written MoE blocks for the tests of passes, and what every such test asks of a pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

import epops
from epops.inspection.capture import PassedGraph, apply_passes, capture
from epops.testing import normalized_graph
from tests.inputs import routing

EXPERTS, TOP_K, HIDDEN, MAX_TOKENS = 3, 2, 16, 8
SHOWN = ("epops", "mm", "add", "sub", "mul", "div", "cast", "reshape", "permute", "clone", "neg", "return")


def group(**settings: Any) -> epops.ExpertGroup:
    """The group "ep", of this process alone unless torch.distributed is initialized."""
    return epops.ExpertGroup(name="ep", **{"num_experts": EXPERTS, "max_tokens": MAX_TOKENS, **settings})


def inputs(
    rank: int = 0, tokens: int = 5, hidden: int = HIDDEN, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """``x`` (T, H), ``idx``, ``weights`` (T, K), ``shared`` (H, H), and this rank's ``experts`` (L, H, H)."""
    make = torch.Generator().manual_seed(rank)
    idx, weights = routing("holes", tokens, TOP_K, EXPERTS, rank)
    same = torch.Generator().manual_seed(99)
    return {
        "x": torch.randn(tokens, hidden, generator=make).to(dtype),
        "idx": idx,
        "weights": weights,
        "shared": (torch.randn(hidden, hidden, generator=same) / 4).to(dtype),
        "experts": (torch.randn(EXPERTS, hidden, hidden, generator=make) / 4).to(dtype),
    }


def experts(given: dict[str, torch.Tensor], **settings: Any) -> tuple[torch.Tensor, epops.DispatchResult]:
    """Rows that the experts return, before the routing weights, and the dispatch."""
    sent = epops.dispatch(given["x"], given["idx"], given["weights"], group="ep", **settings)
    slots = sent.expert_ends.shape[0]
    return epops.grouped_mm(sent.rows, given["experts"][:slots], sent.expert_ends), sent


def combine(
    y: torch.Tensor, sent: epops.DispatchResult, given: dict[str, torch.Tensor], weigh: bool = True
) -> torch.Tensor:
    """(T, H): the expert rows summed for each token."""
    weights = sent.row_weights if weigh else None
    tokens = given["x"].shape[0]
    return epops.combine(y, sent.route, weights, group="ep", num_tokens=tokens, top_k=TOP_K).out


def routed(given: dict[str, torch.Tensor]) -> torch.Tensor:
    """dispatch → experts → combine."""
    y, sent = experts(given)
    return combine(y, sent, given)


def passed(
    block: Callable[..., Any], *args: Any, passes: Any, dynamic: bool | None = None, exact: bool = False
) -> PassedGraph:
    """The inference graph of a block after ``passes``, which make nothing new of what they have made; it ran, and gave what
    the block gives (``exact``: the same bits)."""
    with torch.no_grad():
        graphs, got = capture(block, *args, passes=passes, dynamic=dynamic, run=True)
        expected = block(*args)
    for one, other in zip(tree_leaves(got), tree_leaves(expected)):
        close(one, other, 0.0 if exact else 1e-5 if one.dtype == torch.float32 else 4e-2)
    again = apply_passes(graphs[0].after, passes, "again")
    assert sum(again.rewrites.values()) == 0, f"not idempotent: {again.rewrites}"
    return graphs[0]


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Equal up to ``tolerance`` of the largest value."""
    assert got.dtype == expected.dtype and got.shape == expected.shape
    if tolerance == 0.0 or not got.is_floating_point():
        raw = [item.reshape(-1).contiguous().view(torch.uint8) for item in (got, expected)]
        assert torch.equal(*raw), f"{(raw[0] != raw[1]).sum()} bytes differ"
        return
    largest = expected.float().abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(got.float(), expected.float(), atol=tolerance * max(largest, 1e-3), rtol=0.0)


def text(graph: Any) -> str:
    """What a golden holds of a graph."""
    return normalized_graph(graph, ops=SHOWN)


def same_numbers(
    block: Callable[..., Any], given: dict[str, torch.Tensor], passes: Any, tolerance: float = 0.0
) -> dict[str, int]:
    """Compares values and gradients of a block with and without passes; returns the rewrites in the two graphs."""
    leaves = {name: item.clone().requires_grad_(item.is_floating_point()) for name, item in given.items()}
    wanted = [item for item in leaves.values() if item.requires_grad]
    plain = block(leaves)
    expected = torch.autograd.grad(plain.float().sin().sum(), wanted, allow_unused=True)
    graphs, result = capture(block, leaves, passes=passes, run=True)
    got = torch.autograd.grad(result.float().sin().sum(), wanted, allow_unused=True)
    close(result, plain, tolerance)
    for one, other in zip(got, expected):
        if other is not None:
            close(one, other, tolerance)
    counts: dict[str, int] = {}
    for graph in graphs:
        for name, count in graph.rewrites.items():
            counts[name] = counts.get(name, 0) + count
    return counts
