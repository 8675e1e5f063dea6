"""Step 3.7: laid out like transformers' experts interface, without being on it."""

from __future__ import annotations

from torch import nn

from .. import interface
from ..adapter import Plan
from .family import Family


class Step3p7(Family):
    package, kind = "step3p7", "Step3p7Experts"

    def plan(self, module: nn.Module, name: str) -> Plan:
        return Plan(module.num_experts, interface.shards(module), install)


def install(module: nn.Module) -> None:
    module.has_gate, module.has_bias, module.has_post_expert_norm, module.is_transposed = True, False, False, False
    interface.install(module, loop=True)
