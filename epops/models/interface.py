"""Transformers' experts interface: one forward for every family that uses it, without a line of its own.

An experts module holds ``gate_up_proj`` or ``up_proj``, ``down_proj``, their ``*_bias`` and (fp8) ``*_scale_inv``
companions, and says by flags how they are laid out; ``_apply_gate`` and ``act_fn`` are called as the family wrote them.
"""

from __future__ import annotations

import inspect
import types
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import epops

from .autograd import call_replicated
from .experts import Rows, bias, exchange, linear
from .site import Shard, Site, site_of

NAME = "epops"
FP8_SCALE = "_epops_scale"
"""After the name of a projection that `epops.quantize_experts` made fp8: its scales, (L, out) float32."""
FLAGS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed")


def matches(module: nn.Module) -> bool:
    """Whether ``module`` was made by transformers' ``use_experts_implementation``."""
    return all(hasattr(module, flag) for flag in FLAGS) and isinstance(getattr(module, "down_proj", None), Tensor)


def projections(module: nn.Module) -> tuple[str, str]:
    """Names of the two matrices that every expert has."""
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def shards(module: nn.Module) -> dict[str, Shard]:
    """Every tensor of the module itself with one entry an expert; what lies deeper (a norm) belongs to all experts."""
    rows = module.down_proj.shape[0]
    tensors = {**module._parameters, **module._buffers}
    return {name: Shard(rows) for name, t in tensors.items() if t is not None and t.dim() > 0 and t.shape[0] == rows}


def register(module: ModuleType) -> None:
    """Make ``set_experts_implementation("epops")`` a name that transformers knows: `parallelize` does the rest."""

    def experts(self: nn.Module, *_: Any, **__: Any) -> Tensor:
        raise ValueError(
            f"epops experts {type(self).__name__}: expected experts sharded over a group, got all {self.num_experts}; call "
            "epops.parallelize(model, group)"
        )

    module.ALL_EXPERTS_FUNCTIONS.register(NAME, experts)


def install(module: nn.Module, loop: bool = False, wide: bool = False) -> None:
    """Give the instance, and only it, a forward over the ranks: other models may share its class and its config.

    ``loop``: of `exchange`.  ``wide``: the family computes its experts in float32 whatever the model's dtype, which is followed
    where `Site.exact`.
    """
    names = list(inspect.signature(module.forward).parameters)[:3]
    module._epops_arguments, module._epops_loop, module._epops_wide = tuple(names), loop, wide
    module.forward = types.MethodType(forward, module)


def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """The experts' forward: tokens of this rank in, their weighted expert outputs back."""
    site = site_of(self)
    assert site is not None, "installed by parallelize only"
    x, topk_idx, topk_weights = args + tuple(kwargs[name] for name in self._epops_arguments[len(args) :])

    def compute(rows: Rows) -> Tensor:
        return run(self, site.group, rows, wide=self._epops_wide and site.exact)

    return exchange(site, x, unskipped(site, topk_idx), topk_weights, compute, loop=self._epops_loop, shares=True)


def unskipped(site: Site, topk_idx: Tensor) -> Tensor:
    """Families mark a selection that is to be skipped by the number of experts, one past the last: here it is -1."""
    return torch.where(topk_idx == site.num_experts, -1, topk_idx)


def run(self: nn.Module, group: Any, rows: Rows, wide: bool = False) -> Tensor:
    """Up, gate, down on rows grouped by expert; ``wide``: in float32."""
    up, down = projections(self)
    h = _project(self, rows, rows.x, up, wide)
    if self.has_gate:
        h = self._apply_gate(h)
    else:
        h = _activation(self, group, rows, h)
    y = _project(self, rows, h, down, wide)
    if self.has_post_expert_norm:
        y = call_replicated(self.post_expert_norm, group, _only_valid(rows, y), share=rows.share)
    return y


def _activation(self: nn.Module, group: Any, rows: Rows, h: Tensor) -> Tensor:
    act = self.act_fn
    return call_replicated(act, group, h, share=rows.share) if isinstance(act, nn.Module) else act(h)


def _only_valid(rows: Rows, y: Tensor) -> Tensor:
    """Zeros at padding: a norm's weight is shared by all rows, and what lies in padding must not reach its gradient."""
    return torch.where((rows.expert >= 0)[:, None], y, 0)


def _project(self: nn.Module, rows: Rows, x: Tensor, name: str, wide: bool) -> Tensor:
    weight = getattr(self, name)
    bias_of = getattr(self, f"{name}_bias", None) if self.has_bias else None
    quantized = getattr(self, name + FP8_SCALE, None)
    if quantized is not None:
        return _scaled(rows, x, weight, quantized, bias_of)
    scale = getattr(self, f"{name}_scale_inv", None)
    if scale is not None and weight.element_size() == 1:
        weight = dequantize(
            weight, scale, getattr(self, "block_size", None), x.dtype, where=f"{type(self).__name__}.{name}"
        )
    if wide:
        x, weight, bias_of = x.float(), weight.float(), None if bias_of is None else bias_of.float()
    return linear(rows, x, weight, bias_of, transposed=self.is_transposed)


def _scaled(rows: Rows, x: Tensor, weight: Tensor, scales: Tensor, bias_of: Tensor | None) -> Tensor:
    """``x @ weight[expert].T + bias[expert]`` in fp8: rows as the dispatch brought them, or quantized here, a scale a row."""
    given = x, rows.scales
    if x.element_size() > 1:
        given = epops.quantize(x, block=0)
    y = epops.grouped_mm(given[0], weight.transpose(1, 2), rows.ends, row_scales=given[1], weight_scales=scales)
    return y if bias_of is None else y + bias(rows, bias_of).to(y.dtype)


def dequantize(weight: Tensor, scale_inv: Tensor, block: Any, dtype: torch.dtype, *, where: str) -> Tensor:
    """(L, N, K) fp8 weights times their per-block (or per-tensor) scales, in ``dtype``."""
    if not weight.dtype.is_floating_point:
        raise ValueError(
            f"epops experts {where}: expected float8 weights, got {weight.dtype} (packed 4-bit); dequantize the model first"
        )
    scale = scale_inv.float()
    if block is not None:
        for dim, size in ((-2, block[0]), (-1, block[1])):
            scale = scale.repeat_interleave(size, dim=dim).narrow(dim, 0, weight.shape[dim])
    return (weight.float() * scale).to(dtype)
