"""Compile every kernel of epops/csrc with nvcc alone and print what each takes: `cuda_check.py [sm_80 sm_90a …]`.

No torch, no GPU, nothing is linked or kept.  Fails on an error or a warning of the compiler; spills are shown, and a
kernel that spills is marked, for the person who reads the table to judge.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHS = ["sm_80", "sm_90a", "sm_100"]
JOBS = 2
ENTRY = re.compile(r"Compiling entry function '(\w+)' for")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


def compile_one(nvcc, source, arch, folder):
    """(exit status, compiler output) of one translation unit for one architecture."""
    output = Path(folder) / f"{source.stem}.{arch}.cubin"
    flags = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Xptxas=-v", "-Werror=all-warnings", "-Iepops/csrc"]
    command = [nvcc, "-cubin", f"-arch={arch}", *flags, str(source.relative_to(ROOT)), "-o", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def kernels_of(text):
    """Rows (kernel, registers, spilled bytes, shared bytes) from what ptxas -v printed."""
    rows, name, spilled = [], None, 0
    for line in text.splitlines():
        if entry := ENTRY.search(line):
            name, spilled = entry[1], 0
        elif spills := SPILLS.search(line):
            spilled = int(spills[2]) + int(spills[3])
        elif (used := USED.search(line)) and name is not None:
            rows.append((name, int(used[1]), spilled, int(used[2] or 0)))
            name = None
    return rows


def readable(names):
    """Kernel names as written in the source, arguments left out."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None or not names:
        return list(names)
    text = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True).stdout
    return [without_arguments(line.replace("(anonymous namespace)::", "")) for line in text.splitlines()]


def without_arguments(signature):
    """
    >>> without_arguments("void epops::send<(epops::Layout)0, 4>(epops::Params, int)")
    'epops::send<0, 4>'
    """
    signature = re.sub(r"\(\w[\w:]*\)(?=-?\d)", "", signature)
    return signature.split("(")[0].removeprefix("void ")


def main():
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        sys.exit("cuda-check: there is no nvcc on the PATH; install a CUDA toolkit or add its bin folder to the PATH")
    sources = sorted((ROOT / "epops/csrc").rglob("*.cu"))
    archs = sys.argv[1:] or ARCHS
    jobs = [(source, arch) for source in sources for arch in archs]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(JOBS) as pool:
        results = list(pool.map(lambda job: compile_one(nvcc, *job, folder), jobs))
    failed = 0
    print(f"{'arch':8} {'registers':>9} {'spilled B':>9} {'shared B':>9}  kernel")
    for (source, arch), (status, text) in zip(jobs, results):
        if status:
            failed += 1
            print(f"\n{source.relative_to(ROOT)} for {arch} does not compile:\n{text}")
            continue
        rows = kernels_of(text)
        for (_, registers, spilled, shared), name in zip(rows, readable([row[0] for row in rows])):
            mark = "  <- spills" if spilled else ""
            print(f"{arch:8} {registers:9} {spilled:9} {shared:9}  {source.stem}: {name}{mark}")
    print(f"cuda-check: {len(sources)} files, {len(archs)} architectures, {failed} failures")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
