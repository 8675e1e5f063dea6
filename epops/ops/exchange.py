"""One exchange of a group, from its blocks of bytes to its peers' blocks: what every op's real kernel is made of.

Host transports (gloo) move exactly the rows there are.  Device transports move M rows a pair and never read a count on the
host; then counts, headers and errors are tensors too, and `valid` masks what is padding.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .. import layout as words
from ..errors import DisagreementError, EpopsError, GroupError, PeerError
from ..group import ExpertGroup, get_group
from ..torch_private import is_capturing
from ..transport import Call, Pending, Swap
from ..transport.base import HEADER_WORDS, describe

NOT_BEGUN = object()  # stands for the result of a started op that runs where its wait is


class Blocks(NamedTuple):
    """What this rank sends: block r (N_r, W) uint8 to rank r.  ``counts`` (R,) true rows, on the device of the blocks.

    ``bits`` are the status bits found so far: an int on host transports, else a 0-d int64 tensor.  ``sizes`` are two more
    words a rank that some ops send along.
    """

    call: Call
    blocks: list[torch.Tensor]
    counts: torch.Tensor
    bits: Any
    expected: list[int] | None = None
    sizes: list[tuple[int, int]] | None = None


def status_bits(group: ExpertGroup, found: dict[int, torch.Tensor]) -> Any:
    """Bits whose count in ``found`` is not zero."""
    if group.transport.host_counts:
        return sum(bit for bit, count in found.items() if int(count))
    total = torch.zeros((), dtype=torch.int64, device=group.device)
    for bit, count in found.items():
        total = total + (count != 0).to(torch.int64) * bit
    return total


def token_lists(group: ExpertGroup, order: torch.Tensor, counts: torch.Tensor, limit: int) -> list[torch.Tensor]:
    """For each rank the tokens in its block: exactly those there are, or ``limit`` of them with T marking padding."""
    ep_size, num_tokens = order.shape
    if group.transport.host_counts:
        return [order[rank, :count] for rank, count in enumerate(counts.tolist())]
    padded = torch.nn.functional.pad(order, (0, limit - num_tokens), value=num_tokens)
    inside = torch.arange(limit, device=order.device) < counts.unsqueeze(1)
    return list(torch.where(inside, padded, num_tokens).unbind(0))


def exchange(group: ExpertGroup, out: Blocks, sequence: int) -> Swap:
    """Move the blocks.  The result's ``rows`` are blocks by source; on device transports ``counts`` is a tensor."""
    if group.transport.host_counts:
        return group.transport.swap(out.call, sequence, out.bits, out.blocks, out.expected, out.sizes)
    return _exchange_on_device(group, out)


def _exchange_on_device(group: ExpertGroup, out: Blocks) -> Swap:
    return _received(group, out, group.transport.swap_padded(_buffer(group, out)))


def _buffer(group: ExpertGroup, out: Blocks) -> torch.Tensor:
    """(R, bytes) uint8: for each rank a header and its block."""
    fixed = _fixed_header(group, out)
    header = fixed.clone()
    header[:, 12] = out.counts
    header[:, 13] = out.bits
    body = torch.stack(out.blocks).reshape(group.size, -1)
    return torch.cat([header.view(torch.uint8).reshape(group.size, -1), body], dim=1)


def _fixed_header(group: ExpertGroup, out: Blocks) -> torch.Tensor:
    part = out.blocks[0].numel()
    key = ("header", out.call, part)
    fixed = group.cache.get(key)
    if fixed is None:
        agree_on(group, out.call, part)
        fixed = group.cache[key] = out.call.header(0, 0, [0] * group.size).to(group.device)
    return fixed


def agree_on(group: ExpertGroup, call: Call, part: int) -> None:
    """Compare a call's settings, and the bytes of a part, over the ranks, on the host, before a byte moves.

    Equal parts carry no sizes: on nccl, ranks whose parts differ corrupt one another's memory or wait for ever.  Once a group
    and set of settings; what was agreed is remembered by the caller.

    Raises:
        GroupError: inside a CUDA graph capture, where the host can ask nobody.
        DisagreementError: on every rank, when one does something else.
        PeerError: a rank that does not ask: it did something else, with settings that had been agreed before.
    """
    if is_capturing():
        raise GroupError(
            f"epops.{call.op}: settings: expected a call that ran before, got one that group {group.name!r} first sees inside a "
            "CUDA graph capture; run one step with the same sizes before capturing"
        )
    if group.size == 1:
        return
    mine = [*call.words(), part]
    try:
        every = group.host_all_gather(mine)
    except PeerError as error:
        raise PeerError(
            f"epops.{call.op}: rank {group.rank} of group {group.name!r} makes this call for the first time with {part} "
            f"bytes for each rank, and not all ranks do; all ranks must make the same calls with the same sizes in the same "
            f"order [{error}]"
        ) from error
    for rank, theirs in enumerate(every):
        word = next((place for place, (one, other) in enumerate(zip(mine, theirs, strict=True)) if one != other), None)
        if word is not None:
            what, expected, got = describe(word, mine, theirs)
            raise DisagreementError(
                f"epops.{call.op}: {what}: expected {expected} on every rank, as on rank {group.rank} of group {group.name!r}, got "
                f"{got} on rank {rank}; over a transport that moves equal parts all ranks must give {call.op} the same sizes and "
                "settings: pad to the largest"
            )


def _received(group: ExpertGroup, out: Blocks, received: torch.Tensor) -> Swap:
    ep_size, fixed = group.size, _fixed_header(group, out)
    head_bytes = HEADER_WORDS * 8
    # Flat first: one rank's row is contiguous whatever its stride, and its stride need not be one of int64.
    heads = received[:, :head_bytes].reshape(-1).view(torch.int64).view(ep_size, HEADER_WORDS)
    agree = (heads[:, :12] == fixed[:, :12]).all(dim=1)
    bits = torch.zeros((), dtype=torch.int64, device=group.device) + out.bits
    for rank in range(ep_size):
        bits = bits | heads[rank, 13]
    bits = bits | (~agree).any().to(torch.int64) * words.STATUS_DISAGREE
    counts = torch.where(agree, heads[:, 12], 0)
    rows = received[:, head_bytes:].reshape(ep_size, *out.blocks[0].shape)
    return Swap(list(rows.unbind(0)), bits, counts, None)


def sources(group: ExpertGroup, swap: Swap) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Source rank of each row of all received blocks put together, and which of them are no padding."""
    device = swap.rows[0].device
    sizes = [block.shape[0] for block in swap.rows]
    ranks = torch.arange(group.size, device=device)
    if group.transport.host_counts:
        return ranks.repeat_interleave(torch.tensor(sizes, device=device)), None
    limit = sizes[0]
    valid = torch.arange(limit, device=device) < swap.counts.unsqueeze(1)
    return ranks.repeat_interleave(limit, output_size=limit * group.size), valid.reshape(-1)


def settle(
    group: ExpertGroup,
    op: str,
    sequence: int,
    bits: Any,
    *,
    num_rows: torch.Tensor | int = 0,
    num_dropped: torch.Tensor | int = 0,
    num_bad: torch.Tensor | int = 0,
    num_repeated: torch.Tensor | int = 0,
    device: torch.device,
) -> torch.Tensor:
    """The op's ``status``, and the note of its errors in the group."""
    if group.transport.host_counts:
        rows, dropped, bad, repeated = int(num_rows), int(num_dropped), int(num_bad), int(num_repeated)
        if dropped:
            bits |= words.STATUS_OVERFLOW
        facts = [f"{dropped} rows dropped"] * bool(dropped) + [f"{bad} indices out of range here"] * bool(bad)
        facts += [f"{repeated} repeated choices here"] * bool(repeated)
        group.record(op, bits, f"rank {group.rank}, epoch {sequence}: {', '.join(facts) or 'on another rank'}")
        return torch.tensor([bits, rows, dropped, bad, repeated, -1, 0, 0], dtype=torch.int32)
    status = torch.zeros(words.STATUS_WORDS, dtype=torch.int64, device=device)
    for place, value in enumerate((num_rows, num_dropped, num_bad, num_repeated, -1), start=1):
        # A plain int is filled in: assigned, it would be a copy from the host, which a CUDA graph capture refuses.
        status[place].copy_(value) if isinstance(value, torch.Tensor) else status[place].fill_(value)
    status[0].copy_(bits | (status[2] != 0).to(torch.int64) * words.STATUS_OVERFLOW)
    status = status.to(torch.int32)
    group.record_on_device(status)
    return status


def settings_key(op: str, tensors: tuple[torch.Tensor | None, ...], a: dict[str, Any]) -> int:
    """Hash of an op's settings, that its two halves must share."""
    shapes = [None if t is None else (tuple(t.shape), str(t.dtype)) for t in tensors]
    return zlib.crc32(repr((op, shapes, sorted((k, str(v)) for k, v in a.items()))).encode())


class Halves(NamedTuple):
    """An exchange op in three stages; `whole`, `start` and `wait` put them together."""

    op: str
    check: Callable[..., None]
    prepare: Callable[..., tuple[Blocks, Any]]
    finish: Callable[..., Any]
    late: Callable[..., Any] | None = None
    """What arguments that only the wait half has do to the results of a transport's own op."""


def whole(
    halves: Halves, tensors: tuple[torch.Tensor | None, ...], a: dict[str, Any], finish_only: tuple[Any, ...] = ()
) -> Any:
    """The op in one call.  ``finish_only`` are arguments that only the local half reads."""
    group = get_group(a["group"])
    native = getattr(group.transport, halves.op, None)
    checked(group, halves, tensors, a, finish_only)
    if native is not None:
        group.in_order()
        return native(group, *tensors, *finish_only, **a)

    def run(sequence: int) -> Any:
        out, keep = halves.prepare(group, *tensors, **a)
        return halves.finish(group, exchange(group, out, sequence), keep, sequence, *tensors, *finish_only, **a)

    return group.run(halves.op, run)


def start(halves: Halves, tensors: tuple[torch.Tensor | None, ...], a: dict[str, Any]) -> torch.Tensor:
    """The sending half: everything that peers wait for.  Returns the ticket."""
    group = get_group(a["group"])
    checked(group, halves, tensors, a, ())
    transport, key = group.transport, settings_key(halves.op, tensors, a)
    native = getattr(transport, halves.op, None)
    first = next(t for t in tensors if t is not None)
    if native is not None:
        beside = transport.runs_beside(halves.op, first.shape[-1] * first.element_size(), a)
        group.start(
            halves.op,
            key,
            lambda _: transport.beside(lambda: native(group, *tensors, **a)) if beside else Pending(lambda: NOT_BEGUN),
            None,
        )
    else:
        out, keep = halves.prepare(group, *tensors, **a)
        if transport.host_counts:
            sequence = group.start(halves.op, key, lambda turn: (exchange(group, out, turn), turn), keep)
            return torch.tensor([sequence, key, a.get("lane", 0), 0], dtype=torch.int64)

        def begin(turn: int) -> Pending:
            wire = transport.begin_padded(_buffer(group, out))
            return Pending(lambda: (_received(group, out, wire.take()), turn), wire.behind)

        group.start(halves.op, key, begin, keep)
    return torch.zeros(words.TICKET_WORDS, dtype=torch.int64, device=first.device)


def wait(
    halves: Halves,
    ticket: torch.Tensor,
    tensors: tuple[torch.Tensor | None, ...],
    a: dict[str, Any],
    start_args: dict[str, Any],
    finish_only: tuple[Any, ...] = (),
) -> Any:
    """The local half of a started exchange.  ``start_args`` are the arguments that the start was given."""
    group = get_group(a["group"])
    key = settings_key(halves.op, tensors, start_args)
    sequence = int(ticket[0]) if group.transport.host_counts else group.oldest_started(halves.op, key)
    result, keep = group.finish(halves.op, key, sequence)
    native = getattr(group.transport, halves.op, None)
    if native is not None:
        if result is NOT_BEGUN:
            group.in_order()
            return native(group, *tensors, *finish_only, **a)
        return result if halves.late is None else halves.late(result, *finish_only, **a)
    swap, turn = result
    return halves.finish(group, swap, keep, turn, *tensors, *finish_only, **a)


def checked(
    group: ExpertGroup,
    halves: Halves,
    tensors: tuple[torch.Tensor | None, ...],
    a: dict[str, Any],
    finish_only: tuple[Any, ...] = (),
) -> None:
    """Run the checks of an op; peers are told of a failure, so that none waits for this rank."""
    try:
        halves.check(group, *tensors, *finish_only, **a)
    except (ValueError, EpopsError):
        group.abort(halves.op)
        raise


def check_group(op: str, group: ExpertGroup, tensor: torch.Tensor, ep_size: int) -> None:
    """What only the group knows: its size and the device that its transport serves."""
    if ep_size != group.size:
        raise ValueError(
            f"epops.{op}: ep_size: expected {group.size}, the size of group {group.name!r}, got {ep_size}; pass the group's size"
        )
    if tensor.device.type != group.device.type:
        raise ValueError(
            f"epops.{op}: expected tensors on {group.device.type}, the device of group {group.name!r}, got {tensor.device}; move "
            "them there, or make the group with that device"
        )
