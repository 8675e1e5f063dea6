"""Ranks on two hosts with their own addresses, under `torchrun --nnodes 2`.  (The demo over them: tests/demo/test_demo.py.)"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .hosts import CannotMakeHosts, Host, finish, ip, start, torchrun, two_hosts

HERE = Path(__file__).resolve().parent


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    try:
        with two_hosts() as made:
            yield made
    except CannotMakeHosts as reason:
        pytest.skip(f"two hosts cannot be made here: {reason}")


def test_a_round_trip_over_two_hosts_is_exact(hosts: tuple[Host, Host]) -> None:
    outputs = torchrun(hosts, str(HERE / "round_trip.py"), ranks_per_host=2, timeout=240)
    said = "".join(outputs)
    for rank in range(4):
        assert f"rank {rank} of 4:" in said, said
    assert said.count("values and gradients exact") == 4


def test_a_cut_cable_is_an_error_on_both_hosts_within_the_timeout(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    place = {"MASTER_ADDR": hosts[0].address, "MASTER_PORT": "29572", "WORLD_SIZE": "2"}
    processes = [
        start(host, [str(HERE / "cable_cut.py"), str(tmp_path)], RANK=str(rank), **place)
        for rank, host in enumerate(hosts)
    ]
    give_up = time.monotonic() + 120
    while not all((tmp_path / f"exchanging-{rank}").exists() for rank in range(2)) and time.monotonic() < give_up:
        time.sleep(0.1)
    (tmp_path / "cut").touch()
    ip("-n", hosts[0].namespace, "link", "set", hosts[0].interface, "down")
    for rank, said in enumerate(finish(hosts, processes, timeout=60)):
        told = re.search(
            rf"after ([\d.]+) s: epops.dispatch: rank {rank} of group 'ep': peer {1 - rank} did not arrive", said
        )
        assert told, said
        assert float(told[1]) < 10, "the group's timeout is 3 s"
        assert float(re.search(r"closed after ([\d.]+) s", said)[1]) < 10, said
