"""Run an exchange beside work that needs neither its rows nor its result."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from .decline_log import declined
from .graph_facts import arguments, is_exchange, is_random, op_name, result_users, tensor, writes
from .ordering import run_after
from .rewriting import call
from .work_estimate import batch_of, exchange_time, work_of

RULE = "overlap"
HALVES = ("dispatch", "dispatch_quant", "dispatch_backward", "combine", "combine_backward", "all_to_all")


def overlap(graph: Graph) -> int:
    """**Rewrite**::

        r = dispatch(x); …; s = shared(x)     ->  t = dispatch_start(x); s = shared(x); r = dispatch_wait(t, x); …

    the same for combine, all_to_all and the gradients.  The shared expert comes first, then other products, the largest
    first, until the exchange is covered by an estimate from sizes that all ranks share (`work_estimate`).

    **Requires**: work near the exchange (after the exchange before it, before the second one after it) that it does not
    need and that does not need it; no write in place, no other exchange and no random number among what moves.

    A group of one rank is treated like any other, though there is nothing to wait for: the graph that one process shows in
    `epops.inspect`, and tests, is the graph that many run.

    **Guarantees**: exchanges keep their order, and no other exchange runs between a start and its wait; what a start reads
    is an argument of its wait and so outlives it; orders are pinned, so that Inductor keeps them.
    """
    count = 0
    for node in [node for node in graph.nodes if op_name(node) in HALVES]:
        count += _overlap(graph, node)
    return count


class Window(NamedTuple):
    """The nodes around an exchange that may move: ``before`` it and ``after`` it, in graph order."""

    before: list[Node]
    after: list[Node]


def _overlap(graph: Graph, exchange: Node) -> int:
    given = arguments(exchange)
    tokens, top_k, sent = _sizes(exchange, given)
    if sent is None:
        return 0
    window = _independent(exchange)
    batch = batch_of(given)
    work = {node: work_of(node, tokens, top_k, batch) for node in [*window.before, *window.after]}
    shared = _shared_expert(exchange)
    heavy = sorted(
        (node for node, size in work.items() if size > 0),
        key=lambda node: (node not in shared, -work[node]),
    )
    if not heavy:
        declined(RULE, exchange, "no product beside it is independent of it")
        return 0
    budget = exchange_time(given, sent) if tokens is not None else None
    chosen: set[Node] = set()
    covered = 0.0
    for node in heavy:
        if node in chosen or (budget is not None and covered >= budget):
            continue
        moved = _with_what_must_move(node, window, chosen)
        if moved is not None:
            covered += sum(work[item] for item in moved - chosen)
            chosen |= moved
    if not chosen:
        declined(RULE, exchange, "what is independent of it cannot be moved beside it")
        return 0
    _split(graph, exchange, given, sorted(chosen), [node for node in sorted(chosen) if work[node] > 0])
    return 1


def _sizes(exchange: Node, given: dict[str, Any]) -> tuple[Any, int, torch.Tensor | None]:
    """Tokens of this rank, K, and the rows that an exchange sends."""
    name = op_name(exchange)
    if name == "all_to_all":
        return None, 1, tensor(given["x"])
    if name in ("dispatch", "dispatch_quant"):
        choices, sent = tensor(given["topk_idx"]), tensor(given["x"])
        if choices is None or sent is None or not isinstance(choices.shape[1], int):
            return 0, 1, None
        return sent.shape[0], choices.shape[1], sent  # products are of x: choices may have another symbol for as many
    if name == "combine_backward":
        grad = tensor(given["grad_out"])
        return (grad.shape[0] if grad is not None else None), given["top_k"], grad
    rows = tensor(given["grad_rows"] if name == "dispatch_backward" else given["y"])
    return given["num_tokens"], given["top_k"], rows


# ---- what may move -----------------------------------------------------------------------------------------------------


def _independent(exchange: Node) -> Window:
    # The start half of a combine takes no addend: that may still be computed while rows are on their way.
    needed = set(_inputs_of_start(exchange))
    before = []
    for node in _back(exchange):
        if node in needed or any(user in needed for user in node.users) or not _movable(node):
            needed.add(node)  # stays where it is, and so does what it needs
        else:
            before.append(node)
    tainted: set[Node] = {exchange}
    after = []
    for node in _ahead(exchange):
        if is_exchange(node) or not _movable(node) or any(item in tainted for item in node.all_input_nodes):
            tainted.add(node)
        else:
            after.append(node)
    return Window(before[::-1], after)


def _inputs_of_start(exchange: Node) -> list[Node]:
    return [item for name, item in arguments(exchange).items() if isinstance(item, Node) and name != "addend"]


def _back(exchange: Node) -> Iterator[Node]:
    """Nodes before an exchange, nearest first, up to the exchange or the write before it."""
    node = exchange.prev
    while node.op not in ("root", "placeholder") and not is_exchange(node) and not writes(node):
        yield node
        node = node.prev


def _ahead(exchange: Node) -> Iterator[Node]:
    """Nodes after an exchange, up to the second exchange or the first write after it."""
    node, passed = exchange.next, 0
    while node.op not in ("root", "output") and not writes(node):
        passed += is_exchange(node)
        if passed == 2:
            return
        yield node
        node = node.next


def _movable(node: Node) -> bool:
    if node.op != "call_function" or is_exchange(node) or writes(node):
        return False
    return not is_random(node)


def _with_what_must_move(node: Node, window: Window, chosen: set[Node]) -> set[Node] | None:
    """``node``, what it needs from behind the exchange, and what needs those of them that stand before it; None if one
    of these has to stay."""
    before, after = set(window.before), set(window.after)
    found: set[Node] = set()
    stack = [node]
    while stack:
        item = stack.pop()
        if item in found or item in chosen:
            continue
        found.add(item)
        if item in after:
            stack.extend(source for source in item.all_input_nodes if source in after)
        elif item in before:
            stack.extend(user for user in item.users if user in before)
        else:
            return None
    return found


def _shared_expert(exchange: Node) -> set[Node]:
    """What the addend of this combine, or of the combine that answers this dispatch, is computed from, near the exchange."""
    combine = exchange
    if op_name(exchange) in ("dispatch", "dispatch_quant"):
        answers = [user for user in result_users(exchange, 7) if op_name(user) == "combine"]
        if not answers:
            return set()
        combine = answers[0]
    addend = arguments(combine).get("addend")
    found: set[Node] = set()
    stack = [addend] if isinstance(addend, Node) else []
    while stack and len(found) < 100:
        node = stack.pop()
        if node not in found and _movable(node):
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


# ---- the rewrite -------------------------------------------------------------------------------------------------------


def _split(graph: Graph, exchange: Node, given: dict[str, Any], chosen: list[Node], heavy: list[Node]) -> None:
    name = op_name(exchange)
    with graph.inserting_before(exchange):
        start = _half(graph, f"{name}_start", given, exchange)
        wait = _half(graph, f"{name}_wait", {**given, "ticket": start}, exchange)
    exchange.replace_all_uses_with(wait)
    graph.erase_node(exchange)
    for node in chosen:
        wait.prepend(node)
    inputs = _products_behind(chosen, set(heavy))
    for node in heavy:
        if not inputs[node]:
            run_after(node, [start])
    used = set().union(*(inputs[node] for node in heavy))
    run_after(wait, [node for node in heavy if node not in used])


def _products_behind(chosen: list[Node], heavy: set[Node]) -> dict[Node, set[Node]]:
    """For each chosen node the chosen products nearest to it that it is computed from."""
    behind: dict[Node, set[Node]] = {}
    for node in chosen:
        sources = [item for item in node.all_input_nodes if item in behind]
        behind[node] = set().union(*({item} if item in heavy else behind[item] for item in sources))
    return behind


def _half(graph: Graph, name: str, given: dict[str, Any], like: Node) -> Node:
    target = getattr(torch.ops.epops, name).default
    schema = target._schema.arguments
    args = [given[item.name] for item in schema if not item.kwarg_only]
    kwargs = {item.name: given[item.name] for item in schema if item.kwarg_only}
    return call(graph, target, args, kwargs, like=like, same_value=name.endswith("_wait"))
