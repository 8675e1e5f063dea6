"""benchmarks/bench_mla.py runs on CPU ranks; it checks both cores itself, and its rows have both caches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SIZES = (
    "--heads",
    "5",
    "--requests",
    "5",
    "--lengths",
    "6",
    "9",
    "--lora",
    "16",
    "--rope",
    "4",
    "--runs",
    "1",
    "--eager",
)


def test_both_cores_are_timed_and_checked(tmp_path: Path) -> None:
    out = tmp_path / "mla.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    done = subprocess.run(
        [*command, "benchmarks/bench_mla.py", *SIZES, "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["length"] for row in rows] == [6, 9]
    for row in rows:
        assert all(row["us"][name] > 0 for name in ("tensor-parallel", "data-parallel", "exchanges alone"))
        # 5 requests; at most 2 on a rank; a row more in each for what belongs to nobody.
        width = 4 * (16 + 4)
        held = {"tensor-parallel": (5 * row["length"] + 1) * width, "data-parallel": (2 * row["length"] + 1) * width}
        assert row["cache_bytes"] == held
        assert row["difference"]["exchanges alone"] == 0
    assert out.with_suffix(".md").read_text().count("| 6 |") == 1
