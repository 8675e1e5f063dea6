"""What a sharded experts module carries: plain settings that are equal on every rank, so that graphs are too."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

ATTRIBUTE = "_epops_site"
"""Where an experts module keeps its `Site`.  Not a buffer: ``to_empty`` and ``.to`` must leave it alone."""


class Serving:
    """Whether this rank's tokens take part, for all experts of one group: a device tensor that graphs read at run time.

    `epops.join` and ``generate`` switch it off on a rank that has run out of work, and the rank goes on serving its
    experts with the same graph.  One object a group: copies of a model share it.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.active = torch.ones((), dtype=torch.bool, device=group.device)
        self.padded = False
        """Every rank pads its batch to one number of tokens (a decode bucket): M is T, not the group's maximum."""

    def switch(self, active: bool) -> None:
        self.active.fill_(active)

    def __deepcopy__(self, memo: dict[int, Any]) -> Serving:
        return self


_SERVING: dict[str, Serving] = {}


def serving(group: Any) -> Serving:
    """The `Serving` of a group, made at first use."""
    known = _SERVING.get(group.name)
    if known is None or known.group is not group:
        known = _SERVING[group.name] = Serving(group)
    return known


@dataclasses.dataclass(frozen=True)
class Shard:
    """How a tensor of the unsharded layout lies on the ranks: rows ``[rank * L * unit, …)`` of its first dim.

    ``unit`` rows make one expert; ``rows`` is the unsharded number of them that belong to experts. ``whole`` is the number
    of rows of the unsharded tensor where it has more, which nothing reads: the ranks share them out and save them as they were.
    """

    rows: int
    unit: int = 1
    whole: int = 0

    @property
    def full_rows(self) -> int:
        return self.whole or self.rows


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """One routed-experts module of a sharded model.  Nothing in here differs between ranks, the rank itself included."""

    name: str
    facts: str
    """E, L, R, "mean" or "sum", "exact" or "fast" (`facts_of`).  A str, because Dynamo makes graph inputs of ints that it finds in
    objects if dynamic."""
    serving: Serving
    shards: dict[str, Shard] = dataclasses.field(default_factory=dict)
    """Names of parameters and buffers, relative to the module, that hold this rank's experts."""
    names: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Of those, tensors stacked from experts that are modules of their own → the unsharded layout's names, by expert."""
    quantized: bool = False
    """Whether `epops.quantize_experts` has made the experts fp8: rows are then quantized while they are dispatched."""

    @property
    def group(self) -> Any:
        """What ops take as their group."""
        return self.serving.group

    @property
    def num_experts(self) -> int:
        return int(self.facts.split()[0])

    @property
    def num_slots(self) -> int:
        return int(self.facts.split()[1])

    @property
    def ep_size(self) -> int:
        return int(self.facts.split()[2])

    @property
    def scale(self) -> float:
        """What the gradient of a loss averaged over ranks is divided by, on its way to the experts' parameters."""
        return float(self.ep_size) if self.facts.split()[3] == "mean" else 1.0

    @property
    def power(self) -> float:
        """The largest power of two in `scale`: what the gradients of rows can be divided by without being rounded."""
        return float(1 << (int(self.scale).bit_length() - 1))

    @property
    def exact(self) -> bool:
        """Round as the one-process model does, at the price of a wider wire."""
        return self.facts.split()[4] == "exact"


def facts_of(num_experts: int, num_slots: int, group: Any, grad_reduce: str, exact: bool | None = None) -> str:
    """`Site.facts`; ``exact=None`` is what suits the group's device: on CPU ranks the wire is not what takes the time."""
    exact = group.device.type == "cpu" if exact is None else exact
    return f"{num_experts} {num_slots} {group.size} {grad_reduce} {'exact' if exact else 'fast'}"


def site_of(module: nn.Module) -> Site | None:
    """The module's `Site`, or None for a module whose experts are not sharded."""
    return module.__dict__.get(ATTRIBUTE)


def sites(model: nn.Module) -> dict[str, nn.Module]:
    """Name → module of every sharded experts module of ``model``, each once, in the order of registration."""
    return {name: module for name, module in model.named_modules() if site_of(module) is not None}


def set_method(module: nn.Module, name: str, function: Callable[..., Any]) -> None:
    """Replace a method of this instance, and of no other."""
    setattr(module, name, types.MethodType(function, module))
