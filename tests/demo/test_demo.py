"""The demo as a person starts it, made small; and what it must not let pass."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from epops.demo.compare import Differences
from epops.demo.counts import CompileCounts
from epops.demo.launch import choose
from epops.demo.recipe import Recipe, batch_of, learning_rate
from epops.demo.report import Outcome
from epops.demo.sample import Sample
from epops.demo.text import HELD_OUT, corpus, windows

from ..multihost.hosts import CannotMakeHosts, torchrun, two_hosts

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--steps", "4", "--batch", "4", "--length", "16", "--new-tokens", "5"]


def run(*arguments: str, timeout: float = 500.0) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def row(said: str, what: str) -> list[str]:
    """The cells of the row whose first cell begins with ``what``, in the table at the end, without that first cell."""
    rows = ([cell.strip() for cell in line.strip(" │").split("│")] for line in said.splitlines() if what in line)
    found = next((cells[1:] for cells in rows if cells[0].startswith(what)), None)
    assert found is not None, said
    return found


def test_two_eager_ranks_are_the_one_process_model() -> None:
    done = run("epops.demo", "--eager", *SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    for what in ("loss, first", "gradient norm, first", "loss, whole curve", "logits after", "gradients after"):
        assert re.search(r"\d\.\de[-+]\d\d", row(done.stdout, what)[0]), done.stdout
    assert row(done.stdout, "text as the one-process model writes it")[0] == "yes", done.stdout
    assert "rank 1 writes" in done.stdout and "the same model" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("model", ["mixtral", "deepseek_v3"])
def test_compiled_ranks_are_the_one_process_model_without_a_graph_break(model: str) -> None:
    done = run("epops.cli", "demo", "--model", model, "--ranks", "2", *SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert row(done.stdout, "graph breaks")[:2] == ["0", "0"], done.stdout
    counts = [row(done.stdout, f"rank {r}: graphs, cache hits, compiled")[0].split(", ") for r in range(2)]
    (graphs, hits, compiled), (graphs_1, hits_1, compiled_1) = [[int(n) for n in each] for each in counts]
    assert graphs == graphs_1 == hits + compiled == hits_1 + compiled_1, done.stdout
    assert compiled + compiled_1 == graphs, "a rank compiled what another one had compiled\n" + done.stdout
    for op in ("dispatch", "combine", "dispatch_backward", "combine_backward"):
        assert f"epops.{op}" in done.stdout, done.stdout


def test_under_torchrun_it_joins_the_ranks_that_are_there() -> None:
    done = run("torch.distributed.run", "--standalone", "--nproc-per-node=3", "-m", "epops.demo", "--eager", *SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 ranks and one process: the same model" in done.stdout


def test_two_hosts_are_the_one_process_model() -> None:
    try:
        with two_hosts() as hosts:
            said = "".join(torchrun(hosts, "-m", "epops.demo", "--eager", *SMALL, timeout=400))
    except CannotMakeHosts as reason:
        pytest.skip(f"two hosts cannot be made here: {reason}")
    assert "2 ranks and one process: the same model" in said, said


def outcome(compiled: bool = True, breaks: int = 0, **found: float) -> Outcome:
    same = dict.fromkeys(Differences._fields, 1e-7)
    return Outcome(
        recipe=Recipe(compiled=compiled),
        ranks=2,
        losses=(5.0, 2.0),
        tokens_per_second=1.0,
        counts=[CompileCounts(2, 0, 2, 0), CompileCounts(2, breaks, 0, 2)],
        samples=[Sample("a", "b", 1.0, None), Sample("a", "b", 1.0, True)],
        differences=Differences(**{**same, **found}),
        graphs="",
        seconds=1.0,
    )


def test_a_difference_is_a_failure() -> None:
    assert outcome().good
    for name in Differences._fields:
        assert not outcome(**{name: 0.1}).good, name
        assert not outcome(**{name: math.nan}).good, name
    assert not outcome(breaks=1).good
    assert outcome(loss=1e-2).good, "a routing decision that fell otherwise moves the curve by as much"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "gpt2"], "--model: expected one of mixtral, qwen3_moe, deepseek_v3, gpt_oss, olmoe, got 'gpt2'"),
        (["--ranks", "0"], "--ranks: expected at least 1, got 0"),
        (["--device", "tpu"], "--device: expected auto, cpu or cuda, got 'tpu'"),
        (["--length", "4096"], "--length: expected at most 512, got 4096"),
        (["--steps", "0"], "--steps: expected at least 1, got 0"),
    ],
)
def test_what_it_cannot_do_it_says(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    from typer.testing import CliRunner

    from epops.cli import app

    result = CliRunner().invoke(app, ["demo", *arguments])
    assert result.exit_code == 2
    assert said in result.output


def test_ranks_of_torchrun_are_not_chosen_again() -> None:
    assert choose(4, None, "cpu") == (4, "cpu")
    with pytest.raises(ValueError, match="the ranks that torchrun started"):
        choose(4, 2, "cpu")


def test_windows_come_from_the_text_and_from_the_seed() -> None:
    train, held_out = corpus()
    assert len(held_out) == HELD_OUT and len(train) > 10 * HELD_OUT
    batch = windows(train, 3, 20, seed=7)
    assert batch.shape == (3, 20)
    for one in batch.tolist():
        assert bytes(one) in train
    assert windows(train, 3, 20, seed=7).equal(batch)
    assert not windows(train, 3, 20, seed=8).equal(batch)
    assert not batch_of(train, Recipe(), 0).equal(batch_of(train, Recipe(), 1))


def test_the_learning_rate_rises_and_falls() -> None:
    recipe = Recipe(steps=100, learning_rate=1.0)
    rates = [learning_rate(recipe, step) for step in range(100)]
    assert rates[9] == max(rates) == 1.0
    assert rates[0] == 0.1 and rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert 0.1 <= rates[-1] < 0.11
