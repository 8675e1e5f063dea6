"""epops/csrc for a CPU: sources with C++ in the place of PTX, compiled with hooks at every access to memory.

A kernel's source is what the GPU gets, word by word, but for two things: an ``asm`` statement becomes the statement of
`INSTRUCTIONS` (one that is not there stops the build), and a ``__shared__`` declaration becomes a reference to memory that the
threads of a block share.  g++ writes a call at every load and store for -fsanitize=thread; machine.cpp has those functions, so
that it sees all of them.  Not ThreadSanitizer itself: it knows no fences, no copies that go on by themselves and no scopes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "epops" / "csrc"
FLAGS = ["-std=c++17", "-fPIC", "-w", "-g1", "-ffp-contract=off", "-fno-strict-aliasing"]
HOOKS = ["-fsanitize=thread", "--param", "tsan-distinguish-volatile=1", "--param", "tsan-instrument-func-entry-exit=0"]

# Instruction, without spaces, to what it does; {0}, {1}, … are its operands.
INSTRUCTIONS = {
    "ld.relaxed.sys.global.u64 %0, [%1];": "{0} = emulated::load_word({1});",
    "ld.relaxed.sys.global.u32 %0, [%1];": "{0} = emulated::load_word({1});",
    "ld.relaxed.gpu.global.u64 %0, [%1];": "{0} = emulated::load_word({1});",
    "st.relaxed.sys.global.u64 [%0], %1;": "emulated::store_word({0}, {1});",
    "st.relaxed.sys.global.u32 [%0], %1;": "emulated::store_word({0}, {1});",
    "{.reg .b128 value;ld.relaxed.sys.global.b128 value, [%2];mov.b128 {%0, %1}, value;}": (
        "const uint4 seen = emulated::load_line({2}); {0} = seen.x | uint64_t{{seen.y}} << 32;"
        " {1} = seen.z | uint64_t{{seen.w}} << 32;"
    ),
    "{.reg .b128 value;mov.b128 value, {%1, %2};st.relaxed.sys.global.b128 [%0], value;}": (
        "emulated::store_line({0}, make_uint4({1}, {1} >> 32, {2}, {2} >> 32));"
    ),
    "ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];": (
        "const uint4 seen = emulated::load_line({4}); {0} = seen.x, {1} = seen.y, {2} = seen.z, {3} = seen.w;"
    ),
    "st.volatile.global.v4.u32 [%0], {%1, %2, %3, %4};": "emulated::store_line({0}, make_uint4({1}, {2}, {3}, {4}));",
    "fence.acq_rel.sys;": "emulated::fence(emulated::kSystem);",
    "fence.acq_rel.cta;": "emulated::fence(emulated::kBlock);",
    "ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];": (
        "const uint4 seen = emulated::load<uint4>({4}); {0} = seen.x, {1} = seen.y, {2} = seen.z, {3} = seen.w;"
    ),
    "ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];": (
        "const uint2 seen = emulated::load<uint2>({2}); {0} = seen.x, {1} = seen.y;"
    ),
    "ld.global.s32 %0, [%1];": "{0} = emulated::load<int32_t>({1});",
    "ld.global.s64 %0, [%1];": "{0} = emulated::load<int64_t>({1});",
    "ld.global.f32 %0, [%1];": "{0} = emulated::load<float>({1});",
    "ld.global.u32 %0, [%1];": "{0} = 0;",  # `touch` of team.cuh, which means nothing
    "st.global.v4.u32 [%0], {%1, %2, %3, %4};": "emulated::store({0}, make_uint4({1}, {2}, {3}, {4}));",
    "ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];": (
        "const uint4 seen = emulated::load<uint4>(reinterpret_cast<void*>(uint64_t{{{4}}}));"
        " {0} = seen.x, {1} = seen.y, {2} = seen.z, {3} = seen.w;"
    ),
    "st.shared.v4.u32 [%0], {%1, %2, %3, %4};": (
        "emulated::store(reinterpret_cast<void*>(uint64_t{{{0}}}), make_uint4({1}, {2}, {3}, {4}));"
    ),
    "cp.async.cg.shared.global [%0], [%1], 16;": (
        "emulated::async_copy(reinterpret_cast<void*>(uint64_t{{{0}}}), {1}, 16);"
    ),
    "cp.async.ca.shared.global [%0], [%1], 4;": (
        "emulated::async_copy(reinterpret_cast<void*>(uint64_t{{{0}}}), {1}, 4);"
    ),
    "cp.async.commit_group;": "emulated::async_commit();",
    "cp.async.wait_group %0;": "emulated::async_wait({0});",
    "mov.u64 %0, %%globaltimer;": "{0} = emulated::now_ns();",
    "barrier.cta.sync %0, %1;": "emulated::sync_named({0}, {1});",
    "griddepcontrol.wait;": "emulated::wait_for_earlier();",
    "griddepcontrol.launch_dependents;": "emulated::launch_dependents();",
    "max.NaN.f32 %0, %1, %2;": "{0} = {1} != {1} || {2} != {2} ? NAN : {1} < {2} ? {2} : {1};",
    "min.NaN.f32 %0, %1, %2;": "{0} = {1} != {1} || {2} != {2} ? NAN : {2} < {1} ? {2} : {1};",
    "rcp.approx.ftz.f32 %0, %1;": "{0} = 1.f / {1};",
    "mbarrier.init.shared::cta.b64 [%0], %1;": "emulated::barrier_init({0}, {1});",
    "fence.mbarrier_init.release.cluster;": "",
    "mbarrier.arrive.shared::cta.b64 _, [%0];": "emulated::barrier_arrive({0}, 0);",
    "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;": "emulated::barrier_arrive({0}, {1});",
    "{.reg .pred done;again:mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;@!done bra again;}": (
        "emulated::barrier_wait({0}, {1});"
    ),
    "{.reg .pred done;mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;selp.u32 %0, 1, 0, done;}": (
        "{0} = emulated::barrier_over({1}, {2});"
    ),
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];": (
        "emulated::bulk_load({0}, {1}, {2}, {3});"
    ),
    "cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;": "emulated::bulk_store({0}, {1}, {2});",
    "cp.async.bulk.commit_group;": "emulated::bulk_commit();",
    "cp.async.bulk.wait_group %0;": "emulated::bulk_wait({0}, false);",
    "cp.async.bulk.wait_group.read 0;": "emulated::bulk_wait(0, true);",
    "fence.proxy.async;": "emulated::fence_proxy();",
    "fence.proxy.async.shared::cta;": "emulated::fence_proxy();",
}
SQUEEZED = {re.sub(r"\s", "", name): code for name, code in INSTRUCTIONS.items()}


def closing(text: str, start: int) -> int:
    """The place of the parenthesis that closes the one at ``start``; strings may hold others."""
    depth, at = 0, start
    while True:
        if text[at] == '"':
            at = re.compile(r'"(\\.|[^"\\])*"').match(text, at).end() - 1  # type: ignore[union-attr]
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if depth == 0:
            return at
        at += 1


def without_asm(text: str) -> str:
    """``asm volatile("instruction" : "=r"(a) : "r"(b) : "memory");`` as the C++ of that instruction."""
    statement = re.compile(r"\basm( volatile)?\(")
    while found := statement.search(text):
        end = closing(text, found.end() - 1)
        inside = text[found.end() : end]
        template = re.match(r'(\s*"(\\.|[^"\\])*")+', inside)
        assert template is not None, inside
        instruction = (
            "".join(re.findall(r'"((?:\\.|[^"\\])*)"', template.group())).replace("\\n", "").replace("\\t", "")
        )
        operands, at = [], template.end()
        while constraint := re.compile(r'"[=+]?[a-z]"\(').search(inside, at):
            at = closing(inside, constraint.end() - 1)
            operands.append(f"({inside[constraint.end() : at]})")
        key = re.sub(r"\s", "", instruction)
        if key not in SQUEEZED:
            raise SystemExit(f"tests/emulated/build.py: INSTRUCTIONS lacks {instruction!r}")
        text = f"{text[: found.start()]}{{ {SQUEEZED[key].format(*operands)} }}{text[end + 1 :]}"
    return text


def without_shared(text: str, name: str) -> str:
    """``__shared__`` declarations as references."""
    text = re.sub(
        r"extern __shared__ __align__\(\d+\) (\w+) (\w+)\[\];",
        r"\1* const \2 = static_cast<\1*>(emulated::dynamic_shared());",
        text,
    )

    def references(found: re.Match[str]) -> str:
        kind, made = found.group(1), []
        for number, one in enumerate(found.group(2).split(",")):
            variable, sizes = re.match(r"\s*(\w+)(.*)", one).groups()  # type: ignore[union-attr]
            seed = int.from_bytes(hashlib.sha256(f"{name} {found.start()} {number}".encode()).digest()[:3], "big")
            made.append(f"auto& {variable} = emulated::shared<{kind}{sizes}, {seed}>();")
        return " ".join(made)

    return re.sub(r"__shared__ (?:__align__\(\d+\) )?(\w+) ([^;=]+);", references, text)


def without_words(text: str) -> str:
    """What is a keyword or a variable to nvcc, and may be a member's name or a compiler's word to others."""
    names = {"threadIdx": "thread", "blockIdx": "block", "blockDim": "threads", "gridDim": "blocks"}
    text = re.sub(
        r"(?<![.\w])(threadIdx|blockIdx|blockDim|gridDim)\b", lambda m: f"emulated::here().{names[m[1]]}", text
    )
    return text.replace("__noinline__", "__attribute__((noinline))")


def translate(to: Path, instead: tuple[str, str, str] | None = None) -> list[Path]:
    """Sources for a CPU in ``to``; the .cpp files to compile.  ``instead``: a file, what it says once, and what instead of it."""
    made = []
    for source in sorted([*CSRC.glob("*.cu"), *CSRC.glob("*.cuh"), CSRC / "params.h", CSRC / "bindings.cpp"]):
        text = source.read_text()
        if instead is not None and source.name == instead[0]:
            assert text.count(instead[1]) == 1, instead
            text = text.replace(instead[1], instead[2])
        if source.name in ("lines.cuh", "combine_lines.cu"):  # a warp's lanes together: a line crosses whole
            text = re.sub(r"\b(ld|st)_line\(", r"emulated::\1_lines(", text)
        text = without_words(without_shared(without_asm(text), source.name))
        target = to / (source.name + ".cpp" if source.suffix == ".cu" else source.name)
        target.write_text(f'#line 1 "{source.name}"\n{text}')
        if target.suffix == ".cpp":
            made.append(target)
    return made


def missing() -> str | None:
    """What of the tools is not there, or None."""
    if sys.platform != "linux" or sysconfig.get_platform() != "linux-x86_64":
        return "Linux on x86-64"
    if shutil.which("g++") is None:
        return "g++"
    if headers() is None:
        return "the headers of CUDA (nvcc)"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "the headers of Python"
    return None


def headers() -> Path | None:
    """CUDA's headers, which a CPU's compiler reads too."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parent.parent, "/usr/local/cuda"]
    folders = [Path(home) / "include" for home in homes if home]
    return next((folder for folder in folders if (folder / "cuda_fp8.h").exists()), None)


def build(
    to: Path, instead: tuple[str, str, str] | None = None, only: str | None = None, others: Path | None = None
) -> Path:
    """The module ``_C`` with emulated kernels, in the folder ``to``; of ``only`` one source, with the objects in ``others``."""
    import pybind11

    found = headers()
    assert found is not None
    include = [f"-I{found}", f"-I{HERE}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]

    def compile_one(source: Path) -> Path:
        hooked = HOOKS if source.name.endswith(".cu.cpp") else ["-DTORCH_EXTENSION_NAME=_C", "-O0"]
        if source.parent == HERE:
            hooked = ["-O3"]
        target = to / f"{source.stem}.o"
        subprocess.run(
            ["g++", "-c", "-O1", *FLAGS, *hooked, *include, f"-I{to}", "-include", HERE / "machine.h", source, "-o", target],
            check=True,
        )  # fmt: skip
        return target

    with ThreadPoolExecutor(4) as pool:
        sources = [*translate(to, instead), *HERE.glob("*.cpp")]
        objects = list(pool.map(compile_one, [one for one in sources if only is None or one.name == f"{only}.cpp"]))
    if others is not None:
        objects += [made for made in others.glob("*.o") if made.name != objects[0].name]
    module = to / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run(["g++", "-shared", *objects, "-o", module], check=True)
    return module
