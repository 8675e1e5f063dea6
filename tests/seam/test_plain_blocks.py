"""Routed experts of plain PyTorch models: understood and proved, or refused with what was found."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

import epops
from epops.models import Adapter, NotUnderstoodError
from epops.models.site import site_of, sites

from ..ranks import run_ranks
from . import plain_models as plain
from .compare import close

LOOPS = [plain.OneHotLoop, plain.EnumerateLoop, plain.MethodLoop, plain.StackedInterleaved]
UNDERSTOOD = [*LOOPS, plain.Direct, plain.Titan, plain.TitanAfter]


def _model(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return plain.Model(kind)


def _loss(y: torch.Tensor) -> torch.Tensor:
    return (y * torch.linspace(-1, 1, y.shape[-1])).square().mean()


def _check(rank: int, size: int, kind: type[nn.Module], backend: str | None) -> None:
    whole = _model(kind)
    inputs = [torch.randn(1 + r, 5, plain.H, generator=torch.Generator().manual_seed(r)) for r in range(size)]
    (sum(_loss(whole(x)) for x in inputs) / size).backward()
    with epops.ExpertGroup(None, max_tokens=5 * size) as group:
        model = epops.parallelize(_model(kind), group)
        called = torch.compile(model, fullgraph=True, backend=backend) if backend else model
        y = called(inputs[rank])
        close(y, whole(inputs[rank]), "output", 1e-5)
        _loss(y).backward()
        expected = {name: p.grad for name, p in whole.named_parameters()}
        for path, module in sites(model).items():
            site = site_of(module)
            for name, shard in site.shards.items():
                names = [f"{path}.{n}" for n in site.names.get(name, ())]
                full = torch.stack([expected.pop(n) for n in names]) if names else expected.pop(f"{path}.{name}")
                lo, hi = rank * site.num_slots, min((rank + 1) * site.num_slots, shard.rows)
                close(
                    module.get_parameter(name).grad[: hi - lo], full[lo:hi], name, 1e-5, 1e-3 * float(full.abs().max())
                )
        for name, grad in expected.items():
            ours = model.get_parameter(name).grad
            dist.all_reduce(ours)
            close(ours / size, grad, name, 1e-5)


@pytest.mark.parametrize("kind", UNDERSTOOD)
def test_output_and_gradients(kind: type[nn.Module]) -> None:
    run_ranks(_check, 2, kind, None)


def test_loops_that_break_the_one_process_graph_capture_in_one() -> None:
    for kind in [*LOOPS, plain.Titan]:
        run_ranks(_check, 2, kind, "aot_eager", timeout=500.0)


def _alone(model: nn.Module) -> None:
    with epops.ExpertGroup(None, max_tokens=8) as group:
        epops.parallelize(model, group)


@pytest.mark.parametrize("kind", UNDERSTOOD)
def test_a_meta_model_is_understood_without_its_weights(kind: type[nn.Module]) -> None:
    with torch.device("meta"):
        model = _model(kind)
    _alone(model)
    assert len(sites(model)) == 2 and all(p.is_meta for p in model.parameters())


def test_refused_blocks_say_what_was_found() -> None:
    with pytest.raises(NotUnderstoodError, match=r"blocks\.0: Capacity\.forward .* differs"):
        _alone(_model(plain.Capacity))
    with pytest.raises(NotUnderstoodError, match=r"blocks\.0: .*LayerNorm with 2 parameters"):
        _alone(_model(plain.Stateful))
    with pytest.raises(
        NotUnderstoodError, match=r"blocks\.0: .*parameters of their own, got MLP modules that share some"
    ):
        _alone(_model(plain.Shared))
    with pytest.raises(NotUnderstoodError, match=r"no routed experts in Sequential"):
        _alone(nn.Sequential(nn.Linear(2, 2)))


class _Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([expert(x) for expert in self.experts]).mean(0)


def test_experts_that_no_adapter_knows_are_named() -> None:
    with pytest.raises(NotUnderstoodError, match=r"experts: ModuleList of 3 Linear.*register_adapter"):
        _alone(_Unknown())


def test_sharding_twice_and_wrong_arguments() -> None:
    model = _model(plain.OneHotLoop)
    with epops.ExpertGroup(None, max_tokens=8) as group:
        with pytest.raises(ValueError, match="grad_reduce"):
            epops.parallelize(model, group, grad_reduce="max")
        with pytest.raises(ValueError, match="exact: expected True, False or None, got 'yes'"):
            epops.parallelize(model, group, exact="yes")
        epops.parallelize(model, group)
        with pytest.raises(ValueError, match=r"blocks\.0.* is sharded already"):
            epops.parallelize(model, group)
    with pytest.raises(ValueError, match="expected an epops"):
        epops.register_adapter(object())


class _Lora(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(plain.H, 2, bias=False)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x)


def test_peft_layers_on_experts_are_refused_by_name() -> None:
    model = _model(plain.OneHotLoop)
    for expert in model.blocks[0].experts:
        expert.w1 = _Lora(expert.w1)
    with pytest.raises(NotUnderstoodError, match=r"PEFT.*blocks\.0\.experts\.0\.w1"):
        _alone(model)


def test_a_registered_adapter_comes_first() -> None:
    from epops.models import adapter

    class Mine(Adapter):
        def matches(self, module: nn.Module) -> bool:
            return isinstance(module, _Unknown)

        def plan(self, module: nn.Module, name: str):  # type: ignore[no-untyped-def]
            raise NotUnderstoodError("mine was asked")

    mine = epops.register_adapter(Mine())
    try:
        with pytest.raises(NotUnderstoodError, match="mine was asked"):
            _alone(copy.deepcopy(_Unknown()))
    finally:
        adapter._registered.remove(mine)
