"""A decode step of one model: on one device, by transformers' own expert parallelism, and by epops, in one run.

    python benchmarks/bench_decode.py --config 30b --batch 64 --dtype bfloat16 --out benchmarks/results
    python benchmarks/bench_decode.py --config 30b --batch 64 --dtype bfloat16 --contenders epops "epops fp8" --how captured

All contenders have the same weights and decode the same sequences from their first token on, each rank ``--batch`` of them (those
that share one batch have them all).  The first steps are fed the same tokens everywhere, and the logits of the last of these are
compared; from then on each contender feeds itself, and its steps are timed on the host with the device waited for; the median of
the slowest rank counts.  Every contender's tokens are compared with those of the first one.  "epops fp8" is epops after
`epops.quantize_experts`.  ``--profile`` adds what epops' captured steps are made of: kernels by kind, the exchanges' time a layer,
and how often the host launches something.

Each contender and way to run it has processes of its own, which end after ``--limit`` seconds at the latest; what is found is
written after each.  (Under torchrun all of them share the processes that it started.)
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import faulthandler
import gc
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import epops
from epops import zoo
from epops.demo.launch import Place, choose, join_torchrun, process_group, size_under_torchrun, start
from epops.serving.attention import check_model
from epops.serving.step import Steps
from epops.torch_private import mark_static

sys.path.insert(0, str(Path(__file__).parent))  # run by its path, as a module, or imported by a test
from step_profile import Parts, profile, told

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"moe_intermediate_size": 32},  # fp8 products take multiples of 16
    # Qwen3-30B-A3B, with fewer layers.
    "30b": {
        "hidden_size": 2048, "num_hidden_layers": 8, "num_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768, "intermediate_size": 6144, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 4096,
    },
}  # fmt: skip
CONTENDERS = ("one device", "all_to_all", "all_reduce", "epops", "epops fp8")
HOWS = ("eager", "compiled", "captured")
WARM_UPS = 6
"""Steps that are fed the same tokens and not timed."""


class Options(NamedTuple):
    model: str
    config: str
    batch: int
    steps: int
    length: int
    dtype: str
    hows: tuple[str, ...]
    contenders: tuple[str, ...]
    profile: bool
    out: str
    command: str
    folder: str
    """Where a process of one contender leaves its figures, and finds what the first one wrote; else empty."""
    limit: float
    """Seconds that a process of one contender has; shortly before their end it says where it stands."""


class Figures(NamedTuple):
    contender: str
    how: str
    sequences: int
    """Of all ranks together."""
    milliseconds: float
    tokens_per_second: float
    memory_mib: float
    """Peak on the device of a rank while it decodes, its weights included; 0 on the CPU."""
    graph_breaks: int
    graphs: int
    exchanges: str
    tokens_differ: int
    """Of all tokens of all steps, those that are not the first contender's."""
    logits_differ: float | None
    """‖logits − the first contender's‖ / ‖its‖ after the steps with the same tokens, of the rank that is farthest."""
    parts: Parts | None


def build(options: Options, device: torch.device) -> Any:
    """The unsharded model, the same on every rank."""
    dtype = getattr(torch, options.dtype)
    with torch.device(device if options.config != "tiny" else "cpu"):
        model = zoo.tiny(options.model, dtype=dtype, **SHAPES[options.config])
    return model.to(device)


Step = Callable[[int], torch.Tensor]
"""A step at a position: the tokens become the next ones; returns logits (N, V), to be read before the next step."""


def plain_step(model: Any, tokens: torch.Tensor, how: str, options: Options) -> Step:
    """A step of a model with transformers' static cache, on ``tokens`` (N,)."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=options.length)
    position = torch.zeros((1, 1), dtype=torch.int64, device=tokens.device)

    for buffer in (tokens, position):
        mark_static(buffer)

    def run() -> torch.Tensor:
        out = model(input_ids=tokens[:, None], position_ids=position, past_key_values=cache, use_cache=True)
        logits = out.logits[:, -1].float()
        tokens.copy_(logits.argmax(dim=-1))
        return logits

    run()  # makes the cache's memory, outside of any graph
    cache.reset()
    called = torch.compile(run, mode="reduce-overhead" if how == "captured" else None) if how != "eager" else run

    def step(at: int) -> torch.Tensor:
        position.fill_(at)
        return called()

    return step


def contender(
    name: str, how: str, whole: Any, ids: torch.Tensor, place: Place, options: Options
) -> tuple[Step, torch.Tensor, Callable[[], None], str]:
    """(step, its tokens, what ends it, who exchanges)."""
    rank, size, device = place.rank, place.size, ids.device
    own = slice(rank * options.batch, (rank + 1) * options.batch)
    if name == "one device":
        tokens = ids.clone()
        return plain_step(whole, tokens, how, options), tokens, lambda: None, "none"
    if name.startswith("epops"):
        group = epops.ExpertGroup(max_tokens=options.batch, timeout=900.0)
        model = epops.parallelize(copy.deepcopy(whole), group)
        if name == "epops fp8":
            epops.quantize_experts(model)
        settings = None if how == "eager" else {}
        layers = check_model(model)
        steps = Steps(model, group, layers, (options.batch,), options.length, settings, how == "captured")
        steps.tokens.copy_(ids[own])

        def step(at: int) -> torch.Tensor:
            return steps.decode(options.batch, dict.fromkeys(range(options.batch), at))

        return step, steps.tokens, group.close, repr(group.transport)
    from transformers.distributed.expert_parallel import apply_expert_parallelism

    model = copy.deepcopy(whole)
    plan = {}
    for path, module in model.named_modules():
        if path.endswith("mlp.experts"):
            plan.update({f"{path}.{p}": "grouped_gemm" for p, _ in module.named_parameters(recurse=False)})
            plan[path] = "ep_dispatch_experts"
    mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("ep",))
    alone = init_device_mesh(device.type, (size, 1), mesh_dim_names=("dp", "tp"))["tp"]
    apply_expert_parallelism(model, mesh, mesh if name == "all_reduce" else alone, plan, name)
    tokens = ids.clone() if name == "all_reduce" else ids[own].clone()
    return plain_step(model, tokens, how, options), tokens, lambda: None, dist.get_backend()


class First(NamedTuple):
    """What the first contender that ran did, for the others to be compared with."""

    name: str
    tokens: list[list[int]]
    """Of all sequences, by step."""
    logits: torch.Tensor
    """(N, V) of all sequences, on the CPU."""


def first_of(options: Options, known: list[First]) -> First | None:
    """From this process, or from one before it."""
    path = Path(options.folder) / "first.pt"
    if not known and options.folder and path.exists():
        name, tokens, logits = torch.load(path, weights_only=True)
        known.append(First(name, tokens, logits))
    return known[0] if known else None


def gathered(place: Place, mine: torch.Tensor, count: int) -> torch.Tensor:
    """(N, …) rows of all sequences on the CPU, of which this rank has all or its share."""
    mine = mine.cpu()
    if len(mine) == count:
        return mine
    told: list[Any] = [None] * place.size
    dist.all_gather_object(told, mine)
    return torch.cat(told)


@torch.no_grad()
def measure(name: str, how: str, whole: Any, place: Place, options: Options, known: list[First]) -> Figures | str:
    """Figures of one contender, or why there are none.  ``known``: the first one's answers, if it ran in this process."""
    device = next(whole.parameters()).device
    on_cuda = device.type == "cuda"
    generator = torch.Generator().manual_seed(7)
    vocab = whole.config.get_text_config().vocab_size
    fed = torch.randint(3, vocab, (WARM_UPS, place.size * options.batch), generator=generator).to(device)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    gc.collect()  # the contender before, whose graphs hold its memory
    others = 0
    if on_cuda:
        torch.cuda.empty_cache()
        # Of the model that the copies are made of only the one device's step is part.
        others = 0 if name == "one device" else sum(t.numel() * t.element_size() for t in whole.parameters())
    parts = None
    end: Callable[[], None] = lambda: None  # noqa: E731
    try:
        step, tokens, end, exchanges = contender(name, how, whole, fed[0], place, options)
        if on_cuda:
            torch.cuda.reset_peak_memory_stats()
        share = slice(None) if len(tokens) == fed.shape[1] else slice(place.rank * options.batch, None)
        times, made = [], []
        for at in range(WARM_UPS + options.steps):
            if at < WARM_UPS:
                tokens.copy_(fed[at, share][: len(tokens)])
            began = time.perf_counter()
            logits = step(at)
            if on_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
            if at == WARM_UPS - 1:
                forced = logits.cpu()
            if at >= WARM_UPS - 1:
                made.append(tokens.clone())
        peak = torch.cuda.max_memory_allocated() - others if on_cuda else 0
        if options.profile and on_cuda and how == "captured" and name.startswith("epops"):
            parts = profile(step, at, whole.config.get_text_config().num_hidden_layers)
        end()
    except Exception as error:
        with contextlib.suppress(Exception):
            end()
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    ours = gathered(place, torch.stack(made, dim=1), fed.shape[1]).t()
    forced = gathered(place, forced, fed.shape[1])
    first = first_of(options, known)
    if first is None:
        known.append(First(f"{name}, {how}", ours.tolist(), forced))
        if options.folder and place.rank == 0:
            torch.save(tuple(known[0]), Path(options.folder) / "first.pt")
    told: list[Any] = [None] * place.size
    dist.all_gather_object(told, statistics.median(times[WARM_UPS:]))
    seconds = max(told)
    counters = torch._dynamo.utils.counters
    return Figures(
        contender=name,
        how=how,
        sequences=fed.shape[1],
        milliseconds=1000 * seconds,
        tokens_per_second=fed.shape[1] / seconds,
        memory_mib=peak / 2**20,
        graph_breaks=sum(counters["graph_break"].values()),
        graphs=counters["stats"]["unique_graphs"],
        exchanges=exchanges,
        tokens_differ=0 if first is None else int((ours != torch.tensor(first.tokens)).sum()),
        logits_differ=None if first is None else float((forced - first.logits).norm() / first.logits.norm()),
        parts=parts,
    )


Row = tuple[str, str, Figures | str]
"""Contender, how, and its figures or why there are none."""


def work(place: Place, options: Options) -> bool:
    """Every contender of ``options`` in this process, each rank's part of it."""
    torch.manual_seed(0)
    if options.folder:
        stacks = open(Path(options.folder) / f"stacks{place.rank}.txt", "w")  # noqa: SIM115, open until the process ends
        faulthandler.dump_traceback_later(max(1.0, options.limit - 15.0), file=stacks)
    with process_group(place):
        whole = build(options, torch.device(place.device))
        known: list[First] = []
        found: list[Row] = []
        for name in options.contenders:
            for how in options.hows:
                began = time.perf_counter()
                found.append((name, how, measure(name, how, whole, place, options, known)))
                if place.rank == 0:
                    seconds = time.perf_counter() - began
                    print(f"{name}, {how}, {seconds:.0f} s: {found[-1][2]}", file=sys.stderr, flush=True)
                    write(found, place.size, place.device, options)  # a run that is cut short keeps what it has
                dist.barrier()
        if options.folder:
            faulthandler.cancel_dump_traceback_later()
            # NCCL's end of a communicator waits for the graphs that hold its exchanges: this process has nothing else to end.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        if place.rank == 0:
            finish(found, place.size, place.device, options)
        torch._dynamo.reset()
        gc.collect()
    return True


def apart(options: Options, ranks: int, kind: str, limit: float, arguments: list[str]) -> bool:
    """Every contender in processes of its own; what has not ended after ``limit`` seconds is killed, and said so."""
    found: list[Row] = []
    # A child has a session of its own: whoever ends this process must not leave it on the GPUs.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="epops-bench-decode-") as folder:
        for name in options.contenders:
            for how in options.hows:
                began = time.perf_counter()
                asked = [
                    *arguments,
                    "--ranks",
                    str(ranks),
                    "--contenders",
                    name,
                    "--how",
                    how,
                    "--into",
                    folder,
                    "--limit",
                    str(limit),
                ]
                child = subprocess.Popen([sys.executable, __file__, *asked], start_new_session=True)
                try:
                    said = f"its processes ended with {child.wait(limit)}"
                except subprocess.TimeoutExpired:
                    said = f"no answer in {limit:.0f} s"
                    for stacks in sorted(Path(folder).glob("stacks*.txt")):
                        print(f"{name}, {how}, {stacks.stem}:\n{stacks.read_text()}", file=sys.stderr, flush=True)
                finally:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(child.pid, signal.SIGKILL)
                    child.wait()
                made = Path(folder) / "figures.json"
                row = json.loads(made.read_text()) if made.exists() else {"failed": said}
                made.unlink(missing_ok=True)
                found.append((name, how, row["failed"] if "failed" in row else _figures(row)))
                print(f"{name}, {how}: {time.perf_counter() - began:.0f} s in all", file=sys.stderr, flush=True)
                write(found, ranks, kind, options)
    finish(found, ranks, kind, options)
    return True


def _figures(row: dict[str, Any]) -> Figures:
    return Figures(**{**row, "parts": None if row["parts"] is None else Parts(**row["parts"])})


def finish(found: list[Row], ranks: int, kind: str, options: Options) -> None:
    lines = table(found, ranks, kind, options)
    print("\n".join(lines))
    if options.out:
        plot([one for *_, one in found if isinstance(one, Figures)], lines[0], _stem(ranks, options, "png"))


def table(found: list[Row], ranks: int, kind: str, options: Options) -> list[str]:
    """Lines of the table, its title first."""
    device = torch.cuda.get_device_name() if kind.startswith("cuda") else platform.machine()
    head = f"{options.model} ({options.config}), {options.dtype}, {options.batch} sequences a rank, {ranks} × {device}"
    lines = [
        head,
        "",
        "| | step | ms a step | tokens/s | MiB | graph breaks | graphs | exchanges | tokens that differ | logits differ |",
    ]
    lines.append("|" + " --- |" * 10)
    for name, how, one in found:
        if isinstance(one, str):
            lines.append(f"| {name} | {how} | failed: {one} |")
            continue
        cells = [f"{one.milliseconds:.2f}", f"{one.tokens_per_second:,.0f}", f"{one.memory_mib:.0f}"]
        counts = [one.graph_breaks, one.graphs, one.exchanges, one.tokens_differ]
        far = "" if one.logits_differ is None else f"{one.logits_differ:.1e}"
        lines.append(f"| {name} | {how} | {' | '.join([*cells, *map(str, counts), far])} |")
    for name, _, one in found:
        if isinstance(one, Figures) and one.parts is not None:
            lines += ["", *told(name, one.parts)]
    return lines


def _stem(ranks: int, options: Options, ending: str) -> Path:
    return Path(options.out) / f"decode_{options.model}_{options.config}_{ranks}.{ending}"


def write(found: list[Row], ranks: int, kind: str, options: Options) -> None:
    """JSON and the table, in the folder that was asked for; or the last one's figures, for the process that waits for them."""
    rows = [_row(name, how, one) for name, how, one in found]
    if options.folder:
        path = Path(options.folder) / "figures.json"
        path.with_suffix(".part").write_text(json.dumps(rows[-1]))
        path.with_suffix(".part").rename(path)
    if not options.out or options.folder:
        return
    Path(options.out).mkdir(parents=True, exist_ok=True)
    lines = table(found, ranks, kind, options)
    facts = {
        "what": lines[0],
        "torch": torch.__version__,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "command": options.command,
    }
    _stem(ranks, options, "json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    _stem(ranks, options, "md").write_text("\n".join(lines) + "\n")


def commit() -> str:
    if os.environ.get("COMMIT"):
        return os.environ["COMMIT"]
    try:
        command = ("git", "rev-parse", "--short", "HEAD")
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _row(name: str, how: str, one: Figures | str) -> dict[str, Any]:
    if isinstance(one, str):
        return {"contender": name, "how": how, "failed": one}
    return {**one._asdict(), "parts": None if one.parts is None else one.parts._asdict()}


def plot(rows: list[Figures], title: str, path: Path) -> None:
    try:
        import matplotlib
    except ModuleNotFoundError:
        print(f"no plot: matplotlib is not installed ({path})")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.5 + 0.4 * len(rows)), layout="constrained")
    bars = axes.barh([f"{one.contender}, {one.how}" for one in rows], [one.tokens_per_second for one in rows])
    axes.bar_label(bars, [f" {one.milliseconds:.2f} ms" for one in rows])
    axes.invert_yaxis()
    axes.set(xlabel="tokens/s, all ranks", title=title)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen3_moe", help="a family on transformers' experts interface")
    parser.add_argument("--config", default="tiny", choices=SHAPES)
    parser.add_argument("--ranks", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", type=int, default=4, help="sequences a rank")
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--length", type=int, default=256, help="tokens that the caches have room for")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--how", nargs="+", default=None, choices=HOWS, help="default: all that the device can do")
    parser.add_argument(
        "--contenders", nargs="+", default=CONTENDERS, choices=CONTENDERS, help="in this order; default: all"
    )
    parser.add_argument("--profile", action="store_true", help="what epops' captured steps are made of")
    parser.add_argument("--limit", type=float, default=180.0, help="seconds that one contender has, from its start")
    parser.add_argument("--out", default="", help="folder for JSON, table and plot")
    parser.add_argument("--into", default="", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.steps + WARM_UPS > chosen.length:
        parser.error(f"--length: expected room for {chosen.steps + WARM_UPS} steps, got {chosen.length}")
    started = size_under_torchrun()
    count, kind = choose(started, chosen.ranks, chosen.device, "bench_decode")
    hows = tuple(chosen.how or (HOWS if kind == "cuda" else HOWS[:2]))
    settings = (chosen.model, chosen.config, chosen.batch, chosen.steps, chosen.length, chosen.dtype, hows)
    last = (chosen.profile, chosen.out, " ".join(["python", *sys.argv]), chosen.into, chosen.limit)
    options = Options(*settings, tuple(chosen.contenders), *last)
    if started is not None:
        good = join_torchrun(work, options, kind)
    elif chosen.into:
        good = start(work, options, count, kind)
    else:
        good = apart(options, count, kind, chosen.limit, sys.argv[1:])
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
