"""The ``epops`` command.  What a command needs is imported when it runs."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

app = typer.Typer(help="Expert parallelism that torch.compile can see.", no_args_is_help=True, add_completion=False)

FIVE = "mixtral, qwen3_moe, deepseek_v3, gpt_oss, olmoe"


def refuse(message: Any) -> typer.Exit:
    """Exit status 2 with a message: what was asked cannot be done."""
    typer.echo(message, err=True)
    return typer.Exit(2)


def say_version(asked: bool) -> None:
    if asked:
        from . import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def epops(
    version: Annotated[bool, typer.Option("--version", callback=say_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Expert parallelism that torch.compile can see."""


@app.command()
def demo(
    ranks: Annotated[Optional[int], typer.Option(help="Ranks; default one a GPU, or 2 on a CPU.")] = None,  # noqa: UP045
    model: Annotated[str, typer.Option(help=f"Model family: {FIVE}.")] = "mixtral",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    steps: Annotated[int, typer.Option(help="Training steps.")] = 200,
    batch: Annotated[int, typer.Option(help="Windows a step, of all ranks; rounded up to a multiple of them.")] = 16,
    length: Annotated[int, typer.Option(help="Bytes a window.")] = 64,
    new_tokens: Annotated[int, typer.Option(help="Bytes that each rank writes at the end.")] = 160,
    seed: Annotated[int, typer.Option(help="Seed of weights, batches and sampling.")] = 0,
    eager: Annotated[bool, typer.Option("--eager", help="Do not compile.")] = False,
) -> None:
    """Train a small MoE model over several ranks, compare it with the one-process model, and let it write.

    Under torchrun it joins the ranks that torchrun started, on any number of hosts.
    """
    from .demo.launch import choose, join_torchrun, size_under_torchrun, start
    from .demo.rank import work
    from .demo.recipe import Recipe

    started = size_under_torchrun()
    try:
        count, kind = choose(started, ranks, device)
        batch = -(-batch // count) * count
        recipe = Recipe(model, steps, batch, length, new_tokens=new_tokens, seed=seed, compiled=not eager)
        recipe.check()
    except ValueError as error:
        raise refuse(error) from None
    good = start(work, recipe, count, kind) if started is None else join_torchrun(work, recipe, kind)
    raise typer.Exit(0 if good else 1)


@app.command()
def generate(
    model: Annotated[str, typer.Option(help="Checkpoint folder, or a model family: random weights.")] = "qwen3_moe",
    ranks: Annotated[Optional[int], typer.Option(help="Ranks; default one a GPU, or 2 on a CPU.")] = None,  # noqa: UP045
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    prompt: Annotated[Optional[list[str]], typer.Option(help="A prompt; may be given several times.")] = None,  # noqa: UP045
    requests: Annotated[int, typer.Option(help="Without --prompt: requests, of all ranks, with made-up prompts.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens an answer.")] = 32,
    temperature: Annotated[float, typer.Option(help="0: the most likely token each time.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens that reach this share.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling and of random weights.")] = 0,
    compiled: Annotated[
        bool, typer.Option("--compile/--eager", help="Compile the decode steps, a graph a bucket.")
    ] = True,
    buckets: Annotated[str, typer.Option(help="Batch sizes of decode steps: 1,2,4; default by the requests.")] = "",
    prefill_tokens: Annotated[int, typer.Option(help="Tokens of prompts that one prefill reads.")] = 512,
) -> None:
    """Answer prompts with a model over several ranks: continuous batching, streamed text, throughput and latency.

    Under torchrun it joins the ranks that torchrun started; each prints its own answers.
    """
    from .demo.launch import choose, join_torchrun, size_under_torchrun, start
    from .serving.order import COMMAND, Order

    started = size_under_torchrun()
    try:
        count, kind = choose(started, ranks, device, COMMAND)
        from .serving.generate import parse_buckets, work

        order = Order(
            model, tuple(prompt or ()), requests, max_new_tokens, temperature, top_p, seed, compiled,
            parse_buckets(buckets), prefill_tokens,
        )  # fmt: skip
        order.check()
    except ValueError as error:
        raise refuse(error) from None
    good = start(work, order, count, kind) if started is None else join_torchrun(work, order, kind)
    raise typer.Exit(0 if good else 1)


@app.command()
def inspect(
    model: Annotated[str, typer.Option(help="Model family; `make models` lists them.")] = "qwen3_moe",
    config: Annotated[str, typer.Option(help=f"tiny; small for {FIVE}.")] = "small",
    ranks: Annotated[int, typer.Option(help="Ranks; none of them is started.")] = 2,
    tokens: Annotated[int, typer.Option(help="Tokens of each rank.")] = 32,
    train: Annotated[bool, typer.Option("--train", help="The training step: forward and backward.")] = False,
    graphs: Annotated[bool, typer.Option("--graphs", help="Print the graphs too, before and after.")] = False,
    save: Annotated[Optional[Path], typer.Option(help="Write a page to look at: graph.html.")] = None,  # noqa: UP045
) -> None:
    """What the passes do with a model's exchanges, seen by one process; nothing runs."""
    import torch

    import epops

    from . import zoo
    from .torch_private import fake_world

    if ranks < 1 or tokens < 1:
        raise refuse(f"epops inspect: --ranks, --tokens: expected at least 1, got {ranks} and {tokens}")
    try:
        built = zoo.tiny(model, config=config)
    except (ValueError, ModuleNotFoundError) as error:
        raise refuse(f"epops inspect: --model {model} --config {config}: {error}") from None
    fake_world(ranks)
    with epops.ExpertGroup(name="ep", max_tokens=tokens), torch.set_grad_enabled(train):
        sharded = epops.parallelize(built.train(train), "ep")
        seen = epops.inspect(sharded, **zoo.inputs(model, sharded, batch=1, seqlen=tokens))
    typer.echo(str(seen) if graphs else seen.summary())
    if save is not None:
        typer.echo(f"\nwrote {seen.save(save)}")


class Benchmark(str, Enum):
    eager = "eager"
    dispatch_combine = "dispatch-combine"
    decode = "decode"


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(
    context: typer.Context,
    name: Annotated[Optional[Benchmark], typer.Argument(help="Default: all that this machine can run.")] = None,  # noqa: UP045
) -> None:
    """Run a benchmark of the checkout; options that follow are its own.

    eager: host time of a call.  dispatch-combine: exchanges over NVLink, on two GPUs or more.  decode: a model's decode step beside
    one device and transformers' own expert parallelism; only when it is named.
    """
    import torch

    folder = Path(__file__).resolve().parent.parent / "benchmarks"
    if not folder.is_dir():
        raise refuse(f"epops bench: expected {folder}, which only a checkout of the project has; run it there")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == Benchmark.dispatch_combine and gpus < 2:
        raise refuse(f"epops bench dispatch-combine: expected at least 2 GPUs, got {gpus}")
    if name == Benchmark.decode:
        raise typer.Exit(subprocess.run([sys.executable, str(folder / "bench_decode.py"), *context.args]).returncode)
    if name in (None, Benchmark.eager):
        sys.argv = [str(folder / "bench_eager.py"), *context.args]
        runpy.run_path(sys.argv[0], run_name="__main__")
    if name == Benchmark.dispatch_combine or (name is None and gpus > 1):
        launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={gpus}"]
        done = subprocess.run([*launcher, str(folder / "bench_dispatch_combine.py"), *context.args])
        raise typer.Exit(done.returncode)
    if name is None:
        typer.echo(f"dispatch-combine: left out, it needs 2 GPUs and this machine has {gpus}")


@app.command()
def env() -> None:
    """Versions, devices, transports, and whether the GPU kernels are built."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False)
    for what, value in facts():
        table.add_row(what, value)
    Console(highlight=False).print(table)


def facts() -> list[tuple[str, str]]:
    """What somebody who reports a bug is asked for."""
    import platform
    from importlib import metadata

    import torch
    import torch.distributed as dist

    from . import __version__

    def installed(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "not installed"

    rows = [
        ("epops", f"{__version__} in {Path(__file__).resolve().parent}"),
        ("Python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'not in this build'}"),
        ("transformers", installed("transformers")),
        ("CPU", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads a process"),
    ]
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    rows += [(f"GPU {i}", torch.cuda.get_device_name(i)) for i in gpus] or [("GPUs", "none")]
    try:
        from .transport import kernels

        built = f"built for {', '.join(f'sm_{arch}' for arch in kernels.ARCHS)}"
    except ImportError as error:
        kernels, built = None, f"not built ({error})"  # type: ignore[assignment]
    rows.append(("GPU kernels", built))
    gloo = dist.is_available() and dist.is_gloo_available()
    nccl = dist.is_available() and dist.is_nccl_available() and bool(gpus)
    transports = ["c10d (gloo)"] * gloo + ["c10d (nccl)"] * nccl + ["nvlink"] * (kernels is not None and bool(gpus))
    rows.append(("transports", ", ".join(transports) or "one rank only: this torch has no torch.distributed"))
    return rows


def demo_main() -> None:
    """``python -m epops.demo``."""
    typer.run(demo)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
