"""What a pass may believe about a graph: questions about nodes, answered yes only when the answer is proved.

Passes start from the ``epops.*`` nodes and walk, because a pattern matcher gives up on a node with extra users.  Nothing here
changes a graph; `rewriting` does.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.fx import Graph, Node

from ..schema import EXCHANGES
from ..torch_private import is_control_deps

aten = torch.ops.aten
prims = torch.ops.prims

RESHAPES = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.alias.default,
    aten.detach.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
)
"""Ops whose result has the elements of their first argument in the same row-major order, whatever the strides."""

COPIES = (aten.clone.default, aten.contiguous.default, aten.lift_fresh_copy.default)

PERMUTES = (aten.permute.default, aten.transpose.int, aten.t.default, aten.movedim.int, aten.swapaxes.default)

CASTS = (prims.convert_element_type.default, aten._to_copy.default, aten.to.dtype)


def op_name(node: Any) -> str | None:
    """``"dispatch"`` for a call of ``epops::dispatch``; None for everything else."""
    if not isinstance(node, Node) or node.op != "call_function":
        return None
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.name.startswith("epops::"):
        return None
    return schema.name[len("epops::") :]


def epops_calls(graph: Graph, names: Iterable[str]) -> list[Node]:
    """Calls of the named ops, in graph order."""
    wanted = set(names)
    return [node for node in graph.nodes if op_name(node) in wanted]


def arguments(node: Node) -> dict[str, Any]:
    """Every argument of an operator call by its name in the schema, defaults filled in, in schema order."""
    bound: dict[str, Any] = {}
    for index, argument in enumerate(node.target._schema.arguments):
        if argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        elif not argument.kwarg_only and index < len(node.args):
            bound[argument.name] = node.args[index]
        else:
            bound[argument.name] = argument.default_value
    return bound


def tensor(node: Any) -> Any:
    """The fake ``torch.Tensor`` that a node computes; None where it computes something else or nobody recorded it."""
    if not isinstance(node, Node):
        return None
    value = node.meta.get("val")
    return value if isinstance(value, torch.Tensor) else None


def value(item: Any) -> Any:
    """An argument as a number or fake tensor: a node's recorded value, anything else as it is."""
    return item.meta.get("val") if isinstance(item, Node) else item


def known_equal(left: Any, right: Any) -> bool:
    """Whether two sizes (ints, SymInts or the nodes that compute them) are equal for certain, without adding a guard."""
    left, right = value(left), value(right)
    if left is None or right is None or isinstance(left, torch.Tensor) or isinstance(right, torch.Tensor):
        return False
    if isinstance(left, int) and isinstance(right, int):
        return left == right
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(left == right))


def same_shape(left: Iterable[Any], right: Iterable[Any]) -> bool:
    """Whether two shapes are equal for certain."""
    left, right = tuple(left), tuple(right)
    return len(left) == len(right) and all(map(known_equal, left, right))


def results(node: Node, index: int) -> list[Node]:
    """The ``getitem`` nodes that take result ``index`` of a call."""
    return [user for user in node.users if user.target is operator.getitem and user.args[1] == index]


def result_users(node: Node, index: int) -> list[Node]:
    """Who uses result ``index`` of a call, each once."""
    return list(dict.fromkeys(user for item in results(node, index) for user in item.users))


def is_reshape(node: Any) -> bool:
    """Whether a node only renames the shape of its first argument: same elements, same order, same dtype."""
    if not isinstance(node, Node) or node.op != "call_function":
        return False
    if node.target in RESHAPES:
        return True
    return is_whole_slice(node) or is_whole_expand(node) or is_empty_pad(node) or is_only_entry(node)


def reshapes_on_all_ranks(node: Any) -> bool:
    """Whether a node is a reshape whatever sizes a rank has.

    That a slice keeps all tokens, or padding adds none, or a batch has one entry, says nothing of ranks with other tokens: which
    exchange there is may not follow from it.  Channels, the last dim, are as many on all ranks.
    """
    if not isinstance(node, Node) or node.op != "call_function":
        return False
    if node.target in RESHAPES:
        return True
    if node.target is aten.slice.Tensor:
        last = tensor(node) is not None and arguments(node)["dim"] in (-1, tensor(node).dim() - 1)
        return last and is_whole_slice(node)
    return is_empty_pad(node) and len(node.args[1]) <= 2


def is_whole_slice(node: Node) -> bool:
    """A slice that keeps everything."""
    before, after = tensor(node.args[0] if node.args else None), tensor(node)
    if node.target is not aten.slice.Tensor or before is None or after is None:
        return False
    step = node.args[4] if len(node.args) > 4 else node.kwargs.get("step", 1)
    return step == 1 and same_shape(before.shape, after.shape)


def is_whole_expand(node: Node) -> bool:
    """An expand to the shape that the tensor has."""
    before, after = tensor(node.args[0] if node.args else None), tensor(node)
    if node.target is not aten.expand.default or before is None or after is None:
        return False
    return same_shape(before.shape, after.shape)


def is_only_entry(node: Node) -> bool:
    """The one entry of a dimension of size 1."""
    before = tensor(node.args[0] if node.args else None)
    return node.target is aten.select.int and before is not None and known_equal(before.shape[node.args[1]], 1)


def is_empty_pad(node: Node) -> bool:
    """Padding by nothing."""
    return node.target is aten.constant_pad_nd.default and all(known_equal(size, 0) for size in node.args[1])


BY_STRIDES = (aten.as_strided.default, aten.as_strided_scatter.default)


def read_by_strides(node: Node) -> bool:
    """Whether the memory of a node, or of a view or copy of it, is read by the program's own strides: it has to lie as it does."""
    seen, waiting = {node}, [node]
    while waiting:
        for user in waiting.pop().users:
            if user.target in BY_STRIDES:
                return True
            if user not in seen and (user.target in COPIES or is_view(user)):
                seen.add(user)
                waiting.append(user)
    return False


def is_view(node: Node) -> bool:
    """Whether a node's result has, or may have, the memory of an argument."""
    returns = getattr(getattr(node.target, "_schema", None), "returns", ())
    return node.target is operator.getitem or any(item.alias_info for item in returns)


def is_cast(node: Any) -> bool:
    """Whether a node converts dtype and nothing else."""
    if not isinstance(node, Node) or node.op != "call_function" or node.target not in CASTS:
        return False
    extras = {name for name, given in node.kwargs.items() if given is not None} - {"dtype"}
    before, after = tensor(node.args[0]), tensor(node)
    return not extras - {"non_blocking", "copy", "memory_format", "layout", "device"} and (
        before is not None and after is not None and before.device == after.device
    )


WIDENING = {
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float64),
    (torch.float16, torch.float64),
    (torch.float32, torch.float64),
}


def keeps_values(before: torch.dtype, after: torch.dtype) -> bool:
    """Whether every value of one dtype is a value of the other."""
    return before == after or (before, after) in WIDENING


def source(node: Node) -> Node:
    """The node that a chain of reshapes starts from."""
    while is_reshape(node) and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def is_number(item: Any) -> bool:
    """A Python number, known now."""
    return isinstance(item, (int, float)) and not isinstance(item, bool)


def constant(item: Any) -> float | None:
    """A number known now: written as one, or filled into a tensor of one value."""
    if is_number(item):
        return float(item)
    if isinstance(item, Node) and item.op == "call_function":
        if item.target is aten.full.default and is_number(item.args[1]):
            filled = tensor(item)
            if filled is None or not filled.is_floating_point():
                return None
            return float(torch.tensor(item.args[1], dtype=filled.dtype).item())
        if item.target in (aten.scalar_tensor.default,) and is_number(item.args[0]):
            filled = tensor(item)
            return None if filled is None else float(torch.tensor(item.args[0], dtype=filled.dtype).item())
        if is_reshape(item) or item.target is aten.expand.default:
            return constant(item.args[0])
    return None


def writes(node: Node) -> bool:
    """Whether a node changes memory in place, or may: a mutable schema, or an operator that does not say."""
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    if node.op != "call_function":
        return True
    if node.target is operator.getitem:
        return False
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return bool(schema.is_mutable)
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return node.target.name() not in ("control_deps", "flex_attention", "flex_attention_backward")
    return getattr(node.target, "__module__", "") not in ("_operator", "math", "torch", "builtins")


def is_random(node: Node) -> bool:
    """Whether a node draws random numbers, which are others when it draws them earlier or later than the program does."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


COLLECTIVES = ("_c10d_functional", "_c10d_functional_autograd", "c10d", "c10d_functional", "fsdp", "symm_mem")
"""Namespaces of operators that talk to other ranks, or that wait for those that do."""


def is_exchange(node: Any) -> bool:
    """Whether a node talks to other ranks: an epops exchange, a collective of torch.distributed, or one with a pinned order."""
    name = op_name(node)
    if name is not None:
        return name in EXCHANGES
    if not isinstance(node, Node) or node.op != "call_function":
        return False
    if is_control_deps(node):
        return True
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.name.split("::")[0] in COLLECTIVES


def recomputed(node: Node) -> bool:
    """Whether activation checkpointing means to compute a node of a joint graph again in the backward."""
    return str(getattr(node.meta.get("recompute"), "name", "")).endswith("RECOMPUTE")


def recomputed_alone(node: Node, other: Node) -> bool:
    """Whether ``node`` is to be computed again in the backward and ``other`` not with it."""
    return recomputed(node) and (not recomputed(other) or node.meta.get("ac_graph_id") != other.meta.get("ac_graph_id"))


def between(first: Node, last: Node) -> Iterator[Node]:
    """Nodes after ``first`` and before ``last``."""
    node = first.next
    while node is not last and node.op != "root":
        yield node
        node = node.next


def nothing_written_between(first: Node, last: Node) -> bool:
    """Whether no node after ``first`` and before ``last`` writes in place; reads may then move between the two."""
    return not any(writes(node) for node in between(first, last))
