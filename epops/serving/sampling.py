"""Greedy choice, and sampling by temperature and top-p with one uniform number a row."""

from __future__ import annotations

import torch
from torch import Tensor


def sample(logits: Tensor, temperature: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    """A token a row, (B,) int64, of ``logits`` (B, V); the other arguments are (B,) float32.

    Rows with temperature 0 take the most likely token.  The others draw, by inverting the distribution at ``uniform`` in
    [0, 1), from the smallest set of tokens whose probabilities reach ``top_p``: the order of tokens is by falling
    probability, so a row's draw depends on nothing but its own logits and number.

    >>> logits = torch.tensor([[0.0, 2.0, 1.0]] * 3)
    >>> sample(logits, torch.tensor([0.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 0.6]), torch.tensor([0.9, 0.95, 0.95]))
    tensor([1, 0, 1])
    """
    greedy = logits.argmax(dim=-1)
    scale = torch.where(temperature > 0, temperature, 1.0)[:, None]
    probabilities, tokens = (logits.float() / scale).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    running = probabilities.cumsum(dim=-1)
    # A token stays while what lies before it has not reached top_p: the first always does.
    kept = probabilities * (running - probabilities < top_p[:, None])
    total = kept.cumsum(dim=-1)
    at = (total <= (uniform * total[:, -1])[:, None]).sum(dim=-1).clamp(max=logits.shape[-1] - 1)
    # Rounding may push the number past the last token that was kept.
    at = torch.minimum(at, (kept > 0).sum(dim=-1) - 1)
    return torch.where(temperature > 0, tokens.gather(-1, at[:, None])[:, 0], greedy)
