"""The trained model writes: every rank goes on from its own prompt, one compiled decoding step a byte, static cache."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .recipe import Recipe
from .text import PROMPT, to_text


class Sample(NamedTuple):
    prompt: str
    written: str
    tokens_per_second: float
    """Of this rank, compilation left out."""
    as_alone: bool | None
    """Whether the one-process model with the same weights writes the same; None on ranks that do not have it."""


def sample(model: Any, reference: Any, held_out: bytes, recipe: Recipe, rank: int, device: torch.device) -> Sample:
    """Collective: the ranks' experts serve one another."""
    at = 997 * rank % (len(held_out) - PROMPT)
    prompt = torch.tensor([list(held_out[at : at + PROMPT])], device=device)
    model.eval()
    _write(model, prompt, recipe, compiled=recipe.compiled)
    start = time.perf_counter()
    written = _write(model, prompt, recipe, compiled=recipe.compiled)
    seconds = time.perf_counter() - start
    as_alone = None
    if reference is not None:
        as_alone = bool(torch.equal(written, _write(reference.eval(), prompt, recipe, compiled=False)))
    new = written[0, PROMPT:]
    return Sample(to_text(prompt[0]), to_text(new), len(new) / seconds, as_alone)


def _write(model: Any, prompt: Tensor, recipe: Recipe, *, compiled: bool) -> Tensor:
    settings: dict[str, Any] = {"max_new_tokens": recipe.new_tokens, "cache_implementation": "static"}
    if compiled:
        from transformers import CompileConfig

        settings["compile_config"] = CompileConfig(backend="epops", fullgraph=True)
    else:
        settings["disable_compile"] = True
    torch.manual_seed(recipe.seed)
    mask = torch.ones_like(prompt)
    return model.generate(prompt, attention_mask=mask, do_sample=True, temperature=0.7, **settings)
