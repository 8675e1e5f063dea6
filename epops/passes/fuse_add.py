"""Fold what surrounds a combine into it: the addition of a residual or shared expert, a scalar, the routing weights."""

from __future__ import annotations

import math
import struct
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from ..torch_private import is_joint
from .decline_log import declined
from .graph_facts import (
    arguments,
    aten,
    constant,
    epops_calls,
    is_cast,
    is_reshape,
    keeps_values,
    nothing_written_between,
    op_name,
    prims,
    read_by_strides,
    recomputed_alone,
    results,
    same_shape,
    source,
    tensor,
)
from .rewriting import call, closure_after, erase_unused, hoist, reshape_like, set_arguments
from .spelled_sums import write_sum

RULE = "fuse_add"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ADDITIONS = (aten.add.Tensor, aten.sub.Tensor, aten.rsub.Tensor)
PRODUCTS = (aten.mul.Tensor, aten.div.Tensor)


def fuse_add(graph: Graph) -> int:
    """**Rewrite**::

        out = combine(y, route); z = a * out + b * other  -> z = combine(y, route, addend=other, out_scale=a, addend_scale=b)
        z = addcmul(combine(y, route), gate, other)       -> z = combine(y, route, addend=gate * other)
        z = addmm(combine(y, route), a, b)                -> z = combine(y, route, addend=a @ b)
        z = stack([combine(y, route), a, b]).sum(0)       -> z = combine(y, route, addend=a + b)
        combine(rows * weights.unsqueeze(-1), route)   -> combine(rows, route, row_weights=weights)

    **Requires** of the addition: nobody else sees ``out`` or what it passes through on the way (reshapes, dtype
    casts, scalars); ``other`` has the very shape of the sum (no broadcasting) on the same device, does not need the
    combine, and can be computed before it without moving an exchange or crossing a write; scalars whose product is
    exact in float32; a sum that is wider than the combine's rows, or than what it was
    rounded to on the way, is cast back at once; a combine that is not computed again in
    the backward without the sum.  Of the weights: one float
    weight a row, a product that nobody else reads, a combine without weights.

    **Guarantees**: one rounding, to the dtype that the combine has, where the unfused graph rounded after each step (of an addmm
    the product is rounded too, as what was added to it was); sums of more than two may be in another order;
    the order of exchanges is untouched.
    """
    count, joint = 0, is_joint(graph)
    while True:  # a sum that is left of a fused one may be another combine's
        found = 0
        for combine in epops_calls(graph, ("combine", "combine_wait")):
            if op_name(combine) == "combine":
                found += _fold_weights(graph, combine)
            found += _fold_addition(graph, combine, joint)
        if found == 0:
            return count
        count += found


# ---- the addition --------------------------------------------------------------------------------------------------


class Sum(NamedTuple):
    """``scale * (the combine's rows) + other_scale * other``, as it stands in the graph."""

    node: Node  # what computes the sum, a cast back to the combine's dtype included
    add: Node
    operand: Node  # the side of ``add`` that comes from the combine
    other: Node
    factors: list[float]
    other_scale: float
    between: list[Node]  # casts and scalars on the way from the combine
    written_out: tuple[Node, Node] | None = None  # another spelling of a sum, and the sum that now stands for it


def _fold_addition(graph: Graph, combine: Node, joint: bool) -> int:
    outs = results(combine, 0)
    if not outs:
        return 0
    found = _find_sum(combine, outs[0])
    if found is None:
        return 0
    given = arguments(combine)
    reason = _why_not_addition(combine, outs[0], given, found)
    if not reason and joint and recomputed_alone(combine, found.node):
        reason = f"it is computed again in the backward, and {found.add.name} is not: its addend would have to be kept for that"
    if reason:
        declined(RULE, combine, reason)
        if found.written_out is not None:
            node, result = found.written_out
            result.replace_all_uses_with(node)
            erase_unused([result])
        return 0
    if found.written_out is not None:
        erase_unused([found.written_out[0]])
    other, other_scale = _strip_scalar(found.other, found.other_scale, tensor(outs[0]).dtype)
    other = _strip_widening(other)
    moved = closure_after(combine, other)
    assert moved is not None, "what the whole operand needs can be hoisted, so can its part"
    hoist(moved, combine)
    with graph.inserting_before(combine):
        addend = reshape_like(graph, other, outs[0])
    changes: dict[str, Any] = {"addend": addend, "addend_scale": other_scale}
    scale = math.prod(found.factors) * given["out_scale"]
    if scale != given["out_scale"]:
        changes["out_scale"] = scale
    set_arguments(combine, changes)
    with graph.inserting_before(found.node):
        result = outs[0]
        if tensor(found.node).dtype != tensor(result).dtype:
            result = call(
                graph, prims.convert_element_type.default, (result, tensor(found.node).dtype), like=found.node
            )
        result = reshape_like(graph, result, found.operand)  # of the shape of the sum, and there before it
    if "has_backward_hook" in found.node.meta:  # of a checkpointed region's result: it is kept for the hook
        result.meta["has_backward_hook"] = found.node.meta["has_backward_hook"]
    found.node.replace_all_uses_with(result)
    erase_unused([found.node])
    return 1


def _find_sum(combine: Node, out: Node) -> Sum | None:
    """Follow the combine's rows through reshapes, casts and scalars to the addition that they end in."""
    current = out
    factors: list[float] = []
    between: list[Node] = []
    while True:
        users = list(current.users)
        additions = [user for user in users if user.target in ADDITIONS]
        if len(users) != 1:
            if additions:
                declined(
                    RULE, combine, f"{current.name} has {len(users)} users, and only one of them is {additions[0].name}"
                )
            return None
        user = users[0]
        written = write_sum(user, current)
        if written is not None:
            found = _read_sum(written.add, out, current, [*factors, written.factor], between)
            assert found is not None, "it is an addition of a tensor"
            return found._replace(written_out=(written.node, written.result))
        if user.op != "call_function" or sum(item is current for item in user.args) != 1:
            return None
        if additions and not _adds_zero(user, current):
            return _read_sum(user, out, current, factors, between)
        factor = _scalar_factor(user, current)
        if additions:
            pass
        elif factor is not None:
            factors.append(factor)
        elif not is_reshape(user) and not (is_cast(user) and tensor(user).dtype in FLOATS):
            if user.target in PRODUCTS and any(next_.target in ADDITIONS for next_ in user.users):
                declined(RULE, combine, f"{user.name} is its product with something that is no number known now")
            return None
        between.append(user)
        current = user


def _adds_zero(add: Node, operand: Node) -> bool:
    """What ``sum([a, b])`` begins with: nothing is scaled by it, widened or broadcast."""
    other = add.args[1] if add.args[0] is operand else add.args[0]
    total, rows = tensor(add), tensor(operand)
    return (
        add.target is aten.add.Tensor
        and constant(other) == 0
        and _alpha(add) == 1
        and total.dtype == rows.dtype
        and same_shape(total.shape, rows.shape)
    )


def _alpha(add: Node) -> Any:
    return add.kwargs.get("alpha", add.args[2] if len(add.args) > 2 else 1)


def _read_sum(add: Node, out: Node, operand: Node, factors: list[float], between: list[Node]) -> Sum | None:
    left, right = add.args[:2]
    alpha = _alpha(add)
    if not isinstance(alpha, (int, float)):
        return None
    scales = {
        aten.add.Tensor: (1.0, float(alpha)),
        aten.sub.Tensor: (1.0, -float(alpha)),
        aten.rsub.Tensor: (-float(alpha), 1.0),
    }[add.target]
    mine, theirs = scales if left is operand else scales[::-1]
    other = right if left is operand else left
    if tensor(other) is None:
        return None
    node, users = add, list(add.users)
    rows, total = tensor(out), tensor(add)
    if rows is None or total is None:
        return None
    if total.dtype != rows.dtype and keeps_values(rows.dtype, total.dtype) and len(users) == 1 and is_cast(users[0]):
        node = users[0]
    return Sum(node, add, operand, other, [*factors, mine], theirs, between)


def _why_not_addition(combine: Node, out: Node, given: dict[str, Any], found: Sum) -> str | None:
    rows, other, total = tensor(out), tensor(found.other), tensor(found.add)
    result = tensor(found.node)
    assert rows is not None and other is not None and total is not None and result is not None
    if given["addend"] is not None:
        return f"it has an addend already; {found.add.name} would be a second one"
    if len(results(combine, 0)) != 1:
        return "its rows are taken twice"
    if not (same_shape(other.shape, total.shape) and same_shape(tensor(found.operand).shape, total.shape)):
        return f"{found.add.name} broadcasts"
    if other.dtype not in FLOATS or total.dtype not in FLOATS or rows.dtype not in FLOATS:
        return f"{found.add.name} adds {other.dtype} to {rows.dtype}"
    if result.dtype != rows.dtype and not keeps_values(result.dtype, rows.dtype):
        return f"{found.add.name} is {total.dtype}, wider than the {rows.dtype} that the combine returns"
    narrow = next((node for node in found.between if not keeps_values(result.dtype, tensor(node).dtype)), None)
    if narrow is not None:
        return f"{narrow.name} rounds it to {tensor(narrow).dtype} before {found.add.name} makes {result.dtype} of it"
    if found.node is not found.add and result.dtype != rows.dtype:
        return f"{found.add.name} is cast to {result.dtype}, the combine returns {rows.dtype}"
    if other.device != rows.device:
        return f"{found.other.name} is on {other.device}"
    factors = [*found.factors, given["out_scale"]]
    if not _exact(factors):
        return (
            f"the product of the scalars {', '.join(f'{factor:g}' for factor in factors if factor != 1.0)} is not exact"
        )
    if op_name(combine) == "combine_wait" and math.prod(found.factors) != 1.0:
        return "its start half was given the scale already"
    if not nothing_written_between(combine, found.node):
        return f"memory is written in place between it and {found.add.name}"
    if read_by_strides(found.node):
        return f"{found.node.name} is read by strides, so it has to lie as it does"
    if closure_after(combine, found.other) is None:
        return (
            f"{found.other.name} needs the combine, an exchange that comes after it, or random numbers in their order"
        )
    return None


def _scalar_factor(user: Node, current: Node) -> float | None:
    """The number that a node multiplies ``current`` by; None when it does something else or the number is not exact."""
    rows, product = tensor(current), tensor(user)
    if rows is None or product is None or rows.dtype != product.dtype or not same_shape(rows.shape, product.shape):
        return None
    if user.target is aten.neg.default:
        return -1.0
    if user.target in (aten.mul.Tensor, aten.mul.Scalar):
        other = user.args[1] if user.args[0] is current else user.args[0]
        return constant(other)
    if (
        user.target in (aten.div.Tensor, aten.div.Scalar)
        and user.args[0] is current
        and "rounding_mode" not in user.kwargs
    ):
        divisor = constant(user.args[1])
        if divisor and abs(math.frexp(divisor)[0]) == 0.5:
            return 1.0 / divisor
    return None


def _strip_scalar(node: Node, scale: float, dtype: torch.dtype) -> tuple[Node, float]:
    """Take a scalar off the addend where nobody else wants the scaled one, and where it is not rounded to less than ``dtype``."""
    if len(node.users) != 1 or not node.args or tensor(node.args[0]) is None:
        return node, scale
    if not keeps_values(dtype, tensor(node).dtype):
        return node, scale
    inner = next((item for item in node.all_input_nodes if constant(item) is None), node)
    factor = None if inner is node or sum(item is inner for item in node.args) != 1 else _scalar_factor(node, inner)
    if factor is None or not _exact([factor, scale]):
        return node, scale
    return inner, factor * scale


def _strip_widening(node: Node) -> Node:
    """The addend before a cast that changes none of its values."""
    if is_cast(node) and isinstance(node.args[0], Node):
        before, after = tensor(node.args[0]), tensor(node)
        if (
            before is not None
            and after is not None
            and before.dtype in FLOATS
            and keeps_values(before.dtype, after.dtype)
        ):
            return node.args[0]
    return node


def _exact(factors: list[float]) -> bool:
    """Whether float32 factors (as the unfused graph would use them) have a product that is a float32."""
    product = 1.0
    for factor in factors:
        product *= _float32(factor)
        if not math.isfinite(product) or _float32(product) != product:
            return False
    return True


def _float32(number: float) -> float:
    try:
        return float(struct.unpack("f", struct.pack("f", number))[0])
    except OverflowError:
        return math.inf


# ---- the routing weights -------------------------------------------------------------------------------------------


def _fold_weights(graph: Graph, combine: Node) -> int:
    given = arguments(combine)
    y = given["y"]
    if given["row_weights"] is not None or given["y_scales"] is not None or tensor(y) is None:
        return 0
    product = source(y)
    if is_cast(product):
        product = source(product.args[0])
    if product.target is not aten.mul.Tensor or not all(tensor(item) is not None for item in product.args[:2]):
        return 0
    split = _rows_and_weights(product)
    if split is None:
        return 0
    rows, weights = split
    reason = _why_not_weights(combine, given, product, rows, weights)
    if reason:
        declined(RULE, combine, reason)
        return 0
    rows, weights = _strip_widening(rows), source(weights)
    with graph.inserting_before(combine):
        new_y = reshape_like(graph, rows, y)
        if tensor(weights).dtype != torch.float32:
            weights = call(graph, prims.convert_element_type.default, (weights, torch.float32), like=weights)
        if not same_shape(tensor(weights).shape, tensor(y).shape[:-1]):
            lead = [size if isinstance(size, int) else -1 for size in tensor(y).shape[:-1]]
            weights = call(graph, aten.reshape.default, (weights, lead), like=weights)
    set_arguments(combine, {"y": new_y, "row_weights": weights})
    for user in list(y.users):
        user.replace_input_with(y, new_y)
    erase_unused([y])
    return 1


def _rows_and_weights(product: Node) -> tuple[Node, Node] | None:
    """The side of a product that has one number a row, and the other one."""
    whole = tensor(product)
    for rows, weights in (product.args[:2], product.args[1::-1]):
        if isinstance(weights, Node) and weights.target is aten.expand.default:
            weights = weights.args[0]
        narrow, wide = tensor(weights), tensor(rows)
        if (
            narrow is None
            or wide is None
            or whole is None
            or not same_shape(wide.shape, whole.shape)
            or whole.dim() < 2
        ):
            continue
        if same_shape(narrow.shape, (*whole.shape[:-1], 1)) and not same_shape(narrow.shape, whole.shape):
            return rows, weights
    return None


def _why_not_weights(combine: Node, given: dict[str, Any], product: Node, rows: Node, weights: Node) -> str | None:
    y = given["y"]
    whole, sent, narrow = tensor(product), tensor(y), tensor(weights)
    before = tensor(_strip_widening(rows))
    assert whole is not None and sent is not None and narrow is not None and before is not None
    if given["layout"] == "rank":
        return "rows of the rank layout have a weight for each k, not one"
    if not same_shape(whole.shape[-1:], sent.shape[-1:]):
        return f"{product.name} has weights for parts of a row"
    if narrow.dtype not in FLOATS or whole.dtype not in FLOATS or before.dtype != sent.dtype:
        return f"{product.name} multiplies {before.dtype} by {narrow.dtype}, sent as {sent.dtype}"
    if sum(not isinstance(size, int) for size in sent.shape[:-1]) > 1:
        return "two sizes of its rows are symbolic"
    if not all(user is combine or _reads_shape_alone(user, y) for user in y.users):
        return f"{y.name} has other users"
    step = y
    while step is not product:
        step = step.args[0]
        if len(step.users) != 1:
            return f"{step.name} has other users"
    if not nothing_written_between(product, combine):
        return f"memory is written in place between {product.name} and it"
    return None


def _reads_shape_alone(user: Node, y: Node) -> bool:
    """Whether a node is a gradient of a combine without weights, which takes nothing but the shape from ``y``."""
    if op_name(user) != "combine_backward":
        return False
    given = arguments(user)
    others = [item for name, item in given.items() if name != "y"]
    return given["y"] is y and given["row_weights"] is None and given["y_scales"] is None and y not in others
