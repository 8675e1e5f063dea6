"""The one module that touches torch's private interfaces; everything is feature-tested, nothing is version-tested."""

from __future__ import annotations

from typing import Any

import torch


def is_capturing() -> bool:
    """Whether the current CUDA stream is being captured into a graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def preserve_node_ordering(graph: torch.fx.Graph, after: dict[torch.fx.Node, Any]) -> None:
    """Make each key of ``after`` run after the nodes of its value, through Inductor's scheduler and memory planner too."""
    from torch._inductor.fx_passes.control_dependencies import preserve_node_ordering as preserve
    from torch.utils._ordered_set import OrderedSet

    preserve(graph, {node: OrderedSet(before) for node, before in after.items()})


def is_control_deps(node: torch.fx.Node) -> bool:
    """Whether ``node`` is Inductor's ordering wrapper around another node."""
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "control_deps"


def private_backend(kind: str, process_group: Any, prefix: str, timeout: float) -> Any:
    """A gloo or nccl communicator of our own over the ranks of ``process_group``, named by ``prefix`` on all of them.

    ``new_group`` is not used: without the whole world it names a group after how many groups a rank holds, so that ranks with
    different histories never meet, and a name freed by a destroyed group leads to that group's dead addresses.
    """
    from datetime import timedelta

    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    store = dist.PrefixStore(prefix, distributed_c10d._get_default_store())
    rank, size = process_group.rank(), process_group.size()
    if kind == "gloo":
        return dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=timeout))
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=timeout)
    return dist.ProcessGroupNCCL(store, rank, size, options)


def private_store(prefix: str, timeout: float) -> Any:
    """The default store under ``prefix``: what ranks tell each other before they have a communicator."""
    from datetime import timedelta

    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    store = dist.PrefixStore(prefix, distributed_c10d._get_default_store())
    store.set_timeout(timedelta(seconds=timeout))
    return store
