"""Draws by inverting the distribution: an even grid of uniform numbers gives every token its share."""

from __future__ import annotations

import pytest
import torch

from epops.serving.sampling import sample

GRID = 20000


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [1.0, 0.7, 0.05])
def test_tokens_come_as_often_as_their_probability_says(temperature: float, top_p: float) -> None:
    logits = torch.tensor([0.3, -1.0, 2.0, 1.5, 0.3, -4.0])
    probabilities = (logits.double() / temperature).softmax(0)
    order = probabilities.argsort(descending=True, stable=True)
    before = probabilities[order].cumsum(0) - probabilities[order]
    expected = torch.zeros_like(probabilities)
    kept = order[before < top_p]
    expected[kept] = probabilities[kept] / probabilities[kept].sum()
    uniform = (torch.arange(GRID) + 0.5) / GRID
    row = torch.ones(GRID)
    drawn = sample(logits.expand(GRID, -1), row * temperature, row * top_p, uniform)
    found = torch.bincount(drawn, minlength=len(logits)) / GRID
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-4)


def test_the_ends_of_the_interval_stay_among_the_tokens_kept() -> None:
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(0)) * 5
    largest = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0)).expand(64)
    for top_p in (1e-6, 0.5, 1.0):
        drawn = sample(logits, torch.ones(64), torch.full((64,), top_p), largest)
        assert ((drawn >= 0) & (drawn < 50)).all()
        if top_p < 1e-3:
            assert torch.equal(drawn, logits.argmax(-1))
    assert torch.equal(sample(logits, torch.zeros(64), torch.ones(64), largest), logits.argmax(-1))
