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
    assert list(found) == ["one device", "all_to_all", "all_reduce", "epops"]
    for name, row in found.items():
        assert "failed" not in row, row
        assert (row["sequences"], row["tokens_differ"], row["graph_breaks"]) == (6, 0, 0), name
        assert row["milliseconds"] > 0
        assert f"| {name} | eager |" in done.stdout
    assert (tmp_path / "decode_qwen3_moe_tiny_2.md").read_text().strip() in done.stdout
