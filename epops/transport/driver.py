"""What the NVIDIA driver says of the links between GPUs (NVML, asked through ctypes: it comes with every driver)."""

from __future__ import annotations

import ctypes

P2P_CAPS_NVLINK = 2
FABRIC_STATE_COMPLETED = 3


class _FabricInfo(ctypes.Structure):
    _fields_ = [
        ("cluster_uuid", ctypes.c_ubyte * 16),
        ("status", ctypes.c_uint),
        ("clique", ctypes.c_uint),
        ("state", ctypes.c_ubyte),
    ]


class Driver:
    """One NVML session.

    Raises:
        OSError: there is no NVML, or it does not start.
    """

    def __init__(self) -> None:
        self._nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if self._nvml.nvmlInit_v2() != 0:
            raise OSError("NVML does not start")

    def _device(self, uuid: str) -> ctypes.c_void_p | None:
        handle = ctypes.c_void_p()
        name = (uuid if uuid.startswith("GPU-") else f"GPU-{uuid}").encode()
        if self._nvml.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle)) != 0:
            return None
        return handle

    def nvlink_between(self, uuid: str, peer_uuid: str) -> bool:
        """Whether two GPUs of this host reach each other over NVLink, directly or through switches."""
        here, there = self._device(uuid), self._device(peer_uuid)
        if here is None or there is None:
            return False
        status = ctypes.c_int(-1)
        error = self._nvml.nvmlDeviceGetP2PStatus(here, there, P2P_CAPS_NVLINK, ctypes.byref(status))
        return error == 0 and status.value == 0

    def fabric(self, uuid: str) -> str:
        """Name of the NVLink domain that spans hosts and that the GPU is part of; empty when it is in none."""
        here, info = self._device(uuid), _FabricInfo()
        if here is None or not hasattr(self._nvml, "nvmlDeviceGetGpuFabricInfo"):
            return ""
        if self._nvml.nvmlDeviceGetGpuFabricInfo(here, ctypes.byref(info)) != 0:
            return ""
        cluster = bytes(info.cluster_uuid).hex()
        if info.status != 0 or info.state != FABRIC_STATE_COMPLETED or not cluster.strip("0"):
            return ""
        return f"{cluster}.{info.clique}"

    def close(self) -> None:
        self._nvml.nvmlShutdown()
