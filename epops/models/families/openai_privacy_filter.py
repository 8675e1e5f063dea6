"""OpenAI's privacy filter: on transformers' experts interface, but by default with a loop that computes in float32."""

from __future__ import annotations

from torch import nn

from .. import interface
from ..adapter import Plan
from .family import Family


class OpenAIPrivacyFilter(Family):
    package, kind = "openai_privacy_filter", "OpenAIPrivacyFilterExperts"

    def plan(self, module: nn.Module, name: str) -> Plan:
        wide = module.config._experts_implementation == "eager"
        shards = interface.shards(module)
        return Plan(module.num_experts, shards, lambda m: interface.install(m, wide=wide))
