"""What the adapters of single families share: they know one class of transformers by its name."""

from __future__ import annotations

from torch import nn

from ..adapter import Adapter, Plan
from ..site import Site, site_of


class Family(Adapter):
    """An adapter for one class of one family; a subclass of the class counts too."""

    package = ""
    """The family's package below ``transformers.models``."""
    kind = ""

    def matches(self, module: nn.Module) -> bool:
        return any(c.__name__ == self.kind and f".{self.package}." in f".{c.__module__}." for c in type(module).__mro__)

    def plan(self, module: nn.Module, name: str) -> Plan:
        raise NotImplementedError


def site(module: nn.Module) -> Site:
    """The settings of a module that is sharded."""
    found = site_of(module)
    assert found is not None, "installed by parallelize only"
    return found
