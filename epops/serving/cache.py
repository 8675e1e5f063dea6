"""Keys and values of all slots in one static tensor a layer; each row of a batch writes at a position of its own.

Transformers' static cache has one length for the whole batch.  Here a batch is a set of slots, and where its rows stand is
read from tensors, so that one compiled graph serves any lengths.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ..torch_private import mark_static


class Place:
    """Where the tokens of the running batch go; the layers of a cache share one."""

    def __init__(self, slots: int) -> None:
        self.slots: Tensor | None = None
        """(B,) int64 slot of each row; None: rows are the first B slots."""
        self.positions: Tensor = torch.empty(0)
        """(B, T) int64 position of each token in its sequence."""
        self.count = slots


class SlotLayer(CacheLayerMixin):
    """One layer: keys (S, heads, length, head size) and values, made at the first update, which is never a compiled one."""

    is_compileable = True
    is_sliding = False

    def __init__(self, place: Place, length: int) -> None:
        super().__init__()
        self.place = place
        self.length = length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            torch.zeros((self.place.count, t.shape[1], self.length, t.shape[3]), dtype=t.dtype, device=t.device)
            for t in (key_states, value_states)
        )
        for tensor in (self.keys, self.values):
            mark_static(tensor)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write (B, heads, T, head size) and return the rows' whole keys and values, (B, heads, length, head size)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values, slots = self.keys, self.values, self.place.slots
        rows = torch.arange(key_states.shape[0], device=keys.device) if slots is None else slots
        for stored, states in ((keys, key_states), (values, value_states)):
            # Indices around a slice put their own dims first: (B, T, heads, head size).
            stored[rows[:, None], :, self.place.positions] = states.transpose(1, 2)
        if slots is None:
            return keys[: rows.shape[0]], values[: rows.shape[0]]
        return keys[slots], values[slots]

    def move(self, source: int, target: int) -> None:
        for tensor in (self.keys, self.values):
            tensor[target].copy_(tensor[source])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length, 0

    def get_seq_length(self) -> int:
        """Rows have lengths of their own; models that are given positions and a mask do not ask for one."""
        return 0

    def get_max_length(self) -> int:
        return self.length

    get_max_cache_shape = get_max_length


class SlotCache(Cache):
    """A cache of ``slots`` sequences of up to ``length`` tokens, for a model of ``layers`` layers."""

    def __init__(self, layers: int, slots: int, length: int) -> None:
        self.place = Place(slots)
        super().__init__(layers=[SlotLayer(self.place, length) for _ in range(layers)])

    def move(self, source: int, target: int) -> None:
        """Copy a slot's keys and values."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.move(source, target)
