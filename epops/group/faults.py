"""What goes wrong in a group's exchanges: noted when it is met, raised by the next op, ``check`` or ``close``."""

from __future__ import annotations

from typing import Any

import torch

from .. import layout as words
from ..errors import DisagreementError, GroupError, PeerError, RoutingError
from ..torch_private import is_capturing


class Faults:
    """The error state of a group; a part of `ExpertGroup`."""

    name: str
    overflow: str
    transport: Any

    def __init__(self) -> None:
        self._errors: list[tuple[int, str]] = []
        self._lost: str | None = None
        self._error_word: torch.Tensor | None = None
        self._error_host: torch.Tensor | None = None

    def record(self, op: str, bits: int, detail: str = "") -> None:
        """Note errors that an op met in the routing; they are raised by the next op, `check` or `close`."""
        if self.overflow == "count":
            bits &= ~words.STATUS_OVERFLOW
        if bits:
            names = ", ".join(text for bit, text in words.STATUS_BITS.items() if bits & bit)
            self._errors.append((bits, f"epops.{op}: {names}{': ' + detail if detail else ''} (group {self.name!r})"))

    def record_on_device(self, status: torch.Tensor) -> None:
        """Carry a device op's ``status`` (`layout.STATUS_WORDS`,) to a word that the host reads without a synchronization."""
        if self._error_word is None:
            if is_capturing():
                raise GroupError(
                    f"epops: group {self.name!r} was first used inside a CUDA graph capture; run one step before capturing"
                )
            self._error_word = torch.zeros(1, dtype=torch.int32, device=status.device)
            self._error_host = torch.zeros(1, dtype=torch.int32).pin_memory()
        assert self._error_host is not None, "made together with the device word"
        self._error_word.bitwise_or_(status[:1])
        self._error_host.copy_(self._error_word, non_blocking=True)

    def pending_errors(self) -> list[tuple[int, str]]:
        if self._error_host is not None and self._error_word is not None:
            bits = int(self._error_host[0])
            if bits:
                self._error_host.zero_()
                self._error_word.zero_()
                self.record("exchange", bits, "found on the device")
        take_errors = getattr(self.transport, "take_errors", None)
        for bits, where in take_errors() if take_errors is not None else []:
            self.record("exchange", bits, where)
        return self._errors

    def check(self) -> None:
        """Raise what earlier ops found: `RoutingError` for bad routing, `PeerError` for a rank that is lost."""
        if self._lost is not None:
            raise PeerError(f"{self._lost}; group {self.name!r} has failed: close it and make a new one")
        errors = self.pending_errors()
        if errors:
            text = "; ".join(dict.fromkeys(message for _, message in errors))
            found = 0
            for bits, _ in errors:
                found |= bits
            self._errors = []
            if found & (words.STATUS_TIMEOUT | words.STATUS_EXCLUDED):
                raise PeerError(f"{text}; the rank named no longer takes part: see what ended or stalled it")
            if found & words.STATUS_DISAGREE:
                raise DisagreementError(
                    f"{text}; all ranks must make the same calls with the same settings in the same order"
                )
            raise RoutingError(
                f"{text}; the selections named were treated as -1: mend the router or raise the capacity"
            )
