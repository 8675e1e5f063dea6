"""Ways into a model: shard its routed experts over ranks without touching its source."""

from __future__ import annotations

from .adapter import Adapter, NotUnderstoodError, Plan, register_adapter
from .gradients import average_gradients, clip_grad_norm_, expert_parameters
from .join import join
from .optimizer_state import parallelize_optimizer
from .parallelize import parallelize
from .quantize_experts import quantize_experts
from .site import Shard

__all__ = [
    "Adapter",
    "NotUnderstoodError",
    "Plan",
    "Shard",
    "average_gradients",
    "clip_grad_norm_",
    "expert_parameters",
    "join",
    "parallelize",
    "parallelize_optimizer",
    "quantize_experts",
    "register_adapter",
]
