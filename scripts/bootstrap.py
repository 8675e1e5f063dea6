"""Make .venv and install epops into it: `python3 scripts/bootstrap.py [EXTRAS]`, EXTRAS such as ``test,hf``.

torch is the delicate part.  In this order: the torch that this Python or the .venv already has; a CPU wheel on this
machine's disk (pip's ``find-links``); the CPU wheels of PyTorch's own index.  Never the CUDA wheels that pip would
take by itself on Linux: they are gigabytes, and whoever wants them has installed them before.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
NEWEST_FIRST = ["python3.13", "python3.12", "python3.11", "python3.10", "python3.14"]
MIN_TORCH = (2, 11)
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def say(message):
    print("[setup] " + message, flush=True)


def stop(message):
    sys.exit("[setup] " + message)


def need_python():
    """Go on in a newer Python if this one is too old for torch."""
    if sys.version_info >= (3, 10):
        return
    for name in NEWEST_FIRST:
        path = shutil.which(name)
        if path and subprocess.call([path, "-c", "pass"], stderr=subprocess.DEVNULL) == 0:
            os.execv(path, [path] + sys.argv)
    stop(
        "epops needs Python 3.10 or newer, this is {}.{}; install one, or name it: make test PYTHON=python3.12".format(
            *sys.version_info
        )
    )


def torch_of(python):
    """(version, CUDA version or "") of the torch that ``python`` imports, or None."""
    code = "import torch; print(torch.__version__, torch.version.cuda or '')"
    # Not in the checkout: a folder called torch there would be imported instead.
    done = subprocess.run([str(python), "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=os.sep)
    if done.returncode:
        return None
    version, _, cuda = done.stdout.decode().strip().partition(" ")
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    if numbers < MIN_TORCH:
        say("torch {} of {} is older than {}.{} and is not used".format(version, python, *MIN_TORCH))
        return None
    return version, cuda


def make_venv():
    """.venv, which sees this Python's packages if they include a torch that will do."""
    installed = torch_of(sys.executable)
    options = ["--system-site-packages"] if installed else []
    basis = "the installed torch " + installed[0] if installed else "Python " + sys.version.split()[0]
    say("making .venv with " + basis)
    ways = [[sys.executable, "-m", "venv", *options, str(VENV)]]
    if shutil.which("virtualenv"):
        ways.append(["virtualenv", "-p", sys.executable, *options, str(VENV)])
    if shutil.which("uv"):
        ways.append(["uv", "venv", "--seed", "--python", sys.executable, *options, str(VENV)])
    problems = []
    for way in ways:
        done = subprocess.run(way, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode == 0 and venv_python().exists():
            break
        problems.append(done.stdout.decode().strip())
        shutil.rmtree(VENV, ignore_errors=True)
    else:
        stop(
            "no virtual environment could be made:\n{}\nInstall Python's venv module (Debian, Ubuntu: apt install "
            "python3-venv), or virtualenv, or uv.".format("\n".join(problems))
        )
    if installed and sys.prefix != sys.base_prefix:
        # --system-site-packages shows the base Python's packages; here torch is in an environment above it.
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        site = subprocess.check_output([str(venv_python()), "-c", code])
        Path(site.decode().strip(), "epops_parent_environment.pth").write_text(sysconfig.get_path("purelib") + "\n")


def venv_python():
    return VENV / "bin" / "python"


def pip(*arguments, may_fail=False, quiet=True):
    command = [str(venv_python()), "-m", "pip", "--disable-pip-version-check", *arguments]
    if quiet:
        command.append("-qq")
    done = subprocess.run(command, stderr=subprocess.DEVNULL if may_fail else None, cwd=str(ROOT))
    if done.returncode and not may_fail:
        stop("failed: " + " ".join(command))
    return done.returncode == 0


def find_torch(*where):
    """The version of torch that pip would install from ``where``, if it is a CPU build."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        wanted = "torch>={}.{}".format(*MIN_TORCH)
        if not pip(
            "install",
            "--dry-run",
            "--no-deps",
            "--force-reinstall",
            "--report",
            str(report),
            *where,
            wanted,
            may_fail=True,
        ):
            return None
        found = json.loads(report.read_text())["install"]
    version, url = found[0]["metadata"]["version"], found[0]["download_info"]["url"]
    only_cpu_builds = sys.platform == "darwin"
    return version if only_cpu_builds or "+cpu" in version or "/whl/cpu" in url else None


def install_torch():
    places = [("this machine's disk", ["--no-index"]), ("PyTorch's CPU wheels", ["--index-url", CPU_INDEX])]
    if sys.platform == "darwin":
        places.append(("the package index", []))
    for name, where in places:
        version = find_torch(*where)
        if version is None:
            continue
        say(f"installing torch {version} from {name}")
        pip("install", "--no-deps", "--force-reinstall", *where, "torch==" + version, quiet=not sys.stdout.isatty())
        # torch itself is there now, so this brings what it depends on, from the ordinary index.
        pip("install", "torch==" + version)
        if shutil.which("nvidia-smi"):
            say(
                "there is a GPU here, but this torch is for CPUs; to use the GPU: make clean, and start "
                "again with a Python that has your CUDA torch (make demo PYTHON=...)"
            )
        return
    stop(
        "no CPU build of torch >= {}.{} for Python {}.{} was found: not on this machine's disk (pip's find-links) and "
        "not at {}. Install the torch of your choice with: {} -m pip install torch; then run make again.".format(
            *MIN_TORCH, *sys.version_info[:2], CPU_INDEX, venv_python().relative_to(ROOT)
        )
    )


def install_epops(extras):
    version, cuda = torch_of(venv_python())
    tools = ["setuptools>=77", "wheel"] + (["pybind11>=2.13", "ninja>=1.11"] if cuda else [])
    pip("install", *tools)
    with tempfile.TemporaryDirectory() as folder:
        # No other package may bring another torch.
        constraints = Path(folder, "constraints.txt")
        constraints.write_text(f"torch=={version}\n")
        target = f".[{extras}]" if extras else "."
        say("installing epops{} for torch {}{}".format(target[1:], version, ", CUDA " + cuda if cuda else ", CPU"))
        pip("install", "--no-build-isolation", "-c", str(constraints), "-e", target)


def install_tools():
    """Tools that pip found in the Python below .venv have no command in .venv/bin: give them one."""
    missing = [name for name in ("ruff", "mypy", "clang-format") if not (VENV / "bin" / name).exists()]
    if missing:
        pip("install", "--ignore-installed", "--no-deps", *missing)


def check_compiler():
    """torch.compile writes C++ on CPUs: say now what it would say later."""
    if not any(shutil.which(name) for name in [os.environ.get("CXX", ""), "c++", "g++", "clang++"] if name):
        say("no C++ compiler was found; torch.compile needs one (Debian, Ubuntu: apt install g++)")
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        say(f"{header} does not exist; torch.compile on CPUs needs it (Debian, Ubuntu: apt install python3-dev)")


def main():
    need_python()
    if not venv_python().exists():
        make_venv()
    if torch_of(venv_python()) is None:
        install_torch()
        if torch_of(venv_python()) is None:
            stop("torch was installed but cannot be imported; see: .venv/bin/python -c 'import torch'")
    extras = sys.argv[1] if len(sys.argv) > 1 else ""
    install_epops(extras)
    if "dev" in extras.split(","):
        install_tools()
    check_compiler()


if __name__ == "__main__":
    main()
