"""A graph as stable text: the same on every run, machine and torch version, so that tests can hold it.

Nodes are renamed by what they do (``%mm``, ``%mm.1``) in graph order, symbols of dynamic shapes by first appearance, results
of an exchange by the schema's words (``%dispatch.rows``); no addresses, no paths, no generated names.
"""

from __future__ import annotations

import operator
import re
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, GraphModule, Node

from ..torch_private import is_control_deps

DTYPES = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "b8",
    torch.float8_e4m3fn: "f8e4m3",
    torch.float8_e5m2: "f8e5m2",
    torch.float8_e8m0fnu: "f8e8m0",
}

SAME_OP = {
    "view": "reshape",
    "_unsafe_view": "reshape",
    "convert_element_type": "cast",
    "_to_copy": "cast",
    "preserve_node_ordering": "after",
}
"""Spellings that differ between torch versions and mean the same."""


SETTINGS = ("num_experts", "num_slots", "ep_size", "max_tokens", "num_tokens", "top_k", "capacity", "alignment", "lane")
"""Arguments of exchanges that are the same all over a model, or to be seen in the shapes; left out of the text."""


class Line(NamedTuple):
    """One node: its stable name, what it calls, what it computes, what it reads, and its whole text."""

    name: str
    op: str
    shape: str
    inputs: tuple[str, ...]
    after: tuple[str, ...]
    text: str


def dtype_text(dtype: torch.dtype) -> str:
    return DTYPES.get(dtype, str(dtype).removeprefix("torch."))


def graph_of(graph: Any) -> Graph:
    """The graph of a GraphModule, or the graph itself."""
    return graph.graph if isinstance(graph, GraphModule) else graph


def graph_text(graph: Any, *, ops: tuple[str, ...] | None = None) -> str:
    """The whole graph, a line a node; ``ops`` keeps the lines whose op starts with one of these words, and what they read
    from others is "..."."""
    lines = graph_lines(graph)
    if ops is None:
        return "\n".join(line.text for line in lines)
    kept = [line for line in lines if line.op.startswith(ops)]
    names = {line.name for line in kept}
    return "\n".join(_shorten(line, names) for line in kept)


def graph_near(graph: Any, op: str) -> str:
    """The lines whose op starts with a word, those of what they read, and of what reads them."""
    lines = graph_lines(graph)
    every = {line.name for line in lines}
    reads = {line.name: {_call_of(name, every) for name in line.inputs} for line in lines}
    found = {line.name for line in lines if line.op.startswith(op)}
    near = found.union(*(reads[name] for name in found))
    return "\n".join(line.text for line in lines if line.name in near or reads[line.name] & found)


def _call_of(name: str, known: set[str]) -> str:
    """The call that ``%dispatch.rows`` or ``%topk[0]`` is a result of."""
    name = name.partition("[")[0]
    while name not in known and "." in name:
        name = name.rpartition(".")[0]
    return name


def graph_lines(graph: Any) -> list[Line]:
    """The nodes of a graph in order; ``getitem`` of a call is part of the name of what it takes."""
    naming = _Naming()
    lines = []
    for node in _in_order(graph):
        line = naming.visit(node)
        if line is not None:
            lines.append(line)
    return lines


def names_of(graph: Any) -> dict[Node, str]:
    """Stable name of every node that computes something."""
    naming = _Naming()
    for node in _in_order(graph):
        naming.visit(node)
    return naming.names


INPUT_NUMBER = "epops_input"


def number_inputs(graph: Graph) -> None:
    """Number inputs in the order in which they are used, for their names now and in what passes make of the graph: in which
    order a graph has them, differs between versions of torch."""
    places = {node: place for place, node in enumerate(graph.nodes)}
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if all(INPUT_NUMBER in node.meta for node in inputs):
        return
    last = (len(places), 0)
    inputs.sort(
        key=lambda node: min(((places[user], user.all_input_nodes.index(node)) for user in node.users), default=last)
    )
    for number, node in enumerate(inputs):
        node.meta[INPUT_NUMBER] = number


def _in_order(graph: Any) -> list[Node]:
    """Nodes, inputs by their number first."""
    nodes = list(graph_of(graph).nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    inputs.sort(key=lambda node: node.meta.get(INPUT_NUMBER, 0))
    return [*inputs, *(node for node in nodes if node.op != "placeholder")]


class _Naming:
    def __init__(self) -> None:
        self.names: dict[Node, str] = {}
        self.counts: dict[str, int] = {}
        self.symbols: dict[str, str] = {}

    def visit(self, node: Node) -> Line | None:
        """The node's line; None for what is part of another's."""
        if node.op == "get_attr" and node.users and all(is_control_deps(user) for user in node.users):
            return None
        if node.op == "call_function" and node.target is operator.getitem and isinstance(node.args[0], Node):
            self.names[node] = self.names[node.args[0]] + _result_suffix(node.args[0], node.args[1])
            return None
        return self.line(node)

    def line(self, node: Node) -> Line:
        inputs = tuple(dict.fromkeys(self.names[item] for item in node.all_input_nodes if item in self.names))
        if node.op == "placeholder":
            name, op, call = self._fresh(node, "input"), "input", ""
        elif node.op == "output":
            name, op, call = "return", "return", self._value(node.args[0])
            return Line(name, op, "", inputs, (), f"return {call}")
        elif node.op == "get_attr":
            name, op, call = self._fresh(node, "constant"), "constant", ""
        else:
            target, args, kwargs, after = unwrap(node)
            op = op_text(target)
            name = self._fresh(node, op.rpartition(".")[2])
            call = f"({self._arguments(target, args, kwargs)})"
            waits = tuple(self.names[item] for item in after if item in self.names)
            shape = self._results(node)
            suffix = f" after {', '.join(waits)}" if waits else ""
            reads = tuple(item for item in inputs if item not in waits)
            return Line(name, op, shape, reads, waits, f"{name}: {shape} = {op}{call}{suffix}")
        shape = self.shape(node.meta.get("val"))
        return Line(name, op, shape, inputs, (), f"{name}: {shape} = {op}{call}")

    def _results(self, node: Node) -> str:
        """The shape of a result; of several, those that somebody takes, by name."""
        taken = sorted({user.args[1] for user in node.users if user.target is operator.getitem}, key=str)
        value = node.meta.get("val")
        if not taken or not isinstance(value, (tuple, list)):
            return self.shape(value)
        return ", ".join(f"{_result_name(node, index) or index} {self.shape(value[index])}" for index in taken)

    def shape(self, value: Any) -> str:
        """``bf16[4, s0]``; a tuple of results in brackets; a number as its type."""
        if isinstance(value, torch.Tensor):
            return f"{dtype_text(value.dtype)}[{', '.join(self._size(size) for size in value.shape)}]"
        if isinstance(value, (tuple, list)):
            return f"({', '.join(self.shape(item) for item in value)})"
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return self._size(value)
        return "?" if value is None else type(value).__name__

    def _size(self, size: Any) -> str:
        if isinstance(size, int):
            return str(size)
        expression = size.node.expr
        symbols = {str(symbol): symbol for symbol in expression.free_symbols}
        for word in re.findall(r"\w+", str(expression)):
            if word in symbols:
                self.symbols.setdefault(word, f"s{len(self.symbols)}")
        # Renamed in the expression and not in its text: the text is ordered by their names.
        return str(
            expression.xreplace(
                {one: type(one)(self.symbols[name], **one.assumptions0) for name, one in symbols.items()}
            )
        )

    def _fresh(self, node: Node, base: str) -> str:
        number = self.counts.get(base, 0)
        self.counts[base] = number + 1
        self.names[node] = f"%{base}" + (f".{number}" if number else "")
        return self.names[node]

    def _arguments(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        schema = getattr(target, "_schema", None)
        parts = []
        if schema is None:
            parts = [self._value(item) for item in args] + [
                f"{key}={self._value(item)}" for key, item in kwargs.items()
            ]
            return ", ".join(parts)
        skipped = False
        for index, argument in enumerate(schema.arguments):
            positional = not argument.kwarg_only and index < len(args)
            if not positional and argument.name not in kwargs:
                skipped = True
                continue
            item = args[index] if positional else kwargs[argument.name]
            default = argument.has_default_value() and _same(item, argument.default_value)
            if default or (schema.name.startswith("epops::") and argument.name in SETTINGS):
                skipped = True
                continue
            bare = not argument.kwarg_only and not skipped
            parts.append(self._value(item) if bare else f"{argument.name}={self._value(item)}")
        return ", ".join(parts)

    def _value(self, item: Any) -> str:
        if isinstance(item, Node):
            return self.names.get(item, "...")
        if isinstance(item, (tuple, list)):
            return f"[{', '.join(self._value(part) for part in item)}]"
        if isinstance(item, dict):
            return f"{{{', '.join(f'{key}: {self._value(part)}' for key, part in item.items())}}}"
        if isinstance(item, torch.dtype):
            return dtype_text(item)
        if isinstance(item, torch.SymInt):
            return self._size(item)
        if isinstance(item, (torch.device, torch.layout, torch.memory_format)):
            return str(item).removeprefix("torch.")
        if isinstance(item, float):
            return f"{item:g}" if float(f"{item:g}") == item else repr(item)
        if isinstance(item, (str, int, bool)) or item is None:
            return str(item)
        return type(item).__name__


def _same(left: Any, right: Any) -> bool:
    return type(left) is type(right) and not isinstance(left, Node) and left == right


def unwrap(node: Node) -> tuple[Any, tuple[Any, ...], dict[str, Any], tuple[Node, ...]]:
    """What a node calls and with what, seen through an ordering wrapper; and the nodes that it has to come after."""
    if not is_control_deps(node):
        return node.target, tuple(node.args), dict(node.kwargs), ()
    waits, holder, *given = node.args
    inner = getattr(node.graph.owning_module, holder.target).graph
    places = dict(zip([item for item in inner.nodes if item.op == "placeholder"], given, strict=True))
    call = next(item for item in inner.nodes if item.op == "call_function")
    args, kwargs = torch.fx.node.map_arg((call.args, call.kwargs), lambda item: places.get(item, item))
    return call.target, tuple(args), dict(kwargs), tuple(waits)


def op_text(target: Any) -> str:
    """``epops.dispatch``, ``mm``, ``cast``: without the overload, and one word for what has several."""
    schema = getattr(target, "_schema", None)
    if schema is not None:
        space, _, word = schema.name.partition("::")
        word = SAME_OP.get(word, word)
        return word if space in ("aten", "prims") else f"{space}.{word}"
    word = getattr(target, "__name__", None) or str(target)
    return SAME_OP.get(word, word)


def _result_suffix(node: Node, index: Any) -> str:
    """``.rows`` where the schema names a result, ``[0]`` where it does not."""
    name = _result_name(node, index)
    return f".{name}" if name else f"[{index}]"


def _result_name(node: Node, index: Any) -> str | None:
    schema = getattr(unwrap(node)[0], "_schema", None)
    if schema is None or not isinstance(index, int) or index >= len(schema.returns):
        return None
    return schema.returns[index].name or None


def _shorten(line: Line, kept: set[str]) -> str:
    def name(match: re.Match[str]) -> str:
        word = match.group()
        while word not in kept:
            if "." not in word:
                return "..."
            word = word.rpartition(".")[0]
        return match.group()

    head, equals, call = line.text.partition(" = ")
    return head + equals + re.sub(r"%[\w.]+", name, call) if equals else re.sub(r"%[\w.]+", name, line.text)
