"""examples/mla_data_parallel.py runs, and its table says what is true."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
CASES = [
    pytest.param(2, 1, ("--layers", "1", "--heads", "5", "--steps", "10", "--eager"), id="eager"),
    pytest.param(2, 2, ("--steps", "16"), id="compiled", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("ranks", "layers", "rest"), CASES)
def test_the_example_of_latent_attention(ranks: int, layers: int, rest: tuple[str, ...]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "examples/mla_data_parallel.py", "--ranks", str(ranks), *rest],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=550,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    table = dict(re.split(r"  +", line, maxsplit=1) for line in done.stdout.splitlines() if "  " in line)
    assert float(table["largest difference from the plain model"].split()[0]) < 1e-5
    whole = int(table["cache a rank, tensor-parallel core"].split()[0])
    own, times = re.match(r"(\d+) bytes, ([\d.]+) times less", table["cache a rank, data-parallel core"]).groups()
    assert whole / int(own) > 0.95 * ranks and float(times) == round(whole / int(own), 2)
    assert table["exchanges in the graph"] == f"{2 * layers}, {2 * layers} of them with transposes folded in"
    before, after = map(int, re.findall(r"\d+", table["copies in the graph"]))
    assert before == after + 2 * layers
    assert table["exchanges beside other work"] == str(layers)
    assert table["graphs compiled"] == ("0, recompiles 0" if "--eager" in rest else "1, recompiles 0")
    owners = re.findall(r"(\d+) … (\d+)", table["tokens of a step, by owner"])
    assert len(owners) == ranks and all(int(most) > int(least) for least, most in owners), (
        "tokens differ from step to step"
    )
