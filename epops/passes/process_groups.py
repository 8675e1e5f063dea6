"""Which process groups of torch.distributed are epops groups: passes may then take their collectives for epops exchanges."""

from __future__ import annotations

from collections.abc import Callable

known: Callable[[], dict[str, tuple[str, int]]] = dict
"""Process group's name → name and size of the epops group over it.  Passes know no groups, so the backend fills this in."""


def epops_name(process_group: str, size: int) -> str | None:
    """Name of the epops group over the ranks of a process group of ``size`` ranks; None if there is none."""
    name, ranks = known().get(process_group, (None, 0))
    return name if ranks == size else None
