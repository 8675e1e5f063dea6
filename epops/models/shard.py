"""Sharding in place: this rank's experts replace all experts, one tensor at a time.

Expert e lives on rank ``e // L`` in slot ``e % L``, with L = E / R rounded up. A last rank with fewer experts has its
slots filled up with zeros, so that shapes, and so graphs, are equal on every rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .site import Shard, Site, site_of


def local_range(shard: Shard, site: Site, rank: int) -> tuple[int, int]:
    """First and last (exclusive) row of the unsharded tensor that ``rank`` holds; empty for a rank past the last expert."""
    per_rank = site.num_slots * shard.unit
    return min(rank * per_rank, shard.rows), min((rank + 1) * per_rank, shard.rows)


def local_shape(shape: torch.Size, shard: Shard, site: Site) -> torch.Size:
    return torch.Size((site.num_slots * shard.unit, *shape[1:]))


def slice_of(full: Tensor, shard: Shard, site: Site, rank: int) -> Tensor:
    """A fresh tensor with this rank's rows of ``full``, filled up with zeros to L slots; shares nothing with ``full``."""
    lo, hi = local_range(shard, site, rank)
    shape = local_shape(full.shape, shard, site)
    with torch.no_grad():
        if hi - lo == shape[0]:
            return full[lo:hi].clone(memory_format=torch.contiguous_format)
        # Not new_zeros: it has no kernel for some of the float8 dtypes, while zero_ on bytes serves all.
        local = torch.empty(shape, dtype=full.dtype, device=full.device)
        if not local.is_meta:
            local.view(torch.uint8).zero_() if local.element_size() == 1 else local.zero_()
            local[: hi - lo].copy_(full[lo:hi])
        return local


UNREAD = "_epops_unread_"
"""Before the name of a tensor: the buffer with this rank's part of those of its rows that nothing reads (`Shard.whole`).  It is
saved with the tensor and in no state dict by itself; None until a model on the meta device was given the tensor."""


def unread_slice(full: Tensor, shard: Shard, site: Site, rank: int) -> Tensor:
    """A fresh tensor with this rank's part of the rows of ``full`` that belong to no expert: equal parts, the last ones short."""
    share = -(-(shard.full_rows - shard.rows) // site.ep_size)
    lo = min(shard.rows + rank * share, shard.full_rows)
    return full[lo : min(lo + share, shard.full_rows)].detach().clone(memory_format=torch.contiguous_format)


def keep_unread(holder: nn.Module, name: str, full: Tensor, shard: Shard, site: Site, rank: int) -> None:
    """Keep what nothing reads of the unsharded tensor ``full`` that stands at ``name`` of ``holder``, for when it is saved."""
    if shard.full_rows > shard.rows:
        kept = None if full.is_meta else unread_slice(full, shard, site, rank)
        holder.register_buffer(UNREAD + name, kept, persistent=False)


def owner(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The submodule that holds the tensor ``path`` of ``module``, and its name there."""
    parent, _, name = path.rpartition(".")
    return module.get_submodule(parent), name


def shard_in_place(module: nn.Module, rank: int, done: dict[int, Tensor]) -> None:
    """Replace every tensor that the module's site names by this rank's rows of it.

    ``done`` maps the id of a tensor that was sharded before to what took its place, so that a tensor tied into two modules
    stays one tensor. (All tensors to shard are alive when the first one is sharded, so their ids differ.)
    """
    site = site_of(module)
    assert site is not None
    for path, shard in site.shards.items():
        if path in site.names:
            sources = [module.get_parameter(name) for name in site.names[path]]
            key = id(sources[0])
            if key not in done:
                lo, hi = local_range(shard, site, rank)
                done[key] = nn.Parameter(_stack(sources[lo:hi], sources[0], site), sources[0].requires_grad)
            _place(module, path, done[key])
            continue
        holder, name = owner(module, path)
        full = getattr(holder, name)
        if id(full) not in done:
            local = slice_of(full.detach(), shard, site, rank)
            done[id(full)] = nn.Parameter(local, full.requires_grad) if isinstance(full, nn.Parameter) else local
        keep_unread(holder, name, full, shard, site, rank)
        setattr(holder, name, done[id(full)])


def _stack(sources: list[nn.Parameter], like: Tensor, site: Site) -> Tensor:
    """This rank's experts' tensors, one a slot, zeros in the slots that are left."""
    stacked = torch.zeros((site.num_slots, *like.shape), dtype=like.dtype, device=like.device)
    with torch.no_grad():
        for slot, source in enumerate(sources):
            stacked[slot].copy_(source)
    return stacked


def _place(module: nn.Module, path: str, value: Tensor) -> None:
    """Register ``value`` at ``path``, with plain modules on the way where there are none."""
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in module._modules:
            module._modules[parent] = nn.Module()
        module = module._modules[parent]  # type: ignore[assignment]
    module._parameters[name] = value  # type: ignore[assignment]
