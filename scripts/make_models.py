"""Checks every MoE family of the installed transformers over expert-parallel ranks, and writes docs/models.md.

For each family a tiny instance is sharded by `epops.parallelize` and compared with the one-process model: outputs and all
gradients, eager and compiled, fp32 and bf16, and the tokens of ``generate``.  It takes hours on two cores; results are
kept in a file as they come, and a second run with ``--resume`` goes on from there.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
import queue
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])

import torch  # noqa: E402
import typer  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: E402

from epops.zoo import check, families  # noqa: E402
from epops.zoo.pool import Pool, RankError  # noqa: E402
from epops.zoo.tweaks import NO_GENERATE  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Stage:
    """One column of the table."""

    title: str
    call: Callable[..., dict[str, Any]]
    dtype: torch.dtype | None = torch.float32
    compiler: str = "eager"

    def settings(self) -> dict[str, Any]:
        return {"compiler": self.compiler} | ({} if self.dtype is None else {"dtype": self.dtype})


STAGES = {
    "eager": Stage("eager", check.gradients),
    "bf16": Stage("bf16", check.gradients, dtype=torch.bfloat16),
    "generate": Stage("generate", check.generate, dtype=None),
    "captured": Stage("captured", check.gradients, compiler="capture"),
    "graph": Stage("whole graph", check.gradients, compiler="graph"),
    "compiled": Stage("compiled", check.gradients, compiler="epops"),
}
"""Stages in the order in which a family goes through them, cheap ones first."""


def judge(stage: Stage, results: list[dict[str, Any]]) -> tuple[bool, str]:
    """Whether a stage passed, and what its cell of the table says."""
    if "tokens" in results[0]:
        return True, results[0]["cache"] + " cache"
    worst = max(results, key=lambda r: r["error"] / r["limit"])
    breaks, flips = max(r["breaks"] for r in results), max(r["flips"] for r in results)
    if worst["error"] <= worst["limit"] and breaks == 0:
        return True, f"{worst['error']:.0e}"
    where = f"the gradient of {worst['worst']}" if worst["worst"] else "the output"
    because = f", with {flips} choices of experts that differ" if flips else ""
    return False, f"{breaks} graph breaks" if breaks else f"{where} differs by {worst['error']:.1e}{because}"


def run_family(pool: Pool, family: str, stages: list[str], timeout: float) -> dict[str, dict[str, Any]]:
    """Stage → ``{"ok", "says", "seconds"}``."""
    cells: dict[str, dict[str, Any]] = {}
    for name in stages:
        stage, began = STAGES[name], time.monotonic()
        if name == "generate" and family in NO_GENERATE:
            ok, says = True, NO_GENERATE[family]
        else:
            try:
                ok, says = judge(stage, pool.run(stage.call, family, timeout=timeout, **stage.settings()))
            except RankError as error:
                ok, says = False, str(error)
        cells[name] = {"ok": ok, "says": says, "seconds": round(time.monotonic() - began, 1), "own_scale": True}
    return cells


def reason(family: str, cells: dict[str, dict[str, Any]]) -> str:
    """ "works", or why not: what is known about the first failure, or the first line of what it said."""
    failed = [(name, cell["says"]) for name, cell in cells.items() if not cell["ok"]]
    if not failed:
        return "works"
    name, says = failed[0]
    return f"{STAGES[name].title}: {says.splitlines()[0][:160]}{KNOWN.get((family, name), '')}"


_INDEXER = (
    ". Its sparse-attention indexer loops over tokens and asks tensors for sizes (`nonzero`), so the one-process model does not "
    "capture whole either"
)

KNOWN: dict[tuple[str, str], str] = {
    ("qwen4_exp", "captured"): _INDEXER,
    ("qwen4_exp", "graph"): _INDEXER,
    ("qwen4_exp", "compiled"): _INDEXER,
    ("nllb_moe", "bf16"): (
        ". transformers adds one expert's output E - 1 times and rounds each sum to bf16; here it is one product. float32 agrees"
    ),
    (
        "glm5_next",
        "compiled",
    ): ". Inductor refuses the one-process model on CPU with the same words, for its attention's bmm",
    ("doge", "bf16"): ". Four of six seeds are within the limit",
}
"""What an error's text does not tell, by (family, stage)."""


def _floored(results: dict[str, dict[str, dict[str, Any]]], stages: list[str]) -> str:
    """Which columns are of runs before gradients were compared without a floor."""
    old = [
        STAGES[stage].title
        for stage in stages
        if stage != "generate"
        and any(not cells.get(stage, {"own_scale": 1}).get("own_scale") for cells in results.values())
    ]
    if not old:
        return ""
    return (
        f" Older figures (in {', '.join(old)}): a gradient whose largest value is under a hundredth of the model's largest was "
        "compared with that hundredth."
    )


def table(results: dict[str, dict[str, dict[str, Any]]], stages: list[str], ranks: int) -> str:
    """docs/models.md."""
    import transformers

    works = sum(reason(f, cells) == "works" for f, cells in results.items())
    interface = set(families(True))
    lines = [
        "# Model families",
        "",
        "Written by `make models` (scripts/make_models.py); do not edit.",
        "",
        f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}, {ranks} ranks, each with a batch "
        f"and a length of its own: {works} of {len(results)} families work.",
        "",
        "Numbers are the largest difference from the one-process model, of the output and of each parameter's gradient (the "
        "one-process model's on all ranks' batches), relative to the largest value of that very tensor, where it is nearest its "
        "limit: 1e-5 in float32, 2e-2 in bf16 with the same routing, or twice what rounding moves the one-process model's own "
        f"tensor (its distance from the same weights in a wider dtype).{_floored(results, stages)} *captured*: "
        "Dynamo takes the whole forward as one graph (`fullgraph=True`); *whole graph*: "
        "`fullgraph=True` through the epops passes, forward and backward, the graphs run node by node; *compiled*: the same "
        "through Inductor. *generate*: tokens equal the one-process model's; ranks end at different steps.",
        "",
        "| family | experts interface | " + " | ".join(STAGES[s].title for s in stages) + " | |",
        "|---" * (len(stages) + 3) + "|",
    ]
    for family, cells in sorted(results.items()):
        row = [cells[s]["says"] if s in cells and cells[s]["ok"] else "no" if s in cells else "not run" for s in stages]
        text = reason(family, cells).replace("|", "\\|")
        lines.append(f"| {family} | {'yes' if family in interface else 'own'} | {' | '.join(row)} | {text} |")
    return "\n".join(lines) + "\n"


def main(
    chosen: Annotated[str, typer.Option("--families", help="Comma-separated; default: all.")] = "",
    ranks: Annotated[int, typer.Option(help="Expert-parallel ranks.")] = 2,
    stages: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(STAGES)}; default: all.")] = "",
    eager_only: Annotated[bool, typer.Option("--eager-only", help="Nothing that compiles.")] = False,
    jobs: Annotated[int, typer.Option(help="Families at a time; each has its own ranks.")] = 1,
    timeout: Annotated[float, typer.Option(help="Seconds for one stage of one family.")] = 900.0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what an earlier run found; run what is missing.")
    ] = False,
    results_file: Annotated[Path, typer.Option("--results", help="Where results are kept.")] = ROOT
    / ".cache"
    / "models.json",
    output: Annotated[Path, typer.Option(help="The table.")] = ROOT / "docs" / "models.md",
) -> None:
    """Check model families over expert-parallel ranks and write the table."""
    names = chosen.split(",") if chosen else families()
    wanted = stages.split(",") if stages else [s for s in STAGES if not eager_only or STAGES[s].compiler == "eager"]
    for name in wanted:
        if name not in STAGES:
            raise typer.BadParameter(f"--stages: got {name!r}, expected some of {', '.join(STAGES)}")
    results: dict[str, dict[str, dict[str, Any]]] = {}
    if resume and results_file.exists():
        results = json.loads(results_file.read_text())
    results_file.parent.mkdir(parents=True, exist_ok=True)
    console = Console()
    pools: queue.Queue[Pool] = queue.Queue()
    for _ in range(jobs):
        pools.put(Pool(ranks))

    def work(family: str) -> tuple[str, dict[str, dict[str, Any]]]:
        pool = pools.get()
        try:
            return family, run_family(pool, family, [s for s in wanted if s not in results.get(family, {})], timeout)
        finally:
            pools.put(pool)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress, concurrent.futures.ThreadPoolExecutor(jobs) as threads:
        task = progress.add_task("families", total=len(names))
        for done in concurrent.futures.as_completed([threads.submit(work, family) for family in names]):
            family, cells = done.result()
            results.setdefault(family, {}).update(cells)
            results_file.write_text(json.dumps(results, indent=1, sort_keys=True))
            said = " · ".join(f"{STAGES[s].title} {c['says'][:60] if c['ok'] else 'NO'}" for s, c in cells.items())
            progress.console.print(
                f"{family}: {reason(family, results[family])} ({said})", soft_wrap=True, highlight=False
            )
            progress.advance(task)
    while not pools.empty():
        pools.get().close()
    shown = [s for s in STAGES if any(s in cells for cells in results.values())]
    output.write_text(table(results, shown, ranks))
    console.print(f"wrote {output}")


if __name__ == "__main__":
    typer.run(main)
