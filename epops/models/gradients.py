"""Gradients of a sharded model as an optimizer sees them: which are this rank's own, and their norm over all ranks."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..group import get_group
from .join import AVERAGE, CLIP, announce
from .site import site_of, sites

_sharded: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Experts modules of all models: parameters are replaced by loading and moving, modules are not."""


def remember(module: nn.Module) -> None:
    _sharded.add(module)


def expert_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that hold this rank's experts: each rank has its own, so FSDP, DDP and averaging must leave them alone."""
    found: dict[int, nn.Parameter] = {}
    for module in sites(model).values():
        found.update({id(p): p for p in _own(module)})
    return list(found.values())


def _own(module: nn.Module) -> list[nn.Parameter]:
    site = site_of(module)
    own = []
    for path in site.shards if site is not None else ():
        with contextlib.suppress(AttributeError):
            own.append(module.get_parameter(path))
    return own


def clip_grad_norm_(
    parameters: nn.Module | Tensor | Iterable[Tensor], max_norm: float, group: Any, *, norm_type: float = 2.0
) -> Tensor:
    """Scale gradients so that their norm is at most ``max_norm``; returns the norm, which is the one-process model's.

    Expert gradients count once for each rank's experts, all others once. Gradients that are not of experts must be equal on
    all ranks (averaged) or be DTensors. Collective: every rank of the group calls it.
    """
    group = get_group(group) if isinstance(group, str) else group
    announce(group, CLIP, max_norm)
    if isinstance(parameters, nn.Module):
        parameters = parameters.parameters()
    every = [p for p in ([parameters] if isinstance(parameters, Tensor) else list(parameters)) if p.grad is not None]
    own = {id(p) for module in list(_sharded) for p in _own(module)}
    experts = _power([p.grad for p in every if id(p) in own], norm_type, group.device)
    others = _power([p.grad for p in every if id(p) not in own], norm_type, group.device)
    if group.size > 1:
        operation = dist.ReduceOp.MAX if math.isinf(norm_type) else dist.ReduceOp.SUM
        experts = experts.to(group.device)
        dist.all_reduce(experts, operation, group=group.process_group)
    total = torch.maximum(experts, others) if math.isinf(norm_type) else (experts + others) ** (1.0 / norm_type)
    scale = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    with torch.no_grad():
        for p in every:
            assert p.grad is not None
            p.grad.mul_(scale.to(p.grad.device))
    return total


def average_gradients(model: nn.Module, group: Any) -> None:
    """Average over the group's ranks the gradients of everything that is not an expert, in place; collective.

    A parameter without a gradient on this rank counts as zero, as another rank may have one.
    """
    group = get_group(group) if isinstance(group, str) else group
    announce(group, AVERAGE)
    if group.size == 1:
        return
    own = {id(p) for p in expert_parameters(model)}
    shared: dict[torch.dtype, list[nn.Parameter]] = {}
    for p in model.parameters():
        if id(p) not in own and p.requires_grad:
            shared.setdefault(p.dtype, []).append(p)
    for parameters in shared.values():
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        dist.all_reduce(flat, group=group.process_group)
        flat /= group.size
        for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad = part.view_as(p).clone() if p.grad is None else p.grad.copy_(part.view_as(p))


def _power(grads: list[Any], norm_type: float, device: torch.device) -> Tensor:
    """Sum of the gradients' entries to the power of the norm (or their largest), in float32; of DTensors, over their mesh."""
    total = torch.zeros((), device=device)
    for grad in grads:
        norm = torch.linalg.vector_norm(grad, norm_type, dtype=torch.float32)
        norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).to(device)
        total = torch.maximum(total, norm) if math.isinf(norm_type) else total + norm**norm_type
    return total
