"""Experts behind the same signature as ours: a module's ``forward(x, idx, weights)``, whatever it does inside."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import Adapter, Plan, refuse
from ..experts import exchange
from ..site import Shard, set_method, site_of
from ..stacked_module import StackedExperts, sample
from . import probe, stacked
from .blocks import ModuleExperts
from .search import local


class DirectExperts(Adapter):
    """A module of stacked matrices, or of expert modules, called with tokens, chosen experts and weights in any order."""

    guesses = True

    def matches(self, module: nn.Module) -> bool:
        return _arguments(module) is not None and bool(stacked.matrices(module) or _members(module))

    def plan(self, module: nn.Module, name: str) -> Plan:
        names = _arguments(module)
        assert names is not None, "matches"
        members = _members(module)
        readings: list[Any] = [ModuleExperts(members)] if members else []
        readings += [stacked.AtHolder(h, "") for h in stacked.hypotheses(module)] if not members else []
        probed = sample(module)
        for order, experts in itertools.product(_orders(names), readings):
            if _proved(probed, order, experts):
                return _plan(module, name, order, experts)
        kind = type(module).__name__
        raise refuse(name, f"{kind}.forward{names} is no weighted sum of its experts in any layout that was tried")


def _arguments(module: nn.Module) -> tuple[str, ...] | None:
    """Names of the three arguments that the forward needs, or None."""
    try:
        parameters = list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):
        return None
    plain = [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD]
    needed = [p for p in parameters if p.default is p.empty and p.kind == p.POSITIONAL_OR_KEYWORD]
    return tuple(plain[:3]) if len(plain) >= 3 and len(needed) <= 3 else None


def _members(module: nn.Module) -> list[str]:
    """Keys of a container that is itself the experts, with a forward of its own."""
    if not isinstance(module, nn.ModuleList | nn.ModuleDict) or type(module) in (nn.ModuleList, nn.ModuleDict):
        return []
    kinds = {type(m) for m in module.children() if any(True for _ in m.parameters())}
    return [key for key, m in module._modules.items() if type(m) in kinds] if len(kinds) == 1 else []


def _orders(names: tuple[str, ...]) -> Iterator[tuple[int, int, int]]:
    """Positions of (x, idx, weights), the order that the names suggest first."""

    def score(order: tuple[int, int, int]) -> int:
        idx, weight = names[order[1]].lower(), names[order[2]].lower()
        return -sum(part in idx for part in ("ind", "idx", "expert", "sel")) - sum(
            part in weight for part in ("weight", "score", "prob", "gate")
        )

    orders: list[tuple[int, int, int]] = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 0, 1), (1, 2, 0), (2, 1, 0)]
    yield from sorted(orders, key=score)


def _placed(order: tuple[int, int, int], x: Any, idx: Any, weights: Any) -> list[Any]:
    arguments: list[Any] = [None, None, None]
    for position, value in zip(order, (x, idx, weights)):
        arguments[position] = value
    return arguments


def _num_experts(module: nn.Module) -> int:
    return len(_members(module)) or next(iter(stacked.matrices(module).values())).shape[0]


def _proved(module: nn.Module, order: tuple[int, int, int], experts: Any) -> bool:
    """Whether the module is the sum that this reading says, with gradients of tokens, weights and parameters."""
    generator = torch.Generator().manual_seed(1)
    num_experts = _num_experts(module)
    top_k = min(2, num_experts)
    for hidden in probe.hidden_sizes(module):
        x = torch.randn(7, hidden, generator=generator)
        idx = torch.rand(7, num_experts, generator=generator).topk(top_k, dim=-1).indices
        weights = torch.rand(7, top_k, generator=generator).requires_grad_()
        parameters = [*module.parameters(), weights]
        try:
            original = lambda t: module(*_placed(order, t, idx, weights))  # noqa: B023, E731
            read = lambda t: local(module, experts, t, idx, weights)  # noqa: B023, E731
            if probe.same_function(original, read, x, parameters):
                return True
        except Exception:  # any error of the user's code: not called like that
            continue
    return False


def _plan(module: nn.Module, name: str, order: tuple[int, int, int], experts: Any) -> Plan:
    count, names = _num_experts(module), list(_arguments(module) or ())

    def forward_of(compute_of: Callable[[nn.Module], Any]) -> Callable[..., Tensor]:
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
            site = site_of(self)
            assert site is not None, "installed by parallelize only"
            given = args + tuple(kwargs[n] for n in names[len(args) :])
            x, idx, weights = (given[position] for position in order)
            return exchange(site, x, idx, weights, compute_of(self), loop=True, shares=True)

        return forward

    if isinstance(experts, ModuleExperts):
        merged = StackedExperts({path: module.get_submodule(path) for path in experts.paths}, name)

        def install(module: nn.Module) -> None:
            merged.adopt(module)
            set_method(module, "forward", forward_of(lambda m: m.stacked))

        return Plan(count, {path: Shard(count) for path in merged.names()}, install, merged.names())
    tensors = [*stacked.matrices(module), *dict(experts.mlp.biases).values()]

    def install_stacked(module: nn.Module) -> None:
        set_method(module, "forward", forward_of(experts.compute))

    return Plan(count, {n: Shard(count) for n in tensors}, install_stacked)
