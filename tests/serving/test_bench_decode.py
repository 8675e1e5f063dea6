"""The decode benchmark runs on two CPU ranks, and every contender writes the tokens of the one device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ..demo.test_demo import run


def test_all_contenders_write_the_same_tokens(tmp_path: Path) -> None:
    pytest.importorskip("transformers.distributed.expert_parallel", reason="transformers' own EP is since 5.23")
    options = (
        "--device",
        "cpu",
        "--ranks",
        "2",
        "--batch",
        "3",
        "--steps",
        "2",
        "--how",
        "eager",
        "--out",
        str(tmp_path),
    )
    done = run("epops.cli", "bench", "decode", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    made = json.loads((tmp_path / "decode_qwen3_moe_tiny_2.json").read_text())
    found = {row["contender"]: row for row in made["rows"]}
    assert list(found) == ["one device", "all_to_all", "all_reduce", "epops", "epops fp8"]
    for name, row in found.items():
        assert "failed" not in row, row
        assert (row["sequences"], row["graph_breaks"]) == (6, 0), name
        if name == "epops fp8":
            assert 1e-4 < row["logits_differ"] < 5e-2
        else:
            assert row["tokens_differ"] == 0 and (row["logits_differ"] or 0.0) < 1e-5, name
        assert row["milliseconds"] > 0
        assert f"| {name} | eager |" in done.stdout
    assert found["one device"]["logits_differ"] is None
    assert (tmp_path / "decode_qwen3_moe_tiny_2.md").read_text().strip() in done.stdout


def test_a_contender_that_takes_too_long_is_said_to_and_the_others_are_kept(tmp_path: Path) -> None:
    options = ("--device", "cpu", "--ranks", "1", "--batch", "1", "--steps", "1", "--how", "eager", "--limit", "0.1")
    done = run("benchmarks.bench_decode", *options, "--contenders", "epops", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    made = json.loads((tmp_path / "decode_qwen3_moe_tiny_1.json").read_text())
    assert made["rows"] == [{"contender": "epops", "how": "eager", "failed": "no answer in 0 s"}]
