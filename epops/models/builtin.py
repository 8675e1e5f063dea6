"""The adapters that epops brings, in the order in which they are asked: the most specific first."""

from __future__ import annotations

from torch import nn

from . import interface
from .adapter import Adapter, Plan
from .families.dbrx import Dbrx
from .families.doge import Doge
from .families.ernie4_5_vl_moe import Ernie4_5VLMoe
from .families.jetmoe import JetMoeAttention, JetMoeMLP
from .families.llama4 import Llama4
from .families.longcat_flash import LongcatFlash
from .families.nllb_moe import NllbMoe
from .families.openai_privacy_filter import OpenAIPrivacyFilter
from .families.step3p7 import Step3p7
from .families.switch_transformers import SwitchTransformers
from .plain.blocks import ModuleLoop, StackedLoop
from .plain.direct import DirectExperts
from .plain.torchtitan import Torchtitan


class ExpertsInterface(Adapter):
    """Any module on transformers' experts interface."""

    def matches(self, module: nn.Module) -> bool:
        return interface.matches(module)

    def plan(self, module: nn.Module, name: str) -> Plan:
        return Plan(module.down_proj.shape[0], interface.shards(module), interface.install)


ADAPTERS: tuple[Adapter, ...] = (
    Ernie4_5VLMoe(),
    OpenAIPrivacyFilter(),
    ExpertsInterface(),
    Dbrx(),
    Doge(),
    JetMoeMLP(),
    JetMoeAttention(),
    Llama4(),
    LongcatFlash(),
    NllbMoe(),
    Step3p7(),
    SwitchTransformers(),
    Torchtitan(),
    DirectExperts(),
    ModuleLoop(),
    StackedLoop(),
)
