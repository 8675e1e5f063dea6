"""Passes over graphs that have epops ops.

A pass is ``fn(graph: torch.fx.Graph) -> int``: it proves a rewrite or leaves the graph alone, and returns how many it made.
It keeps ``meta["val"]``, is idempotent, and its docstring says **Rewrite**, **Requires** and **Guarantees**.  A pass that needs an
order asks for it with `ordering.run_after`; the orders are written into the graph when all passes are done.
"""

from __future__ import annotations

import functools
import hashlib
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

from ..torch_private import is_joint
from . import process_groups
from .fuse_add import fuse_add
from .fuse_quant import fuse_quant
from .fuse_transpose import fuse_transpose
from .identity import identity
from .keep_order import keep_order
from .ordering import pin
from .output_strides import keep_output_strides, layout_of
from .overlap import overlap
from .skip_padding import skip_padding, skip_padding_everywhere

Pass = Callable[[Graph], int]

PASSES: tuple[Pass, ...] = (keep_order, fuse_transpose, fuse_quant, fuse_add, overlap, skip_padding)
"""The passes that run, in their order; `keep_order` is always on, and runs again at the end, over what the others made."""

ON_REQUEST: tuple[Pass, ...] = (skip_padding_everywhere,)
"""Passes that run where they are asked for, last: ``options={"passes": [*epops.PASSES, "skip_padding_everywhere"]}``."""

JOINT: tuple[Pass, ...] = (fuse_transpose, fuse_quant, fuse_add, skip_padding)
"""Passes that also run over the joint graph of forward and backward, before it is divided in two: what to keep for the
backward is then decided about the rewritten graph.  The others ask for orders, which only the divided graphs have.  A pass of
yours joins them by an attribute: ``my_pass.joint = True``."""


class Report(NamedTuple):
    """What one run over one graph did: pass name → rewrites; ``joint``: over a joint graph."""

    rewrites: dict[str, int]
    joint: bool = False


reports: deque[Report] = deque(maxlen=256)
"""The newest runs in this process; a graph that came out of a compile cache leaves none."""


def choose(selected: str | Pass | list[str | Pass] | tuple[str | Pass, ...] | None) -> tuple[Pass, ...]:
    """The passes for ``options={"passes": …}``: names of `PASSES` and `ON_REQUEST`, or functions of the user's, in the order given.

    None: all of `PASSES`.  `keep_order` is added when it is missing: without it ranks could exchange in different orders.
    """
    if selected is None:
        return PASSES
    if isinstance(selected, str) or callable(selected):
        selected = [selected]
    if not isinstance(selected, (list, tuple)):
        # A set has another order on every rank, and a generator nothing left for a second graph.
        raise ValueError(
            f"epops backend: options['passes']: expected a list or tuple of names and functions, in their order, got "
            f"{type(selected).__name__}; write [*epops.PASSES, …]"
        )
    known = {entry.__name__: entry for entry in (*PASSES, *ON_REQUEST)}
    chosen: list[Pass] = []
    for entry in selected:
        if isinstance(entry, str):
            if entry not in known:
                raise ValueError(
                    f"epops backend: options['passes']: expected names among {', '.join(known)} or functions of a graph, got "
                    f"{entry!r}"
                )
            entry = known[entry]
        elif not callable(entry):
            raise ValueError(
                f"epops backend: options['passes']: expected names or functions fn(graph) -> int, got {type(entry).__name__}"
            )
        chosen.append(entry)
    return tuple(chosen) if keep_order in chosen else (keep_order, *chosen)


class PassRunner(CustomGraphPass):
    """The passes as the one custom pass that Inductor runs before its own; ``earlier`` is one that was set before ours."""

    def __init__(self, passes: tuple[Pass, ...], earlier: Any = None) -> None:
        self.passes = passes
        self.earlier = () if earlier is None else tuple(earlier) if isinstance(earlier, (list, tuple)) else (earlier,)

    def __call__(self, graph: Graph) -> None:
        for entry in self.earlier:
            entry(graph)
        self.run(graph)

    def run(self, graph: Graph) -> None:
        reports.append(Report(run_passes(graph, self.passes)))

    def uuid(self) -> Any:
        before = tuple(entry.uuid() if hasattr(entry, "uuid") else None for entry in self.earlier)
        ours = _sources(self.passes)
        if ours is None or None in before:
            return None
        return (ours, before, tuple(sorted(process_groups.known().items())))


class JointRunner(PassRunner):
    """The passes of `JOINT` as the custom pass over joint graphs.  Inductor runs it in inference too, where it leaves the graph to
    `PassRunner`."""

    def run(self, graph: Graph) -> None:
        if is_joint(graph):
            reports.append(Report(run_joint_passes(graph, self.passes), joint=True))


def joint_passes(passes: Iterable[Pass]) -> tuple[Pass, ...]:
    """Those of ``passes`` that run over joint graphs."""
    return tuple(entry for entry in passes if entry in JOINT or getattr(entry, "joint", False))


def run_joint_passes(graph: Graph, passes: tuple[Pass, ...]) -> dict[str, int]:
    """Run those of ``passes`` that may see a joint graph over one, whose results lie in memory as before; returns pass name →
    rewrites."""
    done: dict[str, int] = {}
    before = layout_of(graph)
    for entry in joint_passes(passes):
        run_pass(entry, graph, done)
    keep_output_strides(graph, before)
    graph.lint()
    return done


def run_passes(graph: Graph, passes: tuple[Pass, ...]) -> dict[str, int]:
    """Run ``passes`` over ``graph`` and write the orders that they asked for; returns pass name → rewrites."""
    done: dict[str, int] = {}
    for entry in passes:
        if entry is not keep_order:
            run_pass(entry, graph, done)
    # Last in effect, whatever its place: it pins what the other passes left.
    run_pass(keep_order, graph, done)
    pin(graph)
    graph.lint()
    return done


def run_pass(entry: Pass, graph: Graph, done: dict[str, int]) -> None:
    """Run one pass over ``graph``, and add its rewrites to ``done`` under its name."""
    name = name_of(entry)
    try:
        count = entry(graph)
    except Exception as error:
        raise RuntimeError(f"epops backend: pass {name}: raised {type(error).__name__}: {error}") from error
    if not isinstance(count, int):
        raise TypeError(
            f"epops backend: pass {name}: expected the number of its rewrites, an int, got {type(count).__name__}; "
            "return 0 where it left the graph alone"
        )
    try:
        graph.lint()
    except RuntimeError as error:
        raise RuntimeError(f"epops backend: pass {name}: expected a graph that holds together, got: {error}") from error
    done[name] = done.get(name, 0) + count


def name_of(entry: Any) -> str:
    """What reports call a pass: a function's name, that of the function in a partial, or the class of an object.

    >>> name_of(fuse_add), name_of(functools.partial(fuse_add))
    ('fuse_add', 'fuse_add')
    """
    while isinstance(entry, functools.partial):
        entry = entry.func
    return getattr(entry, "__name__", type(entry).__name__)


def _package() -> bytes:
    digest = hashlib.sha256(torch.__version__.encode())
    package = Path(__file__).parent
    beside = [package.parent / name for name in ("schema.py", "torch_private.py", "row_program.py")]
    written = [package.parent / "reference" / name for name in ("quantize.py", "pack_rows.py")]
    for path in [*sorted(package.glob("*.py")), *beside, *written]:
        digest.update(path.read_bytes())
    return digest.digest()


_PACKAGE = _package()
"""Hash of the code that this process runs: read once, for a file may change under it."""


def _sources(passes: tuple[Pass, ...]) -> bytes | None:
    """Hash of all that decides what the passes do: this package's sources, and the `identity` of each pass; None where one has
    none."""
    digest = hashlib.sha256(_PACKAGE)
    for entry in passes:
        text = identity(entry)
        if text is None:
            return None
        digest.update(text.encode())
    return digest.digest()


__all__ = [
    "JOINT",
    "ON_REQUEST",
    "PASSES",
    "JointRunner",
    "Pass",
    "PassRunner",
    "Report",
    "choose",
    "joint_passes",
    "keep_order",
    "reports",
    "run_pass",
    "run_joint_passes",
    "run_passes",
]
