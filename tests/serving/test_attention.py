"""Attention of a decode step: the sums of transformers' sdpa, without repeated keys, and the model left as it was."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from epops.serving.attention import PACKED, packed, packed_attention

from .asked import plain


def given(heads: int, shared: int, queries: int, mask: str) -> tuple[Any, ...]:
    make = torch.Generator().manual_seed(0)
    query = torch.randn(3, heads, queries, 16, generator=make)
    key, value = (torch.randn(3, shared, 20, 16, generator=make) for _ in range(2))
    seen = torch.rand(3, heads if mask == "a head" else 1, queries, 20, generator=make) > 0.4
    return query, key, value, None if mask == "none" else seen


@pytest.mark.parametrize("mask", ["shared", "a head", "none"])
@pytest.mark.parametrize("shape", [(8, 2, 1), (8, 8, 1), (6, 1, 1), (8, 2, 4)], ids=str)
def test_it_is_the_attention_of_repeated_keys(shape: tuple[int, int, int], mask: str) -> None:
    query, key, value, seen = given(*shape, mask)
    groups = shape[0] // shape[1]
    module = SimpleNamespace(num_key_value_groups=groups, is_causal=False)
    got, weights = packed_attention(module, query, key, value, seen, scaling=0.3, dropout=0.0)
    repeated = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(query, *repeated, attn_mask=seen, scale=0.3)
    torch.testing.assert_close(got, expected.transpose(1, 2))
    assert weights is None


def test_a_compiled_step_repeats_no_keys() -> None:
    query, key, value, seen = given(8, 2, 1, "shared")
    module = SimpleNamespace(num_key_value_groups=4, is_causal=False)
    sizes = []

    def backend(graph: Any, inputs: Any) -> Any:
        nodes = [node.meta["example_value"] for node in graph.graph.nodes if "example_value" in node.meta]
        sizes.extend(node.numel() for node in nodes if isinstance(node, torch.Tensor))
        return graph

    torch._dynamo.reset()
    torch.compile(packed_attention, backend=backend, fullgraph=True)(module, query, key, value, seen)
    assert max(sizes) == key.numel()


def test_the_model_is_left_as_it_was() -> None:
    config = plain("qwen3_moe").config
    assert config._attn_implementation == "sdpa"
    with pytest.raises(KeyError), packed(config):
        assert config._attn_implementation == PACKED
        raise KeyError
    assert config._attn_implementation == "sdpa"
    config._attn_implementation = "eager"
    with packed(config):
        assert config._attn_implementation == "eager"
