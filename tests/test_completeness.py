"""The schema table is the list of ops: each is registered as written there, with a fake, a CPU meaning, docs and a test."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import epops
from epops.schema import EXCHANGES, SCHEMAS

ROOT = Path(__file__).resolve().parent.parent
OPS = sorted(SCHEMAS)


def has_kernel(op: str, keys: list[str]) -> bool:
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(f"epops::{op}", key) for key in keys)


def mentions(text: str, op: str) -> bool:
    """
    >>> mentions("calls epops.dispatch_start(x)", "dispatch"), mentions("`dispatch`: rows", "dispatch")
    (False, True)
    """
    return re.search(rf"(?<![A-Za-z0-9_]){op}(?![A-Za-z0-9_])", text) is not None


def test_the_table_and_the_registered_ops_are_the_same() -> None:
    assert epops.__version__
    registered = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("epops::")
    }
    assert registered == set(SCHEMAS), "an op is in epops/schema.py and registered, or neither"


@pytest.mark.parametrize("op", OPS)
def test_an_op_is_registered_as_the_table_writes_it(op: str) -> None:
    registered = getattr(torch.ops.epops, op).default._schema
    assert str(registered) == str(torch._C.parse_schema("epops::" + SCHEMAS[op]))


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_a_fake(op: str) -> None:
    from torch._library.simple_registry import singleton

    entry = singleton.find(f"epops::{op}")
    assert has_kernel(op, ["Meta", "CompositeExplicitAutograd"]) or entry.fake_impl.kernel is not None, (
        f"epops::{op} has no fake: say its sizes in epops/meta"
    )


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_a_meaning_on_cpu(op: str) -> None:
    assert has_kernel(op, ["CPU", "CompositeExplicitAutograd"]), (
        f"epops::{op} does not run on CPU: say what it means in epops/reference"
    )


def table_of_docs(first_column: str) -> set[str]:
    """Names in the first column of the table of docs/architecture.md whose head starts with ``first_column``."""
    text = (ROOT / "docs/architecture.md").read_text()
    rows = text.split(f"| {first_column} |")[1].split("\n\n")[0].splitlines()[2:]
    return {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}


def test_the_docs_list_exactly_the_ops_of_the_table() -> None:
    assert table_of_docs("op") == set(SCHEMAS), "docs/architecture.md, Ops: a row says what an op is for"


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_a_test(op: str) -> None:
    others = [path for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__)]
    assert any(mentions(path.read_text(), op) for path in others), f"no test names {op}"


def test_exchanges_are_the_ops_that_take_a_group() -> None:
    assert set(EXCHANGES) == {op for op, schema in SCHEMAS.items() if "str group" in schema}


@pytest.mark.parametrize("op", [op for op in OPS if op.endswith("_start")])
def test_a_start_has_its_wait_which_takes_what_the_start_took(op: str) -> None:
    """combine's addend is the exception: only the wait, which adds it, reads it."""
    wait = op.removesuffix("_start") + "_wait"
    assert wait in SCHEMAS, f"{op} is started and never waited for"
    started, waited = (torch._C.parse_schema("epops::" + SCHEMAS[name]).arguments for name in (op, wait))
    names = [argument.name for argument in waited]
    assert names[0] == "ticket"
    assert [name for name in names[1:] if not name.startswith("addend")] == [argument.name for argument in started]


@pytest.mark.parametrize("op", OPS)
def test_a_schema_has_no_pointers_and_no_mutation(op: str) -> None:
    schema = torch._C.parse_schema("epops::" + SCHEMAS[op])
    assert not schema.is_mutable, "ops are functional: inputs are read, outputs are fresh"
    assert all(argument.alias_info is None for argument in [*schema.arguments, *schema.returns])
    allowed = {"Tensor", "Optional[Tensor]", "List[Tensor]", "int", "SymInt", "float", "str", "bool"}
    assert {str(argument.type) for argument in schema.arguments} <= allowed


def test_every_pass_says_what_it_rewrites() -> None:
    from epops.passes import ON_REQUEST, PASSES

    passes = (*PASSES, *ON_REQUEST)
    assert table_of_docs("pass") == {fn.__name__ for fn in passes}, "docs/architecture.md, Backend and passes"
    for fn in passes:
        words = fn.__doc__ or ""
        for heading in ("Rewrite", "Requires", "Guarantees"):
            assert heading in words, f"the docstring of {fn.__name__} has no {heading}"
