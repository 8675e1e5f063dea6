"""Transports: who moves the bytes of a group."""

from .base import Call, Pending, Swap, Transport, all_to_all_call
from .c10d import CaptureTransport, GlooTransport, NcclTransport

__all__ = [
    "Call",
    "CaptureTransport",
    "GlooTransport",
    "NcclTransport",
    "Pending",
    "Swap",
    "Transport",
    "all_to_all_call",
]
