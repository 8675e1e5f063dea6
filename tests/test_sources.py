"""What every source file keeps: no unfinished marks, no catch-all modules, no endless files, no hidden host syncs."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("epops", "scripts", "benchmarks", "examples", "tests")
SUFFIXES = {".py", ".cu", ".cuh", ".cpp", ".h"}
SOURCES = sorted(
    path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*")
    if path.suffix in SUFFIXES and path != Path(__file__)
)
TEXTS = [
    *SOURCES,
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted(ROOT.glob("*.md")),
    ROOT / "Makefile",
    ROOT / ".ci/run",
]

# What runs inside a step, or decides what does: none of it may wait for the device.  (Reference and transports may: on
# gloo, counts are read on the host inside an op.)
IN_A_STEP = ("ops", "meta", "passes", "models", "backend.py", "nn")
SYNCS = {"item", "tolist", "cpu", "nonzero"}

# Files in those folders that read values on the host by design, and why no step waits for it.
ON_THE_HOST = {
    "epops/ops/exchange.py": "row counts, on transports that say `host_counts` (gloo)",
    "epops/ops/all_to_all.py": "split sizes, likewise",
    "epops/ops/plan_all_to_all.py": "split sizes, likewise",
    "epops/models/plain/search.py": "probes of a model that is being sharded, before any step",
    "epops/passes/graph_facts.py": "constants of the graph, while compiling",
    "epops/passes/quant_terms.py": "constants of the graph, while compiling",
}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", TEXTS, ids=relative)
def test_nothing_is_marked_unfinished_and_no_path_of_a_machine_is_named(path: Path) -> None:
    marks = re.compile(r"\b(TODO|FIXME|XXX)\b|(^|[^.a-z])/(work|root|home)/")
    found = [f"{n}: {line.strip()}" for n, line in enumerate(path.read_text().splitlines(), 1) if marks.search(line)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_a_file_can_be_read_in_one_sitting(path: Path) -> None:
    assert path.stem not in ("utils", "common", "helpers", "misc"), "name a file after what is in it"
    lines = len(path.read_text().splitlines())
    most = 600 if path.suffix == ".cu" else 500  # a kernel stays together with its launcher and its instantiations
    assert lines <= most, f"{lines} lines: split it where it falls apart naturally"


def host_syncs(path: Path) -> list[str]:
    """`file:line: code` of calls such as ``.item()`` in a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in SYNCS:
            found.append(f"{relative(path)}:{node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("place", IN_A_STEP)
def test_nothing_in_a_step_waits_for_the_device(place: str) -> None:
    top = ROOT / "epops" / place
    files = sorted(top.rglob("*.py")) if top.is_dir() else [top] * top.exists()
    found = [line for path in files if relative(path) not in ON_THE_HOST for line in host_syncs(path)]
    assert not found, "\n".join(found)


def test_the_files_that_read_values_on_the_host_still_do() -> None:
    stale = [name for name in ON_THE_HOST if not (ROOT / name).exists() or not host_syncs(ROOT / name)]
    assert not stale, f"take them out of ON_THE_HOST: {stale}"
