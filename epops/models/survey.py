"""What a model has that looks like routed experts: for errors that say what was found instead of "unsupported"."""

from __future__ import annotations

import dataclasses

from torch import nn


@dataclasses.dataclass
class Survey:
    experts: dict[str, str]
    """Path → one line about what looks like routed experts there."""
    peft: str
    """The first PEFT layer on routed experts, or ""."""
    summary: str


def found(model: nn.Module) -> Survey:
    """Walk the modules once."""
    experts: dict[str, str] = {}
    peft = ""
    for path, module in model.named_modules():
        line = _routed(path, module)
        if line and not any(path.startswith(f"{outer}.") for outer in experts):
            experts[path] = f"{path or 'the model itself'}: {line}"
        if _is_peft(module) and "expert" in path:
            peft = peft or f"{path}: {type(module).__module__}.{type(module).__name__}"
    lists = [
        f"{path} ({len(m)} × {type(next(iter(m))).__name__})"
        for path, m in model.named_modules()
        if isinstance(m, nn.ModuleList) and len(m)
    ]
    summary = (
        f"its module lists are {', '.join(lists[:6])}" if lists else "it has no module lists and no stacked experts"
    )
    return Survey(experts, peft, summary)


def _is_peft(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__module__.split(".")[0] == "peft" or hasattr(module, "lora_A")


def _routed(path: str, module: nn.Module) -> str:
    """A line about ``module`` if its name says experts and it holds several alike, else ""."""
    name = path.rpartition(".")[2].lower()
    kind = type(module).__name__
    if "expert" not in name + kind.lower() or "shared" in name:
        return ""
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        children = list(module.children())
        if len(children) > 1 and len({type(child) for child in children}) == 1:
            return f"{kind} of {len(children)} {type(children[0]).__name__}"
        return ""
    stacked = {n: tuple(p.shape) for n, p in module.named_parameters(recurse=False) if p.dim() >= 3}
    if stacked and len({shape[0] for shape in stacked.values()}) == 1:
        return f"{kind} with stacked parameters {stacked}"
    return ""
