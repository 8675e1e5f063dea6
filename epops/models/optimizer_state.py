"""What an optimizer keeps for sharded experts, saved and loaded in the unsharded layout like the experts themselves.

A torch optimizer knows nothing of shards: the moments of a rank's own experts stand under the names of the whole model's, so a
checkpoint would keep one rank's and give them to all.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from .shard import local_range
from .site import Shard, Site, site_of, sites
from .state_dict import _rows, _whole, mesh_of

_HELD = "_epops_parallelized"


def parallelize_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """From now on ``optimizer.state_dict()`` and ``load_state_dict()`` speak the unsharded layout; in place, idempotent.

    Call it where the optimizer is made, on every rank, before it saves or loads.  Saved, the state of an expert parameter (its
    moments, say) is a DTensor over the group's mesh, or a whole tensor where no DTensor describes its rows; loaded, DTensors
    and whole tensors are cut to this rank's experts.  So `torch.distributed.checkpoint` keeps every rank's, and a run goes on
    with another number of ranks, or with one.  Saving is collective, as a distributed checkpoint is.

    State is taken for an expert's where its first dim is the parameter's; scalars (``step``) are equal on all ranks and stay
    as they are.  Raises ValueError where the optimizer has none of the model's expert parameters, and, when it saves, for
    state of another form (blocks of an 8-bit optimizer), which no unsharded layout describes.
    """
    if getattr(optimizer, _HELD, None) is model:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    places = _places(model)
    if not held & set(places):
        raise ValueError(
            "epops.parallelize_optimizer: optimizer: expected one that steps the experts of this model, got one with none of its "
            f"{len(places)} expert parameters; call epops.parallelize(model, group) before the optimizer is made"
        )
    # The ranks and the meshes outlive the groups, as those of the model's own hooks do.
    homes = {id(site): (site.group.rank, mesh_of(site.group)) for site, _, _ in places.values()}

    def save(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        places, state = _places(model), dict(state_dict["state"])
        for key, parameter in _numbered(optimizer, state_dict):
            if id(parameter) in places and key in state:
                site, shard, path = places[id(parameter)]
                rank, mesh = homes[id(site)]
                lo, hi = local_range(shard, site, rank)
                state[key] = {
                    name: _whole(value[: hi - lo], shard, site, mesh)
                    if _has_rows(name, value, parameter, path)
                    else value
                    for name, value in state[key].items()
                }
        return {**state_dict, "state": state}

    def load(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        places, state = _places(model), dict(state_dict["state"])
        for key, parameter in _numbered(optimizer, state_dict):
            if id(parameter) in places and key in state:
                site, shard, _ = places[id(parameter)]
                rank, _ = homes[id(site)]
                state[key] = {
                    name: _rows(value, shard, site, rank) if isinstance(value, Tensor) else value
                    for name, value in state[key].items()
                }
        return {**state_dict, "state": state}

    optimizer.register_state_dict_post_hook(save)
    optimizer.register_load_state_dict_pre_hook(load)
    setattr(optimizer, _HELD, model)


def _places(model: nn.Module) -> dict[int, tuple[Site, Shard, str]]:
    """id of an expert parameter → its site, how it is sharded and its name."""
    found: dict[int, tuple[Site, Shard, str]] = {}
    for name, module in sites(model).items():
        site = site_of(module)
        assert site is not None
        for path, shard in site.shards.items():
            parameter = dict(module.named_parameters()).get(path)
            if parameter is not None:
                found[id(parameter)] = (site, shard, f"{name}.{path}")
    return found


def _numbered(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> list[tuple[Any, Tensor]]:
    """Keys of a state dict with the optimizer's parameters, which stand in the same order in both."""
    keys = itertools.chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    parameters = itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups)
    return list(zip(keys, parameters))


def _has_rows(name: str, value: Any, parameter: Tensor, path: str) -> bool:
    if not isinstance(value, Tensor) or value.dim() == 0 or value.numel() == 1:
        return False
    if value.shape[0] != parameter.shape[0]:
        raise ValueError(
            f"epops.parallelize_optimizer: state {name!r} of {path}: expected a scalar or {parameter.shape[0]} rows, as the "
            f"parameter has, got shape {tuple(value.shape)}; save this optimizer's state per rank, without parallelize_optimizer"
        )
    return True
