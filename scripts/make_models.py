"""Checks every MoE family of the installed transformers over expert-parallel ranks, and writes docs/models.md.

For each family a tiny instance is sharded by `epops.parallelize` and compared with the one-process model: outputs and all
gradients, eager and compiled, fp32 and bf16, and the tokens of ``generate``.  It takes hours on two cores; results are
kept in a file after every stage of a family, and a second run with ``--resume`` goes on from there.  Runs on several
machines make one table: ``--merge FILE`` takes other runs' results too, and ``--only-table`` runs nothing.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
import queue
import struct
import sys
import threading
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


Cell = dict[str, Any]
"""What is kept of one stage of one family: ``ok``, ``says`` (its words in the table), ``seconds``, ``torch`` and ``ranks`` it ran
with, ``error`` and ``limit`` where numbers were compared, ``over``: the tensors beyond the plain limit, and ``own_scale``:
gradients were compared without a floor."""

Results = dict[str, dict[str, Cell]]
"""Family → stage → cell."""


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


TORCH = torch.__version__.split("+")[0]


def run_stage(pool: Pool, family: str, name: str, timeout: float) -> Cell:
    """One stage of one family, on the ranks of ``pool``."""
    stage, began = STAGES[name], time.monotonic()
    cell: Cell = {"own_scale": True, "torch": TORCH, "ranks": pool.ranks}
    if name == "generate" and family in NO_GENERATE:
        cell["ok"], cell["says"] = True, NO_GENERATE[family]
    else:
        try:
            results = pool.run(stage.call, family, timeout=timeout, **stage.settings())
            cell["ok"], cell["says"] = judge(stage, results)
            if "error" in results[0]:
                worst = max(results, key=lambda r: r["error"] / r["limit"])
                cell["error"], cell["limit"] = worst["error"], worst["limit"]
                cell["over"] = {
                    name: max(r["over"].get(name, 0.0) for r in results) for r in results for name in r["over"]
                }
        except RankError as error:
            cell["ok"], cell["says"] = False, str(error)
    cell["seconds"] = round(time.monotonic() - began, 1)
    return cell


def stands(name: str, cell: Cell | None, ranks: int, retry: bool) -> bool:
    """Whether an earlier run's cell need not be run again: compared as today, over as many ranks."""
    if cell is None or (retry and not cell["ok"]):
        return False
    return (name == "generate" or bool(cell.get("own_scale"))) and cell.get("ranks", ranks) == ranks


def merge(results: Results, other: Results) -> None:
    """``other``'s cells into ``results``: they win, but never one that was compared with a floor over one that was not."""
    for family, cells in other.items():
        mine = results.setdefault(family, {})
        for name, cell in cells.items():
            if cell.get("own_scale") or not mine.get(name, {}).get("own_scale"):
                mine[name] = cell


def write(path: Path, text: str) -> None:
    """All of it or nothing: whoever ends this process leaves a file that can be read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


def drop_cut_libraries(cache: Path) -> int:
    """Remove the shared libraries in Inductor's cache that a killed compiler left unfinished; it would load them for ever."""
    cut = 0
    for library in cache.rglob("*.so"):
        head = library.read_bytes()[:64]
        whole = len(head) == 64 and head[:4] == b"\x7fELF"
        if whole:  # the section headers stand last
            start, (size, count) = struct.unpack_from("<Q", head, 40)[0], struct.unpack_from("<HH", head, 58)
            whole = library.stat().st_size >= start + size * count > 0
        if not whole:
            library.unlink()
            cut += 1
    return cut


def reason(family: str, cells: dict[str, Cell]) -> str:
    """ "works", or why not: what is known about the first failure, or the first line of what it said."""
    failed = [(name, cells[name]["says"]) for name in STAGES if name in cells and not cells[name]["ok"]]
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
    (
        "glm5_next",
        "compiled",
    ): ". Inductor refuses the one-process model on CPU with the same words, for the bmm of its attention's indexer over a batch "
    "of two or more",
}
"""What an error's text does not tell, by (family, stage)."""


def _floored(results: Results, stages: list[str]) -> str:
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


def _only_by_rounding(results: Results, stages: list[str]) -> str:
    """Which tensors are beyond the plain limit, and pass because the one-process model's own rounding is as large."""
    found = []
    for family, cells in sorted(results.items()):
        for stage in stages:
            cell = cells.get(stage, {})
            tensors = [f"{name or 'the output'} {error:.1e}" for name, error in sorted(cell.get("over", {}).items())]
            if tensors and cell["ok"]:
                found.append(f"{family} ({STAGES[stage].title}: {', '.join(tensors)})")
    if not found:
        return ""
    why = "gradients that all but cancel (a key's bias does not change a softmax at all)"
    return f" Only the latter holds for {why}: {'; '.join(found)}."


def _ran_with(results: Results, stages: list[str]) -> str:
    """Torch and ranks, of each column where they are not the same in all."""
    columns: dict[str, list[str]] = {}
    for stage in stages:
        kinds: dict[str, int] = {}
        for cells in results.values():
            if stage in cells:
                torch_, ranks = cells[stage].get("torch"), cells[stage].get("ranks")
                words = f"torch {torch_}, {ranks} ranks" if torch_ else "a torch that was not recorded"
                kinds[words] = kinds.get(words, 0) + 1
        for words, families_ in kinds.items():
            count = f" of {families_} families" if len(kinds) > 1 else ""
            columns.setdefault(words, []).append(STAGES[stage].title + count)
    if len(columns) == 1:
        return next(iter(columns))
    return "; ".join(f"{words} ({', '.join(titles)})" for words, titles in columns.items())


def table(results: Results, stages: list[str]) -> str:
    """docs/models.md."""
    import transformers

    works = sum(reason(f, cells) == "works" for f, cells in results.items())
    interface = set(families(True))
    lines = [
        "# Model families",
        "",
        "Written by `make models` (scripts/make_models.py); do not edit.",
        "",
        f"transformers {transformers.__version__}, {_ran_with(results, stages)}; each rank with a batch and a length of its "
        f"own.  {works} of {len(results)} families work.",
        "",
        "Numbers are the largest difference from the one-process model, of the output and of each parameter's gradient (the "
        "one-process model's on all ranks' batches), relative to the largest value of that very tensor, where it is nearest its "
        "limit: 1e-5 in float32, 2e-2 in bf16 with the same routing, or twice what rounding moves the one-process model's own "
        f"tensor (its distance from the same weights in a wider dtype).{_only_by_rounding(results, stages)}"
        f"{_floored(results, stages)} *captured*: "
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
        bool, typer.Option("--resume", help="Keep what an earlier run found and is still comparable; run the rest.")
    ] = False,
    retry: Annotated[bool, typer.Option("--retry", help="With --resume: run what failed again.")] = False,
    results_file: Annotated[Path, typer.Option("--results", help="Where results are kept.")] = ROOT
    / ".cache"
    / "models.json",
    merged: Annotated[
        list[Path] | None,
        typer.Option("--merge", help="Another run's results, for the table and for --resume; later ones win."),
    ] = None,
    only_table: Annotated[
        bool, typer.Option("--only-table", help="Run nothing; write the table of what there is.")
    ] = False,
    threads: Annotated[int, typer.Option(help="Compile threads a rank.")] = 1,
    output: Annotated[Path, typer.Option(help="The table.")] = ROOT / "docs" / "models.md",
) -> None:
    """Check model families over expert-parallel ranks and write the table."""
    names = chosen.split(",") if chosen else families()
    wanted = stages.split(",") if stages else [s for s in STAGES if not eager_only or STAGES[s].compiler == "eager"]
    for name in wanted:
        if name not in STAGES:
            raise typer.BadParameter(f"--stages: got {name!r}, expected some of {', '.join(STAGES)}")
    own: Results = {}
    if (resume or only_table) and results_file.exists():
        own = json.loads(results_file.read_text())
    results: Results = {}
    merge(results, own)
    for path in merged or []:
        merge(results, json.loads(path.read_text()))
    console = Console()
    if not only_table:

        def keep(family: str, name: str, cell: Cell) -> None:
            own.setdefault(family, {})[name] = cell
            write(results_file, json.dumps(own, indent=1, sort_keys=True))

        cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
        if resume and cache and (cut := drop_cut_libraries(Path(cache))):
            console.print(f"removed {cut} unfinished libraries from Inductor's cache")
        missing = {f: [s for s in wanted if not stands(s, results.get(f, {}).get(s), ranks, retry)] for f in names}
        run(missing, results, keep, console, ranks=ranks, jobs=jobs, timeout=timeout, threads=threads)
    shown = [s for s in STAGES if any(s in cells for cells in results.values())]
    write(output, table(results, shown))
    console.print(f"wrote {output}")


def run(
    missing: dict[str, list[str]],
    results: Results,
    keep: Callable[[str, str, Cell], None],
    console: Console,
    *,
    ranks: int,
    jobs: int,
    timeout: float,
    threads: int,
) -> None:
    """Run family → stages into ``results``, families that took longest before first; ``keep`` each cell when it is there."""
    took = {f: sum(results.get(f, {}).get(s, {}).get("seconds", 0.0) for s in stages) for f, stages in missing.items()}
    names = sorted((f for f in missing if missing[f]), key=lambda f: -took[f])
    pools: queue.Queue[Pool] = queue.Queue()
    for _ in range(jobs):
        pools.put(Pool(ranks, env={"TORCHINDUCTOR_COMPILE_THREADS": str(threads)}))
    keeping = threading.Lock()

    def work(family: str) -> str:
        pool = pools.get()
        try:
            for name in missing[family]:
                cell = run_stage(pool, family, name, timeout)
                with keeping:
                    results.setdefault(family, {})[name] = cell
                    keep(family, name, cell)
                    said = cell["says"][:60] if cell["ok"] else "NO"
                    progress.console.print(
                        f"{family}: {STAGES[name].title} {said}, {cell['seconds']:.0f} s",
                        soft_wrap=True,
                        highlight=False,
                    )
            return family
        finally:
            pools.put(pool)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress, concurrent.futures.ThreadPoolExecutor(jobs) as workers:
        task = progress.add_task("families", total=len(names))
        for done in concurrent.futures.as_completed([workers.submit(work, family) for family in names]):
            family = done.result()
            progress.console.print(f"{family}: {reason(family, results[family])}", soft_wrap=True, highlight=False)
            progress.advance(task)
    while not pools.empty():
        pools.get().close()


if __name__ == "__main__":
    typer.run(main)
