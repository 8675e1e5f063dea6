"""Imports run one way: backend → passes → schema; ops → reference, meta, transport → layout.  Every module has a place."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "epops"

# Legends that everything may read and that read nothing of ours.
LEAVES = {"layout", "schema", "row_program", "errors", "torch_private", "registration"}

# Module or folder directly under epops → the others that it may import (itself and the leaves always).
ALLOWED: dict[str, set[str]] = {
    "meta": set(),
    "reference": set(),
    "transport": {"_C", "reference"},  # what has no kernel is computed as the reference says
    "group": {"transport"},
    "ops": {"meta", "reference", "transport", "group"},
    "passes": {"reference"},  # what has no op of its own is written into a graph as the reference says
    "checkpoint": set(),
    "backend": {"passes", "group"},
    "models": {"ops", "group", "__init__"},  # the model seam is a user of the public functions
    "nn": {"ops", "group"},
}

# At the top: they may import anything below, and nothing below may import them.
TOPS = {"__init__", "cli", "demo", "inspection", "quantizer", "serving", "testing", "zoo"}

# Where Inductor documents how a backend calls it and how a pass is hooked in; everything else below torch._… is private.
INDUCTOR = {
    "torch._inductor",
    "torch._inductor.config",
    "torch._inductor.compile_fx",
    "torch._inductor.custom_graph_pass",
}


def place_of(path: Path) -> str:
    """First part of a module's name under epops: "ops" for epops/ops/dispatch.py, "group" for epops/group.py."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports_of(path: Path) -> set[tuple[str, int]]:
    """(place, line) of every import of epops in a file, those inside functions too, those for type checkers not.

    >>> sorted(place for place, _ in imports_of(PACKAGE / "transport" / "__init__.py"))
    ['transport', 'transport']
    """
    tree = ast.parse(path.read_text())
    for_types = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.walk(node)
    }
    parts = ("epops", *path.relative_to(PACKAGE).parent.parts)
    found: set[tuple[str, int]] = set()
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(parts[: len(parts) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            names = [".".join([*base, alias.name]) for alias in node.names]
        else:
            continue
        found |= {(resolve(name), node.lineno) for name in names if name.split(".")[0] == "epops"}
    return found


def resolve(name: str) -> str:
    """Place of a dotted name: "epops.ops.dispatch.dispatch" → "ops"; a name of epops itself → "__init__"."""
    first = (name.split(".") + [""])[1]
    exists = (PACKAGE / first).is_dir() or (PACKAGE / f"{first}.py").exists() or first == "_C"
    return first if first and exists else "__init__"


MODULES = sorted(path for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_what_lies_below_it(path: Path) -> None:
    place = place_of(path)
    known = LEAVES | set(ALLOWED) | TOPS
    assert place in known, (
        f"epops/{place} has no place in the order of imports: add it to ALLOWED or TOPS in {__file__}"
    )
    if place in LEAVES:
        below: set[str] = set()
    elif place in TOPS:
        below = known | {"_C"}
    else:
        below = ALLOWED[place] | LEAVES | {place}
    may = f"{place} may import {', '.join(sorted(below)) or 'nothing of epops'}"
    wrong = [f"line {line} imports epops.{name}; {may}" for name, line in sorted(imports_of(path)) if name not in below]
    assert not wrong, "\n".join(wrong)


def test_the_order_has_no_cycle() -> None:
    done = LEAVES | {"_C", "__init__"}
    waiting = dict(ALLOWED)
    while waiting:
        ready = [place for place, below in waiting.items() if below <= done]
        assert ready, f"ALLOWED goes in a circle among {sorted(waiting)}"
        done |= set(ready)
        for place in ready:
            del waiting[place]


def test_private_parts_of_torch_are_used_in_one_module_only() -> None:
    wrong = []
    for path in MODULES:
        if place_of(path) == "torch_private":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            wrong += [
                f"{path.relative_to(PACKAGE.parent)}:{node.lineno} imports {name}" for name in names if is_private(name)
            ]
    assert not wrong, "through epops/torch_private.py, so that one file follows torch's changes:\n" + "\n".join(wrong)


def is_private(name: str) -> bool:
    """
    >>> is_private("torch._inductor.lowering"), is_private("torch.distributed"), is_private("_torch")
    (True, False, False)
    """
    parts = name.split(".")
    return parts[0] == "torch" and any(part.startswith("_") for part in parts) and name not in INDUCTOR
