"""``torch.compile(model, backend="epops")``: Inductor, with the passes of `epops.passes` in its hooks."""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import passes
from .group import ExpertGroup, compiling, get_group, process_groups
from .torch_private import eager_backward_compile, private_store

COMPILE_WAIT = 1800.0
"""Seconds that a rank waits for another one's entry in the compile cache before it compiles by itself."""


def epops_backend(
    model: torch.fx.GraphModule,
    inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile with Inductor and the epops passes.

    ``mode`` is Inductor's; ``options`` are Inductor's settings, beside two of ours: ``"passes"``, names of `epops.PASSES` or
    functions ``fn(graph) -> int`` in the order to run them (default: all), and ``"share_compile"`` (default True): of the ranks
    that compile one graph, one does, and the others load it from the compile cache.
    """
    from torch._inductor import config, list_mode_options
    from torch._inductor.compile_fx import compile_fx

    chosen, share, settings = read_options(options)
    settings = {**(list_mode_options(mode) if mode else {}), **settings}
    compiling.watch()
    earlier = settings.get("post_grad_custom_pre_pass", config.post_grad_custom_pre_pass)
    settings["post_grad_custom_pre_pass"] = passes.PassRunner(chosen, earlier)
    earlier = settings.get("joint_custom_pre_pass", config.joint_custom_pre_pass)
    settings["joint_custom_pre_pass"] = passes.JointRunner(chosen, earlier)
    passes.process_groups.known = process_groups
    groups = _groups(model)

    def compiled() -> Any:
        with eager_backward_compile():
            return compile_fx(model, inputs, config_patches=settings)

    result = _in_turn(groups[0], model, inputs, compiled) if groups and share else compiled()
    return _watch(result, [group for group in groups if not group.transport.host_counts])


def read_options(options: dict[str, Any] | None) -> tuple[tuple[passes.Pass, ...], bool, dict[str, Any]]:
    """What ``options`` say: the passes, whether ranks share a compile, and settings of Inductor."""
    from torch._inductor import config

    if not isinstance(options, (dict, type(None))):
        raise ValueError(
            f"epops backend: options: expected a dict such as {{'passes': ['fuse_add']}}, got {type(options).__name__}"
        )
    settings = dict(options or {})
    chosen = passes.choose(settings.pop("passes", None))
    share = settings.pop("share_compile", True)
    for name in settings:
        try:
            functools.reduce(getattr, str(name).split("."), config)
        except AttributeError:
            raise ValueError(
                f"epops backend: options: expected 'passes', 'share_compile' or names of torch._inductor.config, got {name!r}"
            ) from None
    return chosen, share, settings


def _groups(model: torch.fx.GraphModule) -> list[ExpertGroup]:
    """Groups that the graph talks to."""
    names = {
        str(node.kwargs["group"])
        for module in model.modules()
        if isinstance(module, torch.fx.GraphModule)
        for node in module.graph.nodes
        if node.op == "call_function" and "group" in node.kwargs and str(node.target).startswith("epops.")
    }
    return [get_group(name) for name in sorted(names)]


def _in_turn(
    group: ExpertGroup, model: torch.fx.GraphModule, inputs: Sequence[Any], compiled: Callable[[], Any]
) -> Any:
    """One rank of those that have the same graph compiles it while the others wait for its entry in the cache."""
    if group.size == 1 or group.control is None:
        return compiled()
    store = private_store(f"{group.prefix}/compile")
    key = _fingerprint(model, inputs)
    if store.add(f"{key}/claimed", 1) == 1:
        try:
            return compiled()
        finally:
            store.set(f"{key}/done", "1")
    deadline = time.monotonic() + COMPILE_WAIT
    while time.monotonic() < deadline and not store.check([f"{key}/done"]):
        time.sleep(0.02)
    return compiled()


def _fingerprint(model: torch.fx.GraphModule, inputs: Sequence[Any]) -> str:
    """What two ranks' graphs must share for one compile cache entry to serve both; symbolic sizes go by name, not by value."""
    shapes = [_shape(t) if isinstance(t, torch.Tensor) else str(type(t)) for t in inputs]
    return hashlib.sha256(f"{model.code}{shapes}{torch.is_grad_enabled()}".encode()).hexdigest()


def _shape(tensor: torch.Tensor) -> str:
    sizes = [str(size.node.expr) if isinstance(size, torch.SymInt) else str(size) for size in tensor.shape]
    return f"{sizes} {tensor.dtype} {tensor.requires_grad}"


def _watch(run: Callable[..., Any], groups: list[ExpertGroup]) -> Callable[..., Any]:
    """Raise what a group's device found in earlier steps before a new one begins.  (gloo's ops raise it themselves.)"""
    if not groups:
        return run

    def checked(*args: Any) -> Any:
        for group in groups:
            group.check()
        return run(*args)

    if getattr(run, "_boxed_call", False):
        checked._boxed_call = True  # type: ignore[attr-defined]
    return checked


def _reset() -> None:
    from torch._inductor import cudagraph_trees

    cudagraph_trees.reset_cudagraph_trees()


epops_backend.reset = _reset  # type: ignore[attr-defined]
