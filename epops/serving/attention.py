"""The attention mask of rows that stand at different positions, in the form in which a model takes one ready-made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticCache, StaticLayer, StaticSlidingWindowLayer

SERVED = ("full_attention", "sliding_attention")
IMPLEMENTATIONS = ("sdpa", "eager")
NOT_CAUSAL = ("doge",)
"""Model types whose earlier tokens see later ones in transformers 5.23, whatever the mask: a cache gives other answers."""


def check_model(model: Any) -> int:
    """Number of layers that keep keys and values; raises ValueError for models whose state is anything else."""
    config = model.config.get_text_config()
    if getattr(model.config, "is_encoder_decoder", False):
        raise _refuse(model, "a decoder-only model", "an encoder-decoder")
    if config.model_type in NOT_CAUSAL:
        raise _refuse(model, "causal attention", "whose tokens see later ones")
    kinds = set(getattr(config, "layer_types", None) or ())
    layers = StaticCache(config=config, max_cache_len=1).layers if kinds <= set(SERVED) else []
    kinds |= {type(layer).__name__ for layer in layers if type(layer) not in (StaticLayer, StaticSlidingWindowLayer)}
    others = sorted(kinds - set(SERVED))
    if others:
        raise _refuse(model, f"layers of {' and '.join(SERVED)}", f"{', '.join(others)} too")
    if config._attn_implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"epops.serving.Engine: model: expected attention by {' or '.join(IMPLEMENTATIONS)}, got "
            f"{config._attn_implementation!r}; call model.set_attn_implementation('sdpa')"
        )
    return len(layers)


def _refuse(model: Any, expected: str, got: str) -> ValueError:
    return ValueError(
        f"epops.serving.Engine: model: expected {expected}, got {type(model).__name__}, {got}; use model.generate"
    )


def masks(config: Any, positions: Tensor, length: int, dtype: torch.dtype) -> Any:
    """(B, 1, T, length) mask for queries at ``positions`` (B, T): a tensor, or one a kind of layer where a model mixes them.

    True where a key may be seen; for eager attention 0 there and the lowest number elsewhere, in ``dtype``.
    """
    keys = torch.arange(length, device=positions.device)
    queries = positions[:, None, :, None]
    causal = keys <= queries
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())

    def form(mask: Tensor) -> Tensor:
        if config._attn_implementation == "sdpa":
            return mask
        return torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype)

    if not kinds:
        return form(causal if window is None else causal & (keys > queries - window))
    made = {kind: causal if kind == "full_attention" else causal & (keys > queries - window) for kind in sorted(kinds)}
    return {kind: form(mask) for kind, mask in made.items()}
