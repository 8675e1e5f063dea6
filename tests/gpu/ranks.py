"""R ranks on one GPU: R memories and R streams in one process, whose kernels run at once and wait on one another."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch

from epops import layout as words
from epops.reference import combine as ref_combine
from epops.reference import dispatch as ref_dispatch
from epops.reference.quantize import quantize_rows
from epops.reference.routing import choose_slots, sends
from epops.transport import kernels


class Shape(NamedTuple):
    """One layer and call; ``tokens`` is T of each rank."""

    num_ranks: int
    max_tokens: int
    top_k: int
    num_experts: int
    num_slots: int
    hidden: int
    alignment: int = 16
    layout: str = "expert"
    capacity: int | None = None
    tokens: tuple[int, ...] | None = None

    @property
    def rows(self) -> int:
        if self.capacity is not None:
            return self.capacity
        return words.capacity(self.layout, self.max_tokens, self.num_ranks, self.top_k, self.num_slots, self.alignment)

    def tokens_of(self, rank: int) -> int:
        return self.max_tokens if self.tokens is None else self.tokens[rank % len(self.tokens)]


class Batch(NamedTuple):
    """Inputs of one rank."""

    x: torch.Tensor
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor


def random_batch(shape: Shape, rank: int, seed: int, *, dtype: Any = torch.bfloat16, holes: bool = True) -> Batch:
    """Random rows and routing on the CPU; with ``holes`` some selections are -1."""
    made = torch.Generator().manual_seed(seed * 1009 + rank)
    tokens = shape.tokens_of(rank)
    x = torch.randn(tokens, shape.hidden, generator=made).to(dtype)
    scores = torch.rand(tokens, shape.num_experts, generator=made)
    idx = scores.topk(shape.top_k, dim=1).indices if tokens else torch.zeros(0, shape.top_k, dtype=torch.int64)
    if holes and tokens:
        idx = idx.masked_fill(torch.rand(tokens, shape.top_k, generator=made) < 0.15, -1)
    weights = torch.rand(tokens, shape.top_k, generator=made)
    return Batch(x, idx, weights)


def slots_of(shape: Shape) -> torch.Tensor:
    """The default map: experts in blocks of E / R rounded up."""
    block = -(-shape.num_experts // shape.num_ranks)
    expert = torch.arange(shape.num_experts)
    return expert // block * shape.num_slots + expert % block


def own_stream() -> torch.cuda.ExternalStream:
    """A stream of its own: torch's come from a pool of 32, and ranks that share one never run at once."""
    handle = ctypes.c_void_p()
    error = torch.cuda.cudart().cudaStreamCreate(ctypes.addressof(handle))
    assert int(error) == 0, f"cudaStreamCreate failed: {error}"
    return torch.cuda.ExternalStream(handle.value)


class Ranks:
    """The memories of all ranks, on one device."""

    def __init__(
        self, num_ranks: int, sizes: kernels.Sizes, *, timeout: float = 10.0, tuning: kernels.Tuning | None = None
    ) -> None:
        self.num_ranks = num_ranks
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.num_sms = torch.cuda.get_device_properties(self.device).multi_processor_count
        # A block of 1024 threads fills a multiprocessor: all ranks' blocks must be resident at once to wait on one another.
        share = max(1, (self.num_sms - 2) // num_ranks)
        self.tuning = tuning or kernels.Tuning()
        self.tuning.limit_blocks = share
        self.workspaces, self.memories, self.errors = [], [], []
        for rank in range(num_ranks):
            ws, num_bytes = kernels.lay_out(rank, num_ranks, sizes, timeout)
            self.memories.append(torch.zeros(num_bytes, dtype=torch.uint8, device=self.device))
            self.errors.append(kernels.error_words())
            ws.error_host = self.errors[-1].data_ptr()
            self.workspaces.append(ws)
        for ws in self.workspaces:
            ws.set_peers([memory.data_ptr() for memory in self.memories])
        self.streams = [own_stream() for _ in range(num_ranks)]
        torch.cuda.synchronize()

    def plan(self, op: str, max_tokens: int, hidden: int = 7168) -> kernels.Plan:
        return self.tuning.plan(op, max_tokens, self.num_ranks, self.num_sms, hidden)

    def run(self, call: Any) -> list[Any]:
        """``call(rank)`` on each rank's stream, all at once; waits for all."""
        torch.cuda.synchronize()
        results = []
        for rank in range(self.num_ranks):
            with torch.cuda.stream(self.streams[rank]):
                results.append(call(rank))
        torch.cuda.synchronize()
        return results


def expected_dispatch(
    shape: Shape,
    batches: list[Batch],
    *,
    quant: kernels.QuantSettings | None = None,
    mask: torch.Tensor | None = None,
) -> list[tuple[ref_dispatch.Grouped, torch.Tensor]]:
    """The reference's rows for every rank, and each rank's send_slot."""
    num_ranks, num_slots = shape.num_ranks, shape.num_slots
    alive = torch.ones(num_ranks, dtype=torch.int64) if mask is None else mask
    expert_slot = slots_of(shape)
    packed: list[list[torch.Tensor]] = []
    send_slots = []
    scale_dtype, num_scales, row_dtype = None, 0, batches[0].x.dtype
    for rank, batch in enumerate(batches):
        choice = choose_slots(batch.topk_idx, expert_slot, alive, num_experts=shape.num_experts, num_slots=num_slots)
        if not alive[rank]:
            choice = choice._replace(send_slot=torch.full_like(choice.send_slot, -1))
        send_slots.append(choice.send_slot)
        rows, scales = batch.x, None
        if quant is not None:
            facts = quant._asdict()
            facts.pop("scale_layout")
            # Eager torch on a GPU divides by a number as the kernels do, on a CPU it does not.
            rows, scales = (item.cpu() for item in quantize_rows(batch.x.cuda(), **facts))
            scale_dtype, num_scales, row_dtype = scales.dtype, scales.shape[1], rows.dtype
        wanted = sends(choice.send_slot, num_ranks, num_slots)
        parts = []
        for peer in range(num_ranks):
            tokens = wanted[peer].nonzero().squeeze(1)
            where = torch.full_like(tokens, peer)
            parts.append(
                ref_dispatch.pack(
                    rows, scales, batch.topk_weights, choice.send_slot, tokens, where, num_slots=num_slots
                )
            )
        packed.append(parts)
    results = []
    for rank in range(num_ranks):
        records = torch.cat([packed[source][rank] for source in range(num_ranks)])
        source = torch.cat([torch.full((packed[s][rank].shape[0],), s) for s in range(num_ranks)])
        grouped = ref_dispatch.unpack(
            records,
            source,
            None,
            row_dtype=row_dtype,
            hidden=shape.hidden,
            scale_dtype=scale_dtype,
            num_scales=num_scales,
            layout=shape.layout,
            alignment=shape.alignment,
            capacity=shape.rows,
            max_tokens=shape.max_tokens,
            top_k=shape.top_k,
            num_slots=num_slots,
            ep_size=num_ranks,
        )
        results.append((grouped, send_slots[rank]))
    return results


def expected_combine(
    shape: Shape,
    ys: list[torch.Tensor],
    weights: list[torch.Tensor | None],
    placed: list[tuple[ref_dispatch.Grouped, torch.Tensor]],
    addends: list[torch.Tensor | None],
    *,
    out_dtype: torch.dtype,
    out_scale: float = 1.0,
    addend_scale: float = 1.0,
    lost: tuple[int, ...] = (),
) -> list[torch.Tensor]:
    """The reference's combine for every rank; answers of ``lost`` ranks count as zero."""
    outs = []
    answers = []
    for rank in range(shape.num_ranks):
        recv_row = placed[rank][0].recv_row
        flat = recv_row.reshape(-1, shape.top_k)
        sums = ref_combine.reduce_rows(ys[rank], None, weights[rank], flat, layout=shape.layout).to(out_dtype)
        answers.append(sums.view(shape.num_ranks, shape.max_tokens, -1))
    for rank in range(shape.num_ranks):
        send_slot = placed[rank][1]
        wanted = sends(send_slot, shape.num_ranks, shape.num_slots)
        rows, owners = [], []
        for peer in range(shape.num_ranks):
            tokens = wanted[peer].nonzero().squeeze(1)
            if peer in lost:
                tokens = tokens[:0]
            rows.append(answers[peer][rank][tokens])
            owners.append(tokens)
        total = ref_combine.sum_over_ranks(rows, owners, send_slot.shape[0])
        outs.append(
            ref_combine.finish(
                total, addends[rank], out_dtype=out_dtype, out_scale=out_scale, addend_scale=addend_scale
            )
        )
    return outs
