"""Which GPU a process of a test has."""

from __future__ import annotations

import os

import pytest
import torch


def need_gpus(world: int) -> None:
    """Skips the test where there are fewer; ``EPOPS_TESTS_SHARE_GPU=1`` has several processes share each."""
    if torch.cuda.device_count() < world and os.environ.get("EPOPS_TESTS_SHARE_GPU") != "1":
        pytest.skip(f"needs {world} GPUs, or EPOPS_TESTS_SHARE_GPU=1")


def take_gpu(rank: int, world: int) -> None:
    """This process's GPU, `need_gpus` being satisfied; before anything is asked of CUDA."""
    count = torch.cuda.device_count()
    torch.cuda.set_device(rank % count)
    if count < world:
        # Torch maps one GPU's memory twice only when told to, and NCCL takes two ranks of a GPU where they seem to be on two hosts.
        os.environ.update(
            TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES="1",
            NCCL_HOSTID=f"rank-{rank}",
            NCCL_SOCKET_IFNAME="lo",
            NCCL_IB_DISABLE="1",
        )
