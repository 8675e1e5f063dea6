"""Switch Transformers: one expert a token, none for a token beyond its expert's capacity."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..adapter import Plan
from ..experts import exchange
from ..site import Shard, set_method
from ..stacked_module import StackedExperts
from .family import Family, site


class SwitchTransformers(Family):
    package, kind = "switch_transformers", "SwitchTransformersExperts"

    def plan(self, module: nn.Module, name: str) -> Plan:
        experts = StackedExperts({f"expert_{e}": module[f"expert_{e}"] for e in range(module.num_experts)}, name)

        def install(module: nn.Module) -> None:
            experts.adopt(module)
            set_method(module, "forward", forward)

        names = experts.names()
        return Plan(module.num_experts, {path: Shard(module.num_experts) for path in names}, install, names)


def forward(self: nn.Module, hidden_states: Tensor, selected_experts: Tensor, routing_weights: Tensor) -> Tensor:
    """``selected_experts`` (T, 1, E): one 1 at the token's expert, or zeros where the token was dropped."""
    chosen, expert = selected_experts.max(dim=-1)
    selected = torch.where(chosen > 0, expert, -1)
    return exchange(site(self), hidden_states, selected, routing_weights, self.stacked, loop=True, shares=True)
