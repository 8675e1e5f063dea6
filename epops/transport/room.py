"""How a call of a kernel fits a multiprocessor: teams of warps, and what of shared memory each has."""

from __future__ import annotations

from typing import Any

import epops._C as _C

from .plans import COUNTED, LINES, STREAMED, Plan, stream_team

BOARD_WORDS = 40 << 10  # of selections, which every block of a dispatch reads
MOST_SLOTS = 0xFFD  # that selections have numbers for
COMBINE_THREADS = 512
STREAM_ROWS, LEAST_STREAM_ROWS = 32, 4  # of a team of csrc/combine_streams.cu, at most and at least
FLOAT32 = 2  # enum DType


def beside_bytes(top_k: int) -> int:
    """Bytes of a record as lines that its weights, or their gradients, take."""
    return -(-top_k * 4 // 16) * 16


def fits_lines(p: Any) -> bool:
    return p.ws.num_ranks == 1 or (p.max_tokens <= p.ws.line_tokens and _C.lines_bytes(p.sent_bytes) <= p.ws.line_bytes)


def rows_as(p: Any, plan: Plan, shared: int) -> int:
    """How rows travel: as the plan says, where that fits; from what is equal on all ranks.  Sets teams and stages of lines."""
    words_read = 4 * p.ws.num_ranks * p.max_tokens * -(-p.top_k // 8)
    p.sent_bytes = p.record_bytes + beside_bytes(p.top_k)
    if (
        plan.rows_as != LINES
        or words_read > BOARD_WORDS
        or p.max_tokens > p.ws.board_tokens
        or p.num_slots > MOST_SLOTS
    ):
        return COUNTED
    if not fits_lines(p):
        return COUNTED
    p.stage_bytes = -(-p.sent_bytes // 128) * 128
    apart = plan.num_senders < plan.num_blocks
    placers = plan.num_blocks - plan.num_senders if apart else plan.num_blocks
    for parts in range(plan.recv_warps, plan.num_threads // 32 + 1):
        teams = plan.num_threads // 32 // parts
        tokens = -(-max(1, p.max_tokens) // (placers * teams))
        p.launch.send_warps = p.launch.recv_warps = parts
        for p.num_land in (2, 1):
            p.num_stages = tokens + p.num_land
            if p.lines_shared_bytes() <= shared:
                return LINES
    p.launch.send_warps = p.launch.recv_warps = 1
    return COUNTED


def lay_out_stages(p: Any, shared: int) -> None:
    """A stage a warp for rows on their way: all of a row and its scales, or as much as fits; fewer warps where that is little."""
    scales = p.record_bytes - p.row_bytes
    for warps in (16, 8, 4, 2):  # one of them tells peers
        p.launch.num_threads, p.stage_bytes = 32 * warps, 0
        room = (shared - p.shared_bytes()) // warps - scales - 128
        if room >= min(p.row_bytes, 2048):
            break
    p.piece_bytes = p.row_bytes if room >= p.row_bytes else room // 512 * 512
    p.stage_bytes = -(-(p.piece_bytes + scales) // 128) * 128


def answer_lines(p: Any, plan: Plan, shared: int) -> None:
    """Teams of csrc/combine_lines.cu, where it takes this call: one a token of the block, if there are enough warps.  Whether it
    does follows from what is equal on all ranks."""
    if p.in_dtype != p.out_dtype or p.in_dtype == FLOAT32 or not fits_lines(p):
        p.launch.num_senders = p.launch.num_blocks
        return
    if p.lines_shared_bytes() > shared:
        return
    warps = COMBINE_THREADS // 32
    answers = p.max_tokens * max(1, p.ws.num_ranks - 1)
    apart = plan.num_senders < plan.num_blocks
    of_block = max(
        -(-max(1, answers) // plan.num_senders),
        -(-max(1, p.max_tokens) // (plan.num_blocks - plan.num_senders if apart else plan.num_blocks)),
    )
    steps = -(-_C.lines_bytes(p.sent_bytes) // 512)
    parts = max(1, min(warps // min(warps, of_block), -(-steps // 2)))  # a warp has two steps of a row at once
    p.launch.send_warps = p.launch.recv_warps = parts
    p.launch.num_threads, p.launch.rows_as = COMBINE_THREADS, LINES


def stream_rows(p: Any, shared: int) -> None:
    """Teams of csrc/combine_streams.cu and their room for rows, where it takes this call.  A rank's own affair: what travels is
    the same as csrc/combine.cu's."""
    if p.in_dtype != p.out_dtype or p.in_dtype == FLOAT32:
        return
    warps = COMBINE_THREADS // 32
    steps, parts = stream_team(p.hidden, warps)
    if parts == 0:
        return
    settings = p.launch.send_warps, p.launch.recv_warps, p.launch.num_threads
    p.launch.send_warps = p.launch.recv_warps = parts
    p.launch.num_threads, p.stream_steps = COMBINE_THREADS, steps
    teams = (warps - 1) // (parts + 1)
    for rows in range(min(STREAM_ROWS, shared // (teams * p.record_bytes)), LEAST_STREAM_ROWS - 1, -1):
        p.stream_rows = rows
        if p.streams_shared_bytes() <= shared:
            p.launch.rows_as = STREAMED
            return
    p.launch.send_warps, p.launch.recv_warps, p.launch.num_threads = settings
