"""Ranks on two hosts with their own addresses, under `torchrun --nnodes 2`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .hosts import CannotMakeHosts, Host, torchrun, two_hosts

HERE = Path(__file__).resolve().parent


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    try:
        with two_hosts() as made:
            yield made
    except CannotMakeHosts as reason:
        pytest.skip(f"two hosts cannot be made here: {reason}")


@pytest.mark.parametrize("ranks_per_host", [1, 2])
def test_a_round_trip_over_two_hosts_is_exact(hosts: tuple[Host, Host], ranks_per_host: int) -> None:
    outputs = torchrun(hosts, str(HERE / "round_trip.py"), ranks_per_host=ranks_per_host, timeout=120)
    said = "".join(outputs)
    for rank in range(2 * ranks_per_host):
        assert f"rank {rank} of {2 * ranks_per_host}:" in said, said
    assert said.count("values and gradients exact") == 2 * ranks_per_host
