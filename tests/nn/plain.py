"""A tiny DeepSeek-V3 of transformers, requests that several ranks own, and what the plain one-process model makes of them."""

from __future__ import annotations

import copy

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DynamicCache

from epops.nn import Chunk


def model(heads: int = 6, layers: int = 2, q_lora_rank: int | None = 16) -> DeepseekV3ForCausalLM:
    """The same weights on every call, with every layer dense."""
    torch.manual_seed(7)
    config = DeepseekV3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, n_shared_experts=1, kv_lora_rank=12, q_lora_rank=q_lora_rank, qk_rope_head_dim=4, v_head_dim=6,
        qk_nope_head_dim=8, first_k_dense_replace=layers, max_position_embeddings=64, attn_implementation="eager",
    )  # fmt: skip
    made = DeepseekV3ForCausalLM(config).eval()
    for parameter in made.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)  # so that attention is far from uniform
    return made


def copied(plain: DeepseekV3ForCausalLM) -> DeepseekV3ForCausalLM:
    """A copy with a config of its own."""
    return copy.deepcopy(plain)


class Requests:
    """Requests in the plain model, each with its own cache: ``hidden(chunk)`` gives the last hidden states of new tokens."""

    def __init__(self, plain: DeepseekV3ForCausalLM) -> None:
        self.plain = plain
        self.caches: dict[tuple[int, int], DynamicCache] = {}

    def hidden(self, chunk: Chunk) -> torch.Tensor:
        key = (chunk.rank, chunk.slot)
        if chunk.start == 0:
            self.caches[key] = DynamicCache(config=self.plain.config)
        ids = torch.tensor([list(chunk.tokens)])
        positions = torch.arange(chunk.start, chunk.start + ids.shape[1]).unsqueeze(0)
        out = self.plain.model(input_ids=ids, position_ids=positions, past_key_values=self.caches[key])
        return out.last_hidden_state[0]


def steps(size: int) -> list[list[Chunk]]:
    """Prefills, decodes and both at once; ranks have different numbers of requests, at times none; a slot is used again."""
    last = size - 1
    tokens = torch.Generator().manual_seed(size)

    def some(count: int) -> list[int]:
        return torch.randint(64, (count,), generator=tokens).tolist()

    return [
        [Chunk(0, 0, 0, some(3)), Chunk(last, 3, 0, some(4)), Chunk(0, 1, 0, some(1))],
        [Chunk(0, 0, 3, some(1)), Chunk(last, 3, 4, some(1)), Chunk(0, 1, 1, some(1))],
        [Chunk(last, 3, 5, some(1))],
        [Chunk(0, 0, 4, some(1)), Chunk(last, 2, 0, some(4)), Chunk(last, 3, 6, some(1))],
        [Chunk(last, 2, 4, some(2)), Chunk(0, 1, 0, some(2))],
        [Chunk(0, 1, 2, some(1)), Chunk(last, 2, 6, some(1)), Chunk(last, 3, 7, some(1))],
    ]
