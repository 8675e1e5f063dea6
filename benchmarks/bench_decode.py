"""A decode step of one model: on one device, by transformers' own expert parallelism, and by epops, in one run.

    python benchmarks/bench_decode.py --config 30b --batch 64 --dtype bfloat16 --out benchmarks/results

All contenders have the same weights and decode the same sequences from their first token on, each rank ``--batch`` of them (those
that share one batch have them all).  A step is timed on the host with the device waited for; the median of the slowest rank
counts.  Every contender's tokens are compared with those of the one device.  ``--profile`` adds what epops' captured step is made
of: its kernels by kind, the exchanges' time a layer, and how often the host launches something.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import platform
import statistics
import sys
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

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {},
    # Qwen3-30B-A3B, with fewer layers.
    "30b": {
        "hidden_size": 2048, "num_hidden_layers": 8, "num_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768, "intermediate_size": 6144, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 4096,
    },
}  # fmt: skip
CONTENDERS = ("one device", "all_to_all", "all_reduce", "epops")
HOWS = ("eager", "compiled", "captured")
WARM_UPS = 3
PROFILED = 10
"""Steps under the profiler."""
KINDS = {
    "exchange": ("dispatch_kernel", "combine_kernel", "scatter_kernel", "ncclDevKernel"),
    "grouped product": ("GroupProblemShape", "grouped_mm", "prepare_grouped"),
    "attention": ("fmha", "flash", "attention"),
    "rows": ("map_rows",),
    "product": ("gemm", "nvjet", "cublas", "_mm_", "splitK"),
}
"""Kind of kernel → what one of its names has in it, in this order; everything else is "other"."""


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


class Parts(NamedTuple):
    """What one step is made of, on the first rank; microseconds of the device, kernels that overlap counted twice."""

    kinds: dict[str, float]
    exchange_a_layer: float
    exchange_share: float
    """Of the kernels' sum."""
    graph_launches: float
    """A step."""
    other_launches: float
    """Kernels that the host launches outside of a graph, a step."""
    kernels: list[tuple[str, float, float]]
    """Name, count a step, microseconds a step: the largest."""


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
    """Of all tokens of all steps, those that are not the one device's."""
    parts: Parts | None


def build(options: Options, device: torch.device) -> Any:
    """The unsharded model, the same on every rank."""
    dtype = getattr(torch, options.dtype)
    with torch.device(device if options.config != "tiny" else "cpu"):
        model = zoo.tiny(options.model, dtype=dtype, **SHAPES[options.config])
    return model.to(device)


def plain_step(model: Any, tokens: torch.Tensor, how: str, options: Options) -> Callable[[int], None]:
    """A step of a model with transformers' static cache: ``tokens`` (N,) become the next ones."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=options.length)
    position = torch.zeros((1, 1), dtype=torch.int64, device=tokens.device)

    for buffer in (tokens, position):
        mark_static(buffer)

    def run() -> None:
        out = model(input_ids=tokens[:, None], position_ids=position, past_key_values=cache, use_cache=True)
        tokens.copy_(out.logits[:, -1].float().argmax(dim=-1))

    run()  # makes the cache's memory, outside of any graph
    cache.reset()
    called = torch.compile(run, mode="reduce-overhead" if how == "captured" else None) if how != "eager" else run

    def step(at: int) -> None:
        position.fill_(at)
        called()

    return step


def contender(
    name: str, how: str, whole: Any, ids: torch.Tensor, place: Place, options: Options
) -> tuple[Callable[[int], None], torch.Tensor, Callable[[], None], str]:
    """(step, its tokens, what ends it, who exchanges): a step at position ``at`` turns the tokens into the next ones."""
    rank, size, device = place.rank, place.size, ids.device
    own = slice(rank * options.batch, (rank + 1) * options.batch)
    if name == "one device":
        tokens = ids.clone()
        return plain_step(whole, tokens, how, options), tokens, lambda: None, "none"
    if name == "epops":
        group = epops.ExpertGroup(max_tokens=options.batch, timeout=900.0)
        model = epops.parallelize(copy.deepcopy(whole), group)
        settings = None if how == "eager" else {}
        layers = check_model(model)
        steps = Steps(model, group, layers, (options.batch,), options.length, settings, how == "captured")
        steps.tokens.copy_(ids[own])

        def step(at: int) -> None:
            steps.decode(options.batch, dict.fromkeys(range(options.batch), at))

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


@torch.no_grad()
def measure(name: str, how: str, whole: Any, place: Place, options: Options, expected: list[Any]) -> Figures | str:
    """Figures of one contender, or why there are none.  ``expected``: the one device's tokens, filled by its first run."""
    device = next(whole.parameters()).device
    on_cuda = device.type == "cuda"
    generator = torch.Generator().manual_seed(7)
    vocab = whole.config.get_text_config().vocab_size
    ids = torch.randint(3, vocab, (place.size * options.batch,), generator=generator).to(device)
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
        step, tokens, end, exchanges = contender(name, how, whole, ids, place, options)
        if on_cuda:
            torch.cuda.reset_peak_memory_stats()
        tokens.copy_(ids if len(tokens) == len(ids) else ids[place.rank * options.batch :][: options.batch])
        times, made = [], []
        for at in range(WARM_UPS + options.steps):
            began = time.perf_counter()
            step(at)
            if on_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
            made.append(tokens.tolist())
        peak = torch.cuda.max_memory_allocated() - others if on_cuda else 0
        if options.profile and on_cuda and (name, how) == ("epops", "captured"):
            parts = profile(step, at, whole.config.get_text_config().num_hidden_layers)
        end()
    except Exception as error:
        with contextlib.suppress(Exception):
            end()
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    if not expected:
        expected += made
    share = slice(place.rank * options.batch, (place.rank + 1) * options.batch)
    right = expected if len(tokens) == len(ids) else [row[share] for row in expected]
    told: list[Any] = [None] * place.size
    wrong = sum(a != b for ours, theirs in zip(made, right) for a, b in zip(ours, theirs))
    dist.all_gather_object(told, (statistics.median(times[WARM_UPS:]), wrong))
    seconds = max(slowest for slowest, _ in told)
    counters = torch._dynamo.utils.counters
    return Figures(
        contender=name,
        how=how,
        sequences=len(ids),
        milliseconds=1000 * seconds,
        tokens_per_second=len(ids) / seconds,
        memory_mib=peak / 2**20,
        graph_breaks=sum(counters["graph_break"].values()),
        graphs=counters["stats"]["unique_graphs"],
        exchanges=exchanges,
        tokens_differ=sum(wrong for _, wrong in told),
        parts=parts,
    )


def profile(step: Callable[[int], None], at: int, layers: int) -> Parts:
    """What the steps after ``at`` are made of; all ranks call it."""
    from torch.profiler import DeviceType, ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        for _ in range(PROFILED):
            step(at)
        torch.cuda.synchronize()
    found = seen.key_averages()
    on_device = [event for event in found if event.device_type == DeviceType.CUDA]
    kernels = [
        (event.key, event.count / PROFILED, event.self_device_time_total / PROFILED)
        for event in on_device
        if not event.key.startswith(("Memcpy", "Memset"))
    ]
    kinds = dict.fromkeys((*KINDS, "other"), 0.0)
    for key, _, microseconds in kernels:
        kind = next((kind for kind, words in KINDS.items() if any(word in key for word in words)), "other")
        kinds[kind] += microseconds
    counts = {event.key: event.count / PROFILED for event in found}
    return Parts(
        kinds=kinds,
        exchange_a_layer=kinds["exchange"] / layers,
        exchange_share=kinds["exchange"] / max(sum(kinds.values()), 1e-9),
        graph_launches=counts.get("cudaGraphLaunch", 0.0),
        other_launches=sum(
            count for key, count in counts.items() if key.startswith(("cudaLaunchKernel", "cuLaunchKernel"))
        ),
        kernels=sorted(kernels, key=lambda kernel: -kernel[2])[:20],
    )


def work(place: Place, options: Options) -> bool:
    torch.manual_seed(0)
    with process_group(place):
        whole = build(options, torch.device(place.device))
        expected: list[Any] = []
        found: list[tuple[str, str, Figures | str]] = []
        for name in options.contenders:
            for how in options.hows:
                began = time.perf_counter()
                found.append((name, how, measure(name, how, whole, place, options, expected)))
                if place.rank == 0:
                    seconds = time.perf_counter() - began
                    print(f"{name}, {how}, {seconds:.0f} s: {found[-1][2]}", file=sys.stderr, flush=True)
                    write(found, place, options)  # a run that is cut short keeps what it has
                dist.barrier()
        if place.rank == 0:
            lines = table(found, place, options)
            print("\n".join(lines))
            if options.out:
                plot([one for *_, one in found if isinstance(one, Figures)], lines[0], _stem(place, options, "png"))
        # NCCL's end of a communicator waits for the graphs that hold its exchanges.
        torch._dynamo.reset()
        gc.collect()
    return True


def table(found: list[tuple[str, str, Figures | str]], place: Place, options: Options) -> list[str]:
    """Lines of the table, its title first."""
    device = torch.cuda.get_device_name() if place.device.startswith("cuda") else platform.machine()
    head = f"{options.model} ({options.config}), {options.dtype}, {options.batch} sequences a rank, {place.size} × {device}"
    lines = [
        head,
        "",
        "| | step | ms a step | tokens/s | MiB | graph breaks | graphs | exchanges | tokens that differ |",
    ]
    lines.append("|" + " --- |" * 9)
    for name, how, one in found:
        if isinstance(one, str):
            lines.append(f"| {name} | {how} | failed: {one} |")
            continue
        cells = [f"{one.milliseconds:.2f}", f"{one.tokens_per_second:,.0f}", f"{one.memory_mib:.0f}"]
        counts = [one.graph_breaks, one.graphs, one.exchanges, one.tokens_differ]
        lines.append(f"| {name} | {how} | {' | '.join([*cells, *map(str, counts)])} |")
    for _, _, one in found:
        if isinstance(one, Figures) and one.parts is not None:
            lines += ["", *told(one.parts)]
    return lines


def _stem(place: Place, options: Options, ending: str) -> Path:
    return Path(options.out) / f"decode_{options.model}_{options.config}_{place.size}.{ending}"


def write(found: list[tuple[str, str, Figures | str]], place: Place, options: Options) -> None:
    """JSON and the table, in the folder that was asked for."""
    if not options.out:
        return
    Path(options.out).mkdir(parents=True, exist_ok=True)
    lines = table(found, place, options)
    facts = {
        "what": lines[0],
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "command": options.command,
    }
    rows = [_row(name, how, one) for name, how, one in found]
    _stem(place, options, "json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    _stem(place, options, "md").write_text("\n".join(lines) + "\n")


def told(parts: Parts) -> list[str]:
    """The lines of a profile."""
    kinds = ", ".join(f"{kind} {microseconds:.0f}" for kind, microseconds in parts.kinds.items())
    lines = [
        f"epops' captured step, µs of the device by kind of kernel: {kinds}.",
        f"Exchanges take {parts.exchange_a_layer:.1f} µs a layer, {parts.exchange_share:.0%} of the kernels' time.  The host makes "
        f"{parts.graph_launches:g} graph launches and {parts.other_launches:g} kernel launches a step.",
        "",
        "| kernel | a step | µs a step |",
        "| --- | --- | --- |",
    ]
    for name, count, microseconds in parts.kernels:
        lines.append(f"| `{name[:100]}` | {count:g} | {microseconds:.1f} |")
    return lines


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
    parser.add_argument("--profile", action="store_true", help="what epops' captured step is made of")
    parser.add_argument("--out", default="", help="folder for JSON, table and plot")
    chosen = parser.parse_args()
    if chosen.steps + WARM_UPS > chosen.length:
        parser.error(f"--length: expected room for {chosen.steps + WARM_UPS} steps, got {chosen.length}")
    started = size_under_torchrun()
    count, kind = choose(started, chosen.ranks, chosen.device, "bench_decode")
    hows = tuple(chosen.how or (HOWS if kind == "cuda" else HOWS[:2]))
    settings = (chosen.model, chosen.config, chosen.batch, chosen.steps, chosen.length, chosen.dtype, hows)
    contenders = tuple(chosen.contenders)
    options = Options(*settings, contenders, chosen.profile, chosen.out, " ".join(["python", *sys.argv]))
    good = start(work, options, count, kind) if started is None else join_torchrun(work, options, kind)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
