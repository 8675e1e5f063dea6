"""What the schedule does with slots and buckets, without a model."""

from __future__ import annotations

import random

from epops.serving.request import Request
from epops.serving.schedule import Need, Schedule, choose


def request(number: int, prompt: int, new: int = 4) -> Request:
    return Request(number, list(range(prompt)), new, 0.0, 1.0, 0, frozenset(), None)


def fill(schedule: Schedule) -> list[tuple[int, int, int]]:
    chunks = schedule.prefill()
    for chunk in chunks:
        chunk.request.filled += chunk.length
    return [(chunk.request.number, chunk.start, chunk.length) for chunk in chunks]


def test_a_prefill_takes_prompts_in_order_as_far_as_their_padded_block_fits() -> None:
    schedule = Schedule((1, 2, 4), budget=12)
    schedule.queue.extend(request(number, length) for number, length in enumerate([3, 4, 5, 2, 1]))
    assert fill(schedule) == [(0, 0, 3), (1, 0, 4)], "three rows of five would be 15 tokens"
    assert fill(schedule) == [(2, 0, 5), (3, 0, 2)]
    assert schedule.need() == Need(0, 4), "no slot is free for the last"
    schedule.release(schedule.running[1])
    assert schedule.need() == Need(1, 4) and fill(schedule) == [(4, 0, 1)]
    assert schedule.running[1].number == 4


def test_a_prompt_beyond_the_budget_goes_alone_and_in_parts() -> None:
    schedule = Schedule((1, 2), budget=4)
    schedule.queue.extend([request(0, 9), request(1, 2)])
    assert fill(schedule) == [(0, 0, 4)]
    assert schedule.need() == Need(1, 0), "a request whose prompt is not read through takes part in no decode step"
    assert [fill(schedule), fill(schedule), fill(schedule)] == [[(0, 4, 4)], [(0, 8, 1), (1, 0, 2)], []]
    assert schedule.need() == Need(0, 2)


def test_requests_move_into_a_smaller_bucket() -> None:
    schedule = Schedule((1, 2, 4), budget=64)
    schedule.queue.extend(request(number, 2) for number in range(4))
    fill(schedule)
    first, second, third, fourth = schedule.running
    schedule.release(first)
    assert schedule.need().bucket == 4 and not schedule.compact(4)
    schedule.release(third)
    assert schedule.need().bucket == 2
    assert schedule.compact(2) == [(3, 0)] and (fourth.slot, second.slot) == (0, 1)
    assert schedule.slots == [fourth, second, None, None]


def test_a_request_in_the_queue_can_be_released() -> None:
    schedule = Schedule((1,), budget=4)
    one = request(0, 2)
    schedule.queue.append(one)
    schedule.release(one)
    assert schedule.need() == Need(0, 0) and choose([schedule.need()], prefilled=False) is None


def test_any_order_of_events_keeps_requests_and_slots_in_step() -> None:
    chance = random.Random(0)
    for _ in range(200):
        schedule = Schedule((1, 3, 5), budget=7)
        made, prefilled = 0, False
        for _ in range(60):
            if chance.random() < 0.4:
                schedule.queue.append(request(made, chance.randint(1, 12), chance.randint(1, 5)))
                made += 1
            need = choose([schedule.need()], prefilled)
            if need is None:
                assert not schedule.queue and not schedule.running
                continue
            prefilled = bool(need.prefill)
            if prefilled:
                chunks = schedule.prefill()
                assert chunks and len(chunks) * max(chunk.length for chunk in chunks) <= 7
                for chunk in chunks:
                    chunk.request.filled += chunk.length
                    chunk.request.launched += chunk.ends_prompt
            else:
                schedule.compact(need.bucket)
                decoding = [one for one in schedule.running if one.decoding]
                assert decoding and all(one.slot < need.bucket for one in decoding)
                for one in decoding:
                    one.launched += 1
                    if one.launched >= one.max_new_tokens:
                        schedule.release(one)
            assert all(schedule.slots[one.slot] is one for one in schedule.running)
