"""What a run is measured by: throughput, time to the first token, time between tokens."""

from __future__ import annotations

import dataclasses
from collections import Counter

from .request import Request


def quantile(values: list[float], share: float) -> float:
    """The smallest value that ``share`` of the values do not exceed; 0 without values.

    >>> quantile([4.0, 1.0, 3.0, 2.0], 0.5), quantile([4.0, 1.0, 3.0, 2.0], 0.99), quantile([], 0.5)
    (2.0, 4.0, 0.0)
    """
    ordered = sorted(values)
    at = -int(-len(ordered) * share // 1) - 1
    return ordered[max(at, 0)] if ordered else 0.0


@dataclasses.dataclass
class Report:
    """Figures of one rank; times in seconds."""

    requests: int
    """Finished ones, cancelled ones not among them."""
    tokens: int
    """New tokens that the caller was given."""
    seconds: float
    """Spent in `Engine.run`, the caller's own work between events included, compiling and capturing not."""
    first_token_p50: float
    """From `Engine.submit` to the first token."""
    inter_token_p50: float
    inter_token_p99: float
    """Between two tokens of one request."""
    graphs: int
    """Decode steps compiled, one a bucket."""
    prepare_seconds: float
    """Spent compiling and capturing, in `Engine.warm_up` or on the way."""
    decode_steps: dict[int, int]
    """Bucket → decode steps run in it."""
    prefills: int

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class Meter:
    """Adds up what `Report` shows."""

    def __init__(self) -> None:
        self.steps: Counter[int] = Counter()
        self.prefills = 0
        self.seconds = 0.0
        self.prepare_seconds = 0.0
        self.requests = 0
        self.tokens = 0
        self._first: list[float] = []
        self._between: list[float] = []

    def token(self, request: Request) -> None:
        """The newest token of ``request`` has come."""
        self.tokens += 1
        before = request.times[-2] if len(request.times) > 1 else request.submitted
        (self._between if len(request.times) > 1 else self._first).append(request.times[-1] - before)
        self.requests += bool(request.finished)

    def prepare(self, seconds: float, *, running: bool) -> None:
        """A step was compiled; ``running``: while `Engine.run` was measuring, from whose time it is taken out."""
        self.prepare_seconds += seconds
        if running:
            self.seconds -= seconds

    def report(self, graphs: int) -> Report:
        return Report(
            requests=self.requests,
            tokens=self.tokens,
            seconds=self.seconds,
            first_token_p50=quantile(self._first, 0.5),
            inter_token_p50=quantile(self._between, 0.5),
            inter_token_p99=quantile(self._between, 0.99),
            graphs=graphs,
            prepare_seconds=self.prepare_seconds,
            decode_steps=dict(sorted(self.steps.items())),
            prefills=self.prefills,
        )
