"""scripts/bootstrap.py takes the torch that is there, else a CPU build, and never the CUDA build by itself."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "bootstrap.py"


@pytest.fixture
def bootstrap() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bootstrap", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def answer_of_pip(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, offers: dict[str, tuple[str, str]]
) -> list[str]:
    """Let pip find, for each place (an argument of the call), the (version, url) in ``offers``; returns what is installed."""
    installed: list[str] = []

    def pip(*arguments: str, may_fail: bool = False, quiet: bool = True) -> bool:
        place = "disk" if "--no-index" in arguments else "cpu" if "--index-url" in arguments else "index"
        if "--dry-run" not in arguments:
            installed.append(f"{place}: {arguments[-1]}")
            return True
        if place not in offers:
            return False
        version, url = offers[place]
        found: dict[str, Any] = {"install": [{"metadata": {"version": version}, "download_info": {"url": url}}]}
        Path(arguments[arguments.index("--report") + 1]).write_text(json.dumps(found))
        return True

    monkeypatch.setattr(bootstrap, "pip", pip)
    return installed


DISK = ("2.13.0+cpu", "file:///wheels/torch-2.13.0%2Bcpu-cp311.whl")
CUDA_ON_DISK = ("2.15.0", "file:///wheels/torch-2.15.0-cp311.whl")
CPU_INDEX = ("2.15.0+cpu", "https://download.pytorch.org/whl/cpu/torch-2.15.0%2Bcpu-cp311.whl")
ARM_INDEX = ("2.15.0", "https://download.pytorch.org/whl/cpu/torch-2.15.0-cp311-aarch64.whl")
EVERYTHING = ("2.15.0", "https://example.org/torch-2.15.0-cp311.whl")


@pytest.mark.parametrize(
    ("offers", "taken"),
    [
        ({"disk": DISK, "cpu": CPU_INDEX}, "disk: torch==2.13.0+cpu"),
        ({"cpu": CPU_INDEX, "index": EVERYTHING}, "cpu: torch==2.15.0+cpu"),
        ({"cpu": ARM_INDEX}, "cpu: torch==2.15.0"),
        ({"disk": CUDA_ON_DISK, "cpu": CPU_INDEX}, "cpu: torch==2.15.0+cpu"),
    ],
)
def test_on_linux_a_cpu_build_is_taken_from_the_nearest_place(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, offers: dict[str, tuple[str, str]], taken: str
) -> None:
    monkeypatch.setattr(bootstrap.sys, "platform", "linux")
    installed = answer_of_pip(bootstrap, monkeypatch, offers)
    bootstrap.install_torch()
    assert installed[0] == taken


def test_on_linux_the_cuda_build_is_refused_and_the_remedy_is_said(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap.sys, "platform", "linux")
    installed = answer_of_pip(bootstrap, monkeypatch, {"disk": CUDA_ON_DISK, "index": EVERYTHING})
    with pytest.raises(SystemExit, match="no CPU build of torch >= 2.11 .* -m pip install torch; then run make again"):
        bootstrap.install_torch()
    assert installed == []


def test_on_a_mac_the_ordinary_torch_is_taken(bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap.sys, "platform", "darwin")
    installed = answer_of_pip(bootstrap, monkeypatch, {"index": EVERYTHING})
    bootstrap.install_torch()
    assert installed[0] == "index: torch==2.15.0"


@pytest.mark.parametrize(
    ("version", "cuda", "found"),
    [("2.13.0+cpu", None, ("2.13.0+cpu", "")), ("2.11.0", "13.0", ("2.11.0", "13.0")), ("2.10.1", None, None)],
)
def test_a_torch_that_is_there_is_used_if_it_is_new_enough(
    bootstrap: ModuleType, tmp_path: Path, version: str, cuda: str | None, found: tuple[str, str] | None
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho '{version} {cuda or ''}'\n")
    python.chmod(0o755)
    assert bootstrap.torch_of(python) == found


def test_a_python_without_torch_has_none(bootstrap: ModuleType, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    assert bootstrap.torch_of(python) is None
