"""What the passes make of transformers' models: the counts that each family must show, in every MoE layer."""

from __future__ import annotations

import pytest
import torch

import epops
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
