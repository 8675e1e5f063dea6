"""clang-format over the kernels and their emulation: `cuda_format.py --check` reports, without it the files are rewritten."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (ROOT / "epops/csrc", ROOT / "tests/emulated")
SUFFIXES = {".cu", ".cuh", ".cpp", ".h"}


def main() -> int:
    files = sorted(str(path) for folder in FOLDERS for path in folder.rglob("*") if path.suffix in SUFFIXES)
    if not files:
        return 0
    options = ["--dry-run", "-Werror"] if "--check" in sys.argv else ["-i"]
    tool = Path(sys.executable).with_name("clang-format")
    return subprocess.call([str(tool), *options, *files])


if __name__ == "__main__":
    sys.exit(main())
