"""Requests that differ in every way, and the answers of the plain one-process model."""

from __future__ import annotations

from typing import Any

import torch

from epops import zoo


def plain(family: str) -> Any:
    return zoo.tiny(family)


def requests(model: Any, rank: int, count: int, longest: int = 11) -> list[dict[str, Any]]:
    """Arguments of `Engine.submit`: prompts of 1 to ``longest`` tokens, 1 to 9 new ones, others on every rank."""
    generator = torch.Generator().manual_seed(100 + rank)
    vocab = model.config.get_text_config().vocab_size
    asked = []
    for number in range(count):
        length = 1 + (3 * number + 5 * rank) % longest
        ids = torch.randint(3, vocab, (length,), generator=generator).tolist()
        asked.append({"prompt_ids": ids, "max_new_tokens": 1 + (4 * number + 2 * rank + 3) % 9, "eos_token_id": None})
    return asked


def answer(model: Any, prompt_ids: list[int], max_new_tokens: int, eos_token_id: Any) -> list[int]:
    """What the model's own generate writes, greedily."""
    ids = torch.tensor([prompt_ids], device=model.device)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=eos_token_id,
    )
    return out[0, len(prompt_ids) :].tolist()
