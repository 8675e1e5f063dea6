"""Experts in fp8: what a quantized model means, which exchanges and products it has, and what it refuses."""

from __future__ import annotations

import copy
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import epops
from epops import zoo
from epops.reference.quantize import dequantize_rows
from epops.testing import captured, count_ops

from ..ranks import run_ranks
from .compare import close
from .plain_models import EnumerateLoop

FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss")
WIDTHS = {"qwen3_moe": {"moe_intermediate_size": 32}}


def tiny(family: str, **overrides: Any) -> Any:
    return zoo.tiny(family, **{**WIDTHS.get(family, {}), **overrides})


def rounded(x: Tensor) -> Tensor:
    """The numbers that fp8 rows with a scale a row stand for."""
    return dequantize_rows(*epops.quantize(x, block=0))


def meaning(self: Any, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Tensor:
    """A quantized experts module in one process, token by token."""
    matrices = {}
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(self, name).detach()
        matrices[name] = rounded(weight.transpose(1, 2) if self.is_transposed else weight)

    def project(name: str, row: Tensor, expert: int) -> Tensor:
        out = (matrices[name][expert] @ rounded(row[None])[0]).bfloat16()
        return out + getattr(self, f"{name}_bias")[expert].bfloat16() if self.has_bias else out

    out = torch.zeros(x.shape)
    for token in range(x.shape[0]):
        for expert, weight in zip(topk_idx[token].tolist(), topk_weights[token]):
            h = self._apply_gate(project("gate_up_proj", x[token], expert)[None])[0]
            out[token] += weight * project("down_proj", h, expert).float()
    return out


def like_its_meaning(rank: int, size: int, family: str) -> None:
    whole = tiny(family)
    batch = zoo.inputs(family, whole, batch=1 + rank % 2, seqlen=3 + 2 * rank, seed=rank)
    with epops.ExpertGroup(None, max_tokens=64) as group, torch.no_grad():
        model = epops.parallelize(copy.deepcopy(whole), group)
        plain = whole(**batch).logits
        assert epops.quantize_experts(model) == whole.config.num_hidden_layers
        for module in whole.modules():
            if hasattr(module, "has_gate") and hasattr(module, "down_proj"):
                module.forward = types.MethodType(meaning, module)
        got, expected = model(**batch).logits, whole(**batch).logits
    close(got, expected, "logits", 1e-2)
    off = (got - plain).norm() / plain.norm()
    assert 1e-4 < off < 0.1, off


@pytest.mark.parametrize("family", FAMILIES)
def test_a_quantized_model_is_what_it_says(family: str) -> None:
    run_ranks(like_its_meaning, 2, family)


def test_experts_that_ranks_do_not_divide() -> None:
    run_ranks(like_its_meaning, 4, "mixtral")


def test_rows_cross_the_wire_in_fp8_and_products_are_scaled() -> None:
    whole = tiny("mixtral")
    layers = whole.config.num_hidden_layers
    batch = zoo.inputs("mixtral", whole, batch=1, seqlen=5)
    with epops.ExpertGroup(None, max_tokens=8) as group, torch.no_grad():
        model = epops.parallelize(whole, group)
        before = sum(p.numel() * p.element_size() for p in epops.expert_parameters(model))
        epops.quantize_experts(model)
        (graph,) = captured(model, **batch)
        after = epops.expert_parameters(model)
        eager = model(**batch).logits
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(**batch).logits
    assert count_ops(graph, "epops.dispatch_quant") == layers and not count_ops(graph, "epops.dispatch.")
    assert count_ops(graph, "epops.scaled_grouped_mm") == 2 * layers and not count_ops(graph, "epops.grouped_mm")
    assert sum(p.numel() * p.element_size() for p in after) * 4 == before
    assert all(p.dtype == torch.float8_e4m3fn and not p.requires_grad for p in after)
    torch.testing.assert_close(compiled, eager)


def parallel(model: nn.Module, group: Any) -> nn.Module:
    return epops.parallelize(model, group)


def test_what_it_refuses_and_leaves_as_it_was() -> None:
    with pytest.raises(ValueError, match="expected a parallelized model, got Linear"):
        epops.quantize_experts(nn.Linear(3, 4))
    with epops.ExpertGroup(None, max_tokens=8) as group:
        odd = parallel(tiny("mixtral", intermediate_size=40), group)
        with pytest.raises(ValueError, match=r"multiples of 16, got torch.float32 \(\d+, \d+, \d+\).*leave this model"):
            epops.quantize_experts(odd)
        assert all(p.dtype == torch.float32 for p in odd.parameters())
        unloaded = tiny("mixtral").to("meta")
        with pytest.raises(ValueError, match="expected weights, got .* on meta"):
            epops.quantize_experts(parallel(unloaded, group))
        loop = parallel(EnumerateLoop(), group)
        with pytest.raises(ValueError, match="on transformers' experts interface, got"):
            epops.quantize_experts(loop)
        own = parallel(tiny("mixtral"), group)
        own.model.layers[0].mlp.experts.forward = lambda *_: None
        with pytest.raises(ValueError, match=r"interface, got MixtralExperts in 'model.layers.0.mlp.experts'"):
            epops.quantize_experts(own)
        model = parallel(tiny("mixtral"), group)
        state = model.state_dict()
        epops.quantize_experts(model)
        with pytest.raises(ValueError, match="not quantized yet"):
            epops.quantize_experts(model)
        with pytest.raises(ValueError, match="epops state_dict: .*mlp.experts: .*save the model before"):
            model.state_dict()
        with pytest.raises(ValueError, match="epops load_state_dict: .*load the weights before"):
            model.load_state_dict(state)
        batch = zoo.inputs("mixtral", model, batch=1, seqlen=3)
        with pytest.raises(ValueError, match="expected inference, got tokens that require a gradient"):
            model(**batch)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        assert model(**batch).logits.isfinite().all()


def test_a_copy_is_quantized_too() -> None:
    with epops.ExpertGroup(None, max_tokens=8) as group, torch.no_grad():
        model = parallel(tiny("mixtral"), group)
        epops.quantize_experts(model)
        batch = zoo.inputs("mixtral", model, batch=1, seqlen=3)
        assert torch.equal(copy.deepcopy(model)(**batch).logits, model(**batch).logits)
