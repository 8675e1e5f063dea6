"""DBRX: experts lie side by side in the rows of three matrices."""

from __future__ import annotations

from torch import Tensor, nn

from ..adapter import Plan
from ..experts import Rows, exchange, linear
from ..site import Shard, set_method
from .family import Family, site


class Dbrx(Family):
    package, kind = "dbrx", "DbrxExperts"

    def plan(self, module: nn.Module, name: str) -> Plan:
        experts, unit = module.num_experts, module.ffn_hidden_size
        shard = Shard(experts * unit, unit)
        return Plan(
            experts, {f"mlp.{w}": shard for w in ("w1", "v1", "w2")}, lambda m: set_method(m, "forward", forward)
        )


def forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    here, mlp = site(self), self.mlp
    shape = (here.num_slots, self.ffn_hidden_size, self.hidden_size)

    def compute(rows: Rows) -> Tensor:
        gate = mlp.activation_fn(linear(rows, rows.x, mlp.w1.view(shape)))
        up = linear(rows, rows.x, mlp.v1.view(shape))
        return linear(rows, gate * up, mlp.w2.view(shape), transposed=True)

    y = exchange(here, hidden_states, top_k_index, top_k_weights, compute, loop=True, shares=True)
    return y.reshape(hidden_states.shape[0], -1, self.hidden_size)
