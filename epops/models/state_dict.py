"""Sharded experts speak the unsharded layout: what is saved and loaded has the names and shapes of the whole model.

Saved, a shard is a DTensor over the group's mesh, so that torch.distributed.checkpoint writes one whole tensor; loaded,
whole tensors and DTensors are cut to this rank's rows before torch copies or assigns them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as Placement

from .shard import UNREAD, keep_unread, local_range, owner, slice_of
from .site import Shard, Site, site_of

_meshes: dict[str, DeviceMesh] = {}


def mesh_of(group: Any) -> DeviceMesh | None:
    """The group's one-dimensional mesh; None for a single rank, whose tensors are whole anyway."""
    if group.size == 1:
        return None
    if group.device_mesh is not None:
        return group.device_mesh
    known = _meshes.get(group.name)
    if known is None or known.get_group() is not group.process_group:
        _meshes[group.name] = DeviceMesh.from_group(group.process_group, group.device.type)
    return _meshes[group.name]


def install(module: nn.Module, group: Any) -> None:
    """Put the hooks on one experts module.  They hold the rank and the mesh, so that they outlive the group."""
    rank, mesh = group.rank, mesh_of(group)

    def save(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
        site = site_of(module)
        assert site is not None
        for path, shard in site.shards.items():
            local = state.get(prefix + path)
            if local is None:
                continue
            lo, hi = local_range(shard, site, rank)
            if path in site.names:
                del state[prefix + path]
                state.update({prefix + name: local[slot] for slot, name in enumerate(site.names[path][lo:hi])})
            else:
                holder, name = owner(module, path)
                unread = getattr(holder, UNREAD + name, None)
                state[prefix + path] = _whole(local[: hi - lo], shard, site, mesh, unread)

    def load(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        site = site_of(module)
        assert site is not None
        for path, shard in site.shards.items():
            if path in site.names:
                _load_named(module, state, prefix, path, site.names[path], local_range(shard, site, rank))
            elif state.get(prefix + path) is not None:
                if shard.whole:
                    _load_unread(module, path, state[prefix + path], shard, site, rank)
                state[prefix + path] = _rows(state[prefix + path], shard, site, rank)

    module.register_state_dict_post_hook(save)
    module.register_load_state_dict_pre_hook(load)


def _is_chunked(shard: Shard, site: Site) -> bool:
    """Whether our rows are those that DTensor's ``Shard(0)`` gives each rank."""
    return shard.full_rows == shard.rows and site.num_slots * shard.unit == -(-shard.rows // site.ep_size)


def _whole(local: Tensor, shard: Shard, site: Site, mesh: DeviceMesh | None, unread: Tensor | None = None) -> Tensor:
    """This rank's rows as (part of) the unsharded tensor; rows that nothing reads are zeros unless ``unread`` has this rank's."""
    if mesh is None:
        if not shard.whole:
            return local
        rest = local.new_zeros((shard.full_rows - shard.rows, *local.shape[1:])) if unread is None else unread
        return torch.cat([local, rest.to(local.dtype)])
    shape = torch.Size((shard.rows, *local.shape[1:]))
    if _is_chunked(shard, site):
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local, mesh, [Placement(0)], run_check=False, shape=shape, stride=stride)
    # Rows that no DTensor layout describes (several rows an expert, not divisible by ranks) are gathered: every rank must
    # ask for its state dict, as it does for a distributed checkpoint anyway.
    per_rank, share = site.num_slots * shard.unit, -(-(shard.full_rows - shard.rows) // site.ep_size)
    padded = local.new_zeros((per_rank + share, *local.shape[1:]))
    padded[: local.shape[0]].copy_(local)
    if unread is not None:
        padded[per_rank : per_rank + unread.shape[0]].copy_(unread)
    everything = [torch.empty_like(padded) for _ in range(site.ep_size)]
    torch.distributed.all_gather(everything, padded, group=mesh.get_group())
    experts = torch.cat([one[:per_rank] for one in everything])[: shard.rows]
    return torch.cat([experts, torch.cat([one[per_rank:] for one in everything])[: shard.full_rows - shard.rows]])


def _load_unread(module: nn.Module, path: str, value: Tensor, shard: Shard, site: Site, rank: int) -> None:
    """Keep what nothing reads of a tensor that is loaded, in the dtype and place of what was kept before."""
    value = value.full_tensor() if isinstance(value, DTensor) else value
    if not value.dim() or value.shape[0] != shard.full_rows:
        return  # torch will say what it expected
    holder, name = owner(module, path)
    before = getattr(holder, UNREAD + name, None)
    keep_unread(holder, name, value, shard, site, rank)
    kept = getattr(holder, UNREAD + name)
    if before is not None and not before.is_meta and kept is not None:
        setattr(holder, UNREAD + name, kept.to(before))


def _rows(value: Tensor, shard: Shard, site: Site, rank: int) -> Tensor:
    """This rank's rows, filled up to L slots, of an unsharded tensor or of a DTensor of it."""
    if isinstance(value, DTensor):
        same = value.placements == (Placement(0),) and value.device_mesh.size() == site.ep_size
        if same and _is_chunked(shard, site) and value.shape[0] == shard.full_rows:
            local = value.to_local()
            return slice_of(local, Shard(local.shape[0], shard.unit), site, 0)
        value = value.full_tensor()
    return slice_of(value, shard, site, rank) if value.dim() and value.shape[0] == shard.full_rows else value


def _load_named(
    module: nn.Module, state: dict[str, Any], prefix: str, path: str, names: tuple[str, ...], held: tuple[int, int]
) -> None:
    """Experts that are modules of their own in the unsharded layout: copy each of ours into its slot, drop the others."""
    lo, hi = held
    ours: dict[int, Tensor] = {}
    for expert, name in enumerate(names):
        value = state.pop(prefix + name, None)
        if value is not None and lo <= expert < hi:
            ours[expert - lo] = value.full_tensor() if isinstance(value, DTensor) else value
    stacked = module.get_parameter(path)
    complete = len(ours) == hi - lo
    if stacked.is_meta and ours and not complete:
        raise ValueError(
            f"epops load_state_dict: {prefix}{path}: the parameter is on the meta device and only {len(ours)} of this rank's "
            f"{hi - lo} experts were given; call model.to_empty(device=...) first, or give a layer's experts together"
        )
    if not complete:
        with torch.no_grad():
            for slot, value in ours.items():
                stacked[slot].copy_(value)
        return
    like = next(iter(ours.values())) if ours else stacked
    target = torch.zeros(stacked.shape, dtype=like.dtype, device=like.device)
    for slot, value in ours.items():
        target[slot].copy_(value)
    state[prefix + path] = target
