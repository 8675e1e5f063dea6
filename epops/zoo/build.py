"""A model of a family, small enough for a test, with random weights that leave nothing at zero."""

from __future__ import annotations

import re
from typing import Any

import torch

from . import scan
from .tweaks import FAMILIES, GROUPED, MAIN, SIZES

CLASS_ENDINGS = ("ForCausalLM", "ForConditionalGeneration", "ForTokenClassification")
"""In order of preference: the text part of a multimodal family where it stands alone, since its experts are there."""


def model_class(family: str) -> Any:
    """The class that a tiny instance of the family has."""
    module = scan.modeling(family)
    named = FAMILIES.get(family, {}).get("class")
    if named:
        return getattr(module, named)
    for ending in CLASS_ENDINGS:
        names = [
            n
            for n, c in vars(module).items()
            if n.endswith(ending) and isinstance(c, type) and c.__module__ == module.__name__
        ]
        if names:
            return getattr(module, names[0])
    raise ValueError(f"epops.zoo: {module.__name__} has no class that ends in {', '.join(CLASS_ENDINGS)}")


def _layers(fields: dict[str, Any], least: int) -> dict[str, Any]:
    """``least`` layers at least, kinds of attention that the family mixes in turn, experts in all of them."""
    kinds = list(dict.fromkeys(fields.get("layer_types") or ()))
    num_layers = max(least, len(kinds))
    values: dict[str, Any] = {}
    if len(kinds) > 1:
        values = {"layer_types": (kinds * num_layers)[:num_layers], "num_hidden_layers": num_layers}
    if fields.get("mlp_layer_types"):
        values["mlp_layer_types"] = ["sparse"] * num_layers
    return values


def _shrink(config_class: Any, sizes: dict[str, Any], tweaks: dict[str, Any]) -> Any:
    """A configuration of ``config_class`` with small sizes, its sub-configurations too."""
    fields = config_class().to_dict()
    values = {name: value for name, value in sizes.items() if name in fields}
    values.update(_layers(fields, sizes["num_hidden_layers"]))
    if max(fields.get("n_group") or 1, fields.get("num_expert_group") or 1) > 1:
        values.update({name: value for name, value in GROUPED.items() if name in fields})
    if "kv_lora_rank" in fields:  # latent attention: no grouped queries, head sizes in parts
        values["num_key_value_heads"] = values["num_attention_heads"]
        values.pop("head_dim", None)
    for name, sub in config_class.sub_configs.items():
        if hasattr(sub, "sub_configs") and fields.get(name) is not None:
            values[name] = _shrink(sub, sizes, tweaks.get(name, {}))
        elif name in tweaks:  # a configuration that transformers looks up by its model type
            values[name] = tweaks[name]
    values.update({name: value for name, value in tweaks.items() if name not in config_class.sub_configs})
    for other, name in config_class.attribute_map.items():  # what was asked for by a field's other name
        if other in tweaks:
            values[name] = values.pop(other)
    return config_class(**values)


def configuration(family: str, size: str = "tiny", **overrides: Any) -> Any:
    """The configuration of a family; ``overrides`` are fields of it (of the text part, where a model has several)."""
    if size not in SIZES or (size != "tiny" and family not in MAIN):
        raise ValueError(
            f"epops.zoo: config: got {size!r} for {family}; every family has 'tiny', and {', '.join(MAIN)} have 'small'"
        )
    cls = model_class(family)
    tweaks = dict(FAMILIES.get(family, {}).get("config", {}))
    if "text_config" in cls.config_class.sub_configs:
        tweaks["text_config"] = {**tweaks.get("text_config", {}), **overrides}
    else:
        tweaks.update(overrides)
    sizes = {**SIZES[size], **{name: value for name, value in overrides.items() if name in SIZES[size]}}
    return _shrink(cls.config_class, sizes, tweaks)


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Fill weights so that every term counts: matrices scaled by their size, vectors moved off their start value.

    Norm weights start at one or at zero and biases at zero; a model left like that hides a forgotten bias.  Numbers are drawn on
    the device where a tensor lies: GPUs agree with one another, and not with the CPU.
    """
    generators: dict[torch.device, torch.Generator] = {}

    def generator_of(device: torch.device) -> torch.Generator:
        if device not in generators:
            generators[device] = torch.Generator(device).manual_seed(seed)
        return generators[device]

    def noise(like: torch.Tensor, std: float) -> torch.Tensor:
        drawn = torch.randn(like.shape, generator=generator_of(like.device), device=like.device)
        return (drawn * std).to(like.dtype)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and not re.search(r"bias|norm|A_log|scale", name):
                parameter.copy_(noise(parameter, max(parameter.shape[-2:]) ** -0.5))
            else:
                parameter.add_(noise(parameter, 0.1))
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer.add_(noise(buffer, 0.05))
            elif name.endswith("tid2eid"):  # the experts of a token id, each once
                shape = (buffer.shape[0], model.config.n_routed_experts)
                drawn = torch.rand(shape, generator=generator_of(buffer.device), device=buffer.device)
                order = drawn.argsort(dim=-1)
                buffer.copy_(order[:, : buffer.shape[1]])


def tiny(
    family: str, seed: int = 0, dtype: torch.dtype = torch.float32, *, config: str = "tiny", **overrides: Any
) -> Any:
    """An instance of ``family`` in eval mode; the same seed gives the same weights on every rank.

    ``config="small"`` (the five of `MAIN`): a model over bytes that learns in minutes on two cores, initialized as
    transformers initializes it; ``"tiny"``: the smallest that has all parts, its weights drawn by `randomize`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(family)._from_config(configuration(family, config, **overrides), dtype=dtype)
    _keep_in_float32(model, dtype)
    if config == "tiny":
        randomize(model, seed)
    return model.eval()


def _keep_in_float32(model: Any, dtype: torch.dtype) -> None:
    """As from_pretrained does: the tensors that a family names stay in float32 whatever the dtype of the rest."""
    kept = model._keep_in_fp32_modules_strict
    if dtype not in (torch.float16, torch.bfloat16) or not kept:
        return
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and any(re.search(rf"((^|\.){part}($|\.))", name) for part in kept):
            tensor.data = tensor.data.float()
