"""ERNIE 4.5 VL: text experts for text tokens, vision experts for vision tokens.

The original leaves the vision experts out where a batch has no image, which ranks with other batches would wait for; here
every rank calls both, with the other kind's tokens left out of each.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import interface
from ..adapter import Plan
from ..experts import Rows, exchange
from ..site import Shard, set_method
from .family import Family, site

KINDS = ("text_moe", "vision_moe")


class Ernie4_5VLMoe(Family):
    package, kind = "ernie4_5_vl_moe", "Ernie4_5_VLMoeMoeBlock"

    def plan(self, module: nn.Module, name: str) -> Plan:
        shards: dict[str, Shard] = {}
        for kind in KINDS:
            inner = interface.shards(module.get_submodule(f"{kind}.experts"))
            shards.update({f"{kind}.experts.{tensor}": shard for tensor, shard in inner.items()})
        return Plan(module.num_experts, shards, lambda m: set_method(m, "forward", forward))


def forward(
    self: nn.Module, hidden_states: Tensor, moe_mm_token_type_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    here, x = site(self), hidden_states.reshape(-1, hidden_states.shape[-1])
    vision = x.new_zeros(x.shape[0], dtype=torch.bool)
    if moe_mm_token_type_ids is not None:
        vision = moe_mm_token_type_ids.reshape(-1).bool()
    outputs, logits = [], []
    for kind, mine in zip(KINDS, (~vision, vision)):
        block = self.get_submodule(kind)
        scores, weights, selected = block.gate(x)

        def compute(rows: Rows, experts: nn.Module = block.experts) -> Tensor:
            return interface.run(experts, here.group, rows)

        outputs.append(exchange(here, x, torch.where(mine[:, None], selected, -1), weights, compute, shares=True))
        logits.append(scores)
    y = (outputs[0] + outputs[1]).reshape(hidden_states.shape)
    if self.shared_experts is not None:
        y = y + self.shared_experts(hidden_states)
    return y, torch.where(vision[:, None], logits[1], logits[0])
