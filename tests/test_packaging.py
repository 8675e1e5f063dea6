"""The package installs where there is no nvcc and no CUDA, never brings a torch of its own, and refuses wrong toolchains."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text()


def run_setup(
    tmp_path: Path, *, torch_cuda: str | None, nvcc: str | None, pybind11: bool = True, **settings: str
) -> subprocess.CompletedProcess:
    """`wanted_nvcc()` and `cuda_archs()` of setup.py where torch is for ``torch_cuda`` and nvcc is of ``nvcc``."""
    torch = tmp_path / "torch"
    torch.mkdir()
    (torch / "__init__.py").write_text(
        f"class version: cuda = {torch_cuda!r}\nclass cuda:\n  device_count = staticmethod(lambda: 2)\n"
        "  get_device_capability = staticmethod(lambda gpu: (9, 0))\n"
    )
    (tmp_path / "pybind11.py").write_text("" if pybind11 else "raise ModuleNotFoundError")
    tools = tmp_path / "bin"
    tools.mkdir()
    if nvcc is not None:
        (tools / "nvcc").write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {nvcc}, V{nvcc}.88'\n")
        (tools / "nvcc").chmod(0o755)
    code = (
        "import setuptools, pathlib; setuptools.setup = lambda **k: None\n"
        "source = pathlib.Path('setup.py').read_text().replace('/usr/local/cuda/bin/nvcc', '/nonexistent/nvcc')\n"
        "space = {'__name__': 'setup', '__file__': 'setup.py'}\n"
        "exec(compile(source, 'setup.py', 'exec'), space)\n"
        "print('nvcc', space['nvcc'], 'archs', space['cuda_archs']())\n"
    )
    # The kernels' sources need not be there for the decision to be tested.
    sources = tmp_path / "sources"
    (sources / "epops/csrc").mkdir(parents=True)
    for name in ("epops/csrc/a.cu", "epops/csrc/bindings.cpp"):
        (sources / name).write_text("")
    (sources / "setup.py").write_text((ROOT / "setup.py").read_text())
    env = {"PATH": str(tools), "PYTHONPATH": str(tmp_path), **settings}
    return subprocess.run([sys.executable, "-c", code], cwd=sources, env=env, capture_output=True, text=True)


def test_without_a_cuda_torch_the_kernels_are_left_out(tmp_path: Path) -> None:
    done = run_setup(tmp_path, torch_cuda=None, nvcc="13.0")
    assert (done.returncode, done.stdout.split()[:2]) == (0, ["nvcc", "None"]), done.stderr


def test_without_nvcc_the_kernels_are_left_out_and_it_is_said(tmp_path: Path) -> None:
    done = run_setup(tmp_path, torch_cuda="13.0", nvcc=None)
    assert (done.returncode, done.stdout.split()[:2]) == (0, ["nvcc", "None"]), done.stderr
    assert "torch is for CUDA 13.0, but there is no nvcc: installed without the GPU kernels" in done.stderr


def test_with_a_matching_toolchain_the_kernels_are_built_for_the_gpus_present(tmp_path: Path) -> None:
    done = run_setup(tmp_path, torch_cuda="13.0", nvcc="13.2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("bin/nvcc archs ['90a']")


@pytest.mark.parametrize(
    ("torch_cuda", "nvcc", "settings", "says"),
    [
        (
            "13.0",
            "12.8",
            {},
            "torch is for CUDA 13.0, but .*nvcc is of CUDA 12.8; .*Set CUDA_HOME to a CUDA 13 toolkit",
        ),
        ("12.8", "13.0", {}, "install a torch for CUDA 13"),
        ("13.0", None, {"EPOPS_BUILD_CUDA": "1"}, "there is no nvcc; install the CUDA 13.0 toolkit or set CUDA_HOME"),
        (None, "13.0", {"EPOPS_BUILD_CUDA": "1"}, "no CUDA build of torch .* pip install --no-build-isolation"),
        (
            "13.0",
            "13.0",
            {"CUDA_HOME": "/nonexistent"},
            "CUDA_HOME is /nonexistent, but there is no /nonexistent/bin/nvcc",
        ),
        ("13.0", "13.0", {"EPOPS_CUDA_ARCHS": "hopper"}, "names 'hopper'; write architectures as 90a or 8.0"),
        ("13.0", "13.0", {"EPOPS_CUDA_ARCHS": "7.5"}, "need compute capability 8.0 or newer, and this is 75"),
    ],
)
def test_a_wrong_toolchain_is_refused_with_the_remedy(
    tmp_path: Path, torch_cuda: str | None, nvcc: str | None, settings: dict[str, str], says: str
) -> None:
    done = run_setup(tmp_path, torch_cuda=torch_cuda, nvcc=nvcc, **settings)
    assert done.returncode != 0
    assert re.search(says, done.stderr), done.stderr
    assert "EPOPS_BUILD_CUDA=0" in done.stderr


def test_a_missing_pybind11_is_named_with_the_command_that_installs_it(tmp_path: Path) -> None:
    done = run_setup(tmp_path, torch_cuda="13.0", nvcc="13.0", pybind11=False)
    assert done.returncode != 0
    assert "needs pybind11; run: pip install pybind11 ninja" in done.stderr


@pytest.mark.parametrize(("setting", "archs"), [("8.0;9.0", ["80", "90a"]), ("sm_100 90a", ["100", "90a"])])
def test_architectures_can_be_named(tmp_path: Path, setting: str, archs: list[str]) -> None:
    done = run_setup(tmp_path, torch_cuda="13.0", nvcc="13.0", EPOPS_CUDA_ARCHS=setting)
    assert done.stdout.strip().endswith(f"archs {archs}"), done.stderr


def test_building_the_package_never_asks_for_torch() -> None:
    build_system = PYPROJECT.split("[project]")[0]
    requires = re.search(r"requires = \[(.*?)\]", build_system, re.S)[1]
    assert [Requirement(name).name for name in re.findall(r'"([^"]+)"', requires)] == ["setuptools"]


def test_the_installed_package_says_what_it_needs() -> None:
    requirements = [Requirement(text) for text in metadata.requires("epops") or []]
    always = {
        requirement.name: str(requirement.specifier) for requirement in requirements if requirement.marker is None
    }
    assert always == {"torch": ">=2.11", "rich": ">=13", "typer": ">=0.15"}
    assert {"hf", "test", "cu12", "cu13", "tensorrt", "dev"} <= set(
        metadata.metadata("epops").get_all("Provides-Extra")
    )


def test_the_version_is_said_once() -> None:
    import epops

    assert epops.__version__ == metadata.version("epops")
    assert f"## {epops.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_torch_finds_the_backend_by_name() -> None:
    import torch

    assert "epops" in torch._dynamo.list_backends(exclude_tags=())
    entry = next(entry for entry in metadata.entry_points(group="torch_dynamo_backends") if entry.name == "epops")
    from epops.backend import epops_backend

    assert entry.load() is epops_backend


@pytest.mark.parametrize("name", ["passes.PASSES", "testing.assert_fused", "backend.epops_backend", "inspect"])
def test_what_docs_name_is_there_after_import_epops_alone(name: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"import epops; epops.{name}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_command_line_starts() -> None:
    done = subprocess.run([sys.executable, "-m", "epops.cli", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stdout


def test_a_wheel_without_cuda_is_pure_python_and_has_every_module(tmp_path: Path) -> None:
    source = tmp_path / "source"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--", "epops", "*.toml", "setup.py", "README.md", "LICENSE"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode or not listed.stdout:
        pytest.skip("not a git checkout")
    names = [name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()]
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-qq",
        "-w",
        str(tmp_path),
        str(source),
    ]
    done = subprocess.run(command, env={**os.environ, "EPOPS_BUILD_CUDA": "0"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if name.startswith("epops/")} <= inside
    assert not {name for name in inside if name.startswith(("tests/", "benchmarks/", "scripts/"))}
