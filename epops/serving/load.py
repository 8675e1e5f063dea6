"""A model out of a transformers checkpoint folder, each rank reading its own experts and no others; or with random weights.

The model is made on the meta device and sharded there; `loader.Loader` then fills it.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..group import get_group
from ..models import parallelize
from ..models.shard import local_range
from ..models.site import site_of, sites
from .checkpoint import Checkpoint
from .loader import Loader


def load(
    source: Any, group: Any, *, dtype: torch.dtype | str | None = None, device: Any = None, seed: int = 0
) -> nn.Module:
    """A model in eval mode, its experts sharded over ``group``; every rank of the group calls it.

    Args:
        source: a folder that `save_pretrained` wrote or that was downloaded from the hub, with ``config.json`` and safetensors
            files; nothing is fetched and no code of the folder is run.  Or a transformers configuration: random weights.
        group: the `epops.ExpertGroup` (or its name).
        dtype: of the weights; default what the configuration says, else float32.
        device: where the weights go; default the group's device.
        seed: of random weights, the same on every rank.

    Raises:
        ValueError: no such folder, a model that transformers does not know, quantized weights, files in another format, or
            tensors that are missing.
    """
    group = get_group(group) if isinstance(group, str) else group
    folder = None if hasattr(source, "get_text_config") else Path(source)
    config = copy.deepcopy(source) if folder is None else _configuration(folder)
    device = torch.device(device) if device is not None else group.device
    model, mapping = _on_meta(config, dtype)
    whole = dict(model.state_dict())
    parallelize(model, group)
    if folder is None:
        _randomize(model, group.rank, device, seed)
    else:
        checkpoint = Checkpoint(folder)
        try:
            Loader(model, whole, mapping, checkpoint, group.rank, device).load()
        finally:
            checkpoint.close()
        _make_buffers(model, device)
        model.tie_weights()
        _generation_config(model, folder)
    return model.eval()


def _configuration(folder: Path) -> Any:
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise ValueError(
            f"epops.serving.load: folder: expected a transformers checkpoint, got {folder} without a config.json; pass the "
            "folder that save_pretrained wrote"
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(
            f"epops.serving.load: folder: expected a model that this transformers knows, got {folder} [{said}]; code of a "
            "checkpoint is never run: a newer transformers may have the model"
        ) from error
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"epops.serving.load: folder: expected weights that are not quantized, got {folder} with a quantization_config; "
            "dequantize them first, by from_pretrained(..., quantization_config=...Config(dequantize=True)) and save_pretrained"
        )
    return config


def _on_meta(config: Any, dtype: torch.dtype | str | None) -> tuple[Any, list[Any]]:
    """The model without memory, and transformers' rules from names in files to names in the model."""
    from transformers import AutoModelForCausalLM
    from transformers.conversion_mapping import get_model_conversion_mapping

    chosen = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if not (chosen is None or isinstance(chosen, torch.dtype)):
        raise ValueError(
            f"epops.serving.load: dtype: expected a torch.dtype, its name or None, got {dtype!r}; None takes the checkpoint's"
        )
    chosen = chosen or getattr(config, "dtype", None) or torch.float32
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=chosen, trust_remote_code=False)
    except ValueError as error:
        raise ValueError(
            f"epops.serving.load: source: expected a causal language model, got a {type(config).__name__}; load it by its own "
            "class and call epops.parallelize"
        ) from error
    plan = model._get_dtype_plan(chosen)
    if plan:
        for name, parameter in model.named_parameters():
            kept = next((kind for part, kind in plan.items() if re.search(rf"(^|\.){part}($|\.)", name)), None)
            parameter.data = parameter.data.to(kept or parameter.dtype)
    return model, get_model_conversion_mapping(model)


def _make_buffers(model: Any, device: torch.device) -> None:
    """Buffers that no checkpoint holds (rotary frequencies), computed by the model's own initialization, which leaves the rest."""
    for module in model.modules():
        made = [name for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
        for name in made:
            module._buffers[name] = torch.empty_like(module._buffers[name], device=device)
        module._is_hf_initialized = not made
    model.initialize_weights()


def _randomize(model: Any, rank: int, device: torch.device, seed: int) -> None:
    """Weights as the model initializes them: the same on every rank, but for the experts, which differ."""
    model.to_empty(device=device)
    for module in model.modules():
        module._is_hf_initialized = False
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model.initialize_weights()
    model.tie_weights()
    std = getattr(model.config.get_text_config(), "initializer_range", None) or 0.02
    generator = torch.Generator(device).manual_seed(seed * 1_000_003 + rank + 1)
    with torch.no_grad():
        for module in sites(model).values():
            site = site_of(module)
            assert site is not None
            for path, shard in site.shards.items():
                lo, hi = local_range(shard, site, rank)
                tensor = module.get_parameter(path)
                tensor.normal_(0.0, std, generator=generator)[hi - lo :].zero_()


def _generation_config(model: Any, folder: Path) -> None:
    """End tokens and the like, where the folder has them."""
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
