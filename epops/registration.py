"""What importing epops does for transformers, without importing transformers: its registries get their ``"epops"`` entries.

A registry that is loaded gets its entry now, any other right after it is imported.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

ENTRIES = {
    "transformers.integrations.moe": "epops.models.interface",
    "transformers.distributed.expert_parallel": "epops.models.expert_parallel",
}
"""Module of transformers with a registry → module of epops whose ``register(module)`` makes the entry."""


class _Loader(importlib.abc.Loader):
    """Another loader, and the entry after it."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # As if this loader had never been here: pickling and reloading look at it.
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        _register(module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in ENTRIES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def _register(module: ModuleType) -> None:
    importlib.import_module(ENTRIES[module.__name__]).register(module)


def install() -> None:
    """Make the entries of what is loaded, and watch for the rest."""
    for name in ENTRIES:
        if name in sys.modules:
            _register(sys.modules[name])
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
