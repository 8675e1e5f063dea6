"""Experts stacked in 3-D parameters: the ways in which two or three of them make an MLP, each a hypothesis to be tried."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..experts import Rows, linear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


@dataclasses.dataclass(frozen=True)
class StackedMLP:
    """``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` without a gate, of one expert a slice."""

    up: str
    down: str
    gate: str = ""
    """The gate's own parameter; "" where ``up`` holds both or there is no gate."""
    split: str = ""
    """How ``up`` holds both: "halves" or "pairs"."""
    gate_first: bool = True
    up_transposed: bool = False
    """Whether the matrices lie (in, out)."""
    down_transposed: bool = False
    activation: str = "silu"
    biases: tuple[tuple[str, str], ...] = ()
    """Matrix → its bias."""

    def __call__(self, holder: nn.Module, rows: Rows, *, slot: slice = slice(None)) -> Tensor:
        act = activation_of(holder, self.activation)
        biases = dict(self.biases)

        def project(x: Tensor, name: str, transposed: bool) -> Tensor:
            offset = getattr(holder, biases[name])[slot] if name in biases else None
            return linear(rows, x, getattr(holder, name)[slot], offset, transposed=transposed)

        h = project(rows.x, self.up, self.up_transposed)
        if self.gate:
            h = act(project(rows.x, self.gate, self.up_transposed)) * h
        elif self.split:
            first, second = h.chunk(2, dim=-1) if self.split == "halves" else (h[..., ::2], h[..., 1::2])
            h = act(first) * second if self.gate_first else act(second) * first
        else:
            h = act(h)
        return project(h, self.down, self.down_transposed)


def activation_of(holder: nn.Module, name: str) -> Callable[[Tensor], Tensor]:
    return ACTIVATIONS[name] if name in ACTIVATIONS else getattr(holder, name)


class AtHolder:
    """A hypothesis about the parameters of the submodule ``path`` of a block."""

    def __init__(self, mlp: StackedMLP, path: str) -> None:
        self.mlp, self.path = mlp, path

    def one(self, module: nn.Module, expert: int, x: Tensor) -> Tensor:
        ends = torch.tensor([x.shape[0]], dtype=torch.int32)
        rows = Rows(x, torch.ones(x.shape[0]), torch.zeros(x.shape[0], dtype=torch.int32), ends)
        return self.mlp(module.get_submodule(self.path), rows, slot=slice(expert, expert + 1))

    def compute(self, module: nn.Module) -> Callable[[Rows], Tensor]:
        holder = module.get_submodule(self.path)
        return lambda rows: self.mlp(holder, rows)


def matrices(holder: nn.Module) -> dict[str, Tensor]:
    """The holder's own 3-D parameters, if they look like one matrix an expert."""
    found = {name: p for name, p in holder.named_parameters(recurse=False) if p.dim() == 3}
    return found if len(found) in (2, 3) and len({p.shape[0] for p in found.values()}) == 1 else {}


def biases_of(holder: nn.Module, names: list[str]) -> dict[str, str]:
    """Matrix → the (E, n) parameter whose name is the matrix's with "bias" or "b" in it."""
    num_experts = getattr(holder, names[0]).shape[0]
    vectors = [n for n, p in holder.named_parameters(recurse=False) if p.dim() == 2 and p.shape[0] == num_experts]
    found = {}
    for name in names:
        spellings = {f"{name}_bias", f"{name}_b", f"bias_{name}", f"b_{name}"}
        spellings |= {name.replace("w", "b"), name.replace("weight", "bias")}
        match = [v for v in vectors if v in spellings - {name}]
        if match:
            found[name] = match[0]
    return found


def hypotheses(holder: nn.Module) -> Iterator[StackedMLP]:
    """Every way in which the holder's matrices fit together."""
    sizes = {name: tuple(p.shape[1:]) for name, p in matrices(holder).items()}
    biases = tuple(biases_of(holder, list(sizes)).items()) if sizes else ()
    own = [n for n, m in holder.named_children() if not list(m.parameters())]
    own += [n for n in vars(holder) if "act" in n and callable(getattr(holder, n))]
    activations = [*own, *ACTIVATIONS]
    for order in itertools.permutations(sizes):
        *ins, down = order
        if len(ins) == 2 and sizes[ins[0]] != sizes[ins[1]]:
            continue
        for up_transposed, down_transposed in itertools.product((False, True), repeat=2):
            width = sizes[ins[-1]][1 if up_transposed else 0]
            inner = sizes[down][0 if down_transposed else 1]
            common: dict[str, Any] = {"up": ins[-1], "down": down, "biases": biases}
            common.update(up_transposed=up_transposed, down_transposed=down_transposed)
            for activation in activations:
                if len(ins) == 2 and width == inner:
                    yield StackedMLP(gate=ins[0], activation=activation, **common)
                elif len(ins) == 1 and width == inner:
                    yield StackedMLP(activation=activation, **common)
                elif len(ins) == 1 and width == 2 * inner:
                    for split, gate_first in itertools.product(("halves", "pairs"), (True, False)):
                        yield StackedMLP(split=split, gate_first=gate_first, activation=activation, **common)
