"""skip_padding around torch's own grouped GEMM, which is what stands in graphs for GPUs: on fake tensors, nothing runs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import epops  # noqa: F401
from epops.passes.decline_log import listen
from epops.passes.skip_padding import skip_padding, skip_padding_everywhere
from epops.testing import normalized_graph

pytestmark = pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="this torch has no _grouped_mm")


def gated(x, up, down, ends):
    return gated_with_other_ends(x, up, down, ends, ends)


def gated_with_other_ends(x, up, down, ends, other):
    a, b = torch._grouped_mm(x, up, offs=ends).chunk(2, 1)
    return torch._grouped_mm(F.silu(a) * b, down, offs=other)


def gradients(x, up, down, ends, grad):
    return torch.autograd.grad(gated(x, up, down, ends), (x, up, down), grad)


def traced(function, device, *more, grad=False):
    with FakeTensorMode():
        sizes = ((64, 32), (3, 32, 96), (3, 48, 32))
        given = [torch.empty(size, dtype=torch.bfloat16, device=device, requires_grad=grad) for size in sizes]
        given.append(torch.empty(3, dtype=torch.int32, device=device))
        given += [torch.empty(size, dtype=dtype, device=device) for size, dtype in more]
        module = make_fx(function, decomposition_table=select_decomp_table())(*given)
    module.graph.eliminate_dead_code()
    return module


def test_cuda_graphs_are_rewritten_unasked():
    module = traced(gated, "cuda")
    assert skip_padding(module.graph) == 1
    assert skip_padding(module.graph) == 0
    lines = [line.split("(")[0] for line in normalized_graph(module).splitlines() if "=" in line and line[0] == "%"]
    assert lines[4:] == [
        "%_grouped_mm: bf16[64, 96] = _grouped_mm",
        "%map_rows: 0 bf16[64, 48] = epops.map_rows",
        "%_grouped_mm.1: bf16[64, 32] = _grouped_mm",
    ]


def test_the_weights_gradient_reads_rows_by_their_transpose():
    module = traced(gradients, "cpu", ((64, 32), torch.bfloat16), grad=True)
    assert skip_padding_everywhere(module.graph) == 2
    assert skip_padding_everywhere(module.graph) == 0
    left = {str(node.target) for node in module.graph.nodes if str(node.target).startswith(("aten", "prims"))}
    assert left <= {"aten._grouped_mm.default", "aten.permute.default", "aten.transpose.int", "aten.t.default"}


def test_other_ends_are_other_rows():
    """The second product may read rows after the first one's last end."""
    module = traced(gated_with_other_ends, "cuda", ((3,), torch.int32))
    with listen() as declined:
        made = skip_padding(module.graph)
    programs = [node for node in module.graph.nodes if node.target is torch.ops.epops.map_rows.default]
    ends = [node for node in module.graph.nodes if node.op == "placeholder"][-1]
    assert made == 1 and programs[0].args[1] is ends, declined


def test_a_transpose_that_somebody_else_reads():
    def block(x, up, down, ends):
        h = torch._grouped_mm(x, up, offs=ends).relu()
        return torch._grouped_mm(h.t(), x, offs=ends), h.t() @ x

    module = traced(block, "cpu")
    assert skip_padding_everywhere(module.graph) == 0
