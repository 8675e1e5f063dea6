"""``epops generate`` as a person starts it, small."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from epops import zoo
from epops.cli import app
from epops.serving.measure import Report
from epops.serving.order import Order, Words
from epops.serving.screen import figures

from ..demo.test_cli import TORCHRUN
from ..demo.test_demo import row, run
from .asked import answer

QUICK = ("--device", "cpu", "--eager", "--max-new-tokens", "6")


def texts(said: str) -> dict[int, str]:
    """Request of the whole command → its text: request n of rank r of two is number 2 n + r."""
    found = re.findall(r"^rank (\d), request (\d+): (.*?)\s*$", said, re.M)
    return {2 * int(number) + int(rank): text for rank, number, text in found}


def expected(order: Order) -> dict[int, str]:
    """What the plain model writes."""
    whole = zoo.tiny(order.model, order.seed, config="small")
    words = Words(None, whole.config.vocab_size)
    made = {}
    for number, ids in enumerate(order.ids(words)):
        text = words.text(answer(whole, ids, order.max_new_tokens, None))
        made[number] = "".join(letter if letter.isprintable() else "·" for letter in text.replace("\n", " ")).rstrip()
    return made


def test_every_request_is_answered_and_the_table_adds_up() -> None:
    done = run("epops.cli", "generate", "--model", "qwen3_moe", "--ranks", "2", "--requests", "5", *QUICK)
    assert done.returncode == 0, done.stdout + done.stderr
    assert texts(done.stdout) == expected(Order("qwen3_moe", requests=5, max_new_tokens=6))
    assert row(done.stdout, "requests") == ["3", "2", "5"] and row(done.stdout, "tokens") == ["18", "12", "30"]
    assert row(done.stdout, "graphs") == ["0", "0"] and row(done.stdout, "decode steps of 4") == ["5", "5"]
    assert all(cell.endswith("ms") for cell in row(done.stdout, "between tokens, p99"))


def test_under_torchrun_every_rank_prints_its_own() -> None:
    arguments = ("-m", "epops.cli", "generate", "--model", "mixtral", "--prompt", "Hi", "--prompt", "There was", *QUICK)
    done = run(*TORCHRUN, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    said = texts(done.stdout)
    assert said == expected(Order("mixtral", prompts=("Hi", "There was"), max_new_tokens=6))
    assert len(re.findall("generated", done.stdout)) == 1, "one table"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "no_such_model"], "expected a checkpoint folder or a model family, got 'no_such_model'"),
        (["--requests", "0"], "--requests: expected at least 1, got 0"),
        (["--ranks", "0"], "epops generate: --ranks: expected at least 1, got 0"),
        (["--buckets", "4,2"], "--buckets: expected rising sizes such as 1,2,4, got '4,2'"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_rank_starts(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["generate", "--device", "cpu", *arguments])
    assert result.exit_code == 2 and said in " ".join(result.output.split()), result.output


def test_a_folder_with_a_tokenizer(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", "a", "mixture", "of", "experts"])}
    model = tokenizers.models.WordLevel(words | {f"w{n}": n for n in range(7, 128)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    fast.save_pretrained(tmp_path)
    whole = zoo.tiny("mixtral")
    whole.save_pretrained(tmp_path)
    done = run("epops.cli", "generate", "--model", str(tmp_path), "--prompt", "a mixture of experts", *QUICK)
    assert done.returncode == 0, done.stdout + done.stderr
    ids = answer(whole, [3, 4, 5, 6], 6, whole.generation_config.eos_token_id)
    assert texts(done.stdout) == {0: fast.decode(ids, skip_special_tokens=True)}
    assert row(done.stdout, "requests") == ["1", "0", "1"]


def test_figures_of_one_rank_have_no_column_for_all() -> None:
    from rich.console import Console

    console = Console(width=100, file=io.StringIO())
    console.print(figures([Report(2, 20, 4.0, 0.5, 0.002, 0.01, 3, 60.0, {1: 5, 4: 7}, 2)]))
    said = console.file.getvalue()
    assert row(said, "tokens/s") == ["5.0"] and row(said, "between tokens, p50") == ["2.00 ms"]
    assert row(said, "decode steps of 4") == ["7"] and "all" not in said
