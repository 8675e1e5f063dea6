"""Expert parallelism that torch.compile can see: dispatch, combine and a ragged all-to-all as functional torch ops."""

from __future__ import annotations

import importlib
from typing import Any

from . import registration
from .errors import DisagreementError, EpopsError, GroupError, PeerError, RoutingError
from .group import ExpertGroup, check_all, get_group
from .ops.all_to_all import AllToAllResult, all_to_all, all_to_all_start, all_to_all_wait
from .ops.all_to_all_quant import AllToAllQuantResult, all_to_all_quant, all_to_all_quant_start, all_to_all_quant_wait
from .ops.combine import CombineResult, combine, combine_start, combine_wait
from .ops.dispatch import DispatchResult, dispatch, dispatch_start, dispatch_wait
from .ops.dispatch_quant import dispatch_quant, dispatch_quant_start, dispatch_quant_wait
from .ops.plan_all_to_all import Plan, plan_all_to_all
from .ops.seam import all_reduce, gather_tokens, grouped_mm

__version__ = "0.1.0"

_LAZY = {
    "backend": "epops.backend",
    "PASSES": "epops.passes",
    "save_exchanges": "epops.checkpoint",
    "checkpoint_contexts": "epops.checkpoint",
    "parallelize": "epops.models",
    "parallelize_optimizer": "epops.models",
    "quantize_experts": "epops.models",
    "expert_parameters": "epops.models",
    "register_adapter": "epops.models",
    "clip_grad_norm_": "epops.models",
    "average_gradients": "epops.models",
    "join": "epops.models",
    "inspect": "epops.inspection",
    "quantize": "epops.quantizer",
    "nn": "epops.nn",
    "passes": "epops.passes",
    "serving": "epops.serving",
    "testing": "epops.testing",
}
"""Names whose modules are imported on first use, so that ``import epops`` stays light."""

_MODULES = ("backend", "nn", "passes", "serving", "testing")
"""Of those, names that are modules themselves."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'epops' has no attribute {name!r}")
    module = importlib.import_module(_LAZY[name])
    value = module if name in _MODULES else getattr(module, name)
    globals()[name] = value
    return value


__all__ = [
    "AllToAllQuantResult",
    "AllToAllResult",
    "CombineResult",
    "DisagreementError",
    "DispatchResult",
    "EpopsError",
    "ExpertGroup",
    "GroupError",
    "PASSES",
    "PeerError",
    "Plan",
    "RoutingError",
    "all_reduce",
    "all_to_all",
    "all_to_all_quant",
    "all_to_all_quant_start",
    "all_to_all_quant_wait",
    "all_to_all_start",
    "all_to_all_wait",
    "average_gradients",
    "backend",
    "check_all",
    "checkpoint_contexts",
    "clip_grad_norm_",
    "combine",
    "combine_start",
    "combine_wait",
    "dispatch",
    "dispatch_quant",
    "dispatch_quant_start",
    "dispatch_quant_wait",
    "dispatch_start",
    "dispatch_wait",
    "expert_parameters",
    "gather_tokens",
    "get_group",
    "grouped_mm",
    "inspect",
    "join",
    "nn",
    "parallelize",
    "parallelize_optimizer",
    "passes",
    "plan_all_to_all",
    "quantize",
    "quantize_experts",
    "register_adapter",
    "save_exchanges",
    "serving",
    "testing",
]

registration.install()
