"""What every rank of the demo does: train, compare, generate."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import epops

from .compare import Differences, differences
from .counts import CompileCounts, compile_counts
from .launch import Place, process_group
from .recipe import Curve, Recipe, batch_of, build, train
from .report import Outcome, show
from .sample import Sample, sample
from .screen import Screen
from .text import corpus


class Told(NamedTuple):
    """What each rank tells the others at the end."""

    counts: CompileCounts
    sample: Sample
    differences: Differences | None


def work(place: Place, recipe: Recipe) -> bool:
    """The whole demo on one rank; whether the sharded model was the one-process model."""
    started = time.perf_counter()
    device = torch.device(place.device)
    torch.manual_seed(recipe.seed)
    with process_group(place), Screen(quiet=place.rank != 0) as screen:
        tokens = -(-recipe.batch // place.size) * recipe.length
        # While one rank compiles, the last one trains the one-process model: nobody's exchange may time out meanwhile.
        with epops.ExpertGroup(name="ep", max_tokens=tokens, timeout=1800.0) as group:
            screen.say(f"{recipe.model} over {group!r}, torch {torch.__version__}")
            outcome = _run(place, recipe, device, group, screen, started)
            if place.rank == 0:
                show(screen, outcome)
    return outcome.good


def _run(place: Place, recipe: Recipe, device: torch.device, group: Any, screen: Screen, started: float) -> Outcome:
    text, held_out = corpus()
    last = place.rank == place.size - 1
    model = epops.parallelize(build(recipe, device), group)
    forward = torch.compile(model, fullgraph=True, backend="epops") if recipe.compiled else model
    bar = screen.bar(f"{place.size} ranks", recipe.steps, recipe.batch * recipe.length)
    reference, expected = None, None
    if last:
        alone = screen.bar("1 process", recipe.steps, recipe.batch * recipe.length)
        reference, expected = _train_alone(recipe, device, text, alone.step)
    curve = train(
        model,
        forward,
        lambda step: share(batch_of(text, recipe, step), place).to(device),
        recipe,
        average=lambda loss: average(model, loss, group),
        clip=lambda: epops.clip_grad_norm_(model.parameters(), recipe.max_norm, group),
        on_step=bar.step,
    )
    held = batch_of(held_out, recipe, 0)
    found = differences(model, forward, reference, share(held, place).to(device), held.to(device), curve, expected)
    screen.progress.update(bar.row, description=f"{place.size} ranks, trained")
    written = sample(model, reference, held_out, recipe, place.rank, device)
    told: list[Any] = [None] * place.size
    dist.all_gather_object(told, Told(compile_counts(), written, found))
    return Outcome(
        recipe=recipe,
        ranks=place.size,
        losses=(curve.losses[0], curve.losses[-1]),
        tokens_per_second=bar.speed,
        counts=[one.counts for one in told],
        samples=[one.sample for one in told],
        differences=told[-1].differences,
        graphs=expert_part(model, share(held, place).to(device)) if place.rank == 0 and recipe.compiled else "",
        seconds=time.perf_counter() - started,
    )


def _train_alone(recipe: Recipe, device: torch.device, text: bytes, on_step: Any) -> tuple[Any, Curve]:
    """The one-process model on whole batches, eager and unsharded."""
    model = build(recipe, device)
    curve = train(
        model,
        model,
        lambda step: batch_of(text, recipe, step).to(device),
        recipe,
        average=lambda loss: loss,
        clip=lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_norm),
        on_step=on_step,
    )
    return model, curve


def share(batch: Tensor, place: Place) -> Tensor:
    """This rank's windows."""
    return batch.chunk(place.size)[place.rank]


def average(model: Any, loss: Tensor, group: Any) -> Tensor:
    """Plain data parallelism: gradients of all but the experts, and the loss, are averaged over the ranks."""
    epops.average_gradients(model, group)
    dist.all_reduce(loss)
    return loss / group.size


def expert_part(model: Any, ids: Tensor) -> str:
    """The exchanges and grouped matrix products of the training step's graphs, as the passes left them."""
    from ..inspection.text import graph_text
    from ..testing import captured

    graphs = captured(model.train(), input_ids=ids, labels=ids, use_cache=False)
    parts = [f"{graph.kind}:\n{graph_text(graph.after, ops=('epops',))}" for graph in graphs if graph.kind != "joint"]
    return "\n\n".join(parts)
