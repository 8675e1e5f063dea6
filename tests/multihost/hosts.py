"""Two hosts on one machine: network namespaces joined by a cable (veth), each with an address of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
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
    launcher = ["-m", "torch.distributed.run", "--nnodes=2", f"--nproc-per-node={ranks_per_host}"]
    place = [f"--master-addr={hosts[0].address}", "--master-port=29571"]
    processes = [
        start(host, [*launcher, f"--node-rank={number}", *place, *command]) for number, host in enumerate(hosts)
    ]
    return finish(hosts, processes, timeout)


def start(host: Host, arguments: list[str], **settings: str) -> subprocess.Popen[str]:
    """``python arguments`` on a host, its output kept for `finish`."""
    env = {**os.environ, "GLOO_SOCKET_IFNAME": host.interface, "PYTHONPATH": str(ROOT), **settings}
    command = ["ip", "netns", "exec", host.namespace, sys.executable, *arguments]
    out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, env=env, cwd=ROOT, text=True, start_new_session=True, **out)


def finish(hosts: tuple[Host, Host], processes: list[subprocess.Popen[str]], timeout: float) -> list[str]:
    """What each process printed; none outlives this call, and one that failed or did not end raises with both outputs."""
    outputs: list[str] = []
    deadline = time.monotonic() + timeout
    for process in processes:
        try:
            outputs.append(process.communicate(timeout=max(deadline - time.monotonic(), 0.1))[0])
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            outputs.append(process.communicate()[0] + f"\nkilled: it had not ended after {timeout:g} s")
    if any(process.returncode for process in processes):
        raise AssertionError("\n".join(f"--- {host}:\n{text}" for host, text in zip(hosts, outputs)))
    return outputs
