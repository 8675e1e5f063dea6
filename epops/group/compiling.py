"""While this process compiles, its groups tell their peers: a rank that recompiles alone keeps the others waiting."""

from __future__ import annotations

import sys
import threading
from typing import Any

from ..torch_private import on_compile
from .registry import open_groups

_lock = threading.Lock()
_watching = False
_done: threading.Event | None = None


def watch(*, now: bool = False) -> None:
    """Have torch.compile say when it begins and ends, once it is in use.  ``now``: a compile is running already."""
    global _watching
    if _watching or "torch._dynamo" not in sys.modules:
        return
    with _lock:
        begun = not _watching and on_compile(_begin, _end)
        _watching = True
    if now and begun:
        _begin()


def _begin(*_: Any) -> None:
    global _done
    with _lock:
        if _done is None:
            _done = threading.Event()
            threading.Thread(target=_keep_saying, args=(_done,), name="epops-compiling", daemon=True).start()


def _end(*_: Any) -> None:
    global _done
    with _lock:
        if _done is not None:
            _done.set()
            _done = None


def _keep_saying(done: threading.Event) -> None:
    """Send a busy message four times in a timeout; a compile that is over before the first one costs no message."""
    while not done.wait(min([group.timeout for group in open_groups()], default=30.0) / 4):
        for group in open_groups():
            for mailbox in group.mailboxes():
                mailbox.busy()
