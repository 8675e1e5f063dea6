"""What runs on the device: a decode step a bucket, each its own graph, and prefill between them, which is eager.

Everything that a decode step reads lies in buffers that stay where they are (tokens, positions, the token mask), so that a
CUDA graph of the whole step serves every later one.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..models.site import serving
from ..torch_private import mark_static
from .attention import masks, packed
from .cache import SlotCache
from .schedule import Chunk, Move

WARM_UPS = 2
"""Steps on a side stream before a capture: what allocates at first use does so then."""


class Steps:
    """The model with its cache and buffers; every method is called by all ranks alike.

    ``compiled``: settings for torch.compile, or None for eager steps. ``capture``: hold whole steps in CUDA graphs.
    """

    def __init__(
        self, model: Any, group: Any, layers: int, buckets: tuple[int, ...], length: int, compiled: Any, capture: bool
    ) -> None:
        self.model, self.group, self.compiled, self.capture = model, group, compiled, capture
        self.length = length
        self.device = model.get_input_embeddings().weight.device
        self.dtype = model.get_input_embeddings().weight.dtype
        self.cache = SlotCache(layers, buckets[-1], length)
        self.tokens = torch.zeros(buckets[-1], dtype=torch.int64, device=self.device)
        """(S,) the newest token of each slot: what the next step is fed."""
        self.control = torch.zeros((2, buckets[-1]), dtype=torch.int64, device=self.device)
        """(2, S): position of each slot's newest token, and 1 where the slot takes part."""
        self.masks = {bucket: torch.zeros(bucket, dtype=torch.bool, device=self.device) for bucket in buckets}
        """(B,) token mask of each bucket."""
        for buffer in (self.tokens, self.control):
            mark_static(buffer)
        self.ready: dict[int, Callable[[], Tensor]] = {}
        """Bucket → its step, once it is compiled and captured."""
        self.graphs: list[Any] = []
        self._pool: Any = None
        self._warm = False

    @property
    def trash(self) -> int:
        """The cache's last position: what is fed for padding writes there, and no sequence gets that far."""
        return self.length - 1

    # ---- decode ---------------------------------------------------------------------------------------------------------

    def decode(self, bucket: int, rows: dict[int, int]) -> Tensor:
        """One step of a bucket for the slots ``rows`` (slot → position).  Returns logits (B, V); `tokens` has the greedy choice.

        The logits are the graph's own memory: read them before the next step.
        """
        step = self.ready.get(bucket) or self.prepare(bucket)
        self._control(bucket, rows)
        return self._masked(bucket, step)

    def prepare(self, bucket: int) -> Callable[[], Tensor]:
        """Compile and capture a bucket's step, on steps in which no token takes part."""
        step = self._step(bucket)
        if self.compiled is not None or self.capture:
            self.warm()
            kept = self.tokens.clone()
            self._control(bucket, {})
            self._masked(bucket, step)
            if self.capture:
                step = self._masked(bucket, functools.partial(self._captured, step))
            self.tokens.copy_(kept)
        self.ready[bucket] = step
        return step

    def _step(self, bucket: int) -> Callable[[], Tensor]:
        run: Any = decode_step
        if self.compiled is not None:
            # A code object a bucket: Dynamo then keeps one entry for each and never looks through those of the others.
            code = decode_step.__code__.replace(co_name=f"decode_step_{bucket}")
            run = types.FunctionType(code, decode_step.__globals__, code.co_name)
            run = torch.compile(run, **{"fullgraph": True, "dynamic": False, "backend": "epops", **self.compiled})
        tokens, control, mask = self.tokens[:bucket], self.control[:, :bucket], self.masks[bucket]
        positions = control[0][:, None]

        def step() -> Tensor:
            mask.copy_(control[1])
            self.cache.place.slots, self.cache.place.positions = None, positions
            with packed(self.model.config.get_text_config()):
                return run(self.model, self.cache, tokens, positions, self.length, self.dtype)

        return step

    def _captured(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """The step as one CUDA graph: a replay runs what the capture recorded, on the same buffers."""
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                step()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = step()
        self._pool = graph.pool()
        self.graphs.append(graph)

        def replay() -> Tensor:
            self.group.check()
            graph.replay()
            return logits

        return replay

    def _control(self, bucket: int, rows: dict[int, int]) -> None:
        positions = [rows.get(slot, self.trash) for slot in range(bucket)]
        values = torch.tensor([positions, [int(slot in rows) for slot in range(bucket)]])
        self.control[:, :bucket].copy_(self._pinned(values), non_blocking=True)

    def _pinned(self, values: Tensor) -> Tensor:
        return values.pin_memory() if self.device.type == "cuda" else values

    def _masked(self, bucket: int, call: Callable[[], Any]) -> Any:
        """``call()`` where only the tokens of the bucket's mask take part and every rank sends ``bucket`` rows."""
        state = serving(self.group)
        self.group.token_mask, state.padded = self.masks[bucket], True
        try:
            with torch.no_grad():
                return call()
        finally:
            self.group.token_mask, state.padded = None, False

    # ---- prefill ------------------------------------------------------------------------------------------------------------

    def warm(self) -> None:
        """Make the cache, before any step is compiled."""
        if not self._warm:
            self.prefill([])

    @torch.no_grad()
    def prefill(self, chunks: list[Chunk]) -> Tensor:
        """Run parts of prompts, (rows, longest) padded on the left, and return the logits (rows, V) after each one's last token.

        Without chunks one token that takes no part is run: the other ranks need this one's experts.
        """
        self._warm = True
        longest = max((chunk.length for chunk in chunks), default=1)
        ids, positions, part = [], [], []
        for chunk in chunks:
            pad = longest - chunk.length
            ids.append([0] * pad + chunk.request.prompt[chunk.start : chunk.start + chunk.length])
            positions.append([self.trash] * pad + list(range(chunk.start, chunk.start + chunk.length)))
            part += [False] * pad + [True] * chunk.length
        slots = [chunk.request.slot for chunk in chunks] or [0]
        place = self.cache.place
        place.slots = torch.tensor(slots, device=self.device)
        place.positions = torch.tensor(positions or [[self.trash]], device=self.device)
        self.group.token_mask = torch.tensor(part or [False], device=self.device)
        try:
            out = self.model(
                input_ids=torch.tensor(ids or [[0]], device=self.device),
                attention_mask=masks(self.model.config.get_text_config(), place.positions, self.length, self.dtype),
                position_ids=place.positions,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        finally:
            self.group.token_mask = None
        return out.logits[:, -1].float()

    def close(self) -> None:
        """Let go of the graphs and of the memory that they and the cache hold."""
        self.ready.clear()
        self.graphs.clear()
        self.cache = SlotCache(0, 0, 0)

    def move(self, move: Move) -> None:
        """Copy a slot to another one, its newest token too."""
        self.cache.move(*move)
        self.tokens[move.target].copy_(self.tokens[move.source])


def decode_step(model: Any, cache: Any, tokens: Tensor, positions: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """One token of every row in, the next one's logits (B, V) out; ``tokens`` (B,) becomes the most likely next tokens."""
    out = model(
        input_ids=tokens[:, None],
        attention_mask=masks(model.config.get_text_config(), positions, length, dtype),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    )
    logits = out.logits[:, -1].float()
    tokens.copy_(logits.argmax(dim=-1))
    return logits
