"""The tiny models that everything else is checked with: all families, no weight at zero, the same on every rank."""

from __future__ import annotations

import pytest
import torch

from epops import zoo


def test_families_are_found_by_reading_transformers() -> None:
    every, interface, own = zoo.families(), zoo.families(True), zoo.families(False)
    assert sorted(interface + own) == every
    assert set(zoo.MAIN) <= set(interface)
    assert {"dbrx", "jetmoe", "llama4", "switch_transformers"} <= set(own)
    assert "vitpose_backbone" not in every, "it picks experts by data set: nothing is routed"
    with pytest.raises(ValueError, match="'llama' is not a MoE family"):
        zoo.tiny("llama")


@pytest.mark.parametrize("family", zoo.families())
def test_a_tiny_model_has_two_layers_of_experts_that_count(family: str) -> None:
    model = zoo.tiny(family)
    batch = zoo.inputs(family, model, batch=2, seqlen=9)
    answer = model(**batch)
    zoo.loss_of(answer).backward()
    assert zoo.output_of(answer).isfinite().all()
    stacked = [m for m in model.modules() if hasattr(type(m), "_apply_gate")]
    if stacked:
        used = [m for m in stacked if m.down_proj.grad is not None and m.down_proj.grad.abs().sum() > 0]
        assert len(used) >= 2, "fewer than two layers of routed experts reach the output"
    for name, parameter in model.named_parameters():
        assert parameter.abs().max() > 0, f"{name} is zero: a forgotten term would not show"
    assert sum(p.numel() for p in model.parameters()) < 400_000


def test_the_seed_decides_the_weights() -> None:
    first, again, other = zoo.tiny("gpt_oss"), zoo.tiny("gpt_oss"), zoo.tiny("gpt_oss", seed=1)
    for (name, a), b, c in zip(first.named_parameters(), again.parameters(), other.parameters()):
        assert torch.equal(a, b), name
        assert not torch.equal(a, c), name


def test_float32_stays_where_a_family_keeps_it() -> None:
    model = zoo.tiny("deepseek_v3", dtype=torch.bfloat16)
    assert model.model.layers[0].mlp.experts.down_proj.dtype == torch.bfloat16
    assert model.model.layers[0].mlp.gate.e_score_correction_bias.dtype == torch.float32


@pytest.mark.parametrize("family", zoo.MAIN)
def test_small_models_speak_bytes(family: str) -> None:
    model = zoo.tiny(family, config="small", num_hidden_layers=2)
    assert model.config.vocab_size == 259
    ids = torch.randint(0, 256, (2, 17))
    loss = model(input_ids=ids, labels=ids).loss
    assert abs(loss.item() - 5.55) < 0.3, "an untrained model should be about as good as a guess, ln 259"


def test_only_five_families_have_a_small_model() -> None:
    with pytest.raises(ValueError, match="every family has 'tiny'"):
        zoo.tiny("dbrx", config="small")


def test_each_gradient_is_compared_with_the_largest_of_its_own() -> None:
    """A wrong gradient does not hide behind another tensor's, however small it is."""
    from epops.demo.compare import _gradients
    from epops.zoo.check import _differences

    expected = {"large": torch.ones(3, dtype=torch.float64), "tiny": torch.full((3,), 1e-6, dtype=torch.float64)}
    got = {"large": expected["large"], "tiny": 1.01 * expected["tiny"]}
    assert _differences(got, expected) == {"large": 0.0, "tiny": pytest.approx(1e-2)}
    assert _gradients(got, expected) == pytest.approx(1e-2)
