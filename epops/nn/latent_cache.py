"""The cache of multi-head latent attention: one compressed row a token, for the requests that this rank owns."""

from __future__ import annotations

from typing import Any

import torch

from .batch import Batch


class LatentCache(torch.nn.Module):
    """Rows of ``kv_lora_rank + qk_rope_head_dim`` numbers for ``num_slots`` requests, up to ``max_length`` a request and layer.

    Buffers of fixed addresses that steps write in place, so that a captured graph can hold them.
    """

    def __init__(
        self,
        config: Any,
        num_slots: int,
        max_length: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.num_slots = num_slots
        self.max_length = max_length
        self.width = config.kv_lora_rank + config.qk_rope_head_dim
        for layer in range(config.num_hidden_layers):
            # One row more: tokens of other ranks' requests are written there, so that a step has one shape.
            rows = torch.zeros(num_slots * max_length + 1, self.width, dtype=dtype, device=device)
            self.register_buffer(f"layer{layer}", rows, persistent=False)

    @property
    def num_bytes(self) -> int:
        """Bytes of all layers."""
        return sum(rows.numel() * rows.element_size() for rows in self.buffers())


class StepCache:
    """What DeepseekV3Attention calls its cache: writes the rows of a step and returns the rows of all requests."""

    is_compileable = True
    is_sliding: tuple[bool, ...] = (False,)

    def __init__(self, cache: LatentCache, batch: Batch) -> None:
        self.cache = cache
        self.batch = batch

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions are the batch's own; the model asks only for their default."""
        return 0

    def update(
        self, latents: torch.Tensor, rotated: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``latents`` (1, 1, T, kv_lora_rank), ``rotated`` (1, 1, T, rope) → rows (Q, 1, length, width), and ``rotated``."""
        cache = self.cache
        rows = cache.get_buffer(f"layer{layer_idx}")
        written = torch.cat([latents[0, 0], rotated[0, 0]], dim=-1).detach().to(rows.dtype)
        rows.index_copy_(0, self.batch.cache_row, written)
        return rows[:-1].view(cache.num_slots, 1, cache.max_length, cache.width), rotated
