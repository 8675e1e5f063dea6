"""Two hosts on one machine: network namespaces joined by a cable (veth), each with an address of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Host(NamedTuple):
    namespace: str
    interface: str
    address: str


class CannotMakeHosts(Exception):
    """This machine does not let us make network namespaces; the text says why."""


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Hosts 10.210.<n>.1 and .2, gone at the end of the ``with``."""
    if sys.platform != "linux":
        raise CannotMakeHosts("network namespaces are Linux's")
    if shutil.which("ip") is None:
        raise CannotMakeHosts("there is no `ip` command (Debian, Ubuntu: apt install iproute2)")
    if os.geteuid() != 0:
        raise CannotMakeHosts("making network namespaces takes root")
    tag = os.getpid() % 100000
    hosts = tuple(Host(f"epops-{tag}-{i}", f"ep{tag}-{i}", f"10.210.{tag % 250}.{i + 1}") for i in range(2))
    try:
        for host in hosts:
            ip("netns", "add", host.namespace)
        a, b = hosts
        ip(
            "link",
            "add",
            a.interface,
            "netns",
            a.namespace,
            "type",
            "veth",
            "peer",
            "name",
            b.interface,
            "netns",
            b.namespace,
        )
        for host in hosts:
            ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", host.interface)
            ip("-n", host.namespace, "link", "set", host.interface, "up")
            ip("-n", host.namespace, "link", "set", "lo", "up")
        yield hosts
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host.namespace], capture_output=True)


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise CannotMakeHosts(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def torchrun(hosts: tuple[Host, Host], *command: str, ranks_per_host: int = 1, timeout: float = 300.0) -> list[str]:
    """Run ``torchrun --nnodes 2 … command`` on both hosts; what each printed.  Raises with both outputs if one fails."""
    processes = []
    for number, host in enumerate(hosts):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--nproc-per-node={ranks_per_host}"]
        place = [f"--node-rank={number}", f"--master-addr={hosts[0].address}", "--master-port=29571"]
        env = {**os.environ, "GLOO_SOCKET_IFNAME": host.interface, "PYTHONPATH": str(ROOT)}
        processes.append(
            subprocess.Popen(
                ["ip", "netns", "exec", host.namespace, *launcher, *place, *command],
                env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            )
        )  # fmt: skip
    outputs = []
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=timeout)[0])
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, 9)
    if any(process.returncode for process in processes):
        raise AssertionError("\n".join(f"--- {host}:\n{text}" for host, text in zip(hosts, outputs)))
    return outputs
