"""``generate`` over ranks: it stops when all have stopped, and a rank that has finished goes on serving its experts.

Transformers' loop has a mode for this (``synced_gpus``), which goes on calling the model with nothing to say. Here the
ranks asked are those of the group, a finished rank's tokens take no part, and its cache stands still: a static cache
would overflow where another rank's generation is longer.
"""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import nn

from ..group import get_group
from .cache import FrozenCache
from .site import Serving, serving

ATTRIBUTE = "_epops_generation"
BACKEND = "epops"


class Generation:
    """Where a model's ``generate`` stands on this rank."""

    def __init__(self, serving: Serving) -> None:
        self.serving = serving
        self.cache_is_returned = False
        self.frozen: FrozenCache | None = None
        self.before: dict[str, Any] = {}
        """Keyword arguments of the model's last call, before the loop moved them on by one token."""
        self.cache: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Generation:
        return Generation(self.serving)

    def idle(self) -> None:
        """Stand still for one more step of the others."""
        if self.frozen is None:
            self.serving.switch(False)
            self.frozen = FrozenCache(self.cache, keep=self.cache_is_returned)
        self.frozen.hold()

    def end(self) -> None:
        if self.frozen is not None:
            self.frozen.release()
            self.serving.switch(True)
        self.frozen, self.before, self.cache = None, {}, None


def synchronize_generate(model: nn.Module, group: Any) -> None:
    """Make ``model.generate``, where it has one, stop together with the other ranks' and compile by the epops backend."""
    if not hasattr(model, "_has_unfinished_sequences"):
        return
    model.__dict__[ATTRIBUTE] = Generation(serving(group))
    for name in ("generate", *_WRAPPED):
        wrapper = _generate if name == "generate" else _WRAPPED[name]
        model.__dict__[name] = types.MethodType(functools.partial(_call, wrapper, name), model)


def _call(wrapper: Any, name: str, self: Any, *args: Any, **kwargs: Any) -> Any:
    # Looked up in the class at each call: a bound method kept here would go on pointing at the model that was copied.
    original = functools.partial(getattr(type(self), name), self)
    return wrapper(self.__dict__[ATTRIBUTE], original, *args, **kwargs)


def _generate(state: Generation, original: Any, *args: Any, **kwargs: Any) -> Any:
    kwargs.setdefault("synced_gpus", state.serving.group.size > 1)
    config = kwargs.get("generation_config")
    state.cache_is_returned = bool(
        kwargs.get("past_key_values") is not None
        or kwargs.get("return_dict_in_generate")
        or getattr(config, "return_dict_in_generate", False)
    )
    try:
        return original(*args, **kwargs)
    finally:
        state.end()


def _has_unfinished_sequences(
    state: Generation, original: Any, this_peer_finished: bool, synced_gpus: bool, device: Any
) -> bool:
    if not synced_gpus:
        return original(this_peer_finished, synced_gpus, device)
    finished = get_group(state.serving.group.name).host_all_gather([int(this_peer_finished)])
    if all(peer for (peer,) in finished):
        return False
    if this_peer_finished:
        state.idle()
    return True


def _update_model_kwargs_for_generation(
    state: Generation, original: Any, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    if state.frozen is not None:
        return model_kwargs
    state.before = dict(model_kwargs)
    updated = original(outputs, model_kwargs, *args, **kwargs)
    state.cache = updated.get("past_key_values")
    return updated


def _prepare_inputs_for_generation(state: Generation, original: Any, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
    if state.frozen is not None and state.frozen.steps_back:
        kwargs.update({name: value for name, value in state.before.items() if name in kwargs})
    return original(input_ids, *args, **kwargs)


def _valid_auto_compile_criteria(state: Generation, original: Any, model_kwargs: Any, generation_config: Any) -> bool:
    compile_config = generation_config.compile_config
    if compile_config is not None and compile_config.backend == BACKEND:
        # Transformers compiles on accelerators only, unless told that the user means it.
        compile_config._compile_all_devices = True
    return original(model_kwargs, generation_config)


_WRAPPED = {
    "_has_unfinished_sequences": _has_unfinished_sequences,
    "_update_model_kwargs_for_generation": _update_model_kwargs_for_generation,
    "prepare_inputs_for_generation": _prepare_inputs_for_generation,
    "_valid_auto_compile_criteria": _valid_auto_compile_criteria,
}
