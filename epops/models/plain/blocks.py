"""Adapters for blocks of plain models that walk their experts in a Python loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..adapter import Adapter, Plan, refuse
from ..experts import exchange
from ..site import Shard, set_method, site_of
from ..stacked_module import StackedExperts, sample
from . import stacked
from .loop import ROUTED, Loop, find
from .search import Reading, local, proved, readings_of


class ModuleExperts:
    """Experts that are modules of their own."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def one(self, module: nn.Module, expert: int, x: Tensor) -> Tensor:
        return module.get_submodule(self.paths[expert])(x)


class ModuleLoop(Adapter):
    """A ModuleList (or ModuleDict) of expert MLPs, walked in the forward of its module, or in a method that it calls."""

    guesses = True

    def matches(self, module: nn.Module) -> bool:
        return any(find(module, name) is not None for name in containers(module))

    def plan(self, module: nn.Module, name: str) -> Plan:
        holder, loop = next((n, found) for n in containers(module) if (found := find(module, n)) is not None)
        paths = [f"{holder}.{key}" for key in module.get_submodule(holder)._modules]
        reading = _read(module, name, loop, [ModuleExperts(paths)])
        experts = StackedExperts({path: module.get_submodule(path) for path in paths}, name)

        def install(module: nn.Module) -> None:
            experts.adopt(module)
            _install(module, loop, reading, lambda m: m.stacked)

        names = experts.names()
        return Plan(len(paths), {path: Shard(len(paths)) for path in names}, install, names)


class StackedLoop(Adapter):
    """Experts stacked in 3-D parameters of a module (or of a child), walked in the module's forward."""

    guesses = True

    def matches(self, module: nn.Module) -> bool:
        return _stacked_loop(module) is not None

    def plan(self, module: nn.Module, name: str) -> Plan:
        found = _stacked_loop(module)
        assert found is not None, "matches"
        path, loop = found
        holder = module.get_submodule(path)
        reading = _read(module, name, loop, [stacked.AtHolder(h, path) for h in stacked.hypotheses(holder)])
        prefix = f"{path}." if path else ""
        held = stacked.matrices(holder)
        experts = next(iter(held.values())).shape[0]
        tensors = [*held, *dict(reading.experts.mlp.biases).values()]

        def install(module: nn.Module) -> None:
            _install(module, loop, reading, reading.experts.compute)

        return Plan(experts, {f"{prefix}{n}": Shard(experts) for n in tensors}, install)


def containers(module: nn.Module) -> list[str]:
    """Children that hold several modules of one class with parameters."""
    return [
        name
        for name, child in module.named_children()
        if isinstance(child, nn.ModuleList | nn.ModuleDict)
        and len(child) > 1
        and len({type(m) for m in child.children()}) == 1
        and any(True for _ in child.parameters())
    ]


def _stacked_loop(module: nn.Module) -> tuple[str, Loop] | None:
    for path, holder in [("", module), *module.named_children()]:
        for name in stacked.matrices(holder):
            loop = find(module, path or name)
            if loop is not None:
                return path, loop
    return None


def _read(module: nn.Module, name: str, loop: Loop, readings: list[Any]) -> Reading:
    """The reading of the loop, after the forward with it in the loop's place was run beside the original."""
    probed, tried = sample(module), None
    for reading, x in readings_of(probed, loop, readings):
        tried = reading

        def routed(
            module: nn.Module, out: Any, x: Tensor, idx: Tensor, weights: Tensor | None, experts: Any = reading.experts
        ) -> Tensor:
            return _added(out, local(module, experts, x, idx, weights))

        set_method(probed, ROUTED, routed)
        replaced = loop.replaced(reading.x, reading.idx, reading.weights)
        if proved(probed, loop.forward(loop.function), loop.forward(replaced), x):
            return reading
    where = f"{type(module).__name__}.{loop.method} with its loop over experts (line {loop.line})"
    if tried is None:
        raise refuse(name, f"{where} fills {loop.out!r} by no sum of weighted experts that was tried")
    raise refuse(name, f"{where} read as a sum over ({tried.x}, {tried.idx}, {tried.weights}) differs from what it is")


def _added(out: Any, y: Tensor) -> Tensor:
    return out + y.reshape(out.shape).to(out.dtype) if isinstance(out, Tensor) else y


def _install(module: nn.Module, loop: Loop, reading: Reading, compute_of: Callable[[nn.Module], Any]) -> None:
    def routed(module: nn.Module, out: Any, x: Tensor, idx: Tensor, weights: Tensor | None) -> Tensor:
        site = site_of(module)
        assert site is not None
        weights = idx.new_ones(idx.shape, dtype=x.dtype) if weights is None else weights
        loop = not isinstance(out, Tensor) or out.dtype == x.dtype
        return _added(
            out, exchange(site, x.reshape(-1, x.shape[-1]), idx, weights, compute_of(module), loop=loop, shares=True)
        )

    set_method(module, ROUTED, routed)
    set_method(module, loop.method, loop.replaced(reading.x, reading.idx, reading.weights))
