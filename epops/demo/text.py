"""English text that every Python has on its disk, as byte windows: the demo needs no download."""

from __future__ import annotations

import torch
from torch import Tensor

HELD_OUT = 16384
"""Bytes at the end that training never sees: prompts and the last comparison come from there."""

PROMPT = 32
"""Bytes that generation goes on from."""


def corpus() -> tuple[bytes, bytes]:
    """The Python language reference as ``pydoc`` prints it: (text to train on, text held out)."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name].strip() for name in sorted(topics)).encode()
    return text[:-HELD_OUT], text[-HELD_OUT:]


def windows(text: bytes, count: int, length: int, seed: int) -> Tensor:
    """(count, length) int64: bytes from ``count`` random places of ``text``, the same for the same seed."""
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(data) - length, (count, 1), generator=generator)
    return data[starts + torch.arange(length)].long()


def to_text(ids: Tensor) -> str:
    """Byte ids as text; the ids above 255 (beginning, end, padding) say nothing.

    >>> to_text(torch.tensor([104, 105, 258]))
    'hi'
    """
    return bytes(i for i in ids.tolist() if i < 256).decode("utf-8", "replace")
