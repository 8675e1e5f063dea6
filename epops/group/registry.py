"""Open groups by name: how an op finds its group."""

from __future__ import annotations

import atexit
import threading
import warnings
from typing import TYPE_CHECKING

from ..errors import EpopsError, GroupError

if TYPE_CHECKING:
    from .expert_group import ExpertGroup

_groups: dict[str, ExpertGroup] = {}
_lock = threading.RLock()


def add(group: ExpertGroup) -> None:
    with _lock:
        if group.name in _groups:
            raise GroupError(
                f"epops.ExpertGroup: name: expected one that is free, got {group.name!r}, which {_groups[group.name]!r} has; "
                "close that group or choose another name"
            )
        _groups[group.name] = group


def remove(group: ExpertGroup) -> None:
    with _lock:
        if _groups.get(group.name) is group:
            del _groups[group.name]


def get_group(name: str) -> ExpertGroup:
    """The open group of that name."""
    group = _groups.get(name)
    if group is None:
        known = ", ".join(sorted(_groups)) or "none"
        raise GroupError(
            f"epops: group: expected the name of an open group, got {name!r} (open groups: {known}); create "
            f"epops.ExpertGroup(..., name={name!r}) before the first call and keep it open"
        )
    return group


def open_groups() -> list[ExpertGroup]:
    """All open groups, by name."""
    with _lock:
        return [_groups[name] for name in sorted(_groups)]


def process_groups() -> dict[str, tuple[str, int]]:
    """Name of a torch process group → name and size of the open epops group over it; of several, the first by name."""
    found: dict[str, tuple[str, int]] = {}
    for group in open_groups():
        if group.process_group is not None:
            found.setdefault(group.process_group.group_name, (group.name, group.size))
    return found


def check_all() -> None:
    """`ExpertGroup.check` of every open group."""
    for group in open_groups():
        group.check()


@atexit.register
def _report_at_exit() -> None:
    """What nobody asked for before the interpreter ends is printed: an error is never lost silently."""
    for group in open_groups():
        try:
            group.check()
        except EpopsError as error:
            warnings.warn(f"at exit: {error}", stacklevel=1)
