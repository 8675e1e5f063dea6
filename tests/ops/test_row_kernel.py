"""The Triton kernels of row programs, run by Triton's interpreter on CPU tensors, compared with what the programs mean.

The interpreter cuts float32 to bfloat16 where a GPU rounds, so bfloat16 is left to tests/gpu/test_row_kernel.py.
"""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch

from epops.ops.row_expressions import EXPRESSIONS, LOGICAL
from epops.ops.row_kernel import kernel, launch, source
from epops.passes.skip_padding import skip_padding_everywhere
from epops.reference.map_rows import FUNCTIONS
from epops.row_program import BINARY, EXPONENTS, NAMES, POINTWISE, UNARY, parse
from tests.passes import random_rows

interpreted = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or torch.cuda.is_available(),
    reason="triton is not installed, or there is a GPU and tests/gpu/test_row_kernel.py",
)
ENDS = torch.tensor([3, 3, 17], dtype=torch.int32)
CAPACITY = 37
TOLERANCE = {torch.float64: 1e-13, torch.float32: 4e-6, torch.float16: 2e-3}
TRUTHS = ("eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_xor", "logical_not", "isnan")


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    yield
    kernel.cache_clear()


def agree(inputs, program):
    """Both say the same of valid rows; the kernel writes no others."""
    expected = torch.ops.epops.map_rows(inputs, ENDS, program=program)
    for got, want in zip(launch(inputs, ENDS, program), expected):
        assert got.dtype == want.dtype and got.shape == want.shape
        got, want = got[:17], want[:17]
        if not want.is_floating_point():
            assert torch.equal(got, want)
            continue
        tolerance = TOLERANCE[want.dtype]
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, equal_nan=True)


def test_each_op_of_the_language_has_its_meanings():
    special = {"cast", "where", "pow"}
    assert set(EXPRESSIONS) | set(LOGICAL) | special == set(POINTWISE)
    assert set(POINTWISE) - {"cast"} <= set(FUNCTIONS)


@interpreted
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: NAMES[dtype])
def test_ops_of_one_value(dtype):
    make = torch.Generator().manual_seed(0)
    for op in UNARY:
        x = torch.randn(CAPACITY, 5, generator=make).to(dtype)
        x = x.abs() if op in ("log", "log2", "sqrt", "rsqrt", "log1p") else x
        x[:4, 0] = torch.tensor([math.nan, 0.0, 1e-4, 30.0]).to(dtype)
        if op != "bitwise_not":
            result = "b8" if op in TRUTHS else NAMES[dtype]
            agree([x], f"x0: {NAMES[dtype]}[*, 5] = rows()\nv0: {result}[*, 5] = {op}(x0)\nreturn v0")
    for exponent in EXPONENTS:
        x = torch.rand(CAPACITY, 5, generator=make).to(dtype) + 0.1
        agree([x], f"x0: {NAMES[dtype]}[*, 5] = rows()\nv0: {NAMES[dtype]}[*, 5] = pow(x0, {exponent})\nreturn v0")


@interpreted
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: NAMES[dtype])
def test_ops_of_two_values(dtype):
    make = torch.Generator().manual_seed(1)
    name = NAMES[dtype]
    for op in BINARY:
        a, b = (torch.randn(CAPACITY, 5, generator=make).to(dtype) for _ in range(2))
        a[0, 0] = b[1, 1] = math.nan
        a[2, 2] = b[2, 2]
        result = "b8" if op in TRUTHS else name
        head = f"x0: {name}[*, 5] = rows()\nx1: {name}[*, 5] = rows()\n"
        if not op.startswith(("pow", "bitwise")):
            agree([a, b], f"{head}v0: {result}[*, 5] = {op}(x0, x1)\nreturn v0")


@interpreted
def test_whole_numbers_and_truth_values():
    make = torch.Generator().manual_seed(2)
    x, y = (torch.randint(-5, 6, (CAPACITY, 4), generator=make, dtype=torch.int32) for _ in range(2))
    agree(
        [x, y],
        """x0: i32[*, 4] = rows()
x1: i32[*, 4] = rows()
v0: i32[*, 4] = bitwise_xor(x0, x1)
v1: i32[*, 4] = add(v0, x1, -3)
v2: b8[*, 4] = ge(v1, 2)
v3: b8[*, 4] = bitwise_not(v2)
v4: b8[*, 4] = logical_or(v3, x0)
v5: f32[*, 4] = div(x0, 3)
v6: f32[*, 4] = where(v4, v5, -inf)
v7: f64[*, 4] = cast(v6)
return v1, v2, v3, v4, v6, v7""",
    )


@interpreted
def test_places_within_a_row():
    make = torch.Generator().manual_seed(3)
    x = torch.randn(10, CAPACITY, generator=make).t()  # strides that are not those of a fresh tensor
    y = torch.randn(CAPACITY, 5, generator=make)
    agree(
        [x, y],
        """x0: f32[*, 10] = rows()
x1: f32[*, 5] = rows()
v0: f32[*, 5, 2] = reshape(x0)
v1: f32[*, 2, 5] = permute(v0, [0, 2, 1])
v2: f32[*, 1, 5] = reshape(x1)
v3: f32[*, 2, 5] = expand(v2)
v4: f32[*, 2, 5] = add(v1, v3, -2)
v5: f32[*, 5] = select(v4, 1, 1)
v6: f32[*, 3, 5] = cat([v4, v2], 1)
v7: f32[*, 15] = reshape(v6)
v8: f32[*, 4, 5] = pad(v6, [0, 0, 1, 0], -inf)
v9: f32[*, 10] = scatter(x0, x1, 1, 1, 2)
v10: f32[*, 13] = pad(v9, [4, -1], 7.5)
return v5, v7, v6, v8, v10""",
    )


@interpreted
def test_a_row_number_outside_the_table_reads_nothing():
    index = torch.full((CAPACITY,), -1, dtype=torch.int32)
    index[:4] = torch.tensor([2, -3, 3, 10**9])
    program = "x0: f32[3, 2] = whole()\nx1: i32[*] = rows()\nv0: f32[*, 2] = index(x0, x1)\nreturn v0"
    (got,) = launch([torch.arange(6.0).view(3, 2) + 1, index], ENDS, program)
    assert got[:4].tolist() == [[5, 6], [1, 2], [0, 0], [0, 0]]


@interpreted
@pytest.mark.parametrize("ends", [0, 1, 36, 37, 1000])
def test_rows_after_the_last_end_are_not_touched(ends, monkeypatch):
    """Nor is memory after the capacity, whatever the ends say."""
    out = torch.full((CAPACITY + 3, 70), 5.0)
    fresh = torch.Tensor.new_empty

    def ours(x, *shape, **settings):
        return out[:CAPACITY] if shape == ((CAPACITY, 70),) else fresh(x, *shape, **settings)

    monkeypatch.setattr(torch.Tensor, "new_empty", ours)
    x = torch.randn(CAPACITY, 70)
    program = "x0: f32[*, 70] = rows()\nv0: f32[*, 70] = mul(x0, 2.0)\nreturn v0"
    launch([x], torch.tensor([0, ends], dtype=torch.int32), program)
    valid = min(ends, CAPACITY)
    assert torch.equal(out[:valid], x[:valid] * 2) and bool((out[valid:] == 5.0).all())


@interpreted
@pytest.mark.parametrize("seed", range(24))
def test_random_programs(seed):
    given = random_rows.inputs(seed, (torch.float32, torch.float16)[seed % 2])
    module = random_rows.graph_of(seed, given)
    skip_padding_everywhere(module.graph)
    (made,) = (node for node in module.graph.nodes if node.target is torch.ops.epops.map_rows.default)
    program = made.kwargs["program"]
    make = torch.Generator().manual_seed(seed)
    inputs = []
    for line in parse(program).inputs:
        shape = (CAPACITY, *line.columns) if line.by_row else line.columns
        drawn = torch.randn(shape, generator=make)
        inputs.append(drawn.to(line.dtype) if line.dtype.is_floating_point else given[2])
    expected = torch.ops.epops.map_rows(inputs, ENDS, program=program)
    for got, want in zip(launch(inputs, ENDS, program), expected):
        near = torch.isclose(got[:17].double(), want[:17].double(), rtol=2e-2, atol=2e-2, equal_nan=True)
        # A last bit may lie on the other side of floor or of a comparison.
        assert near.float().mean() > 0.97, program


def test_the_source_is_the_same_on_every_run():
    program = "x0: bf16[*, 4] = rows()\nv0: bf16[*, 2] = slice(x0, 1, 1, 2)\nv1: bf16[*, 2] = neg(v0)\nreturn v1"
    text = source(parse(program))
    assert text == source(parse(program))
    assert "x0 + r * x0_0 + ((j * 2) + 1) * x0_1" in text, "a slice is arithmetic, not memory"
    assert "valid = tl.minimum(tl.load(ends + (slots - 1)), capacity)" in text, "read on the device"


def test_without_triton_the_error_says_what_to_do(monkeypatch):
    import sys

    kernel.cache_clear()
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ImportError, match="needs triton"):
        kernel("x0: f32[*] = rows()\nv0: f32[*] = neg(x0)\nreturn v0")
