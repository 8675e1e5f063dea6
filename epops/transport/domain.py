"""Which ranks NVLink joins: asked of the driver on every rank, and agreed on by all of them.

``EPOPS_NVLINK=0`` forbids it and ``EPOPS_NVLINK=1`` takes the driver's answer for yes; all ranks must set the same.
"""

from __future__ import annotations

import os
import socket
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ..torch_private import OVERLAPPING_GPUS
from .driver import Driver


class Place(NamedTuple):
    """Where a rank is, as its peers see it.

    ``number`` is what its process calls the GPU, ``overlaps`` that torch may map a GPU which another rank calls the same, and
    ``refusal`` why the rank cannot take part.
    """

    host: str
    uuid: str
    number: int
    overlaps: bool
    fabric: str
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
    taken_for_one = _taken_for_one(everyone)
    if taken_for_one or setting == "1":
        return taken_for_one
    missing = [
        f"no NVLink to rank {peer} on {place.host}"
        for peer, place in enumerate(everyone)
        if peer != group.rank and not _linked(mine, place)
    ]
    found: list[Any] = [None] * group.size
    dist.all_gather_object(found, missing[0] if missing else "", group=group.control)
    return next((f"rank {rank}: {text}" for rank, text in enumerate(found) if text), "")


def _taken_for_one(everyone: list[Place]) -> str:
    """Which ranks' GPUs torch's symmetric memory would refuse (`OVERLAPPING_GPUS`)."""
    if all(place.overlaps for place in everyone):
        return ""
    first: dict[tuple[str, int], int] = {}
    for rank, place in enumerate(everyone):
        other = first.setdefault((place.host, place.number), rank)
        if other == rank:
            continue
        if everyone[other].uuid == place.uuid:
            return (
                f"ranks {other} and {rank} share a GPU of {place.host}, whose memory torch maps for both only with "
                f"{OVERLAPPING_GPUS}=1 on every rank"
            )
        return (
            f"ranks {other} and {rank} of {place.host} both call their GPU cuda:{place.number} (by CUDA_VISIBLE_DEVICES), and "
            "torch's symmetric memory takes the two for one; let every process see all GPUs, or set "
            f"{OVERLAPPING_GPUS}=1 on every rank"
        )
    return ""


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
    from . import kernels  # there where the extension was built

    device = torch.cuda.get_device_properties(group.device)
    number = torch.cuda.current_device() if group.device.index is None else group.device.index
    place = Place(
        socket.gethostname(),
        str(getattr(device, "uuid", "")),
        number,
        os.environ.get(OVERLAPPING_GPUS) == "1",
        fabric="",
        refusal="",
    )
    if setting not in ("", "0", "1"):
        return place._replace(refusal=f"EPOPS_NVLINK: expected 0 or 1, got {setting!r}")
    if setting == "0":
        return place._replace(refusal="EPOPS_NVLINK=0 forbids it")
    if group.size > kernels.MAX_RANKS:
        return place._replace(refusal=f"it serves at most {kernels.MAX_RANKS} ranks, and the group has {group.size}")
    arch = f"{device.major}{device.minor}"
    built = kernels.ARCHS
    if not any(name.rstrip("af") == arch for name in built):
        return place._replace(refusal=f"the kernels are built for sm_{', sm_'.join(built)}, and this GPU is sm_{arch}")
    try:
        driver = Driver()
    except OSError as error:
        return place if setting == "1" else place._replace(refusal=f"the driver cannot be asked for links ({error})")
    try:
        return place._replace(fabric=driver.fabric(place.uuid))
    finally:
        driver.close()
