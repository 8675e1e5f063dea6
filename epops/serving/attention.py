"""The attention of a decode step: a mask of rows at different positions, ready-made, and keys that are read where they lie."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import StaticCache, StaticLayer, StaticSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

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


PACKED = "epops_packed"
"""Name of `packed_attention` among transformers' attention functions."""


def packed_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """Transformers' sdpa; for one query a row (B, N, 1, D) and fewer heads of keys (B, N_kv, length, D), without a copy of them.

    Query heads that share a head of keys become N / N_kv queries of that head, which is the same sum.  Transformers does so in
    eager calls alone, and in compiled ones writes the keys and values of the whole cache N / N_kv times.
    """
    heads, shared = query.shape[1], key.shape[1]
    alike = attention_mask is None or attention_mask.shape[1] == 1
    plain = all(settings.get(name) is None for name in ("position_bias", "softcap", "cache"))
    if query.shape[2] != 1 or heads == shared or not alike or not plain:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    packed = query.reshape(query.shape[0], shared, heads // shared, query.shape[3])
    out = torch.nn.functional.scaled_dot_product_attention(
        packed,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=settings.get("dropout", 0.0),
        scale=settings.get("scaling"),
    )
    return out.reshape(out.shape[0], 1, heads, out.shape[3]), None


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)


@contextmanager
def packed(config: Any) -> Iterator[None]:
    """While it lasts a model of ``config`` whose attention is sdpa uses `packed_attention`."""
    before = config._attn_implementation
    if before != "sdpa":
        yield
        return
    config._attn_implementation = PACKED
    try:
        yield
    finally:
        config._attn_implementation = before
