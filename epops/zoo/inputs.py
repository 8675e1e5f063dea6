"""What a tiny model is fed, and what of its answer is compared."""

from __future__ import annotations

from typing import Any

import torch

FIRST_TOKEN = 3
"""Ids below are bos, eos and pad."""


def inputs(family: str, model: Any, batch: int = 2, seqlen: int = 8, seed: int = 0) -> dict[str, torch.Tensor]:
    """Keyword arguments of a forward call: token ids (batch, seqlen), and the decoder's where the model has a decoder."""
    generator = torch.Generator().manual_seed(1000 + seed)
    vocab = model.config.get_text_config().vocab_size
    ids = torch.randint(FIRST_TOKEN, vocab, (batch, seqlen), generator=generator)
    kwargs: dict[str, Any] = {"input_ids": ids}
    if model.config.is_encoder_decoder or hasattr(model.config, "canvas_length"):
        length = max(1, seqlen // 2)
        # made up when it is absent, but not while compiling
        kwargs["attention_mask"] = torch.ones_like(ids)
        kwargs["decoder_input_ids"] = torch.randint(FIRST_TOKEN, vocab, (batch, length), generator=generator)
    if getattr(model.config, "use_cache", None) is not None:
        kwargs["use_cache"] = False
    return kwargs


def output_of(answer: Any) -> torch.Tensor:
    """The tensor to compare: logits where there are any, else the last hidden state."""
    logits = getattr(answer, "logits", None)
    return answer.last_hidden_state if logits is None else logits


def loss_of(answer: Any) -> torch.Tensor:
    """A mean loss with gradients everywhere: the mean squared distance, in float32, from a fixed slope."""
    out = output_of(answer).float()
    slope = torch.linspace(-1.0, 1.0, out.shape[-1], device=out.device)
    return ((out - slope) ** 2).mean()
