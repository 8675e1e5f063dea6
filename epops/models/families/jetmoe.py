"""JetMoE: experts in the MLP, and in the attention as pairs of query and output projections."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter import Plan
from ..experts import Rows, exchange, linear
from ..site import Shard, set_method
from .family import Family, site


class JetMoeMLP(Family):
    package, kind = "jetmoe", "JetMoeMoE"

    def plan(self, module: nn.Module, name: str) -> Plan:
        return _plan(module, {"forward": mlp_forward})


class JetMoeAttention(Family):
    package, kind = "jetmoe", "JetMoeMoA"

    def plan(self, module: nn.Module, name: str) -> Plan:
        return _plan(module, {"map": attention_map, "reduce": attention_reduce})


def _plan(module: nn.Module, methods: dict[str, Any]) -> Plan:
    def install(module: nn.Module) -> None:
        for name, function in methods.items():
            set_method(module, name, function)
        set_method(module.router, "forward", route)

    num_experts = module.input_linear.num_experts
    shards = {"input_linear.weight": Shard(num_experts), "output_linear.weight": Shard(num_experts)}
    return Plan(num_experts, shards, install)


def route(self: nn.Module, hidden_states: Tensor) -> tuple[Tensor, None, Tensor, None, Tensor]:
    """Experts, weights and logits, in the places of the original's five results where others look for them."""
    logits = self.layer(hidden_states).float()
    best, experts = logits.topk(self.top_k, dim=1)
    return experts, None, best.softmax(dim=1).type_as(hidden_states), None, logits


def mlp_forward(self: nn.Module, layer_input: Tensor) -> Tensor:
    experts, _, weights, _, _ = self.router(layer_input.reshape(-1, layer_input.shape[-1]))

    def compute(rows: Rows) -> Tensor:
        gate, up = linear(rows, rows.x, self.input_linear.weight).chunk(2, dim=-1)
        return linear(rows, self.activation(gate) * up, self.output_linear.weight)

    return exchange(site(self), layer_input, experts, weights, compute, loop=True, shares=True) + self.bias


def _place(rows: Rows, top_k: int) -> Tensor:
    """(C, K) one-hot: which of its token's selections a row is. It travels in the place of the router weight."""
    places = torch.arange(top_k, device=rows.weights.device)
    return rows.weights.detach().round().long()[:, None] == places


def _places(experts: Tensor) -> Tensor:
    return torch.arange(experts.shape[1], device=experts.device, dtype=torch.float32).expand(experts.shape)


def attention_map(self: nn.Module, layer_input: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Each token's query of each of its experts, (batch, length, K, hidden): summed over experts in K separate columns."""
    batch, length, width = layer_input.shape
    x = layer_input.reshape(-1, width)
    experts, _, weights, _, logits = self.router(x)

    def compute(rows: Rows) -> Tensor:
        query = linear(rows, rows.x, self.input_linear.weight)
        return (query[:, None, :] * _place(rows, self.top_k)[:, :, None]).flatten(1)

    queries = exchange(site(self), x, experts, _places(experts), compute, weight_on="rows", shares=True)
    return queries.view(batch, length, self.top_k, -1), logits, (experts, weights)


def attention_reduce(self: nn.Module, layer_input: Tensor, topo_info: tuple[Tensor, Tensor]) -> Tensor:
    """Each expert's output projection of its own attention result, weighted and summed over a token's experts."""
    batch, length, top_k, width = layer_input.shape
    experts, weights = topo_info
    # Weights travel as columns of the row, for in their own place travels which selection a row is.
    columns = F.pad(weights.to(layer_input.dtype), (0, -top_k % 8))
    x = torch.cat([layer_input.reshape(-1, top_k * width), columns], dim=1)

    def compute(rows: Rows) -> Tensor:
        place = _place(rows, top_k)
        mine = (rows.x[:, : top_k * width].unflatten(1, (top_k, width)) * place[:, :, None]).sum(dim=1)
        weight = (rows.x[:, top_k * width :][:, :top_k] * place).sum(dim=1, keepdim=True)
        return linear(rows, mine, self.output_linear.weight) * weight

    y = exchange(site(self), x, experts, _places(experts), compute, weight_on="rows", shares=True)
    return y.view(batch, length, self.input_size) + self.bias
