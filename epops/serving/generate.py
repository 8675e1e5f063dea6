"""What every rank of `epops generate` does: load, warm up, answer its share of the prompts."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ..demo.launch import Place, process_group
from ..group import ExpertGroup
from .engine import Engine
from .measure import Report
from .order import COMMAND, Order
from .screen import Show
from .settings import BUCKETS

TIMEOUT = 1800.0
"""Seconds that ranks wait for one another: one may still be loading, or compiling, when the others are ready."""


def work(place: Place, order: Order) -> bool:
    """The whole command on one rank; whether every request was answered."""
    torch.manual_seed(order.seed)
    with process_group(place):
        share = -(-max(len(order.prompts), 0 if order.prompts else order.requests) // place.size)
        buckets = order.buckets or _buckets(share)
        with ExpertGroup(max_tokens=max(buckets[-1], order.prefill_tokens), timeout=TIMEOUT) as group:
            model, words = order.build(group)
            prompts = order.ids(words)
            mine = prompts[place.rank :: place.size]
            length = max(map(len, prompts)) + order.max_new_tokens
            engine = Engine(model, group, buckets=buckets, max_length=length, compiled=order.compiled)
            with engine, Show(place, words, len(mine) * order.max_new_tokens) as show:
                if place.rank == 0:
                    show.say(f"{order.model} over {group!r}, torch {torch.__version__}")
                engine.warm_up()
                show.began()
                for number, ids in enumerate(mine):
                    engine.submit(
                        ids,
                        max_new_tokens=order.max_new_tokens,
                        temperature=order.temperature,
                        top_p=order.top_p,
                        seed=order.seed + place.rank + number * place.size,
                    )
                for event in engine.run():
                    show.event(event)
                told: list[Report | None] = [None] * place.size
                dist.all_gather_object(told, engine.report)
            reports = [one for one in told if one is not None]
            if place.rank == 0:
                show.table(reports)
    return sum(one.requests for one in reports) == len(prompts)


def _buckets(requests: int) -> tuple[int, ...]:
    """Powers of two up to the one that holds ``requests``.

    >>> _buckets(5), _buckets(1), _buckets(1000)[-1]
    ((1, 2, 4, 8), (1,), 128)
    """
    return tuple(size for size in BUCKETS if size < 2 * requests)


def parse_buckets(text: str) -> tuple[int, ...]:
    """``"1,4,16"`` as sizes; "" is none.

    >>> parse_buckets("1,4,16"), parse_buckets("")
    ((1, 4, 16), ())
    """
    try:
        sizes = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        sizes = (0,)
    if sizes and (list(sizes) != sorted(set(sizes)) or sizes[0] < 1):
        raise ValueError(f"{COMMAND}: --buckets: expected rising sizes such as 1,2,4, got {text!r}")
    return sizes
