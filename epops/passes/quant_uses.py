"""Who sees the fp8 rows and the scales that a graph makes of the rows of an exchange, and who sees more than that."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.fx import Graph, Node

from .decline_log import declined
from .graph_facts import between, op_name, prims, tensor, writes
from .quant_formula import Quantizer, Unknown, recognize, variants
from .quant_terms import FP8, Term, read_terms
from .rewriting import call, erase_unused, reshape_like

RULE = "fuse_quant"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Uses(NamedTuple):
    """A quantizer of some rows: ``outputs`` are the nodes of it that others use, and what each is: "rows", "scales" or "narrow
    scales" (UE8M0)."""

    quantizer: Quantizer
    terms: dict[Node, Term]
    outputs: dict[Node, str]

    def replace(self, graph: Graph, rows: Node, scales: Node) -> None:
        """Give others these ``rows`` and ``scales`` in place of the quantizer's."""
        for node, what in self.outputs.items():
            with graph.inserting_before(node):
                replacement = reshape_like(graph, rows if what == "rows" else scales, node)
                if tensor(replacement).dtype != tensor(node).dtype:  # narrow ones beside others, or of no powers of two
                    to = (replacement, tensor(node).dtype)
                    replacement = call(graph, prims.convert_element_type.default, to, like=node)
            node.replace_all_uses_with(replacement)

    def erase(self) -> None:
        """Erase what nobody uses any more."""
        erase_unused(sorted(self.terms, reverse=True))


def read_uses(exchange: Node, rows: Node) -> Uses | None:
    """The quantizer of the rows that an exchange returns; None where they are not quantized, `Unknown` where that is unclear or
    others see them too."""
    terms = read_terms(rows)
    casts = [node for node, term in terms.items() if term.expr[0] == "fp8"]
    if not casts:
        cast = _some_cast(rows)
        if cast is not None:
            declined(RULE, exchange, f"{cast.name} is computed from its rows by a formula that is no known quantizer")
        return None
    if not all(terms[node].same_as(terms[casts[0]]) for node in casts):
        raise Unknown(f"{casts[0].name} and {casts[-1].name} quantize it differently")
    found = recognize(terms[casts[0]], tensor(rows).shape[-1])
    computed = {term.expr for term in terms.values() if term.of_blocks_of(terms[casts[0]])}
    found = next((one for one in variants(found) if one.scale in computed), found)
    outputs = _seen_outside(terms, casts, found)
    require_unwritten(exchange, max(outputs))
    narrow = any(what == "narrow scales" for what in outputs.values())
    if narrow and not any(what == "scales" for what in outputs.values()) and found.scale_format == "float32_pow2":
        found = found._replace(scale_format="ue8m0")
    return Uses(found, terms, outputs)


def _some_cast(rows: Node) -> Node | None:
    """A cast to fp8 of something near the rows."""
    seen, waiting = {rows}, [rows]
    while waiting and len(seen) < 40:
        for user in waiting.pop(0).users:
            found = tensor(user)
            if found is not None and found.dtype in FP8:
                return user
            if found is not None and user not in seen and op_name(user) is None:
                seen.add(user)
                waiting.append(user)
    return None


def _seen_outside(terms: dict[Node, Term], casts: list[Node], found: Quantizer) -> dict[Node, str]:
    """Nodes of the quantizer that others use, and what each is: "rows", "scales" or "narrow scales" (UE8M0)."""
    narrow, quantized = ("to", found.scale, torch.float8_e8m0fnu), terms[casts[0]]
    parts = found.scale, narrow, quantized.expr
    formula = {node for node, term in terms.items() if term.expr in parts and term.of_blocks_of(quantized)}
    stack = [*formula, *casts]
    formula.update(casts)
    while stack:
        for node in stack.pop().all_input_nodes:
            if node in terms and node not in formula:
                formula.add(node)
                stack.append(node)
    outputs: dict[Node, str] = {}
    for node in sorted(formula):
        others = [user for user in node.users if user not in formula]
        term = terms[node]
        if not others:
            continue
        if term.same_as(quantized) and not term.padded:
            outputs[node] = "rows"
        elif term.per == "block" and term.of_blocks_of(quantized) and term.expr == found.scale:
            outputs[node] = "scales"
        elif term.per == "block" and term.of_blocks_of(quantized) and term.expr == narrow:
            outputs[node] = "narrow scales"
        else:
            raise Unknown(f"{node.name} is used by {others[0].name} besides the quantizer")
    if "rows" not in outputs.values():
        raise Unknown("nobody uses the quantized rows")
    return outputs


def require_unwritten(first: Node, last: Node) -> None:
    """`Unknown` where a node between two writes in place."""
    written = next((node for node in between(first, last) if writes(node)), None)
    if written is not None:
        raise Unknown(f"{written.name} writes in place in between")
