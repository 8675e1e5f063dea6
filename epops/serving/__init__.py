"""Generation with an expert-parallel model: continuous batching, one graph a batch size, each rank its own requests.

A small engine to start from, not a server: it has no network interface.  ::

    with epops.ExpertGroup(max_tokens=2048) as group:
        engine = epops.serving.Engine(epops.serving.load("a-folder-with-a-Mixtral", group), group)
        engine.warm_up()
        engine.submit(tokenizer("Once upon a time").input_ids, max_new_tokens=100)
        for event in engine.run():
            print(event.request.number, event.token)
"""

from __future__ import annotations

from .engine import Engine
from .load import load
from .measure import Report
from .request import Event, Request
from .settings import BUCKETS

__all__ = ["BUCKETS", "Engine", "Event", "Report", "Request", "load"]
