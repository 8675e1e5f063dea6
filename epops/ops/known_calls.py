"""Calls whose arguments were found sound before: an eager step repeats a few shapes for ever, and checks take Python's time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ..group import ExpertGroup

MOST = 4096
"""Calls that a group remembers; after so many different ones it begins anew."""


def once(check: Callable[..., None]) -> Callable[..., None]:
    """``check(group, *tensors, **settings)``, run once for each set of shapes, dtypes, devices and settings.

    For checks that read nothing else.  What they refuse is not remembered.
    """

    @functools.wraps(check)
    def checked(group: ExpertGroup, /, *tensors: Any, **a: Any) -> None:
        facts = [None if t is None else (t.shape, t.dtype, t.device) for t in tensors]
        key = (check, *facts, *a.items())
        if key in group.known_calls:
            return
        check(group, *tensors, **a)
        if len(group.known_calls) >= MOST:
            group.known_calls.clear()
        group.known_calls.add(key)

    return checked
