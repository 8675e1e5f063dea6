"""The demo's last page: what was checked, what was measured, what the compiler saw, what the model wrote."""

from __future__ import annotations

from typing import NamedTuple

from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from .compare import EARLY, Differences
from .counts import CompileCounts
from .recipe import Recipe
from .sample import Sample
from .screen import Screen

SAME = 1e-4
"""Relative.  Sums in another order: rounding of float32, some of it through a whole backward."""
DRIFT = 5e-2
"""Relative; see `compare.EARLY`."""


class Outcome(NamedTuple):
    recipe: Recipe
    ranks: int
    losses: tuple[float, float]
    tokens_per_second: float
    counts: list[CompileCounts]
    """A rank each."""
    samples: list[Sample]
    differences: Differences
    graphs: str
    seconds: float

    @property
    def graph_breaks(self) -> int:
        return sum(one.graph_breaks for one in self.counts)

    @property
    def checks(self) -> list[tuple[str, str, str, bool]]:
        """(what, found, allowed, whether it is)."""
        d = self.differences
        rows = [
            _limit(f"loss, first {EARLY} steps", d.early_loss, SAME),
            _limit(f"gradient norm, first {EARLY} steps", d.early_norm, SAME),
            _limit("loss, whole curve", d.loss, DRIFT),
            _limit("logits after training, same weights", d.logits, SAME),
            _limit("gradients after training, same weights", d.gradients, SAME),
        ]
        if self.recipe.compiled:
            rows.append(("graph breaks", str(self.graph_breaks), "0", self.graph_breaks == 0))
        return rows

    @property
    def good(self) -> bool:
        return all(ok for *_, ok in self.checks)


def _limit(what: str, found: float, limit: float) -> tuple[str, str, str, bool]:
    # A NaN compares as False, which is what it should be here.
    return what, f"{found:.1e}", f"{limit:.0e}", found <= limit


def show(screen: Screen, outcome: Outcome) -> None:
    screen.progress.stop()
    if outcome.graphs:
        body = Text(outcome.graphs, no_wrap=False)
        screen.say(Panel(body, title="experts in the compiled training step", title_align="left"))
    for rank, one in enumerate(outcome.samples):
        text = Text(one.prompt, style="bold") + Text(one.written)
        screen.say(Panel(text, title=f"rank {rank} writes", title_align="left"))
    screen.say(_summary(outcome))
    verdict = "[bold green]the same model[/]" if outcome.good else "[bold red]NOT the same model[/]"
    screen.say(f"{outcome.ranks} ranks and one process: {verdict}, {outcome.seconds:.0f} s")


def _summary(outcome: Outcome) -> Table:
    table = Table(
        title=f"{outcome.recipe.model}: largest differences of {outcome.ranks} ranks from one process",
        title_justify="left",
    )
    for column in ("", "found", "allowed", ""):
        table.add_column(column, justify="left" if not column else "right")
    for what, found, allowed, ok in outcome.checks:
        table.add_row(what, found, allowed, "[green]ok[/]" if ok else "[red]WRONG[/]")
    table.add_section()
    for what, value in _facts(outcome):
        table.add_row(what, value)
    return table


def _facts(outcome: Outcome) -> list[tuple[str, str]]:
    first, last = outcome.losses
    rows = [
        ("loss, first and last step", f"{first:.3f} → {last:.3f}"),
        ("training, all ranks", f"{outcome.tokens_per_second:,.0f} tokens/s"),
        ("decoding, all ranks", f"{sum(one.tokens_per_second for one in outcome.samples):,.0f} tokens/s"),
        ("text as the one-process model writes it", "yes" if outcome.samples[-1].as_alone else "no"),
    ]
    if outcome.recipe.compiled:
        rows += [
            (f"rank {rank}: graphs, cache hits, compiled", f"{one.graphs}, {one.cache_hits}, {one.compiled}")
            for rank, one in enumerate(outcome.counts)
        ]
    return rows
