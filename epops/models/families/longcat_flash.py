"""LongCat-Flash: experts past the routed ones compute nothing, they hand the token back."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..adapter import NotUnderstoodError, Plan
from ..experts import Rows, exchange, linear
from ..site import Shard, set_method
from .family import Family, site


class LongcatFlash(Family):
    package, kind = "longcat_flash", "LongcatFlashExperts"

    def plan(self, module: nn.Module, name: str) -> Plan:
        routed = module.num_routed_experts
        if not routed:
            raise NotUnderstoodError(f"epops.parallelize: {name}: it has no routed experts, only zero-computation ones")
        # The first matrix has rows for the zero-computation experts too, which nothing reads.
        shards = {"gate_up_proj": Shard(routed, whole=module.gate_up_proj.shape[0]), "down_proj": Shard(routed)}
        return Plan(routed, shards, lambda m: set_method(m, "forward", forward))


def forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    here = site(self)

    def compute(rows: Rows) -> Tensor:
        gate, up = linear(rows, rows.x, self.gate_up_proj).chunk(2, dim=-1)
        return linear(rows, self.act_fn(gate) * up, self.down_proj)

    zero = top_k_index >= here.num_experts
    routed = exchange(
        here, hidden_states, torch.where(zero, -1, top_k_index), top_k_weights, compute, loop=True, shares=True
    )
    kept = (top_k_weights * zero).sum(dim=-1, keepdim=True)
    return routed + (hidden_states * kept).to(hidden_states.dtype)
