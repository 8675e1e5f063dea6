"""A decode step of one model: on one device, by transformers' own expert parallelism, and by epops, in one run.

    python benchmarks/bench_decode.py --config 30b --batch 64 --dtype bfloat16 --out benchmarks/results

All contenders have the same weights and decode the same sequences from their first token on, each rank ``--batch`` of them (those
that share one batch have them all).  A step is timed on the host with the device waited for; the median of the slowest rank
counts.  Every contender's tokens are compared with those of the one device.
"""

from __future__ import annotations

import argparse
import copy
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


class Options(NamedTuple):
    model: str
    config: str
    batch: int
    steps: int
    length: int
    dtype: str
    hows: tuple[str, ...]
    out: str
    command: str


class Figures(NamedTuple):
    contender: str
    how: str
    sequences: int
    """Of all ranks together."""
    milliseconds: float
    tokens_per_second: float
    memory_mib: float
    """Peak on the device of a rank, weights included; 0 on the CPU."""
    graph_breaks: int
    graphs: int
    exchanges: str
    tokens_differ: int
    """Of all tokens of all steps, those that are not the one device's."""


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
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    try:
        step, tokens, end, exchanges = contender(name, how, whole, ids, place, options)
        tokens.copy_(ids if len(tokens) == len(ids) else ids[place.rank * options.batch :][: options.batch])
        times, made = [], []
        for at in range(WARM_UPS + options.steps):
            began = time.perf_counter()
            step(at)
            if on_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
            made.append(tokens.tolist())
        end()
    except Exception as error:
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
        memory_mib=torch.cuda.max_memory_allocated() / 2**20 if on_cuda else 0.0,
        graph_breaks=sum(counters["graph_break"].values()),
        graphs=counters["stats"]["unique_graphs"],
        exchanges=exchanges,
        tokens_differ=sum(wrong for _, wrong in told),
    )


def work(place: Place, options: Options) -> bool:
    torch.manual_seed(0)
    with process_group(place):
        whole = build(options, torch.device(place.device))
        expected: list[Any] = []
        found: list[tuple[str, str, Figures | str]] = []
        for name in CONTENDERS:
            for how in options.hows:
                found.append((name, how, measure(name, how, whole, place, options, expected)))
                if place.rank == 0:
                    print(f"{name}, {how}: {found[-1][2]}", file=sys.stderr, flush=True)
                dist.barrier()
        if place.rank == 0:
            report(found, place, options)
    return True


def report(found: list[tuple[str, str, Figures | str]], place: Place, options: Options) -> None:
    """Print the table; write JSON, the table and a plot."""
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
    print("\n".join(lines))
    if not options.out:
        return
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"decode_{options.model}_{options.config}_{place.size}"
    rows = [
        one._asdict() if isinstance(one, Figures) else {"contender": n, "how": h, "failed": one} for n, h, one in found
    ]
    facts = {"what": head, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "command": options.command}
    (folder / f"{stem}.json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    (folder / f"{stem}.md").write_text("\n".join(lines) + "\n")
    plot([one for *_, one in found if isinstance(one, Figures)], head, folder / f"{stem}.png")


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
    parser.add_argument("--out", default="", help="folder for JSON, table and plot")
    chosen = parser.parse_args()
    if chosen.steps + WARM_UPS > chosen.length:
        parser.error(f"--length: expected room for {chosen.steps + WARM_UPS} steps, got {chosen.length}")
    started = size_under_torchrun()
    count, kind = choose(started, chosen.ranks, chosen.device, "bench_decode")
    hows = tuple(chosen.how or (HOWS if kind == "cuda" else HOWS[:2]))
    settings = (chosen.model, chosen.config, chosen.batch, chosen.steps, chosen.length, chosen.dtype, hows, chosen.out)
    options = Options(*settings, " ".join(["python", *sys.argv]))
    good = start(work, options, count, kind) if started is None else join_torchrun(work, options, kind)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
