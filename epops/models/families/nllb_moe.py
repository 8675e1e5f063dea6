"""NLLB-MoE: its experts read a one-hot mask as if it held expert ids, and so does this.

``one_hot(mask)`` of a 0/1 mask (T, E) sends token t once to expert 0 for every 0 in its row and once to expert 1 for every
1, weighted by the router's probability at that place. Checkpoints behave like that in transformers; the routing is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..adapter import Plan
from ..experts import Rows, exchange
from ..site import Shard, set_method
from ..stacked_module import StackedExperts
from .family import Family, site


class NllbMoe(Family):
    package, kind = "nllb_moe", "NllbMoeExperts"

    def plan(self, module: nn.Module, name: str) -> Plan:
        experts = StackedExperts({f"expert_{e}": module[f"expert_{e}"] for e in range(module.num_experts)}, name)

        def install(module: nn.Module) -> None:
            experts.adopt(module)
            set_method(module, "forward", forward)

        names = experts.names()
        return Plan(module.num_experts, {path: Shard(module.num_experts) for path in names}, install, names)


def forward(self: nn.Module, hidden_states: Tensor, router_mask: Tensor, router_probs: Tensor) -> Tensor:
    first = (router_probs * (1 - router_mask)).sum(dim=-1)
    second = (router_probs * router_mask).sum(dim=-1)
    weights = torch.stack([first, second], dim=-1)
    selected = torch.arange(2, device=weights.device).expand(weights.shape[0], 2)

    def compute(rows: Rows) -> Tensor:
        y = self.stacked(rows)
        if self.moe_token_dropout > 0:
            y = self.token_dropout(y) if self.training else y * (1 - self.moe_token_dropout)
        return y

    return exchange(site(self), hidden_states, selected, weights, compute, loop=True, shares=True)
