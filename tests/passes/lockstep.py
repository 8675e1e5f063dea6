"""Runs a graph for all ranks of a group at once, in one process: a value is a list of what each rank has."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg


def run(module: GraphModule, inputs: list[list[Any]]) -> list[list[Any]]:
    """Outputs of each rank, of the inputs of each rank."""
    ranks = range(len(inputs))
    values: dict[Node, list[Any]] = {}
    places = iter(range(len(inputs[0])))
    for node in module.graph.nodes:
        if node.op == "placeholder":
            place = next(places)
            values[node] = [inputs[rank][place] for rank in ranks]
            continue
        given = [map_arg((node.args, node.kwargs), lambda item: values[item][rank]) for rank in ranks]  # noqa: B023
        if node.op == "output":
            return [list(args[0]) for args, _ in given]
        exchange = EXCHANGES.get(str(node.target))
        values[node] = exchange(given) if exchange else [node.target(*args, **kwargs) for args, kwargs in given]
    raise AssertionError("a graph has an output")


def _all_to_all_single(given: list[Any]) -> list[Any]:
    pieces = [list(args[0].split(list(args[2]))) for args, _ in given]
    return [torch.cat([pieces[source][rank] for source in range(len(given))]) for rank in range(len(given))]


def _all_to_all(given: list[Any]) -> list[Any]:
    size = len(given)
    pieces = []
    for args, settings in given:
        x, splits = args[0], args[1] if len(args) > 1 else None
        dim = settings.get("scatter_dim", 0)
        pieces.append(list(x.split([x.shape[dim] // size] * size if splits is None else splits.tolist(), dim)))
    dims = [given[0][1].get(name, 0) for name in ("scatter_dim", "gather_dim")]
    rows = [
        torch.cat([pieces[source][rank] for source in range(size)], given[rank][1].get("gather_dim", 0))
        for rank in range(size)
    ]
    for got, (_, settings) in zip(rows, given):
        assert got.shape[settings.get("gather_dim", 0)] == settings["out_size"]
        assert got.shape[settings.get("scatter_dim", 0)] == settings["scatter_size"]
    sent = [[pieces[source][rank].shape[dims[1]] for source in range(size)] for rank in range(size)]
    return [(got, torch.tensor(counts), None) for got, counts in zip(rows, sent)]


EXCHANGES = {
    "_c10d_functional.all_to_all_single.default": _all_to_all_single,
    "_c10d_functional.wait_tensor.default": lambda given: [args[0] for args, _ in given],
    "epops.all_to_all.default": _all_to_all,
}
