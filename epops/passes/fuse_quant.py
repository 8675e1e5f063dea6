"""Fold a quantizer into the dispatch next to it, so that fp8 rows and their scales cross the wire in one exchange."""

from __future__ import annotations

import itertools
import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from ..layout import QUANT_BLOCKS
from .decline_log import declined
from .graph_facts import (
    arguments,
    between,
    epops_calls,
    is_cast,
    is_reshape,
    keeps_values,
    known_equal,
    result_users,
    results,
    tensor,
    writes,
)
from .quant_all_to_all import quantize_all_to_all
from .quant_formula import Quantizer, Unknown, recognize, variants
from .quant_terms import FP8, Term, read_terms
from .quant_uses import FLOATS, RULE, read_uses, require_unwritten
from .rewriting import call, closure_after, erase_unused, hoist, reshape_like


def fuse_quant(graph: Graph) -> int:
    """**Rewrite**::

        rows = dispatch(x).rows; q, s = quantize(rows)   ->  q, s = dispatch_quant(x)
        q, s = quantize(x); dispatch(q, x_scales=s)      ->  dispatch_quant(x)
        q, s = quantize(x); dispatch(q), dispatch(s)     ->  dispatch(q, x_scales=s), and then as above
        q, s = quantize(all_to_all(x).rows)              ->  q, s = all_to_all_quant(x)
        all_to_all(q).rows, all_to_all(s).rows           ->  all_to_all of each row's scales and fp8, as one row of bytes

    Quantizing a row needs that row alone, so it commutes with routing.

    **Requires**: a formula that `quant_formula` reads exactly (block, format and rounding of the scales, eps,
    clamping, the order of roundings); nothing but the formula sees the unquantized rows, or only this dispatch the
    quantized ones; nothing written in between.  Of an all_to_all: rows (the last dim) stay whole; two that become one have the
    same splits, dims and room.  Ranks that cut or pad rows after quantizing them do so on all ranks: where that changes nothing
    torch drops it from the graph of that rank, before any pass sees it, and ranks would come to different exchanges.

    **Guarantees**: the same bits as the unfused graph in eager mode, in rows and scales, on valid rows (infinities too; a NaN is a
    NaN there too, but may have another sign); whatever else the dispatch returns is unchanged.  Of an all_to_all: on all rows,
    those behind what came too; on CUDA only those become one that send fp8 and scales, for a quantizer in front of an exchange
    would be compiled there, and not have eager's bits.
    """
    count = _merge_scales(graph) + quantize_all_to_all(graph)
    for dispatch in epops_calls(graph, ("dispatch",)):
        given = arguments(dispatch)
        sent = tensor(given["x"])
        if sent is None:
            continue
        if sent.dtype in FP8:
            count += _quantized_before(graph, dispatch, given)
        elif sent.dtype in FLOATS and given["x_scales"] is None:
            count += _quantized_after(graph, dispatch, given)
    return count


# ---- quantize(dispatch(x)) -----------------------------------------------------------------------------------------


def _quantized_after(graph: Graph, dispatch: Node, given: dict[str, Any]) -> int:
    rows = results(dispatch, 0)
    if len(rows) != 1:
        return 0
    try:
        used = read_uses(dispatch, rows[0])
        if used is None:
            return 0
        if result_users(dispatch, 1):
            raise Unknown("its empty scales are used")
        _require_kernel(used.quantizer, tensor(rows[0]))
    except Unknown as reason:
        declined(RULE, dispatch, str(reason))
        return 0
    fused = _quantizing(graph, dispatch, given, given["x"], used.quantizer)
    used.replace(graph, *_results_of(graph, fused))
    _replace_dispatch(dispatch, fused, (0, 1))
    used.erase()
    erase_unused(dispatch.users)
    graph.erase_node(dispatch)
    return 1


# ---- dispatch(quantize(x)) -----------------------------------------------------------------------------------------


def _quantized_before(graph: Graph, dispatch: Node, given: dict[str, Any]) -> int:
    rows, scales = given["x"], given["x_scales"]
    try:
        if scales is None:
            raise Unknown("fp8 rows without scales")
        roots = _candidates(rows)
        if not roots:
            return 0
        reason = "its rows do not come from a quantizer"
        for root in roots:
            formula = _upstream(root, (rows, scales))
            terms = read_terms(root, formula)
            if rows not in terms or scales not in terms:
                continue
            try:
                found = _read_pair(root, terms, rows, scales)
                _require_kernel(found, tensor(rows))
                _require_alone({dispatch, *formula}, rows, scales)
                require_unwritten(root, dispatch)
                break
            except Unknown as error:
                reason = str(error)
        else:
            raise Unknown(reason)
    except Unknown as error:
        declined(RULE, dispatch, str(error))
        return 0
    with graph.inserting_before(dispatch):
        source = reshape_like(graph, root, rows)
    fused = _quantizing(graph, dispatch, given, source, found)
    _replace_dispatch(dispatch, fused, ())
    graph.erase_node(dispatch)
    erase_unused([rows, scales])
    return 1


def _candidates(rows: Node) -> list[Node]:
    """Where the rows may come from, first the widest view of it: what the largest magnitude is taken of."""
    seen, stack = {rows}, [rows]
    while stack and len(seen) < 200:
        node = stack.pop()
        if node.target in (torch.ops.aten.amax.default, torch.ops.aten.max.dim):
            return _peel(node.args[0])
        for item in node.all_input_nodes:
            if item not in seen and item.op == "call_function":
                seen.add(item)
                stack.append(item)
    return []


def _peel(node: Any) -> list[Node]:
    chain = [node]
    while True:
        before, after = (tensor(node.args[0]) if node.args else None), tensor(node)
        widens = is_cast(node) and before is not None and after is not None and keeps_values(before.dtype, after.dtype)
        padding = node.target is torch.ops.aten.constant_pad_nd.default
        if not (widens or padding or is_reshape(node) or node.target is torch.ops.aten.abs.default) or before is None:
            break
        node = node.args[0]
        chain.append(node)
    return [node for node in reversed(chain) if tensor(node) is not None and tensor(node).dtype in FLOATS]


def _upstream(root: Node, ends: tuple[Node, ...]) -> set[Node]:
    """What the ends are computed from, after the root."""
    found: set[Node] = set()
    stack = list(ends)
    while stack and len(found) < 200:
        node = stack.pop()
        if node not in found and root < node:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def _read_pair(root: Node, terms: dict[Node, Term], rows: Node, scales: Node) -> Quantizer:
    shape = tensor(rows).shape
    source = tensor(root)
    assert source is not None
    if terms[rows].padded or not known_equal(source.numel(), shape[0] * shape[1]):
        raise Unknown("it sends rows that are longer than those that were quantized")
    found = recognize(terms[rows], shape[1])
    if terms[scales].per == "block" and terms[scales].of_blocks_of(terms[rows]):
        for one in variants(found):
            if terms[scales].expr == one.scale:
                return one
        if found.scale_format == "float32_pow2" and terms[scales].expr == ("to", found.scale, torch.float8_e8m0fnu):
            return found._replace(scale_format="ue8m0")
    raise Unknown(f"{scales.name} is not the scale that {rows.name} was quantized by")


def _require_alone(known: set[Node], *nodes: Node) -> None:
    for node in nodes:
        others = [user for user in node.users if user not in known]
        if others:
            raise Unknown(f"{node.name} is used by {others[0].name} too, so it would be computed twice")


def _require_kernel(found: Quantizer, rows: torch.Tensor) -> None:
    """The CUDA kernels have `QUANT_BLOCKS`, send rows of whole 16 bytes, and have no infinities of float8_e5m2.

    They round scales up by their bits.  ``2 ** ceil(log2(s))`` is something else: log2 rounds, the more coarsely the farther s is
    from 1, so numbers just above a power of two come out as that power's exponent, and on CUDA, where it may be off by one unit
    in its last place, which of them do is the business of the library that torch was built with.  (exp2 of whole numbers is
    exact.)
    """
    if rows.device.type != "cuda":
        return
    if found.scale_math.endswith("_log2"):
        raise Unknown(
            "its scales are 2 ** ceil(log2(s)), and log2 on CUDA takes some numbers just above a power of two for that "
            "power, which the kernels' rounding by the bits does not; write epops.quantize(scale_format='ue8m0'), or round "
            "by the bits"
        )
    if found.block not in QUANT_BLOCKS or rows.shape[-1] % 16:
        raise Unknown(
            f"the CUDA kernels have no {found.scale_math} with blocks of {found.block} in rows of {rows.shape[-1]}"
        )
    if found.quant_dtype == torch.float8_e5m2 and not found.clamp:
        raise Unknown("the CUDA kernels clamp, and what overflows float8_e5m2 without is infinite")


# ---- the new dispatch ------------------------------------------------------------------------------------------------


def _quantizing(graph: Graph, dispatch: Node, given: dict[str, Any], x: Node, found: Quantizer) -> Node:
    dropped = ("x", "topk_idx", "topk_weights", "x_scales")
    kwargs = {name: item for name, item in given.items() if name not in dropped}
    kwargs.update(found._asdict())
    kwargs.pop("scale")
    kwargs["scale_layout"] = "row"
    with graph.inserting_before(dispatch):
        target = torch.ops.epops.dispatch_quant.default
        order = [argument.name for argument in target._schema.arguments if argument.kwarg_only]
        ordered = {name: kwargs[name] for name in order}
        return call(graph, target, (x, given["topk_idx"], given["topk_weights"]), ordered, like=dispatch)


def _results_of(graph: Graph, fused: Node) -> tuple[Node, Node]:
    with graph.inserting_after(fused):
        scales = call(graph, operator.getitem, (fused, 1), like=fused)
        rows = call(graph, operator.getitem, (fused, 0), like=fused)
    return rows, scales


def _replace_dispatch(old: Node, new: Node, without: tuple[int, ...]) -> None:
    """Give the results of ``old`` to the users of those of ``new``, other than the results numbered ``without``."""
    for user in list(old.users):
        if user.args[1] not in without:
            user.replace_input_with(old, new)
            user.meta["val"] = new.meta["val"][user.args[1]]


# ---- two dispatches that should be one -------------------------------------------------------------------------------


def _merge_scales(graph: Graph) -> int:
    """dispatch(q) and dispatch(s) with the same routing: the scales travel with the rows."""
    count = 0
    calls = epops_calls(graph, ("dispatch",))
    for first, second in itertools.pairwise(calls):
        rows, scales = (first, second) if _sends_fp8(first) else (second, first)
        if not _sends_fp8(rows) or _sends_fp8(scales):
            continue
        mine, theirs = arguments(rows), arguments(scales)
        carried = tensor(theirs["x"])
        if mine["x_scales"] is not None or theirs["x_scales"] is not None or carried is None:
            continue
        if any(mine[name] != theirs[name] for name in mine if name not in ("x", "x_scales")):
            continue
        if result_users(rows, 1) or result_users(scales, 1):
            declined(RULE, second, "the empty scales of a dispatch without scales are used")
            continue
        if carried.dtype not in (torch.float32, torch.float8_e8m0fnu) or not _few(carried, mine["x"]):
            continue
        late = arguments(second)["x"]
        moved = closure_after(first, late)
        if moved is None or any(map(writes, between(first, second))):
            declined(RULE, second, f"what it sends cannot be sent with {first.name}, which has the same routing")
            continue
        hoist(moved, first)
        with graph.inserting_before(first):
            args = (mine["x"], mine["topk_idx"], mine["topk_weights"], theirs["x"])
            merged = call(graph, rows.target, args, dict(rows.kwargs), like=rows)
        for user in results(scales, 0):
            user.args = (scales, 1)
        _replace_dispatch(rows, merged, (1,))
        _replace_dispatch(scales, merged, ())
        for call_ in (rows, scales):
            erase_unused(call_.users)
            graph.erase_node(call_)
        count += 1
    return count


def _few(scales: torch.Tensor, rows: Node) -> bool:
    """Whether there is one scale a row, or one for 16 channels or more."""
    width, hidden = scales.shape[-1], tensor(rows).shape[-1]
    return isinstance(width, int) and isinstance(hidden, int) and (width == 1 or width * 16 <= hidden)


def _sends_fp8(dispatch: Node) -> bool:
    sent = tensor(arguments(dispatch)["x"])
    return sent is not None and sent.dtype in FP8
