"""What is asked of an engine, and what it answers token by token."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Event:
    """One new token of a request."""

    request: Request
    token: int
    """Its id; the end token itself is an event too."""
    index: int
    """Its place among the request's new tokens, from 0."""
    finished: str
    """"" while the request goes on; "eos" or "length" with its last token."""


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt and how to go on from it; made by `Engine.submit`, which documents the arguments."""

    number: int
    prompt: list[int]
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    eos_token_ids: frozenset[int]
    on_token: Callable[[Event], None] | None

    tokens: list[int] = dataclasses.field(default_factory=list)
    """New tokens so far, as the host has seen them."""
    finished: str = ""
    """"" while it goes on; then "eos", "length" or "cancelled"."""
    times: list[float] = dataclasses.field(default_factory=list)
    """When each new token came, in seconds of `time.perf_counter`."""
    submitted: float = 0.0

    slot: int = -1
    """Where its keys and values lie in the cache; -1 while it has no place there."""
    filled: int = 0
    """Prompt tokens whose keys and values are in the cache."""
    launched: int = 0
    """New tokens that the device was told to make; the host may not have seen the last one yet."""

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def uniform(self) -> float:
        """A number in [0, 1) for the next token: the same tokens whatever else is in the batch, on any rank."""
        return self._random.random()

    @property
    def decoding(self) -> bool:
        """Whether it takes part in decode steps."""
        return self.slot >= 0 and self.filled == len(self.prompt)

    @property
    def position(self) -> int:
        """Position of the token that the next decode step is fed: the newest one."""
        return len(self.prompt) + self.launched - 1

    def take(self, token: int, now: float) -> Event:
        """Note a new token and whether it was the last."""
        self.tokens.append(token)
        self.times.append(now)
        if token in self.eos_token_ids:
            self.finished = "eos"
        elif len(self.tokens) == self.max_new_tokens:
            self.finished = "length"
        return Event(self, token, len(self.tokens) - 1, self.finished)


def check(name: str, good: bool, expected: str, got: Any, remedy: str) -> None:
    if not good:
        raise ValueError(f"epops.serving.Engine.submit: {name}: expected {expected}, got {got!r}; {remedy}")


def token_ids(prompt_ids: Any, vocab_size: int) -> list[int]:
    """A prompt as a list of ids; takes a list or a tensor of (T,) or (1, T) integers."""
    values = prompt_ids.reshape(-1).tolist() if hasattr(prompt_ids, "reshape") else list(prompt_ids)
    integers = all(isinstance(value, int) and not isinstance(value, bool) for value in values)
    check("prompt_ids", integers, "integers", prompt_ids, "pass the ids that a tokenizer returns")
    check("prompt_ids", bool(values), "at least one token", values, "begin an empty prompt with the model's bos token")
    wrong = [value for value in values if not 0 <= value < vocab_size]
    check("prompt_ids", not wrong, f"ids from 0 to {vocab_size - 1}", wrong[:4], "use the model's own tokenizer")
    return values


def end_tokens(eos_token_id: int | Sequence[int] | None) -> frozenset[int]:
    if eos_token_id is None:
        return frozenset()
    return frozenset([eos_token_id] if isinstance(eos_token_id, int) else eos_token_id)
