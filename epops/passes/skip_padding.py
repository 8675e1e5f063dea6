"""What stands between grouped products, computed for the rows that came and not for all that could have come."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from ..row_program import NAMES, VIEWS, Line, Program, Ref
from .decline_log import declined
from .graph_facts import nothing_written_between, op_name, tensor
from .rewriting import call, erase_unused
from .row_spaces import GROUPED_MM, Needs, Space, has_grouped
from .row_steps import SPLITS, Step, by_row, is_fill, step_of

RULE = "skip_padding"
MOST_INPUTS = 24
"""Of a `map_rows` that several were put together to; a kernel has so many registers."""


def skip_padding(graph: Graph) -> int:
    """**Rewrite**::

        a = grouped_mm(x, w1, ends); h = silu(a[:, :I]) * a[:, I:]; y = grouped_mm(h, w2, ends)
            ->  h, = map_rows([a], ends, program="x0: bf16[*, 2I] = rows() …")

    for any computation whose rows each come from the same row of its inputs (pointwise, casts, slices and reshapes within a row,
    biases gathered by ``row_expert``), written as a program (`epops.row_program`) that `map_rows` runs on the rows before
    ``ends[-1]``.

    **Requires**: every reader of what is replaced reads valid rows only: grouped products and their gradients with these very
    ``ends``, exchanges whose route is of the same dispatch, or nodes that are replaced too; no write in place on the way; row
    lengths that are known; CUDA tensors.  (On CPU, where each line is an op of torch, it is slower than the one loop that
    Inductor makes of all lines while more than about half of the rows are valid, and how many are is known at run time only;
    `skip_padding_everywhere` does it there too.)

    **Guarantees**: valid rows have the bits of the graph run node by node: each line rounds to its type, in bfloat16 too,
    where Inductor would not round in between (on CUDA exp and its like differ in their last bits).  Rows after the last end are
    unspecified on CUDA and zero on CPU, as those of a grouped product.
    """
    return _skip(graph, ("cuda",))


def skip_padding_everywhere(graph: Graph) -> int:
    """**Rewrite**: that of `skip_padding`.  **Requires**: the same, on whatever device.  **Guarantees**: the same."""
    return _skip(graph, None)


skip_padding_everywhere.joint = True  # type: ignore[attr-defined]


def _skip(graph: Graph, devices: tuple[str, ...] | None) -> int:
    if not has_grouped(graph):
        return 0
    needs = Needs(graph)
    _tell(needs, devices)
    made = 0
    groups: list[Region] = []
    for node in needs.outputs():
        if devices is not None and tensor(node).device.type not in devices:
            continue
        region = Region(needs, [node])
        if not region.computes() or not region.fits():
            continue
        if not nothing_written_between(region.first(), region.place()):
            declined(RULE, node, "memory is written in place between what it is computed from and its readers")
            continue
        if groups and (both := groups[-1].joined(region)) is not None:
            groups[-1] = both
        else:
            groups.append(region)
    for region in groups:
        _replace(graph, region)
        made += 1
    return made


def _tell(needs: Needs, devices: tuple[str, ...] | None) -> None:
    for node, reason in needs.why_not.items():
        rows = node
        while rows.target is operator.getitem or rows.target in SPLITS:
            rows = rows.args[0]
        given = op_name(rows) is not None or rows.target is GROUPED_MM
        found = tensor(node)
        if not given and found is not None and (devices is None or found.device.type in devices):
            declined(RULE, node, reason)


class Region:
    """Values that one `map_rows` returns, and what it computes them from."""

    def __init__(self, needs: Needs, outputs: list[Node]) -> None:
        self.needs = needs
        self.outputs = outputs
        self.space: Space = needs.space[outputs[0]]
        # Each with whether its rows are meant, or all of it for every row; operands before those who read them.
        self.inner: dict[tuple[Node, bool], Step] = {}
        self.inputs: dict[tuple[Node, bool], None] = {}
        for node in outputs:
            self._enter((node, True))

    def _enter(self, start: tuple[Node, bool]) -> None:
        """Without recursion: a chain of nodes may be longer than Python's stack."""
        stack: list[tuple[tuple[Node, bool], Step | None]] = [(start, None)]
        while stack:
            key, step = stack.pop()
            if key in self.inner:
                continue
            if step is not None:
                self.inner[key] = step
                continue
            step = self._step(*key)
            if step is None:
                self.inputs[key] = None
                continue
            stack.append((key, step))
            stack.extend(((item, self._by_row(item, step, key[0])), None) for item in reversed(step.operands))

    def _by_row(self, item: Node, step: Step, node: Node) -> bool:
        return by_row(item, step, node, self.space.rows)

    def _step(self, node: Node, rowwise: bool) -> Step | None:
        """How a node is computed in here; None where it is read."""
        if rowwise and self.needs.space.get(node) == self.space and node in self.needs.step:
            return self.needs.step[node]
        if is_fill(node) or rowwise:
            step = step_of(node, self.space.rows)
            # Views and numbers cost nothing to have again, whoever else wants them.
            if isinstance(step, Step) and (step.op == "full" or step.op in VIEWS):
                return step
        return None

    def computes(self) -> bool:
        """Whether it does more than take parts of what it reads, of which some is read row by row."""
        work = any(step.op not in VIEWS and step.op != "full" for step in self.inner.values())
        return work and any(rowwise for _, rowwise in self.inputs)

    def first(self) -> Node:
        """The first of the nodes that it replaces."""
        return min(node for node, _ in self.inner)

    def place(self) -> Node:
        """Before which node it is computed: the first that reads what it returns."""
        return min(user for node in self.outputs for user in node.users if (user, True) not in self.inner)

    def fits(self) -> bool:
        """Whether all that it reads is there in time."""
        return max(self.space.ends, *(node for node, _ in self.inputs)) < self.place()

    def joined(self, later: Region) -> Region | None:
        """Both in one, where they read the same and the later one needs nothing that the earlier one's readers make."""
        if self.space != later.space or not self.inputs.keys() & later.inputs.keys():
            return None
        both = Region(self.needs, [*self.outputs, *later.outputs])
        fits = both.fits() and nothing_written_between(both.first(), both.place())
        return both if fits and len(both.inputs) <= MOST_INPUTS else None

    def program(self) -> Program:
        """The region in the language, its values numbered in the order in which they are computed."""
        names: dict[tuple[Node, bool], str] = {}
        lines = []
        for number, (node, rowwise) in enumerate(self.inputs):
            names[node, rowwise] = f"x{number}"
            lines.append(self._line(f"x{number}", node, rowwise, "rows" if rowwise else "whole", ()))
        for number, ((node, rowwise), step) in enumerate(self.inner.items()):

            def named(item: Any, node: Node = node, step: Step = step) -> Any:
                if isinstance(item, (list, tuple)):
                    return tuple(map(named, item))
                return Ref(names[item, self._by_row(item, step, node)]) if isinstance(item, Node) else item

            names[node, rowwise] = f"v{number}"
            lines.append(self._line(f"v{number}", node, rowwise, step.op, tuple(map(named, step.args))))
        return Program(tuple(lines), tuple(names[node, True] for node in self.outputs))

    def _line(self, name: str, node: Node, rowwise: bool, op: str, args: tuple[Any, ...]) -> Line:
        found = tensor(node)
        assert found.dtype in NAMES
        shape = (None, *found.shape[1:]) if rowwise else tuple(found.shape)
        return Line(name, found.dtype, shape, op, args)


def _replace(graph: Graph, region: Region) -> None:
    program = str(region.program())
    like = region.outputs[0]
    with graph.inserting_before(region.place()):
        given = ([node for node, _ in region.inputs], region.space.ends)
        made = call(graph, torch.ops.epops.map_rows.default, given, {"program": program}, like=like)
        results = [call(graph, operator.getitem, (made, place), like=node) for place, node in enumerate(region.outputs)]
    for node, result in zip(region.outputs, results):
        node.replace_all_uses_with(result, delete_user_cb=lambda user: (user, True) not in region.inner)
    erase_unused(region.outputs)
