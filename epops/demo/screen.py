"""What the demo shows while it works: a bar with the loss and the speed on a terminal, a few lines anywhere else."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class Bar:
    """One row of the screen: steps of one thing."""

    def __init__(self, screen: Screen, title: str, steps: int, tokens_a_step: int) -> None:
        self.screen, self.title, self.steps, self.tokens = screen, title, steps, tokens_a_step
        self.row: Any = screen.progress.add_task(title, total=steps, detail="compiling …")
        self.since = 0.0
        self.speed = 0.0

    def step(self, step: int, loss: float) -> None:
        """Step ``step`` (from 0) is done.  The clock starts after the first, which compiles."""
        if step == 0:
            self.since = time.perf_counter()
        else:
            self.speed = step * self.tokens / max(time.perf_counter() - self.since, 1e-9)
        detail = f"loss {loss:.3f}  {self.speed:,.0f} tokens/s"
        self.screen.progress.update(self.row, completed=step + 1, detail=detail)
        every = max(1, self.steps // 10)
        if not self.screen.live and (step % every == every - 1 or step in (0, self.steps - 1)):
            self.screen.say(f"{self.title}: step {step + 1} of {self.steps}, {detail}")


class Screen:
    """Rank 0's terminal; the others' screens are ``quiet``."""

    def __init__(self, *, quiet: bool) -> None:
        self.console = Console(quiet=quiet, highlight=False)
        self.live = self.console.is_terminal and not quiet
        columns = [
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("[green]{task.fields[detail]}"),
            TimeElapsedColumn(),
        ]
        self.progress = Progress(*columns, console=self.console, disable=not self.live)

    def __enter__(self) -> Screen:
        self.progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.progress.stop()

    def bar(self, title: str, steps: int, tokens_a_step: int) -> Bar:
        return Bar(self, title, steps, tokens_a_step)

    def say(self, *what: Any) -> None:
        """A line (or anything that rich prints) above the bars."""
        self.console.print(*what)
