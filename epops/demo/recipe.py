"""What both models of the demo are trained by: the same windows, optimizer, schedule and clipping."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .text import PROMPT, windows


class Recipe(NamedTuple):
    """Equal on every rank."""

    model: str = "mixtral"
    steps: int = 200
    batch: int = 16
    """Windows a step, of all ranks together."""
    length: int = 64
    layers: int = 2
    learning_rate: float = 4e-3
    max_norm: float = 1.0
    new_tokens: int = 160
    seed: int = 0
    compiled: bool = True

    def check(self) -> None:
        """Raises ValueError for what the small models cannot do."""
        from ..zoo.tweaks import MAIN, SMALL

        most = SMALL["max_position_embeddings"]
        if self.model not in MAIN:
            raise ValueError(f"epops demo: --model: expected one of {', '.join(MAIN)}, got {self.model!r}")
        for name, least in (("steps", 1), ("batch", 1), ("length", 2), ("new_tokens", 1)):
            if getattr(self, name) < least:
                option = name.replace("_", "-")
                raise ValueError(f"epops demo: --{option}: expected at least {least}, got {getattr(self, name)}")
        for name, used in (("length", self.length), ("new_tokens", self.new_tokens + PROMPT)):
            if used > most:
                raise ValueError(
                    f"epops demo: --{name.replace('_', '-')}: expected at most {most - used + getattr(self, name)}, "
                    f"got {getattr(self, name)}; the small models have {most} positions"
                )


class Curve(NamedTuple):
    """Loss (nats a byte, mean of the whole batch) and gradient norm before clipping, a value a step."""

    losses: list[float]
    norms: list[float]


def batch_of(text: bytes, recipe: Recipe, step: int) -> Tensor:
    """(batch, length) windows of one step, of all ranks together."""
    return windows(text, recipe.batch, recipe.length, seed=1_000_003 * recipe.seed + step)


def build(recipe: Recipe, device: torch.device) -> Any:
    """The unsharded model; the same seed gives the same weights on every rank."""
    from .. import zoo

    fields: dict[str, Any] = {"num_hidden_layers": recipe.layers}
    if recipe.model == "mixtral":
        fields["sliding_window"] = None  # as in the published Mixtrals; its cache would need one more decoding graph
    model = zoo.tiny(recipe.model, recipe.seed, config="small", **fields)
    return model.to(device).train()


def learning_rate(recipe: Recipe, step: int) -> float:
    """Up for a tenth of the steps, then down a half cosine to a tenth of the peak."""
    warm_up = max(1, recipe.steps // 10)
    if step < warm_up:
        return recipe.learning_rate * (step + 1) / warm_up
    done = (step - warm_up) / max(1, recipe.steps - warm_up)
    return recipe.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def train(
    model: nn.Module,
    forward: Callable[..., Any],
    batches: Callable[[int], Tensor],
    recipe: Recipe,
    *,
    average: Callable[[Tensor], Tensor],
    clip: Callable[[], Tensor],
    on_step: Callable[[int, float], None],
) -> Curve:
    """Train in place.

    ``forward`` is the model or its compiled self.  ``average(loss)`` runs after the backward: it makes gradients those of the whole
    batch and returns the whole batch's loss.  ``clip()`` clips them and returns their norm.
    """
    # A larger eps than usual: where gradients are tiny, Adam would turn their last bits into full steps, and two ways of
    # adding up the same numbers into two curves.
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), eps=1e-6)
    losses, norms = [], []
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        ids = batches(step)
        loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        total = average(loss.detach())
        norm = clip()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(total))
        norms.append(float(norm))
        on_step(step, losses[-1])
    return Curve(losses, norms)
