"""What the passes make of transformers' models: the counts that each family must show, in every MoE layer."""

from __future__ import annotations

import pytest
import torch

import epops
from epops.inspection.wire import overlaps
from epops.testing import assert_fused, captured, count_ops

pytest.importorskip("transformers")
from epops import zoo
from epops.zoo.build import tiny

# Family → MoE layers of the tiny model, combines with something folded in, exchanges overlapped (forward, no gradients).
# DeepSeek-V3's shared expert becomes the addend and runs beside the dispatch; the others have no shared expert, and
# their residual becomes the addend.
EXPECTED = {
    "mixtral": (2, 2, 0),
    "qwen3_moe": (2, 2, 0),
    "olmoe": (2, 2, 0),
    "gpt_oss": (2, 2, 0),
    "deepseek_v3": (2, 2, 2),
}


def test_every_layer_of_a_training_step_is_fused():
    """Folded once, in the joint graph; the forward graph overlaps the dispatch with the shared expert, the backward its own."""
    torch.manual_seed(0)
    with epops.ExpertGroup(None, name="families", max_tokens=32) as group:
        model = epops.parallelize(tiny("deepseek_v3"), group).train()
        model.config.use_cache = False
        joint, forward, backward = captured(model, **zoo.inputs("deepseek_v3", model, batch=1, seqlen=5, seed=0))
    assert (joint.kind, joint.rewrites["fuse_add"], forward.rewrites["fuse_add"]) == ("joint", 2, 0)
    assert count_ops([joint, forward, backward], "epops.combine") == 2
    assert forward.rewrites["overlap"] >= 2 and backward.rewrites["overlap"] >= 2
    for flight in overlaps(forward.after.graph):
        assert flight.beside, "a dispatch runs beside the products of the shared expert"


@pytest.mark.parametrize("family", EXPECTED)
def test_every_layer_is_fused(family):
    layers, added, overlapped = EXPECTED[family]
    torch.manual_seed(0)
    with epops.ExpertGroup(None, name="families", max_tokens=32) as group:
        model = epops.parallelize(tiny(family), group)
        model.config.use_cache = False
        with torch.no_grad():
            graphs = captured(model, **zoo.inputs(family, model, batch=1, seqlen=5, seed=0))
    assert len(graphs) == 1
    assert count_ops(graphs, "epops.combine") + count_ops(graphs, "epops.combine_start") == layers
    assert_fused(graphs, fuse_add=added, overlap=overlapped, fuse_quant=0, fuse_transpose=0)
