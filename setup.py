"""Builds ``epops._C``, the CUDA kernels, where nvcc and a CUDA torch of the same major version are there.

Everything else about the package is in pyproject.toml.  Without nvcc, or with a torch for CPUs, or in pip's isolated
build (which sees no torch), the package is pure Python: everything but the kernels.  To build them:

    pip install --no-build-isolation .        (needs pybind11; ninja makes it quicker)

Settings, all environment variables: EPOPS_BUILD_CUDA=0 leaves the kernels out, =1 makes their absence an error;
EPOPS_CUDA_ARCHS="80;90a;100" builds for those instead of the GPUs present; CUDA_HOME names the toolkit; MAX_JOBS.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "epops/csrc").rglob("*.cu"))
BINDINGS = "epops/csrc/bindings.cpp"
DEFAULT_ARCHS = ["90a"]
NEEDS_ARCH_SUFFIX = {"90": "90a"}  # wgmma, setmaxnreg and their like


def refuse(message: str) -> None:
    sys.exit(f"epops: {message} Or set EPOPS_BUILD_CUDA=0 to install without the GPU kernels.")


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        nvcc = Path(home, "bin", "nvcc")
        if not nvcc.exists():
            refuse(f"CUDA_HOME is {home}, but there is no {nvcc}; point it at a CUDA toolkit or unset it.")
        return str(nvcc)
    usual = Path("/usr/local/cuda/bin/nvcc")
    return shutil.which("nvcc") or (str(usual) if usual.exists() else None)


def nvcc_version(nvcc: str) -> str:
    text = subprocess.check_output([nvcc, "--version"], text=True)
    return re.search(r"release (\d+\.\d+)", text)[1]


def torch_cuda() -> str | None:
    """CUDA version of the torch that this Python imports; None without torch or for a CPU torch."""
    try:
        import torch
    except ModuleNotFoundError:
        return None
    return torch.version.cuda


def wanted_nvcc() -> str | None:
    """The nvcc to build with, or None to leave the kernels out; stops where the toolchain is wrong."""
    setting = os.environ.get("EPOPS_BUILD_CUDA", "auto")
    if setting == "0" or not SOURCES or not Path(ROOT, BINDINGS).exists():
        return None
    forced = setting == "1"
    cuda, nvcc = torch_cuda(), find_nvcc()
    if cuda is None:
        if forced:
            refuse(
                "EPOPS_BUILD_CUDA=1, but no CUDA build of torch can be imported here; install one and build "
                "with: pip install --no-build-isolation . (pip's isolated build sees no torch)."
            )
        return None
    if nvcc is None:
        if forced:
            refuse(f"EPOPS_BUILD_CUDA=1, but there is no nvcc; install the CUDA {cuda} toolkit or set CUDA_HOME.")
        print(
            f"epops: torch is for CUDA {cuda}, but there is no nvcc: installed without the GPU kernels", file=sys.stderr
        )
        return None
    found = nvcc_version(nvcc)
    if found.split(".")[0] != cuda.split(".")[0]:
        refuse(
            f"torch is for CUDA {cuda}, but {nvcc} is of CUDA {found}; their major versions must be the same. "
            f"Set CUDA_HOME to a CUDA {cuda.split('.')[0]} toolkit, or install a torch for CUDA {found.split('.')[0]}."
        )
    try:
        import pybind11  # noqa: F401
    except ModuleNotFoundError:
        refuse("building the GPU kernels needs pybind11; run: pip install pybind11 ninja.")
    return nvcc


def cuda_archs() -> list[str]:
    """Architectures to build for: the setting, else those of the GPUs present, else Hopper."""
    setting = os.environ.get("EPOPS_CUDA_ARCHS", "")
    if setting:
        archs = [
            arch.strip().removeprefix("sm_").replace(".", "") for arch in re.split(r"[;, ]+", setting) if arch.strip()
        ]
    else:
        import torch

        gpus = range(torch.cuda.device_count())
        archs = sorted({"{}{}".format(*torch.cuda.get_device_capability(gpu)) for gpu in gpus}) or DEFAULT_ARCHS
    for arch in archs:
        number = re.fullmatch(r"(\d{2,3})[af]?", arch)
        if number is None:
            refuse(f"EPOPS_CUDA_ARCHS={setting} names {arch!r}; write architectures as 90a or 8.0, separated by ';'.")
        if int(number[1]) < 80:
            refuse(f"the kernels need compute capability 8.0 or newer, and this is {arch}.")
    return [NEEDS_ARCH_SUFFIX.get(arch, arch) for arch in archs]


class BuildKernels(build_ext):
    """nvcc for each .cu (they include no torch header, so seconds each), g++ for the bindings, all at once."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        nvcc, archs = ext.nvcc, cuda_archs()
        objects = Path(self.build_temp).resolve()
        objects.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        includes = ["-Iepops/csrc", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
        code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        flags = ["-O3", "-std=c++17", "-lineinfo", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden"]
        jobs = []
        for source in [*SOURCES, BINDINGS]:
            output = objects / (source.replace("/", "_") + ".o")
            defines = [f'-DEPOPS_CUDA_ARCHS="{";".join(archs)}"', f"-DTORCH_EXTENSION_NAME={ext.name.split('.')[-1]}"]
            jobs.append((output, [nvcc, "-c", source, "-o", str(output), *flags, *includes, *code, *defines]))
        print(
            f"epops: {len(SOURCES)} kernels for {', '.join('sm_' + arch for arch in archs)} with {nvcc}",
            file=sys.stderr,
        )
        self.compile_all(jobs, objects)
        outputs = [str(output) for output, _ in jobs]
        # The runtime is linked in: it shares torch's context whichever minor version torch brings.
        subprocess.check_call(
            [nvcc, "-shared", "-cudart=static", *code, *outputs, "-o", str(target), "-ldl", "-lpthread"]
        )

    def compile_all(self, jobs: list[tuple[Path, list[str]]], folder: Path) -> None:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        ninja = shutil.which("ninja", path=path)
        workers = int(os.environ.get("MAX_JOBS", 0)) or os.cpu_count() or 1
        if ninja is None:
            with ThreadPoolExecutor(workers) as pool:
                list(pool.map(lambda job: subprocess.check_call(job[1], cwd=ROOT), jobs))
            return
        rule = ["rule compile", "  command = cd $root && $cmd -MD -MF $out.d", "  depfile = $out.d", "  deps = gcc"]
        lines = [f"root = {ROOT}", *rule]
        for output, command in jobs:
            text = shlex.join(command).replace("$", "$$")
            source = str(ROOT / command[2]).replace(" ", "$ ").replace(":", "$:")
            lines += [f"build {str(output).replace(' ', '$ ').replace(':', '$:')}: compile {source}", f"  cmd = {text}"]
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        subprocess.check_call([ninja, "-C", str(folder), "-j", str(workers), *([] if self.verbose else ["--quiet"])])


nvcc = wanted_nvcc()
extensions = []
if nvcc is not None:
    kernels = Extension("epops._C", [*SOURCES, BINDINGS])
    kernels.nvcc = nvcc
    extensions.append(kernels)
setup(ext_modules=extensions, cmdclass={"build_ext": BuildKernels})
