"""`Engine`: continuous batching over the ranks of a group, each with its own requests.

A round is a prefill or a decode step, the same on all ranks: before each one they tell each other on the host what they
need.  A rank without work runs the round with no token taking part, so that its experts are there for the others.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import GroupError
from ..group import get_group
from .agreement import Agreement
from .attention import check_model
from .measure import Meter, Report
from .request import Event, Request, check, end_tokens, token_ids
from .sampling import sample
from .schedule import Need, Schedule, choose
from .settings import check_buckets, check_length, check_sharded
from .step import Steps


class Flight(NamedTuple):
    """Tokens that the device is making, or has made, and whose they are."""

    requests: list[tuple[int, Request]]
    """(place among the tokens, request)."""
    tokens: Tensor
    """On the host."""
    done: Any
    """A CUDA event after which ``tokens`` may be read; None: now."""


class Engine:
    """Answers requests with an expert-parallel model.  Made by all ranks of the group together, like the group itself.

    Args:
        model: a transformers causal language model whose experts `epops.parallelize` sharded over ``group``.
        group: the `epops.ExpertGroup` (or its name).  A prefill has up to its ``max_tokens`` tokens.
        buckets: batch sizes of decode steps, rising; the last one is how many requests run at once.  Default: powers of two up
            to 128, as far as ``max_tokens`` allows.
        max_length: tokens of a sequence, prompt and new ones together; default what the model was made for, at most 4096.
            The cache is allocated for the largest bucket of such sequences.
        compiled: compile the decode steps, one graph a bucket; False runs them eagerly.
        capture: hold each decode step in one CUDA graph; default: on CUDA, over the NVLink transport.
        overlap: read a step's tokens on the host while the device runs the next one, which finds an end token one step late;
            default: on CUDA.
        compile_options: more settings for torch.compile, such as ``{"mode": "max-autotune-no-cudagraphs"}``.

    Raises:
        ValueError: a model that is not sharded over the group, or whose layers keep other state than keys and values; buckets or
            lengths that do not fit.
    """

    def __init__(
        self,
        model: Any,
        group: Any,
        *,
        buckets: Sequence[int] | None = None,
        max_length: int | None = None,
        compiled: bool = True,
        capture: bool | None = None,
        overlap: bool | None = None,
        compile_options: dict[str, Any] | None = None,
    ) -> None:
        group = get_group(group) if isinstance(group, str) else group
        check_sharded(model, group)
        layers = check_model(model)
        self.model, self.group = model.eval(), group
        self.buckets = check_buckets(buckets, group)
        self.max_length = check_length(max_length, model.config.get_text_config())
        self.vocab_size = model.config.get_text_config().vocab_size
        self.closed = False
        on_cuda = group.device.type == "cuda"
        capture = (on_cuda and compiled and group.transport.name == "nvlink") if capture is None else capture
        if capture and not on_cuda:
            raise ValueError(
                "epops.serving.Engine: capture: expected a group on CUDA, got one on the CPU; leave it out"
            )
        self._overlap = on_cuda if overlap is None else overlap
        settings = dict(compile_options or {}) if compiled else None
        self._steps = Steps(self.model, group, layers, self.buckets, self.max_length, settings, capture)
        self._schedule = Schedule(self.buckets, group.max_tokens)
        self._agreement = Agreement(group)
        self._meter = Meter()
        self._numbers = itertools.count()
        self._prefilled = False
        self._running = False

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    # ---- requests -----------------------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt_ids: Any,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        eos_token_id: int | Sequence[int] | str | None = "model",
        on_token: Callable[[Event], None] | None = None,
    ) -> Request:
        """Put a request of this rank into the queue; `run` answers it.  May be called while `run` is going on.

        Args:
            prompt_ids: a list, or a (T,) or (1, T) tensor, of token ids; T + max_new_tokens is at most ``max_length``.
            max_new_tokens: tokens to make, unless an end token comes first.
            temperature: 0 takes the most likely token each time; above, logits are divided by it before sampling.
            top_p: sample from the most likely tokens whose probabilities reach this share, in (0, 1].
            seed: equal seeds give equal answers to equal prompts, whatever else runs.
            eos_token_id: id or ids that end the answer; default those of the model's generation config, None: none.
            on_token: called with each `Event` of this request, before `run` yields it.

        Raises:
            ValueError: an argument that does not fit; a prompt that is too long says how long it may be.
            GroupError: the engine is closed.
        """
        self._require_open("submit")
        prompt = token_ids(prompt_ids, self.vocab_size)
        check("max_new_tokens", max_new_tokens >= 1, "at least 1", max_new_tokens, "ask for a token")
        room = self.max_length - max_new_tokens
        check(
            "prompt_ids",
            len(prompt) <= room,
            f"at most {max(room, 0)} tokens (max_length {self.max_length} less max_new_tokens {max_new_tokens})",
            len(prompt),
            "shorten the prompt, ask for fewer tokens, or make the Engine with a larger max_length",
        )
        check("temperature", temperature >= 0.0, "0 or more", temperature, "0 is greedy")
        check("top_p", 0.0 < top_p <= 1.0, "a share in (0, 1]", top_p, "1.0 leaves all tokens in")
        if eos_token_id == "model":
            eos_token_id = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        ends = end_tokens(eos_token_id)  # type: ignore[arg-type]
        request = Request(next(self._numbers), prompt, max_new_tokens, temperature, top_p, seed, ends, on_token)
        request.submitted = time.perf_counter()
        self._schedule.queue.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """End a request early; it has no more events."""
        if not request.finished:
            request.finished = "cancelled"
            self._schedule.release(request)

    # ---- rounds -------------------------------------------------------------------------------------------------------------

    def warm_up(self, buckets: Sequence[int] | None = None) -> None:
        """Compile and capture the decode steps of ``buckets`` (default all), largest first; on all ranks alike.

        Without it a bucket is prepared when it is first needed, in the middle of somebody's answer.
        """
        self._require_open("warm_up")
        for bucket in sorted(buckets or self.buckets, reverse=True):
            if bucket not in self._steps.ready:
                self._prepare(bucket)

    def run(self) -> Iterator[Event]:
        """Answer what was submitted, an `Event` a token as they come, until no rank has work; every rank calls it.

        A rank that leaves the loop early drops its requests and goes on serving the others until they are done.

        Raises:
            PeerError: a rank does not come to the next round within the group's timeout.
            GroupError: the engine is closed, or running already.
        """
        self._require_open("run")
        if self._running:
            raise GroupError("epops.serving.Engine.run: expected one run at a time, got a second one; end the first")
        self._running = True
        rounds = self._rounds()
        try:
            for events in rounds:
                yield from events
        except GeneratorExit:
            for request in [*self._schedule.running, *self._schedule.queue]:
                self.cancel(request)
            for _ in rounds:
                pass
            raise
        finally:
            self._running = False

    def _rounds(self) -> Iterator[list[Event]]:
        began = time.perf_counter()
        flight: Flight | None = None
        needs = self._agreement.start(self._schedule.need())()
        while (now := choose(needs, self._prefilled)) is not None:
            before, flight = flight, self._launch(now)
            if not self._overlap:
                before, flight = flight, None
            events = self._land(before) if before is not None else []
            agreed = self._agreement.start(self._schedule.need())
            yield events
            needs = agreed()
        if flight is not None:
            yield self._land(flight)
        self._meter.seconds += time.perf_counter() - began

    def _launch(self, now: Need) -> Flight | None:
        """Have the device run a round."""
        self._prefilled = bool(now.prefill)
        return self._prefill() if now.prefill else self._decode(now.bucket)

    def _prefill(self) -> Flight | None:
        self._meter.prefills += 1
        chunks = self._schedule.prefill()
        logits = self._steps.prefill(chunks)
        for chunk in chunks:
            chunk.request.filled += chunk.length
        rows = [(row, chunk.request) for row, chunk in enumerate(chunks) if chunk.ends_prompt]
        if not rows:
            return None
        slots = torch.tensor([request.slot for _, request in rows], device=self._steps.device)
        tokens = self._choose(logits, logits.argmax(dim=-1), rows)
        self._steps.tokens[slots] = tokens[torch.tensor([row for row, _ in rows], device=tokens.device)]
        return self._take_off(rows, tokens)

    def _decode(self, bucket: int) -> Flight | None:
        self._meter.steps[bucket] += 1
        if bucket not in self._steps.ready:
            self._prepare(bucket)
        for move in self._schedule.compact(bucket):
            self._steps.move(move)
        rows = [(request.slot, request) for request in self._schedule.running if request.decoding]
        logits = self._steps.decode(bucket, {slot: request.position for slot, request in rows})
        if not rows:
            return None
        tokens = self._steps.tokens[:bucket]
        chosen = self._choose(logits, tokens, rows)
        if chosen is not tokens:
            tokens.copy_(chosen)
        return self._take_off(rows, tokens)

    def _choose(self, logits: Tensor, greedy: Tensor, rows: list[tuple[int, Request]]) -> Tensor:
        """``greedy``, with drawn tokens in the rows of requests that ask for them."""
        if not any(request.temperature for _, request in rows):
            return greedy
        settings = [[0.0, 1.0, 0.0] for _ in range(logits.shape[0])]
        for row, request in rows:
            settings[row] = [request.temperature, request.top_p, request.uniform() if request.temperature else 0.0]
        temperature, top_p, uniform = torch.tensor(settings, device=logits.device).unbind(1)
        return torch.where(temperature > 0, sample(logits, temperature, top_p, uniform), greedy)

    def _take_off(self, rows: list[tuple[int, Request]], tokens: Tensor) -> Flight:
        """Send a round's tokens to the host; requests that will have all of theirs then give up their slots."""
        for _, request in rows:
            request.launched += 1
            if request.launched == request.max_new_tokens:
                self._schedule.release(request)
        if tokens.device.type != "cuda":
            return Flight(rows, tokens.clone(), None)
        host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        host.copy_(tokens, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        return Flight(rows, host, done)

    def _land(self, flight: Flight) -> list[Event]:
        """Events of a round's tokens; an answer that ended in the round before this one has none here."""
        if flight.done is not None:
            flight.done.synchronize()
        tokens = flight.tokens.tolist()
        now = time.perf_counter()
        events = []
        for row, request in flight.requests:
            if request.finished:
                continue
            event = request.take(tokens[row], now)
            self._meter.token(request)
            if event.finished:
                self._schedule.release(request)
            if request.on_token is not None:
                request.on_token(event)
            events.append(event)
        return events

    def _prepare(self, bucket: int) -> None:
        began = time.perf_counter()
        self._steps.prepare(bucket)
        self._meter.prepare(time.perf_counter() - began, running=self._running)

    # ---- life -----------------------------------------------------------------------------------------------------------------

    @property
    def report(self) -> Report:
        """Figures of this rank since the engine was made or `reset_report` was called."""
        return self._meter.report(len(self._steps.ready) if self._steps.compiled is not None else 0)

    def reset_report(self) -> None:
        """Measure from here: after `warm_up`, or after a first run that warms the machine."""
        self._meter = Meter()

    def close(self) -> None:
        """Give back the cache and the graphs; a second close does nothing.  The group and the model stay open."""
        if not self.closed:
            self.closed = True
            self._agreement.close()
            self._steps.close()

    def _require_open(self, what: str) -> None:
        if self.closed:
            raise GroupError(
                f"epops.serving.Engine.{what}: expected an open engine, got a closed one; make a new Engine"
            )
