"""Multi-head latent attention with projections split by heads and a core that is data-parallel over requests.

For the DeepSeek-V3 attention of transformers, whose forward stays as it is.  Every rank projects its heads of all tokens; each
query goes to the rank that owns the request, meets the latent cache there, and its result goes back.
"""

from __future__ import annotations

import types
from typing import Any, NamedTuple

import torch

from ..group import ExpertGroup
from ..ops.all_to_all import all_to_all
from ..ops.plan_all_to_all import plan_all_to_all
from .batch import Batch
from .by_heads import HeadsIn, HeadsOut, heads_of, to_parts
from .latent_cache import LatentCache, StepCache

NAME = "epops_mla"
CORES = ("requests", "heads")


class MLAStep(NamedTuple):
    """What the attention of every layer needs of a step: pass it to the model as ``mla_step``, and ``cache`` as its cache.

    ``out`` and ``back`` are the plans of the two exchanges.
    """

    batch: Batch
    out: torch.Tensor
    back: torch.Tensor
    cache: StepCache | None


class Core(NamedTuple):
    """How one attention module is split: ``heads[r]`` heads on rank r."""

    kind: str
    group: str
    rank: int
    heads: list[int]


def begin(model: torch.nn.Module, batch: Batch, cache: LatentCache | None = None) -> MLAStep:
    """The exchanges of a step planned, once for all layers; inside a compiled or captured step, or before it.

    ``cache`` None: every request of the batch begins in it (training, and scoring of whole prompts).
    """
    layer: Any = next(module for module in model.modules() if hasattr(module, "epops_core"))
    core, tokens, heads = layer.epops_core, batch.rank_tokens, layer.epops_heads
    stored = None if cache is None else StepCache(cache, batch)
    if core.kind == "heads":
        return MLAStep(batch, tokens, tokens, stored)
    out, _ = plan_all_to_all(tokens, heads, group=core.group)
    back, _ = plan_all_to_all(heads, tokens, group=core.group)
    return MLAStep(batch, out, back, stored)


def shard_mla(model: torch.nn.Module, group: ExpertGroup, *, core: str = "requests") -> int:
    """Split the latent attention of ``model`` over the ranks of ``group``, in place; returns how many layers have it.

    Args:
        core: "requests": each rank caches and attends for the requests that it owns.  "heads": each rank attends with its
            heads for all requests, and so caches all of them (what tensor parallelism does).

    Raises:
        ValueError: fewer heads than ranks, or no such attention in the model.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if core not in CORES:
        raise ValueError(
            f"epops.nn.shard_mla: core: expected one of {', '.join(CORES)}, got {core!r}; name one of them"
        )
    layers = [module for module in model.modules() if hasattr(module, "kv_b_proj") and hasattr(module, "expand_kv")]
    if not layers:
        raise ValueError(
            f"epops.nn.shard_mla: model: expected latent attention that caches its latents (transformers 5.23 and newer), got "
            f"none in {type(model).__name__}; pass a DeepSeek-V3 model or its attention"
        )
    for layer in layers:
        _check(layer, group)
    ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
    for layer in layers:
        _shard(layer, group, core)
    return len(layers)


def _check(layer: Any, group: ExpertGroup) -> None:
    if hasattr(layer, "epops_core"):
        raise ValueError("epops.nn.shard_mla: model: expected a whole model, got one that is split; split it once")
    if layer.num_heads < group.size:
        raise ValueError(
            f"epops.nn.shard_mla: model: expected at least one head for each of the {group.size} ranks of group {group.name!r}, "
            f"got {layer.num_heads} heads; use fewer ranks"
        )
    if layer.attention_dropout:
        raise ValueError(
            f"epops.nn.shard_mla: model: expected attention_dropout 0, got {layer.attention_dropout}; set it to 0 in the config"
        )


def _shard(layer: Any, group: ExpertGroup, kind: str) -> None:
    heads = heads_of(layer.num_heads, group.size)
    name = "q_proj" if layer.q_lora_rank is None else "q_b_proj"
    setattr(layer, name, HeadsOut(getattr(layer, name), heads, group.rank, group.name))
    layer.kv_b_proj = HeadsOut(layer.kv_b_proj, heads, group.rank, group.name)
    layer.o_proj = HeadsIn(layer.o_proj, heads, group.rank, group.name)
    layer.epops_core = Core(kind, group.name, group.rank, heads)
    layer.register_buffer("epops_heads", torch.tensor(heads, device=layer.o_proj.weight.device), persistent=False)
    layer.expand_kv = types.MethodType(_keep_latents, layer)
    layer.config._attn_implementation = NAME


def _keep_latents(layer: Any, latents: torch.Tensor, rotated: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """In place of ``expand_kv``: keys and values stay latents, and the products with ``kv_b_proj`` go to queries and results."""
    if latents.shape[-1] != layer.kv_lora_rank:  # rows of a LatentCache
        return latents, latents[..., : layer.kv_lora_rank]
    rows = to_parts(torch.cat([latents, rotated], dim=-1), layer.epops_core.group)
    return rows, rows[..., : layer.kv_lora_rank]


def attention(
    layer: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any = None,
    *,
    scaling: float,
    mla_step: MLAStep | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """``query`` (1, h, T, nope + rope) of this rank's heads → (1, T, h, v_head_dim)."""
    if mla_step is None:
        raise ValueError(
            "epops.nn.shard_mla: mla_step: expected the step that epops.nn.begin returned, got None; call the model with mla_step=…"
        )
    core = layer.epops_core
    weight = layer.kv_b_proj.weight.view(core.heads[core.rank], -1, layer.kv_lora_rank)
    to_latent, from_latent = weight.split([layer.qk_nope_head_dim, layer.v_head_dim], dim=1)
    plain, rotated = query[0].split([layer.qk_nope_head_dim, layer.qk_rope_head_dim], dim=-1)
    queries = torch.cat([torch.bmm(plain, to_latent), rotated], dim=-1)  # (h, T, D)
    found = attend(core, queries, key, value, mla_step, scaling)
    out = torch.bmm(found, from_latent.transpose(1, 2))  # (h, T, v)
    return out.transpose(0, 1).unsqueeze(0), None


def attend(
    core: Core, queries: torch.Tensor, key: torch.Tensor, value: torch.Tensor, step: MLAStep, scaling: float
) -> torch.Tensor:
    """Exchanges and attention, between the products with ``kv_b_proj``: (h, T, D) queries of this rank's heads → (h, T, lora)."""
    if core.kind == "heads":
        found = _attend(queries.transpose(0, 1), key, value, step, scaling)
    else:
        # Shapes are those of the rank with most heads, for transports that move equal parts; the plans name the true ones.
        most = core.heads[0]
        queries = torch.nn.functional.pad(queries, (0, 0, 0, 0, 0, most - core.heads[core.rank]))
        # (T, h, D) → (N, H, D): all heads of this rank's tokens …
        queries = all_to_all(
            queries.transpose(0, 1).contiguous(),
            plan=step.out,
            group=core.group,
            scatter_dim=0,
            gather_dim=1,
            scatter_size=step.batch.own.shape[0],
            out_size=sum(core.heads),
        ).rows
        found = _attend(queries, key, value, step, scaling)
        # … and (N, H, lora) → (T, h, lora).
        found = all_to_all(
            found,
            plan=step.back,
            group=core.group,
            scatter_dim=1,
            gather_dim=0,
            scatter_size=most,
            out_size=step.batch.cache_row.shape[0],
        ).rows
    # Cut behind the transpose: next to the exchange all ranks have the same nodes, and so the same exchange.
    return found.transpose(0, 1).contiguous()[: core.heads[core.rank]]


def _attend(
    queries: torch.Tensor, key: torch.Tensor, value: torch.Tensor, step: MLAStep, scaling: float
) -> torch.Tensor:
    """(N, H, D) queries against the rows of their requests → (N, H, lora): one matrix product a slot, for all heads share them."""
    batch = step.batch
    slots, chunk = batch.query_position.shape
    heads, width = queries.shape[1:]
    if step.cache is None:  # the rows of this step's tokens: those of the queries are all there are
        key, value = (rows[0, 0][batch.own][batch.grid].view(slots, 1, chunk, -1) for rows in (key, value))
    key, value = key[:, 0].to(queries.dtype), value[:, 0].to(queries.dtype)
    grid = queries[batch.grid].view(slots, chunk * heads, width)
    scores = torch.bmm(grid, key.transpose(1, 2)).view(slots, chunk, heads, -1) * scaling
    seen = torch.arange(key.shape[1], device=key.device) <= batch.query_position.unsqueeze(-1)
    scores = scores.masked_fill(~seen.unsqueeze(2), torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(queries.dtype)
    found = torch.bmm(weights.view(slots, chunk * heads, -1), value).view(slots * chunk, heads, -1)
    return found[batch.place]
