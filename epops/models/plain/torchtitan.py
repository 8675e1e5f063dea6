"""Blocks in the manner of torchtitan: a token-choice router, grouped experts ``w1 w2 w3``, and a shared expert or none.

The router is called as it is, so its scores, biases and load counts stay its own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..adapter import Adapter, Plan, refuse
from ..experts import Rows, exchange
from ..site import Shard, set_method, site_of
from ..stacked_module import sample
from . import probe
from .search import local
from .stacked import AtHolder, StackedMLP

WEIGHTS = ("w1", "w2", "w3")
ROUTED = "_epops_routed"
MLP = StackedMLP(gate="w1", up="w3", down="w2", activation="silu")


class Torchtitan(Adapter):
    def matches(self, module: nn.Module) -> bool:
        experts = getattr(module, "experts", None)
        return (
            isinstance(experts, nn.Module)
            and isinstance(getattr(module, "router", None), nn.Module)
            and hasattr(module, "score_before_experts")
            and all(isinstance(getattr(experts, w, None), Tensor) and getattr(experts, w).dim() == 3 for w in WEIGHTS)
        )

    def plan(self, module: nn.Module, name: str) -> Plan:
        num_experts = module.experts.w1.shape[0]
        probed = sample(module)
        # The same function, without kernels that only an accelerator has.
        probed.experts.use_grouped_mm = False
        set_method(probed, ROUTED, _local)
        original = type(probed).forward
        parameters = [p for p in probed.parameters() if p.requires_grad]
        for x in probe.inputs(module.experts.w1.shape[2]):
            if not probe.same_function(lambda t: original(probed, t), lambda t: forward(probed, t), x, parameters):
                raise refuse(
                    name, f"{type(module).__name__} looks like torchtitan's MoE but answers a probe differently"
                )

        def install(module: nn.Module) -> None:
            set_method(module, ROUTED, _over_ranks)
            set_method(module, "forward", forward)

        return Plan(num_experts, {f"experts.{w}": Shard(num_experts) for w in WEIGHTS}, install)


def forward(self: nn.Module, x: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    bias = getattr(self, "expert_bias", None)
    scores, selected, counts = self.router(flat, bias)
    counted = getattr(self, "tokens_per_expert", None)
    if counted is not None:
        with torch.no_grad():
            counted.add_(counts)
    y = getattr(self, ROUTED)(flat, selected, scores)
    shared = getattr(self, "shared_experts", getattr(self, "shared_expert", None))
    if shared is not None:
        y = shared(flat) + y
    return y.reshape(x.shape)


def _weighted(self: nn.Module, x: Tensor, weights: Tensor) -> Tensor:
    return (x.float() * weights[:, None]).to(x.dtype) if self.score_before_experts else x


def _over_ranks(self: nn.Module, x: Tensor, selected: Tensor, scores: Tensor) -> Tensor:
    site = site_of(self)
    assert site is not None, "installed by parallelize only"

    def compute(rows: Rows) -> Tensor:
        given = _weighted(self, rows.x, rows.weights)
        if getattr(self.experts, "use_grouped_mm", False):
            given = given.bfloat16()  # as torchtitan's grouped experts do, whatever the model's dtype
        return MLP(self.experts, rows._replace(x=given)).to(rows.x.dtype)

    return exchange(
        site, x, selected, scores, compute, weight_on="rows" if self.score_before_experts else "output", shares=True
    )


def _local(self: nn.Module, x: Tensor, selected: Tensor, scores: Tensor) -> Tensor:
    experts = AtHolder(MLP, "experts")
    if not self.score_before_experts:
        return local(self, experts, x, selected, scores)
    top_k = selected.shape[1]
    weighted = (x[:, None, :] * scores[:, :, None]).flatten(0, 1)
    return local(self, experts, weighted, selected.reshape(-1, 1), None).view(-1, top_k, x.shape[1]).sum(dim=1)
