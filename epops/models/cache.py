"""A key-value cache that stands still while its rank goes on calling the model for the others' sake."""

from __future__ import annotations

from typing import Any

import torch

LENGTHS = ("cumulative_length", "cumulative_length_int", "indexer_cumulative_length")
"""How far a static layer is filled: tensors that graphs read, and an int."""


class FrozenCache:
    """State of a cache to come back to before every call that does not count.

    A dynamic cache makes new tensors, so that putting the old ones back undoes a step. A static cache is written in place
    and may be full: it is set back by one token, whose place is written again and again.
    """

    def __init__(self, cache: Any, *, keep: bool) -> None:
        """``keep``: the cache is the caller's, its contents are put back by `release` too."""
        cache = getattr(cache, "self_attention_cache", cache)
        self.layers = list(getattr(cache, "layers", None) or [])
        self.steps_back = bool(self.layers) and bool(getattr(cache, "is_compileable", False))
        self.attributes = [dict(vars(layer)) for layer in self.layers]
        self.contents = [self._copies(saved, keep) for saved in self.attributes]

    def _copies(self, saved: dict[str, Any], keep: bool) -> dict[str, torch.Tensor]:
        tensors = {name: value for name, value in saved.items() if isinstance(value, torch.Tensor)}
        whole = keep and self.steps_back
        return {name: value.clone() for name, value in tensors.items() if whole or name in LENGTHS}

    def hold(self) -> None:
        """Undo what the last call did, so that the next one finds room."""
        for layer, saved, contents in zip(self.layers, self.attributes, self.contents):
            vars(layer).update(saved)
            if not self.steps_back:
                continue
            for name in LENGTHS:
                if name in contents:
                    saved[name].copy_((contents[name] - 1).clamp(min=0))
                elif isinstance(saved.get(name), int):
                    setattr(layer, name, max(saved[name] - 1, 0))

    def release(self) -> None:
        """Leave the cache as it was when its rank finished."""
        for layer, saved, contents in zip(self.layers, self.attributes, self.contents):
            vars(layer).update(saved)
            for name, value in contents.items():
                saved[name].copy_(value)
