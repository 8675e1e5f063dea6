"""Argument checks that several ops share.  Each raises ValueError: op, argument, expected, got, remedy."""

from __future__ import annotations

from typing import Any

import torch

from .. import layout as words

PAYLOADS = (torch.float32, torch.float16, torch.bfloat16)


def fail(op: str, argument: str, expected: str, got: Any, remedy: str) -> None:
    raise ValueError(f"epops.{op}: {argument}: expected {expected}, got {got}; {remedy}")


def is_int(value: Any) -> bool:
    """Whether a size is known now; a symbolic one is left to the run time."""
    return isinstance(value, int)


def check_settings(op: str, num_experts: int, num_slots: int, ep_size: int, max_tokens: Any, layout: str) -> None:
    if layout not in words.LAYOUTS:
        fail(op, "layout", "one of " + ", ".join(words.LAYOUTS), repr(layout), "name a layout")
    if ep_size < 1:
        fail(op, "ep_size", "at least 1", ep_size, "pass the group's size")
    if num_experts < 1:
        fail(op, "num_experts", "at least 1", num_experts, "pass num_experts here or to the ExpertGroup")
    if num_slots < words.num_slots_for(num_experts, ep_size):
        least = words.num_slots_for(num_experts, ep_size)
        fail(op, "num_slots", f"at least {least} for {num_experts} experts on {ep_size} ranks", num_slots, "raise it")
    if is_int(max_tokens) and max_tokens < 1:
        fail(op, "max_tokens", "at least 1", max_tokens, "pass a bound on the tokens of every rank")


def check_tokens(op: str, argument: str, num_tokens: Any, max_tokens: Any) -> None:
    if is_int(num_tokens) and is_int(max_tokens) and num_tokens > max_tokens:
        fail(
            op,
            argument,
            f"at most max_tokens = {max_tokens} rows",
            num_tokens,
            "raise max_tokens of the ExpertGroup (on every rank) or send fewer tokens",
        )


def check_dim(op: str, argument: str, tensor: torch.Tensor, dim: int, shape: str) -> None:
    if tensor.dim() != dim:
        fail(op, argument, f"{dim} dimensions, {shape}", f"shape {tuple(tensor.shape)}", "reshape it")


def check_device(op: str, first: torch.Tensor, **others: torch.Tensor | None) -> None:
    for argument, tensor in others.items():
        if tensor is not None and tensor.device != first.device:
            fail(op, argument, f"device {first.device} like the first argument", tensor.device, "move it there")


def check_rows(op: str, argument: str, got: Any, other: str, expected: Any, remedy: str) -> None:
    if is_int(got) and is_int(expected) and got != expected:
        raise ValueError(f"epops.{op}: {argument} has {got} rows but {other} has {expected}; {remedy}")


def check_route(op: str, route: torch.Tensor, num_tokens: Any, max_tokens: Any, ep_size: int, top_k: int) -> None:
    if route.dtype != torch.int32 or route.dim() != 1:
        fail(
            op,
            "route",
            "the int32 tensor that dispatch returned",
            f"{route.dtype} {tuple(route.shape)}",
            "pass it unchanged",
        )
    size = words.route_size(num_tokens, max_tokens, ep_size, top_k)
    if is_int(size) and is_int(route.shape[0]) and route.shape[0] != size:
        fail(
            op,
            "route",
            f"{size} words (num_tokens {num_tokens}, max_tokens {max_tokens}, ep_size {ep_size}, top_k {top_k})",
            f"{route.shape[0]} words",
            "pass the route, num_tokens and max_tokens of one and the same dispatch",
        )
