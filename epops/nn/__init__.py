"""Modules for models over ranks that are no experts: multi-head latent attention, data-parallel over requests."""

from .batch import Batch, Chunk, lay_out
from .latent_cache import LatentCache
from .mla import MLAStep, begin, shard_mla

__all__ = ["Batch", "Chunk", "lay_out", "LatentCache", "MLAStep", "begin", "shard_mla"]
