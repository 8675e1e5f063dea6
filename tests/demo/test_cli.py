"""The ``epops`` command and the examples, as a person starts them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import epops
from epops.cli import app

from .test_demo import ROOT, run

TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node=2")


def test_the_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0 and result.output.strip() == epops.__version__


def test_env_says_what_a_bug_report_needs() -> None:
    import torch

    result = CliRunner().invoke(app, ["env"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    for what in ("epops", "Python", torch.__version__, "transformers", "GPU kernels", "c10d"):
        assert what in result.output


def test_help_imports_no_model_library() -> None:
    done = run("epops.cli", "--help")
    assert done.returncode == 0
    for command in ("demo", "generate", "inspect", "bench", "env"):
        assert command in done.stdout
    code = "import sys, epops.cli; assert not {'transformers', 'rich.progress'} & set(sys.modules), 'heavy imports'"
    path = ROOT / "epops" / "cli.py"
    assert path.exists()
    import subprocess
    import sys

    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_inspect_shows_each_pass_and_writes_a_page(tmp_path: Path) -> None:
    page = tmp_path / "graph.html"
    done = run("epops.cli", "inspect", "--model", "deepseek_v3", "--config", "tiny", "--graphs", "--save", str(page))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "inference graph" in done.stdout and "epops.dispatch" in done.stdout
    for one in epops.PASSES:
        assert re.search(rf"\b{one.__name__} \d", done.stdout), done.stdout
    assert "<html" in page.read_text().lower()


def test_inspect_names_what_it_does_not_know() -> None:
    result = CliRunner().invoke(app, ["inspect", "--model", "mixtral", "--config", "huge"])
    assert result.exit_code == 2 and "'huge'" in result.output


def test_bench_refuses_gpus_that_are_not_there() -> None:
    import torch

    if torch.cuda.device_count() > 1:
        pytest.skip("this machine has GPUs")
    result = CliRunner().invoke(app, ["bench", "dispatch-combine"])
    assert result.exit_code == 2 and "at least 2 GPUs, got" in result.output


def test_the_ops_example() -> None:
    done = run(*TORCHRUN, "examples/ops.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rank 0: 4 tokens came back right" in done.stdout and "rank 1: 5 tokens came back right" in done.stdout


def test_the_training_example_learns() -> None:
    done = run(*TORCHRUN, "examples/train_moe.py", "--eager", "--steps", "16")
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [float(found) for found in re.findall(r"loss (\d+\.\d+)", done.stdout)]
    assert len(losses) == 4 and losses[-1] < losses[0] - 0.5, done.stdout


def test_the_generation_example_lets_every_rank_end_at_its_own_step() -> None:
    done = run(*TORCHRUN, "examples/generate.py", "--eager")
    assert done.returncode == 0, done.stdout + done.stderr
    for rank, length in ((0, 8), (1, 12)):
        found = re.search(rf"rank {rank}: .* → \[([\d, ]+)\]", done.stdout)
        assert found and len(found[1].split(",")) == length, done.stdout
