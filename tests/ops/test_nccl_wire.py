"""The nccl wire without a GPU: what it asks of a communicator, and that one which a CUDA graph holds is never destroyed."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from epops.transport import c10d


class Communicator:
    """Two ranks that send each other the same; ``alltoall_base`` as torch's process groups have it."""

    def alltoall_base(self, received: torch.Tensor, sent: torch.Tensor, out_splits: list, in_splits: list) -> Any:
        assert sent.is_contiguous() and out_splits == in_splits == []
        received.copy_(sent)
        return self

    def wait(self) -> None:
        pass


@pytest.mark.parametrize("captured", [False, True])
def test_a_communicator_of_a_captured_exchange_is_never_destroyed(monkeypatch: Any, captured: bool) -> None:
    monkeypatch.setattr(c10d, "is_capturing", lambda: captured)
    communicator = Communicator()
    alive = weakref.ref(communicator)
    buffer = torch.arange(12, dtype=torch.uint8).view(6, 2).t()
    for _ in range(2):
        assert torch.equal(c10d.begin_equal(communicator, buffer).take(), buffer)
    del communicator
    gc.collect()
    assert (alive() is not None) == captured
