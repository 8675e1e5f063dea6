"""Transformers' own expert parallelism with ep_implementation="epops": its weights, its plan, our exchanges."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import epops
from epops import zoo

from ..ranks import run_ranks
from .compare import batches, close, run

REGISTRIES = """
import {first}
import {second}
from transformers.distributed.expert_parallel import EPImplementationInterface
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
assert "epops" in EPImplementationInterface(), "no implementation"
assert "epops" in ALL_EXPERTS_FUNCTIONS, "no experts function"
"""


@pytest.mark.parametrize(
    "first,second", [("epops", "transformers"), ("transformers.distributed.expert_parallel", "epops")]
)
def test_importing_epops_registers_it_in_either_order(first: str, second: str) -> None:
    subprocess.run([sys.executable, "-c", REGISTRIES.format(first=first, second=second)], check=True)


def test_importing_epops_does_not_import_transformers() -> None:
    code = "import sys, epops; assert 'transformers' not in sys.modules; assert 'epops.models' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def _plan(model: torch.nn.Module) -> dict[str, str]:
    plan = {}
    for name, module in model.named_modules():
        if name.endswith("mlp.experts"):
            plan.update({f"{name}.{p}": "grouped_gemm" for p, _ in module.named_parameters(recurse=False)})
            plan[name] = "ep_dispatch_experts"
    return plan


def _check(rank: int, size: int, family: str, shared: bool, backend: str | None) -> None:
    from transformers.distributed.expert_parallel import apply_expert_parallelism

    whole = zoo.tiny(family)
    everyone = batches(family, whole, size)
    if shared:
        everyone = [everyone[1]] * size
    expected_out, _ = run(whole, everyone[rank])
    (sum(run(whole, batch)[1] for batch in (everyone[:1] if shared else everyone))).backward()
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("ep",))
    alone = init_device_mesh("cpu", (size, 1), mesh_dim_names=("dp", "tp"))["tp"]
    with epops.ExpertGroup(mesh, max_tokens=64):
        model = copy.deepcopy(whole)
        model.zero_grad()
        apply_expert_parallelism(model, mesh, mesh if shared else alone, _plan(model), "epops")
        called = torch.compile(model, fullgraph=True, backend=backend) if backend else model
        out, loss = run(called, everyone[rank])
        close(out, expected_out, "output", 1e-5)
        loss.backward()
        expected = dict(whole.named_parameters())
        for name, p in model.named_parameters():
            grad = p.grad
            if isinstance(grad, DTensor):
                grad = grad.full_tensor()
            elif not shared:
                dist.all_reduce(grad)
            close(grad, expected[name].grad, name, 1e-5, 1e-5)


@pytest.mark.parametrize("shared", [False, True], ids=["own batches", "one batch"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_output_and_gradients(family: str, shared: bool) -> None:
    run_ranks(_check, 2, family, shared, None)


@pytest.mark.parametrize("shared", [False, True], ids=["own batches", "one batch"])
def test_captures_in_one_graph(shared: bool) -> None:
    run_ranks(_check, 2, "mixtral", shared, "aot_eager", timeout=500.0)
