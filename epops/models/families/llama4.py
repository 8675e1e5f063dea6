"""Llama 4: the router's score multiplies what goes into an expert, not what comes out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..adapter import Plan
from ..experts import Rows, exchange, linear
from ..site import Shard, set_method
from .family import Family, site


class Llama4(Family):
    package, kind = "llama4", "Llama4TextMoe"

    def plan(self, module: nn.Module, name: str) -> Plan:
        shard = Shard(module.num_experts)
        shards = {"experts.gate_up_proj": shard, "experts.down_proj": shard}
        return Plan(module.num_experts, shards, lambda m: set_method(m, "forward", forward))


def forward(self: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    x = hidden_states.reshape(-1, self.hidden_dim)
    scores, logits = self.router(x)
    selected = torch.topk(logits, self.top_k, dim=1).indices
    experts = self.experts

    def compute(rows: Rows) -> Tensor:
        weighted = rows.x * rows.weights[:, None].to(rows.x.dtype)
        gate, up = linear(rows, weighted, experts.gate_up_proj, transposed=True).chunk(2, dim=-1)
        return linear(rows, up * experts.act_fn(gate), experts.down_proj, transposed=True)

    routed = exchange(site(self), x, selected, scores.gather(1, selected), compute, weight_on="rows", shares=True)
    return self.shared_expert(x) + routed, logits
