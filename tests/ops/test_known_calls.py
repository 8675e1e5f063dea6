"""Checks run once for a call: what was refused is refused again, and another dtype, shape or setting is looked at anew."""

from __future__ import annotations

import pytest
import torch

import epops
from epops.ops import known_calls
from tests import inputs


def test_a_sound_call_is_remembered_and_a_bad_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_calls, "MOST", 3)
    with epops.ExpertGroup(None, "ep", max_tokens=8, num_experts=4) as group:
        for tokens in (3, 4, 3, 5, 6, 3):
            x, (idx, w) = inputs.rows(tokens, 16, 0), inputs.routing("random", tokens, 2, 4, 0)
            sent = epops.dispatch(x, idx, w, group=group)
            for _ in range(2):
                with pytest.raises(ValueError, match="topk_weights"):
                    epops.dispatch(x, idx, w.double(), group=group)
                with pytest.raises(ValueError, match="row_weights"):
                    epops.combine(sent.rows, sent.route, w, group=group, num_tokens=tokens, top_k=2)
                with pytest.raises(ValueError, match="route"):
                    epops.combine(sent.rows, sent.route, group=group, num_tokens=tokens + 1, top_k=2)
            back = epops.combine(sent.rows, sent.route, sent.row_weights, group=group, num_tokens=tokens, top_k=2)
            torch.testing.assert_close(back.out, x * w.sum(1, keepdim=True))
            assert 1 <= len(group.known_calls) <= 3
