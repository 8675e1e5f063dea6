"""Random row computations: rewritten, each valid row has the bits of the graph run node by node."""

from __future__ import annotations

import copy

import pytest
import torch

from epops.passes.skip_padding import skip_padding_everywhere
from epops.row_program import parse
from tests.passes import random_rows
from tests.passes.blocks import close

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("seed", range(90))
def test_valid_rows_keep_their_bits(seed):
    given = random_rows.inputs(seed, DTYPES[seed % 3])
    module = random_rows.graph_of(seed, given)
    expected = module(*given)
    twin = copy.deepcopy(module)
    count = skip_padding_everywhere(module.graph)
    assert count == 1, f"not rewritten:\n{twin.graph}"
    module.graph.lint()
    module.recompile()
    valid = int(given[1][-1])
    close(module(*given)[:valid], expected[:valid], 0.0)
    assert skip_padding_everywhere(module.graph) == 0
    (made,) = (node for node in module.graph.nodes if node.target is torch.ops.epops.map_rows.default)
    text = made.kwargs["program"]
    assert str(parse(text)) == text
    outside = [node for node in module.graph.nodes if str(node.target).startswith(("aten", "prims"))]
    assert all(node.meta["val"].shape[0] != 37 for node in outside), f"part of it stayed outside:\n{module.graph}"
