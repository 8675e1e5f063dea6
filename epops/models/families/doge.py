"""Doge: many experts of one neuron each, found by product keys and stored as two embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..adapter import Plan
from ..experts import Rows, bias, exchange
from ..site import Shard, set_method
from .family import Family, site


class Doge(Family):
    package, kind = "doge", "DogeCDMoE"

    def plan(self, module: nn.Module, name: str) -> Plan:
        shard = Shard(module.num_experts)
        shards = {"down_embed.weight": shard, "up_embed.weight": shard}
        return Plan(module.num_experts, shards, lambda m: set_method(m, "forward", forward))


def route(self: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, experts and logits: the best sums of one score of each of two key sets."""
    tokens = x.shape[0]
    logits = self.router_gate(x).view(2, tokens, -1)
    scores, keys = logits.topk(self.num_keys, dim=-1)
    sums = (scores[0][:, :, None] + scores[1][:, None, :]).flatten(1)
    experts = (keys[0][:, :, None] * self.num_keys + keys[1][:, None, :]).flatten(1)
    best, position = sums.topk(self.top_k, dim=-1)
    weights = best.softmax(dim=-1)
    if self.norm_topk_prob:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights, experts.gather(-1, position), logits


def forward(self: nn.Module, hidden_states: Tensor, **_: object) -> tuple[Tensor, Tensor]:
    here = site(self)
    weights, experts, logits = route(self, hidden_states.reshape(-1, hidden_states.shape[-1]))

    def compute(rows: Rows) -> Tensor:
        down, up = bias(rows, self.down_embed.weight), bias(rows, self.up_embed.weight)
        neuron = (rows.x.float() * down.float()).sum(dim=-1, keepdim=True).to(rows.x.dtype)
        share = self.act_fn(neuron) * rows.weights[:, None].to(weights.dtype)
        # The original sums over a token's neurons in a matmul, which rounds the sum and not its terms.
        return share.float() * up.float() if here.exact else share * up

    shared = self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))
    routed = exchange(here, hidden_states, experts, weights, compute, weight_on="rows", shares=True)
    return shared + torch.reshape(routed, shared.shape), logits
