"""`epops.parallelize`: the one line that turns a model into an expert-parallel one, in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .. import layout
from ..group import get_group
from ..torch_private import fsdp_parameters
from . import builtin, state_dict
from .adapter import NotUnderstoodError, Plan, refuse, registered
from .generate import synchronize_generate
from .gradients import remember
from .shard import owner, shard_in_place
from .site import ATTRIBUTE, Site, facts_of, serving, site_of, sites
from .survey import found

GRAD_REDUCE = ("mean", "sum")
CHECKED = "_epops_fsdp_checked"


def parallelize(model: nn.Module, group: Any, *, grad_reduce: str = "mean", exact: bool | None = None) -> nn.Module:
    """Shard the routed experts of ``model`` over the ranks of ``group``, in place, and return the model.

    Every rank calls it with the same model (the same weights, or the meta device) and keeps its own E / R experts;
    everything else stays whole. From then on each rank runs its own batch of up to ``group.max_tokens`` tokens.

    Args:
        model: a transformers model of any MoE family, or a PyTorch model whose experts an adapter knows.
        group: the `epops.ExpertGroup` (or its name).
        grad_reduce: "mean": expert gradients are those of the loss averaged over ranks, as they are for parameters whose
            gradients DDP or FSDP average; "sum": those of the sum.
        exact: True rounds in bf16 and fp16 as the one-process model does: rows times router weights in the dtype in which the
            model multiplies them, and their sum over ranks in float32, which the wire then carries. False multiplies in
            float32 and sends a rank's share of the sum in the model's dtype: half the bytes, and as near to the true value.
            None: True on CPU ranks, False on GPUs. Without effect in float32. Equal on all ranks.

    Raises:
        NotUnderstoodError: no routed experts, or experts that no adapter understands; says what was found.
        ValueError: the model is sharded already, or an argument does not fit.
    """
    group = get_group(group) if isinstance(group, str) else group
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"epops.parallelize: model: expected an nn.Module, got {type(model).__name__}; pass the model itself"
        )
    if not (exact is None or isinstance(exact, bool)):
        raise ValueError(f"epops.parallelize: exact: expected True, False or None, got {exact!r}")
    if grad_reduce not in GRAD_REDUCE:
        raise ValueError(f"epops.parallelize: grad_reduce: expected one of {GRAD_REDUCE}, got {grad_reduce!r}")
    already = sites(model)
    if already:
        raise ValueError(f"epops.parallelize: model: {next(iter(already))!r} is sharded already; call it once a model")
    plans = _plan(model)
    _shard(model, plans, group, grad_reduce, exact)
    model.register_forward_pre_hook(_refuse_fsdp_over_experts)
    synchronize_generate(model, group)
    return model


def _plan(model: nn.Module) -> dict[str, Plan]:
    """Module name → plan for every block of routed experts; nothing is changed until all of them are understood."""
    plans: dict[str, Plan] = {}
    adapters = (*registered(), *builtin.ADAPTERS)
    survey = found(model)
    if survey.peft:
        raise NotUnderstoodError(
            f"epops.parallelize: model: PEFT layers lie on the routed experts ({survey.peft}); merge them first "
            "(merge_and_unload), or put the adapters on modules outside the experts"
        )
    # Adapters that know a class come first everywhere: a loop in an outer module must not be taken for one over its experts.
    for guesses in (False, True):
        asked = [adapter for adapter in adapters if adapter.guesses is guesses]
        for name, module in model.named_modules():
            if any(_covers(done, name) or (guesses and _covers(name, done)) for done in plans):
                continue
            adapter = next((adapter for adapter in asked if adapter.matches(module)), None)
            if adapter is not None:
                plans[name] = adapter.plan(module, name)
    left = [line for path, line in survey.experts.items() if not any(_covers(done, path) for done in plans)]
    if left:
        more = f"; and {len(left) - 4} more" if len(left) > 4 else ""
        raise refuse("model", "routed experts that no adapter understands: " + "; ".join(left[:4]) + more)
    if not plans:
        raise refuse("model", f"no routed experts in {type(model).__name__}: {survey.summary}")
    return plans


def _covers(done: str, path: str) -> bool:
    return done == "" or path == done or path.startswith(f"{done}.")


def _shard(model: nn.Module, plans: dict[str, Plan], group: Any, grad_reduce: str, exact: bool | None) -> None:
    done: dict[int, Any] = {}
    for name, plan in plans.items():
        module = model.get_submodule(name)
        slots = layout.num_slots_for(plan.num_experts, group.size)
        facts = facts_of(plan.num_experts, slots, group, grad_reduce, exact)
        site = Site(name, facts, serving(group), plan.shards, plan.names)
        module.__dict__[ATTRIBUTE] = site
        shard_in_place(module, group.rank, done)
        plan.install(module)
        state_dict.install(module, group)
        remember(module)


def _refuse_fsdp_over_experts(model: nn.Module, _: Any) -> None:
    """Before a forward outside of a graph: FSDP would gather the experts of different ranks into one tensor."""
    if torch.compiler.is_compiling() or model.__dict__.get(CHECKED) is model.__class__:
        return
    managed = fsdp_parameters(model)
    for name, module in sites(model).items():
        site = site_of(module)
        assert site is not None
        for path in site.shards:
            holder, parameter = owner(module, path)
            if (id(holder), parameter) in managed:
                raise ValueError(
                    f"epops: {name}.{path}: expected experts that FSDP leaves alone, got them sharded by fully_shard; pass "
                    "ignored_params=set(epops.expert_parameters(model)) to every fully_shard"
                )
    # fully_shard gives the module another class, after which this is looked at once more.
    model.__dict__[CHECKED] = model.__class__
