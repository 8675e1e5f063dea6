"""What torch.compile has done in this process, from its own counters."""

from __future__ import annotations

from typing import NamedTuple

import torch


class CompileCounts(NamedTuple):
    graphs: int
    """Graphs that Dynamo captured."""
    graph_breaks: int
    cache_hits: int
    """Graphs, a forward with its backward being one, that came out of a compile cache."""
    compiled: int
    """Graphs that this process compiled."""


def compile_counts() -> CompileCounts:
    """So far; `torch.compiler.reset` sets them back."""
    counters = torch._dynamo.utils.counters
    caches = counters["aot_autograd"]
    return CompileCounts(
        counters["stats"]["unique_graphs"],
        sum(counters["graph_break"].values()),
        caches["autograd_cache_hit"],
        caches["autograd_cache_miss"] + caches["autograd_cache_bypass"],
    )
