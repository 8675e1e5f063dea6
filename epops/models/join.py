"""Loops over uneven data: a rank that has run out of batches mirrors what the others do, until all are done.

Before each forward, backward and optimizer step the ranks tell each other on the host what they are about to do. A rank
that is done runs its last inputs through the same model, eager or compiled, with none of its tokens taking part and with
zero gradients, so that its exchanges are those of the others.
"""

from __future__ import annotations

import contextlib
import functools
import struct
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DisagreementError
from ..group import get_group
from .site import serving

DONE, FORWARD, BACKWARD, STEP, AVERAGE, CLIP = range(6)
EVENTS = ("done", "a forward", "a backward", "an optimizer step", "epops.average_gradients", "epops.clip_grad_norm_")

_joined: dict[str, Join] = {}


def announce(group: Any, event: int, value: float = 0.0) -> None:
    """Tell the ranks of a joined loop what this one is about to do; nothing outside of `join`."""
    here = _joined.get(group.name)
    if here is not None:
        here.announce(event, _bits(value))


def _bits(value: float) -> int:
    return struct.unpack("<q", struct.pack("<d", value))[0]


def _float(bits: int) -> float:
    return struct.unpack("<d", struct.pack("<q", bits))[0]


class Join:
    """One joined loop on this rank."""

    def __init__(self, model: nn.Module, group: Any, optimizer: Any, example: Any) -> None:
        self.model, self.group, self.optimizer = model, group, optimizer
        self.inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = example
        self.forwards = 0
        self.outputs: dict[int, list[Tensor]] = {}
        """Mirrored forwards, by their number, that wait for their backward."""
        self.mirroring = False
        self.stepped = True

    # ---- a rank that has work ----------------------------------------------------------------------------------------

    def announce(self, event: int, fact: int = 0) -> None:
        if not self.mirroring:
            self._exchange(event, fact)

    def before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            raise ValueError(
                "epops.join: model: expected the module that is called; pass the result of torch.compile(model)"
            )
        if not self.mirroring:
            self.inputs = (args, kwargs)
            self.announce(FORWARD, int(torch.is_grad_enabled()))
        self.forwards += 1

    def after(self, output: Any) -> None:
        if self.mirroring or not torch.is_grad_enabled():
            return
        number = self.forwards
        told: list[bool] = []

        def backward(_: Tensor) -> None:
            if not told:
                told.append(True)
                self.stepped = False
                self.announce(BACKWARD, number)

        for tensor in differentiable(output):
            tensor.register_hook(backward)

    def step(self, *_: Any) -> None:
        self.announce(STEP)
        self.stepped = True

    # ---- a rank that has none --------------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Mirror the others until all are done."""
        switch = serving(self.group)
        switch.switch(False)
        self.mirroring = True
        try:
            while (told := self._exchange(DONE, 0)) is not None:
                self._mirror(*told)
        finally:
            self.mirroring = False
            switch.switch(True)

    def _exchange(self, event: int, fact: int) -> tuple[int, int] | None:
        """What the ranks with work are about to do, or None when there are none."""
        told = [
            (peer, *values)
            for peer, values in enumerate(self.group.host_all_gather([event, fact]))
            if values[0] != DONE
        ]
        if not told:
            return None
        first, *others = told
        for peer in others:
            if peer[1:] != first[1:]:
                raise DisagreementError(
                    f"epops.join: expected the same on every rank that has work, got {EVENTS[first[1]]} on rank {first[0]} and "
                    f"{EVENTS[peer[1]]} on rank {peer[0]} ({first[2]} and {peer[2]}); run the same loop on all ranks"
                )
        return first[1], first[2]

    def _mirror(self, event: int, fact: int) -> None:
        if event == FORWARD:
            self._forward(bool(fact))
        elif event == BACKWARD:
            if self.stepped and self.optimizer is not None:
                self.optimizer.zero_grad()
            self.stepped = False
            outputs = self.outputs.pop(fact, [])
            if outputs:
                torch.autograd.backward(outputs, [torch.zeros_like(t) for t in outputs])
        elif event == STEP:
            if self.optimizer is None:
                raise ValueError(
                    "epops.join: optimizer: the other ranks step one, got None; pass it to epops.join on every rank"
                )
            self.optimizer.step()
            self.stepped = True
        else:
            self._gradients(event, fact)

    def _forward(self, grad: bool) -> None:
        if self.inputs is None:
            raise ValueError(
                "epops.join: example: this rank has run no forward whose inputs it could repeat; pass example=(args, kwargs) of a "
                "forward to epops.join"
            )
        args, kwargs = self.inputs
        with torch.set_grad_enabled(grad):
            output = self.model(*args, **kwargs)
        if grad:
            self.outputs[self.forwards] = differentiable(output)

    def _gradients(self, event: int, fact: int) -> None:
        from .gradients import average_gradients, clip_grad_norm_

        if event == AVERAGE:
            average_gradients(self.model, self.group)
        else:
            clip_grad_norm_(self.model, _float(fact), self.group)

    # ---- hooks ---------------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Hear of the model's forwards and the optimizer's steps."""
        with contextlib.ExitStack() as stack:
            compiled = getattr(self.model, "_compiled_call_impl", None)
            if compiled is not None:  # model.compile(): hooks would be part of the graph
                self.model._compiled_call_impl = functools.partial(self._call, compiled)  # type: ignore[assignment]
                stack.callback(setattr, self.model, "_compiled_call_impl", compiled)
            else:
                before = self.model.register_forward_pre_hook(lambda _, a, k: self.before(a, k), with_kwargs=True)
                after = self.model.register_forward_hook(lambda _, __, output: self.after(output))
                stack.callback(before.remove)
                stack.callback(after.remove)
            if self.optimizer is not None:
                stack.callback(self.optimizer.register_step_pre_hook(self.step).remove)
            yield

    def _call(self, compiled: Any, *args: Any, **kwargs: Any) -> Any:
        self.before(args, kwargs)
        output = compiled(*args, **kwargs)
        self.after(output)
        return output


def differentiable(output: Any) -> list[Tensor]:
    """Tensors of an answer that carry a gradient."""
    if isinstance(output, Tensor):
        return [output] if output.requires_grad and output.grad_fn is not None else []
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else ()
    return [t for value in values for t in differentiable(value)]


@contextlib.contextmanager
def join(model: nn.Module, group: Any, optimizer: Any = None, *, example: Any = None) -> Iterator[None]:
    """Run a loop whose ranks have different numbers of batches; every rank of the group enters it.

    Args:
        model: what the loop calls: a sharded model, or what torch.compile, DDP or FSDP made of it.
        group: the `epops.ExpertGroup` (or its name).
        optimizer: the one that the loop steps, if it does. A rank that is done steps too, with gradients of zero batches.
        example: ``(args, kwargs)`` of a forward, for a rank that may have no batch at all.

    Gradients are averaged and clipped inside the loop by `epops.average_gradients` and `epops.clip_grad_norm_` (or by DDP or
    FSDP), which a rank that is done takes part in; other collectives in the loop are not mirrored.

    Raises:
        DisagreementError: ranks with work did different things.
        PeerError: a rank did not come within the group's timeout.
    """
    group = get_group(group) if isinstance(group, str) else group
    if group.name in _joined:
        raise ValueError(f"epops.join: group: {group.name!r} is joined already; leave the outer join first")
    here = _joined[group.name] = Join(model, group, optimizer, example)
    try:
        with here.watch():
            yield
            here.serve()
    finally:
        del _joined[group.name]
