"""What `epops generate` shows: a progress bar, every rank's text as it comes, and a table of figures at the end."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ..demo.launch import Place
from .measure import Report
from .order import Words
from .request import Event

REFRESH = 0.1
"""Seconds between two looks at what the other ranks have written."""


class Feed:
    """Text from the other ranks of this machine to the first one's screen: a file a rank, a line of JSON a token."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.file = open(self._path(place.rank), "a") if place.store is not None and place.rank else None  # noqa: SIM115
        self.read = [0] * place.size

    def _path(self, rank: int) -> Path:
        return self.place.folder / f"rank{rank}.text"

    def put(self, number: int, text: str, finished: str) -> None:
        if self.file is not None:
            self.file.write(json.dumps([number, text, finished]) + "\n")
            self.file.flush()

    def take(self) -> list[tuple[int, int, str, str]]:
        """(rank, request, text so far, how it finished) of what was put since the last call; whole lines only."""
        found = []
        for rank in range(1, self.place.size if self.place.store is not None else 0):
            path = self._path(rank)
            if not path.exists():
                continue
            with path.open("rb") as file:
                file.seek(self.read[rank])
                lines = file.read()
            whole = lines[: lines.rfind(b"\n") + 1]
            self.read[rank] += len(whole)
            found += [(rank, *json.loads(line)) for line in whole.splitlines()]
        return found


class Show:
    """The screen of one rank: the first one's has all of it, under torchrun each prints its own answers."""

    def __init__(self, place: Place, words: Words, tokens: int) -> None:
        """``tokens``: how many there will be at most, of this rank."""
        self.place, self.words = place, words
        self.feed = Feed(place)
        self.console = Console(quiet=place.store is not None and place.rank != 0, highlight=False)
        self.texts: dict[int, tuple[int, str]] = {}
        """Rank → (request, its text so far): the newest."""
        columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
        self.progress = Progress(
            *columns, TextColumn("{task.fields[detail]}"), TimeElapsedColumn(), console=self.console
        )
        self.row = self.progress.add_task("tokens of rank 0", total=tokens, detail="compiling …")
        self.live = Live(self._view(), console=self.console, refresh_per_second=8, transient=True)
        self.shows = self.console.is_terminal and not self.console.quiet
        self.looked = 0.0

    def __enter__(self) -> Show:
        if self.shows:
            self.live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._look(force=True)
        self.live.stop()

    def say(self, *what: Any) -> None:
        self.console.print(*what)

    def began(self) -> None:
        """Compiling is over."""
        self.progress.update(self.row, detail="")

    def event(self, event: Event) -> None:
        """A token of this rank."""
        text = self.words.text(event.request.tokens)
        self.progress.advance(self.row)
        self.feed.put(event.request.number, text, event.finished)
        self._text(self.place.rank, event.request.number, text, event.finished)
        self._look()

    def _look(self, force: bool = False) -> None:
        if self.place.rank == 0 and (force or time.monotonic() - self.looked > REFRESH):
            self.looked = time.monotonic()
            for rank, number, text, finished in self.feed.take():
                self._text(rank, number, text, finished)
            self.live.update(self._view())

    def _text(self, rank: int, number: int, text: str, finished: str) -> None:
        self.texts[rank] = (number, text)
        if finished:
            self.say(Text(f"rank {rank}, request {number}: ", style="bold") + Text(_plain(text)))

    def _view(self) -> Any:
        panels = [
            Panel(Text(_plain(text)[-300:]), title=f"rank {rank}, request {number}", title_align="left")
            for rank, (number, text) in sorted(self.texts.items())
        ]
        return Group(*panels, self.progress)

    def table(self, reports: list[Report]) -> None:
        """Figures of every rank."""
        self.say(figures(reports))


def figures(reports: list[Report]) -> Table:
    """A column a rank and one for all together."""

    def milliseconds(seconds: float) -> str:
        return f"{1000 * seconds:.2f} ms"

    rows: list[tuple[str, list[str], str]] = [
        ("requests", [str(one.requests) for one in reports], str(sum(one.requests for one in reports))),
        ("tokens", [str(one.tokens) for one in reports], str(sum(one.tokens for one in reports))),
        (
            "tokens/s",
            [f"{one.tokens_per_second:,.1f}" for one in reports],
            f"{sum(one.tokens_per_second for one in reports):,.1f}",
        ),
        ("between tokens, p50", [milliseconds(one.inter_token_p50) for one in reports], ""),
        ("between tokens, p99", [milliseconds(one.inter_token_p99) for one in reports], ""),
        ("first token, p50", [milliseconds(one.first_token_p50) for one in reports], ""),
        ("prefills", [str(one.prefills) for one in reports], ""),
        ("graphs", [str(one.graphs) for one in reports], ""),
    ]
    for bucket in sorted({bucket for one in reports for bucket in one.decode_steps}):
        rows.append((f"decode steps of {bucket}", [str(one.decode_steps.get(bucket, 0)) for one in reports], ""))
    table = Table(title="generated", title_justify="left")
    table.add_column("")
    for rank in range(len(reports)):
        table.add_column(f"rank {rank}", justify="right")
    if len(reports) > 1:
        table.add_column("all", justify="right")
    for what, values, total in rows:
        table.add_row(what, *values, *([total] if len(reports) > 1 else []))
    return table


def _plain(text: str) -> str:
    """On one line, without what a terminal would take for a command."""
    return "".join(letter if letter.isprintable() else "·" for letter in text.replace("\n", " "))
