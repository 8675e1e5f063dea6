"""How kernels are laid over the chip: the launch plan that a shape gets, and its settings."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import epops._C as _C

COUNTED, LINES, STREAMED = range(3)  # how rows travel, csrc/params.h RowsAs

STREAM_STEPS = 2, 3, 5  # of 256 channels a warp, csrc/combine_streams.cu


class Plan(NamedTuple):
    """How a kernel is laid over the chip; see ``struct Launch`` in csrc/params.h.

    Where ``rows_as`` is STREAMED the rest is for csrc/combine.cu, if a call cannot stream: csrc/combine_streams.cu has teams of
    its own and ``stream_senders`` blocks that send, 0 for ``num_senders``.
    """

    num_blocks: int
    num_senders: int
    num_threads: int
    send_warps: int
    recv_warps: int
    dynamic: int
    pdl: int = 0
    rows_as: int = COUNTED
    stream_senders: int = 0

    def launch(self, phases: int = 3) -> Any:
        made = _C.Launch()
        for name, value in self._asdict().items():
            if name != "stream_senders":
                setattr(made, name, value)
        made.phases = phases
        return made


@dataclass
class Tuning:
    """Settings of the launch plans, with measured defaults (benchmarks/results).

    ``num_sms``: blocks that send on the throughput path; ``spare_sms`` and ``spare_sms_throughput``: multiprocessors that
    no block of ours ever holds, so that other collectives can run beside a wait; ``decode_tokens`` and ``middle_tokens``: M
    up to which all warps of a block, or a few, share a token; above, each warp has its own. ``dispatch_line_tokens`` and
    ``combine_line_tokens``: M up to which rows travel as lines (csrc/lines.cuh), combine's if its elements have 16 bits;
    alike on every rank. Of such a dispatch of more than ``apart_tokens``, ``line_senders`` blocks only send and the others do
    the rest. ``combine_stream_tokens``: M above which combine takes rows by whole-row copies that one warp of a team asks for
    (csrc/combine_streams.cu), for elements of 16 bits on sm_90 and newer; ``stream_senders``, at most ``num_sms``, of its
    blocks send: more than the link needs are slower.
    ``limit_blocks``: at most so many blocks (0: no limit). ``beside_sms``: blocks of an op that a start half runs on a
    second stream; one of which M rows are more than ``beside_bytes``, or one that adds rows up and M is more than
    ``beside_sum_tokens``, loses more there than is gained, and runs whole where its wait is. ``pdl``: a kernel's launch overlaps
    the end of the one before. ``extra``: plans by op, instead of all this. Of all_to_all: ``ring_bytes`` of peer memory for its
    chunks, ``chunk_bytes`` of the smallest, ``ring_senders`` blocks that send an x of more than ``whole_bytes``; an x of at most
    ``small_bytes`` goes by the kernel for little.
    """

    num_sms: int = 32
    spare_sms: int = 4
    spare_sms_throughput: int = 32
    decode_tokens: int = 160
    middle_tokens: int = 1024
    dispatch_line_tokens: int = 1024
    combine_line_tokens: int = 128
    apart_tokens: int = 128
    line_senders: int = 40
    combine_stream_tokens: int = 128
    stream_senders: int = 25
    limit_blocks: int = 0
    beside_sms: int = 64
    beside_bytes: int = 32 << 20
    beside_sum_tokens: int = 128
    pdl: int = 1
    ring_bytes: int = 32 << 20
    chunk_bytes: int = 4096
    ring_senders: int = 32
    whole_bytes: int = 16 << 20
    small_bytes: int = 256 << 10
    extra: dict[str, Plan] = field(default_factory=dict)

    def beside(self) -> Tuning:
        """Settings for a kernel that other work runs beside: at most ``beside_sms`` blocks, and a launch behind an event."""
        blocks = min(self.limit_blocks or self.beside_sms, self.beside_sms)
        return dataclasses.replace(self, limit_blocks=blocks, pdl=0)

    def plan(self, op: str, max_tokens: int, num_ranks: int, num_sms: int, hidden: int = 7168) -> Plan:
        if op in self.extra:
            return self.extra[op]
        blocks = max(1, num_sms - self.spare_sms)
        if self.limit_blocks:
            blocks = min(blocks, self.limit_blocks)
        room = blocks
        pieces = max(1, -(-hidden // 512))  # a warp's step is 512 elements of a row
        if op == "combine_backward":
            return Plan(blocks, max(1, min(self.num_sms, blocks)), 512, 1, 1, 1, self.pdl)
        if op == "dispatch" and max_tokens <= self.dispatch_line_tokens:
            blocks = max(1, min(blocks, max(64, max_tokens)))
            senders = min(self.line_senders, blocks // 2) if max_tokens > self.apart_tokens else blocks
            crew = blocks - senders or blocks
            warps = team_warps(max_tokens, crew, pieces)
            return Plan(blocks, senders or blocks, 512, warps, warps, 0, self.pdl, LINES)
        how = COUNTED, 0
        if op == "combine" and max_tokens > self.combine_stream_tokens:
            how = STREAMED, max(1, min(self.stream_senders, self.num_sms, blocks))
        if op == "combine" and max_tokens <= self.middle_tokens:
            answers = max_tokens * max(1, num_ranks - 1)
            parts = min(7, pieces)
            if max_tokens <= self.decode_tokens:
                blocks, parts = max(1, min(blocks, answers)), min(15, pieces)
            senders = blocks
            if max_tokens <= self.combine_line_tokens and how[0] == COUNTED:
                how = LINES, 0
                if num_ranks > 1 and answers + max_tokens <= room:  # a block an answer, and one an own token
                    senders, blocks = max(1, answers), max(1, answers + max_tokens)
            return Plan(blocks, senders, 512, parts, parts, 0, self.pdl, *how)
        blocks = max(1, min(blocks, num_sms - self.spare_sms_throughput))
        send = min(2, pieces) if op == "combine" else 1
        return Plan(blocks, min(self.num_sms, blocks), 512, send, 1, 1, self.pdl, *how)


def team_warps(max_tokens: int, blocks: int, pieces: int) -> int:
    """Warps that share a token, where every team of a block has one, if there are enough."""
    return max(1, min(pieces, 16 // -(-max(1, max_tokens) // blocks)))


def stream_team(hidden: int, warps: int) -> tuple[int, int]:
    """(256s of channels that a warp of csrc/combine_streams.cu has, warps that share a row): of what is compiled, that which
    leaves the fewest of a block's ``warps`` idle; (0, 0) where rows are too long for them.  One warp of a team asks for rows,
    and one of the block tells peers: 7168 channels and 16 warps make one team of 14 and 1, 4096 two of 6 and 1."""
    best, most = (0, 0), 0
    for steps in STREAM_STEPS:
        parts = -(-hidden // (256 * steps))
        busy = (warps - 1) // (parts + 1) * parts
        if busy > most:
            best, most = (steps, parts), busy
    return best
