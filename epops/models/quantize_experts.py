"""`epops.quantize_experts`: experts of a sharded model in fp8, fed by the quantizing dispatch; for inference."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

import epops

from . import interface
from .site import ATTRIBUTE, site_of, sites

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
WIDTH = 16
"""What the scaled grouped GEMM wants both sizes of a matrix to be a multiple of."""


def quantize_experts(model: nn.Module) -> int:
    """Turn the experts of a parallelized ``model`` into fp8 (e4m3), in place; returns how many layers it turned.

    From then on a layer's rows are quantized while they are dispatched, a scale a token, so that half the bytes cross the wire;
    both grouped products take fp8 rows and fp8 weights (a scale an output of each expert, computed here), sum in float32 and give
    bfloat16; what stands between them is the model's own.  The weights take half the memory.  Everything outside the experts
    stays as it is.  Every rank calls it.

    What it costs: e4m3 keeps three bits after the leading one, so that a number is off by up to 1/16 of itself, 2.6 % on
    average; compare outputs on your own data.  Such a model is for inference: it has no gradients through its experts, and
    neither saves nor loads them.  Load weights first, and call it after the model is where it will run.

    Raises:
        ValueError: no sharded experts; experts that are not on transformers' experts interface; experts that are quantized already,
            on the meta device, not in bfloat16, float16 or float32, or of sizes that are no multiples of 16.  Nothing is
            changed then.
    """
    found = sites(model)
    if not found:
        raise _refuse(
            "model", "a parallelized model", f"{type(model).__name__} without sharded experts", "call epops.parallelize"
        )
    for name, module in found.items():
        _check(name, module)
    done: dict[int, tuple[nn.Parameter, Tensor]] = {}
    for module in found.values():
        for path in interface.projections(module):
            _quantize(module, path, done)
        site = site_of(module)
        assert site is not None
        module.__dict__[ATTRIBUTE] = dataclasses.replace(site, quantized=True)
        module.register_state_dict_pre_hook(_no_save)
        module.register_load_state_dict_pre_hook(_no_load)
    return len(found)


def _quantize(module: nn.Module, path: str, done: dict[int, tuple[nn.Parameter, Tensor]]) -> None:
    """(L, out, in) fp8 takes the parameter's place and (L, out) scales stand beside it; tied tensors stay one tensor."""
    weight = module.get_parameter(path)
    if id(weight) not in done:
        with torch.no_grad():
            given = weight.transpose(1, 2) if module.is_transposed else weight
            # An expert at a time: the float32 copy that quantizing makes is four times the result.
            parts = [epops.quantize(one, block=0) for one in given]
            rows = torch.stack([part.rows.view(torch.uint8) for part in parts]).view(torch.float8_e4m3fn)
            scales = torch.stack([part.scales[:, 0] for part in parts])
        done[id(weight)] = nn.Parameter(rows, requires_grad=False), scales
    module._parameters[path], scales = done[id(weight)]
    module.register_buffer(path + interface.FP8_SCALE, scales, persistent=False)


def _check(name: str, module: nn.Module) -> None:
    site = site_of(module)
    assert site is not None
    if site.quantized:
        raise _refuse("model", f"experts that are not quantized yet, in {name!r}", "fp8 ones", "call it once a model")
    # A family with a forward of its own may have the interface's tensors too, and would take them for what they were.
    if not interface.matches(module) or getattr(module.forward, "__func__", None) is not interface.forward:
        raise _refuse(
            "model",
            "experts on transformers' experts interface",
            f"{type(module).__name__} in {name!r}",
            "leave this model as it is",
        )
    for path in interface.projections(module):
        weight = module.get_parameter(path)
        got = f"{weight.dtype} {tuple(weight.shape)} on {weight.device.type} in {name}.{path}"
        if weight.is_meta:
            raise _refuse("model", "weights", got, "load them first")
        if weight.dtype not in FLOATS:
            raise _refuse("model", "weights in bfloat16, float16 or float32", got, "load the model unquantized")
        if weight.shape[1] % WIDTH or weight.shape[2] % WIDTH:
            raise _refuse("model", f"sizes that are multiples of {WIDTH}", got, "leave this model as it is")


def _refuse(argument: str, expected: str, got: str, remedy: str) -> ValueError:
    return ValueError(f"epops.quantize_experts: {argument}: expected {expected}, got {got}; {remedy}")


def _no_save(module: nn.Module, prefix: str, _keep: bool) -> None:
    raise ValueError(
        f"epops state_dict: {prefix.rstrip('.')}: expected experts as they were loaded, got fp8 ones of epops.quantize_experts; "
        "save the model before it is quantized"
    )


def _no_load(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    raise ValueError(
        f"epops load_state_dict: {prefix.rstrip('.')}: expected experts as parallelize made them, got fp8 ones of "
        "epops.quantize_experts; load the weights before they are quantized"
    )
