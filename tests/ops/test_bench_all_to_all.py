"""benchmarks/bench_all_to_all.py runs on CPU ranks, and its ways give the same rows (it checks them itself)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def test_every_way_is_timed_and_checked(tmp_path: Path) -> None:
    out = tmp_path / "all_to_all.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    done = subprocess.run(
        [*command, "benchmarks/bench_all_to_all.py", "--sizes", "16KiB", "--runs", "1", "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 12 and len({row["way"] for row in rows}) == 3
    assert all(row["ms"] > 0 and row["gb_s"] > 0 and not row["graph"] for row in rows)
    assert done.stdout.count("| 16KiB |") == 12
