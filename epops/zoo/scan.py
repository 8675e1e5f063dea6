"""Which model families of the installed transformers route tokens to experts: found by reading it, not by a list."""

from __future__ import annotations

import functools
import importlib
import re
from pathlib import Path
from types import ModuleType

INTERFACE = "@use_experts_implementation"
"""The decorator by which a family hands its experts to transformers' registry, ALL_EXPERTS_FUNCTIONS."""

OWN_EXPERTS = re.compile(r"^class \w*(Experts|MoE|Moe)\(", re.MULTILINE)
"""Families that keep their experts to themselves still name the class after what it is."""

CHOICE = re.compile(r"top_?k|argmax")
"""A router picks experts token by token; picking one by data set, as vitpose does, is no routing."""


@functools.cache
def _scan() -> dict[str, bool]:
    import transformers

    found: dict[str, bool] = {}
    for folder in sorted((Path(transformers.__file__).parent / "models").iterdir()):
        source = folder / f"modeling_{folder.name}.py"
        if not source.exists():
            continue
        text = source.read_text(encoding="utf-8")
        if INTERFACE in text:
            found[folder.name] = True
        elif OWN_EXPERTS.search(text) and CHOICE.search(text):
            found[folder.name] = False
    return found


def families(interface: bool | None = None) -> list[str]:
    """Folder names of transformers' MoE families, in alphabetical order.

    ``interface=True``: only those on the experts interface; ``False``: only those that are not.
    """
    return [name for name, on_interface in _scan().items() if interface is None or on_interface == interface]


def modeling(family: str) -> ModuleType:
    """transformers' modeling module of a family."""
    if family not in _scan():
        raise ValueError(
            f"epops.zoo: family {family!r} is not a MoE family of the installed transformers; "
            f"expected one of {', '.join(_scan())}"
        )
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")
