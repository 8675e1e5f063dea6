"""The CUDA kernels on a CPU: the tests of tests/gpu that need no GPU's speed, and races, in a process with emulated kernels."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from . import build

ROOT = Path(__file__).resolve().parent.parent.parent
pytestmark = pytest.mark.skipif(bool(build.missing()), reason=f"needs {build.missing()}")


@pytest.fixture(scope="session")
def module() -> Path:
    """Built once for the sources as they are."""
    sources = sorted([*build.CSRC.glob("*"), *build.HERE.glob("*.cpp"), *build.HERE.glob("*.h"), Path(build.__file__)])
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
    folder = ROOT / ".cache" / "emulated" / digest
    made = list(folder.glob("_C.*.so"))
    if made:
        return made[0]
    folder.mkdir(parents=True, exist_ok=True)
    return build.build(folder)


def run_pytest(module: Path, *arguments: str, checks: bool = False) -> str:
    """What pytest says of tests/gpu or races.py with emulated kernels."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-o",
        "addopts=",
        "-p",
        "no:cacheprovider",
        "-p",
        "tests.emulated.plugin",
    ]
    env = {**os.environ, "EPOPS_EMULATED": str(module), "EPOPS_EMULATED_CHECKS": str(int(checks))}
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=env, cwd=ROOT, timeout=400)
    return done.stdout + done.stderr


def must_pass(told: str) -> None:
    assert re.search(r"^\d+ passed[^\n]* in ", told, re.M) and "failed" not in told and "skipped" not in told, told[
        -6000:
    ]


# Of tests/gpu, what takes seconds here.
SELECTED = [
    ("test_virtual_ranks.py", "any_number_of_ranks and not (24 or 32 or 72)"),
    ("test_virtual_ranks.py", "few_tokens_in_every_way and not (7 or 16 or 72)"),
    ("test_virtual_ranks.py", "streams and not (t-7 or k-7 or d-7 or 16 or 72 or 7168 or 8192 or 4096 or shape3)"),
    (
        "test_virtual_ranks.py",
        "every_layout and not (500 or 1025 or 1500) or every_hidden and not (7168 or 8192 or 16384)",
    ),
    ("test_virtual_ranks.py", "quantizer and not (7168 or 16384 or 21504) or gradients and 19"),
    ("test_virtual_ranks.py", "one_expert or hostile or do_not_fit or outside or different_ways or never_comes"),
    ("test_virtual_all_to_all.py", "any_number_of_ranks and not (8 or 16) or any_two_dims"),
]


@pytest.mark.parametrize("which", SELECTED)
def test_gpu_tests_on_a_cpu(module: Path, which: tuple[str, str]) -> None:
    file, selected = which
    must_pass(run_pytest(module, f"tests/gpu/{file}", "-k", selected))


def test_nothing_is_unordered(module: Path) -> None:
    must_pass(run_pytest(module, "tests/emulated/races.py", checks=True))


# In which file, what, what instead; the kernel that is compiled with it, the program that shows it, and what is said of it.
BROKEN = {
    "a place of the ring is filled again before it is empty": (
        "stream_rows.cuh",
        "    await_parity(rows.empty(), rows.parity);\n",
        "",
        "combine_streams.cu",
        "pairs and expert and streams",
        "store after load of shared memory",
    ),
    "a row is filled again with loads before it that no fence of the proxies has covered": (
        "combine_streams.cu",
        "        fence_before_refill();\n",
        "",
        "combine_streams.cu",
        "pairs and expert and streams",
        "store after load of shared memory",
    ),
    "a flag without a fence of the system": (
        "team.cuh",
        "      fence_acq_rel_sys();  // [D] acquires, too\n",
        "",
        "combine_streams.cu",
        "pairs and expert and streams",
        "load after store of global memory",
    ),
    "a bulk copy reads what no fence of the proxies has covered": (
        "dispatch_lines.cu",
        "      fence_before_bulk();\n      sync_team(t);  // and the record before, whose stage comes next, has been sent\n",
        "      sync_team(t);\n",
        "dispatch_lines.cu",
        "pairs and expert and lines",
        "load after store of shared memory",
    ),
    "records where a peer still reads those of the op before": (
        "exchange.cuh",
        "return !op.overlaps ||",
        "return true ||",
        "dispatch.cu",
        "behind and counts",
        "store after load of global memory",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_unordered_is_found(module: Path, tmp_path: Path, name: str) -> None:
    file, right, wrong, kernel, program, says = BROKEN[name]
    broken = build.build(tmp_path, instead=(file, right, wrong), only=kernel, others=module.parent)
    told = run_pytest(broken, "tests/emulated/races.py", "-k", program, "-x", checks=True)
    assert re.search(rf"Race: .*{says}|E +{says}", told), told[-6000:]
