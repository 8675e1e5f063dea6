"""While this process compiles, its groups tell their peers: a rank that recompiles alone keeps the others waiting."""

from __future__ import annotations

import sys
import threading
from typing import Any

from ..torch_private import is_compile_pending, on_compile
from .registry import open_groups

_lock = threading.Lock()
_called: list[Any] = []
"""What torch calls when a compile begins.  `_begin` is in it once we watch, until ``torch.compiler.reset`` empties it."""
_done: threading.Event | None = None


def watch() -> None:
    """Have torch.compile say when it begins and ends, once it is in use; a compile that is under way has begun."""
    global _called
    if _begin in _called or "torch._dynamo" not in sys.modules:
        return
    with _lock:
        if _begin in _called:
            return
        calls = on_compile(_begin, _end)
        _called = [_begin] if calls is None else calls
    if is_compile_pending():
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
    global _done
    while not done.wait(min([group.timeout for group in open_groups()], default=30.0) / 4):
        if is_compile_pending() is False:  # it ended while we asked to be told
            with _lock:
                _done = None if _done is done else _done
            return
        for group in open_groups():
            for mailbox in group.mailboxes():
                mailbox.busy()
