"""Which ranks NVLink joins: asked of the driver on every rank, and agreed on by all of them.

``EPOPS_NVLINK=0`` forbids it and ``EPOPS_NVLINK=1`` takes the driver's answer for yes; all ranks must set the same.
"""

from __future__ import annotations

import socket
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from . import kernels
from .driver import Driver


class Place(NamedTuple):
    """Where a rank is, as its peers see it; ``refusal`` says why it cannot take part."""

    host: str
    uuid: str
    fabric: str
    links: tuple[str, ...]
    refusal: str


def refusal(group: Any, setting: str) -> str:
    """Why the group cannot use NVLink; empty if it can.  The same on every rank."""
    mine = _my_place(group, setting)
    if group.size == 1:
        return mine.refusal
    places: list[Any] = [None] * group.size
    dist.all_gather_object(places, tuple(mine), group=group.control)
    everyone = [Place(*place) for place in places]
    for rank, place in enumerate(everyone):
        if place.refusal:
            return f"rank {rank}: {place.refusal}"
    if setting == "1":
        return ""
    missing = [
        f"no NVLink to rank {peer} on {place.host}"
        for peer, place in enumerate(everyone)
        if peer != group.rank and not _linked(mine, place)
    ]
    found: list[Any] = [None] * group.size
    dist.all_gather_object(found, missing[0] if missing else "", group=group.control)
    return next((f"rank {rank}: {text}" for rank, text in enumerate(found) if text), "")


def _linked(mine: Place, theirs: Place) -> bool:
    if mine.host != theirs.host:
        return bool(mine.fabric) and mine.fabric == theirs.fabric
    if mine.uuid == theirs.uuid:
        return True
    try:
        driver = Driver()
    except OSError:
        return False
    try:
        return driver.nvlink_between(mine.uuid, theirs.uuid)
    finally:
        driver.close()


def _my_place(group: Any, setting: str) -> Place:
    device = torch.cuda.get_device_properties(group.device)
    uuid = str(getattr(device, "uuid", ""))
    host = socket.gethostname()
    if setting not in ("", "0", "1"):
        return Place(host, uuid, "", (), f"EPOPS_NVLINK: expected 0 or 1, got {setting!r}")
    if setting == "0":
        return Place(host, uuid, "", (), "EPOPS_NVLINK=0 forbids it")
    if group.size > kernels.MAX_RANKS:
        return Place(host, uuid, "", (), f"it serves at most {kernels.MAX_RANKS} ranks, and the group has {group.size}")
    arch = f"{device.major}{device.minor}"
    built = kernels.ARCHS
    if not any(name.rstrip("af") == arch for name in built):
        return Place(
            host, uuid, "", (), f"the kernels are built for sm_{', sm_'.join(built)}, and this GPU is sm_{arch}"
        )
    try:
        driver = Driver()
    except OSError as error:
        return Place(host, uuid, "", (), "" if setting == "1" else f"the driver cannot be asked for links ({error})")
    try:
        return Place(host, uuid, driver.fabric(uuid), (), "")
    finally:
        driver.close()
