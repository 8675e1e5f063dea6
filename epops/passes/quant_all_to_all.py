"""Fold a quantizer into the all_to_all next to it: one exchange of bytes, each row's scales and then its fp8, as
`epops.all_to_all_quant` sends them."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from ..layout import num_scales
from ..reference.pack_rows import WHOLE, pack, powers_of_two, unpack
from ..reference.quantize import quantize_rows
from .decline_log import declined
from .graph_facts import arguments, between, epops_calls, known_equal, results, same_shape, tensor, writes
from .quant_formula import Quantizer, Unknown
from .quant_terms import FP8
from .quant_uses import FLOATS, RULE, read_uses
from .rewriting import call, closure_after, erase_unused, hoist, write

NEAR = 3
"""Exchanges behind one of fp8 or of scales among which the other one is looked for: indices and weights may come between."""


def quantize_all_to_all(graph: Graph) -> int:
    """The part of `fuse_quant` that is about all_to_all."""
    count = _send_together(graph)
    for exchange in epops_calls(graph, ("all_to_all",)):
        sent = tensor(arguments(exchange)["x"])
        if sent is not None and sent.dtype in FLOATS:
            count += _quantized_after(graph, exchange)
    return count


# ---- quantize(all_to_all(x)) -----------------------------------------------------------------------------------------


def _quantized_after(graph: Graph, exchange: Node) -> int:
    rows = results(exchange, 0)
    if len(rows) != 1:
        return 0
    try:
        used = read_uses(exchange, rows[0])
        if used is None:
            return 0
        _require_rows(arguments(exchange), used.quantizer)
    except Unknown as reason:
        declined(RULE, exchange, str(reason))
        return 0
    new, new_rows, new_scales = _quantizing(graph, exchange, used.quantizer)
    used.replace(graph, new_rows, new_scales)
    _take_results(exchange, new)
    used.erase()
    erase_unused(exchange.users)
    inputs = exchange.all_input_nodes
    graph.erase_node(exchange)
    erase_unused(inputs)
    return 1


def _require_rows(given: dict[str, Any], found: Quantizer) -> None:
    """Whole rows travel, all that arrives is known to be there or behind the last one, fewer bytes travel than before, and what is
    compiled has eager's bits."""
    x = tensor(given["x"])
    if x.device.type == "cuda":
        raise Unknown(
            "what quantizes before it would be compiled, and on CUDA compiled quotients are not always eager's; call "
            "epops.all_to_all_quant to have it so"
        )
    last, scatter, gather = x.dim() - 1, given["scatter_dim"], given["gather_dim"]
    if last in (scatter, gather):
        raise Unknown(f"it cuts dim {last}, along which channels share scales")
    even = given["input_splits"] is None and given["plan"] is None
    share = known_equal(given["scatter_size"], x.shape[scatter] // given["ep_size"])
    if scatter != gather and not (even and share):
        raise Unknown(
            f"there may be zeros along dim {scatter} for which nothing came, and a quantizer gives zeros scales"
        )
    if not isinstance(x.shape[last], int):
        raise Unknown(f"the size of dim {last} is symbolic")
    width, before = _packed_width(x.shape[last], found), x.shape[last] * x.element_size()
    if width >= before:
        raise Unknown(f"a row of {before} bytes would be one of {width} with its scales")


def _packed_width(hidden: int, found: Quantizer) -> int:
    scale = 1 if found.scale_format == "ue8m0" else 4
    return -(-(hidden + scale * num_scales(hidden, found.block)) // WHOLE) * WHOLE


def _quantizing(graph: Graph, exchange: Node, found: Quantizer) -> tuple[Node, Node, Node]:
    """The exchange of what x is quantized to; also its rows and its scales."""
    given = arguments(exchange)
    hidden, gather = tensor(given["x"]).shape[-1], given["gather_dim"]
    settings = found._asdict()
    settings.pop("scale")
    narrow, blocks = found.scale_format == "ue8m0", num_scales(hidden, found.block)
    zeros = {**settings, "block": 0, "scale_format": "float32_pow2" if narrow else found.scale_format}

    def packed(x: torch.Tensor) -> torch.Tensor:
        # As bytes and back: a compiler does not round numbers of 16 bits that it keeps to itself, so it gets them from memory.
        x = x.contiguous().view(torch.uint8).view(x.dtype)
        rows, scales = quantize_rows(x.reshape(-1, hidden), **settings)
        return pack(rows, scales).unflatten(0, x.shape[:-1])

    def unpacked(got: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Behind what came there are zeros, which are quantized like others in the graph as it was.
        places = torch.arange(got.shape[gather], device=got.device)
        came = (places < counts.sum()).view([-1 if dim == gather else 1 for dim in range(got.dim())])
        zero = quantize_rows(got.new_zeros((1, 1), dtype=torch.float32), **zeros)
        rows, scales = unpack(got, hidden, blocks, found.quant_dtype, torch.uint8 if narrow else torch.float32)
        scales = torch.where(came, powers_of_two(scales) if narrow else scales, zero[1])
        # That may be 0 / 0, too, where eps is none or so small that its reciprocal is infinite.
        rows = torch.where(came, rows.view(torch.uint8), zero[0].view(torch.uint8)).view(rows.dtype)
        return rows, scales.to(torch.float8_e8m0fnu) if narrow else scales

    with graph.inserting_before(exchange):
        (x,) = write(graph, packed, [given["x"]], like=exchange)
        new = _exchange(graph, exchange, x)
        got, counts = (call(graph, operator.getitem, (new, place), like=exchange) for place in (0, 1))
        rows, scales = write(graph, unpacked, [got, counts], like=exchange)
    return new, rows, scales


def _exchange(graph: Graph, like: Node, x: Node) -> Node:
    """The exchange ``like`` of another x."""
    given = {**arguments(like), "x": x}
    schema = like.target._schema.arguments  # type: ignore[union-attr]
    args = [given[item.name] for item in schema if not item.kwarg_only]
    kwargs = {item.name: given[item.name] for item in schema if item.kwarg_only}
    return call(graph, like.target, args, kwargs, like=like)


def _take_results(old: Node, new: Node) -> None:
    """Give the counts and the status of ``new`` to the users of those of ``old``."""
    for user in [item for place in (1, 2) for item in results(old, place)]:
        user.replace_input_with(old, new)


# ---- two exchanges, of fp8 and of scales, that should be one -----------------------------------------------------------


def _send_together(graph: Graph) -> int:
    """all_to_all(q) and all_to_all(s), near one another and alike: a row's scales travel in front of it, in one exchange.

    Whatever the scales are: bytes arrive as they were sent, and zeros where nothing came.
    """
    count = 0
    waiting = epops_calls(graph, ("all_to_all",))
    while waiting:
        first, *waiting = waiting
        for second in waiting[:NEAR]:
            reason = _why_apart(first, second)
            if reason is None:
                _merge(graph, first, second)
                waiting.remove(second)
                count += 1
                break
            if reason:
                declined(RULE, second, reason)
    return count


def _why_apart(first: Node, second: Node) -> str | None:
    """None where two exchanges can be one of rows and their scales; empty where they are no such pair."""
    rows, scales = _rows_and_scales(first, second)
    if rows is None or scales is None:
        return ""
    mine, theirs = arguments(first), arguments(second)
    for name in mine:
        if name != "x" and not _alike(mine[name], theirs[name]):
            return f"its {name} is not that of {first.name}, with which its rows could travel"
    if mine["scatter_dim"] >= _lead(rows) or mine["gather_dim"] >= _lead(rows):
        return f"it cuts dim {_lead(rows)}, along which channels share scales"
    if len(results(first, 0)) > 1 or len(results(second, 0)) > 1:
        return "its rows are taken twice"
    if any(map(writes, between(first, second))) or closure_after(first, theirs["x"]) is None:
        return f"what it sends cannot be sent with {first.name}, which has the same splits"
    return None


def _alike(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and one == other) or known_equal(one, other)


def _lead(rows: Node) -> int:
    return int(tensor(arguments(rows)["x"]).dim()) - 1


def _rows_and_scales(first: Node, second: Node) -> tuple[Node | None, Node | None]:
    """Of two exchanges that of fp8 rows, and that of one scale a row or one for 16 channels or more."""
    for rows, scales in ((first, second), (second, first)):
        wide, narrow = (tensor(arguments(node)["x"]) for node in (rows, scales))
        if wide is None or narrow is None or wide.dim() < 2 or not _is_fp8(arguments(rows)["x"]):
            continue
        if narrow.dtype not in (torch.float32, torch.float8_e8m0fnu):
            continue
        one = same_shape(narrow.shape, wide.shape[:-1])
        width = 1 if one else narrow.shape[-1]
        if not one and not same_shape(narrow.shape[:-1], wide.shape[:-1]):
            continue
        hidden = wide.shape[-1]
        if isinstance(width, int) and isinstance(hidden, int) and (width == 1 or 0 < width * 16 <= hidden):
            return rows, scales
    return None, None


def _is_fp8(node: Node) -> bool:
    """fp8, or its bytes."""
    found = tensor(node)
    if found.dtype in FP8:
        return True
    if node.target is not torch.ops.aten.view.dtype or found.element_size() != 1:
        return False
    return tensor(node.args[0]).dtype in FP8


def _merge(graph: Graph, first: Node, second: Node) -> None:
    rows, scales = _rows_and_scales(first, second)
    assert rows is not None and scales is not None
    sent = [arguments(node)["x"] for node in (rows, scales)]
    hidden, row_dtype, scale_dtype = tensor(sent[0]).shape[-1], tensor(sent[0]).dtype, tensor(sent[1]).dtype
    one = tensor(sent[1]).dim() < tensor(sent[0]).dim()
    width = 1 if one else tensor(sent[1]).shape[-1]
    moved = closure_after(first, arguments(second)["x"])
    assert moved is not None, "that was asked"
    hoist(moved, first)

    def packed(q: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return pack(q.reshape(-1, hidden).contiguous(), s.reshape(-1, width).contiguous()).unflatten(0, q.shape[:-1])

    def unpacked(got: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, s = unpack(got, hidden, width, row_dtype, scale_dtype)
        return q, s.squeeze(-1) if one else s

    with graph.inserting_before(first):
        (x,) = write(graph, packed, sent, like=rows)
        new = _exchange(graph, rows, x)
        got = call(graph, operator.getitem, (new, 0), like=rows)
        for exchange, came in zip((rows, scales), write(graph, unpacked, [got], like=rows), strict=True):
            for item in results(exchange, 0):
                item.replace_all_uses_with(came)
            _take_results(exchange, new)
    for exchange in (rows, scales):
        erase_unused(exchange.users)
        inputs = exchange.all_input_nodes
        graph.erase_node(exchange)
        erase_unused(inputs)
