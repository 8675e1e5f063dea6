"""The adapter protocol: how `parallelize` learns a block of routed experts that it does not know.

An adapter looks at modules from the outside in. Where it recognizes one it plans: which tensors hold one entry an
expert, and what replaces the module's forward. Adapters of the user come before the built-in ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import nn

from .site import Shard


class NotUnderstoodError(ValueError):
    """A module holds routed experts, but what it does with them could not be established."""


def refuse(where: str, found: str) -> NotUnderstoodError:
    """The error that names a block, says what was found there and what to do."""
    return NotUnderstoodError(
        f"epops.parallelize: {where or 'model'}: {found}; write an epops.models.Adapter for the block and pass it to "
        "epops.register_adapter"
    )


@dataclasses.dataclass
class Plan:
    """What `parallelize` does to one module."""

    num_experts: int
    shards: dict[str, Shard]
    """Path of a tensor below the module → how its rows belong to experts; the rest of the tensors stay whole."""
    install: Callable[[nn.Module], None]
    """Called after sharding: puts the forward over the ranks on the instance; `site_of(module)` has the settings."""
    names: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """For experts that are modules of their own: stacked tensor → the unsharded layout's name of each expert's tensor."""


class Adapter:
    """Subclass, implement both methods, and hand an instance to `register_adapter`."""

    guesses = False
    """Whether it recognizes code rather than a class; such adapters are asked where no other one knows better."""

    def matches(self, module: nn.Module) -> bool:
        """Whether this adapter is the one for ``module``; cheap, and must not run the module."""
        raise NotImplementedError

    def plan(self, module: nn.Module, name: str) -> Plan:
        """How to shard ``module``; raises `NotUnderstoodError` with what was found when it cannot be proved right."""
        raise NotImplementedError


_registered: list[Adapter] = []


def register_adapter(adapter: Adapter) -> Adapter:
    """Let `parallelize` ask ``adapter`` before the built-in ones; returns it, so that it can be a decorator's result."""
    if not isinstance(adapter, Adapter):
        raise ValueError(f"epops.register_adapter: adapter: expected an epops.models.Adapter instance, got {adapter!r}")
    _registered.insert(0, adapter)
    return adapter


def registered() -> tuple[Adapter, ...]:
    """Adapters of the user, the last registered first."""
    return tuple(_registered)
