"""The ``epops`` command.  Every command imports what it needs when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(
    help="Expert parallelism that torch.compile can see.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

FIVE = "mixtral, qwen3_moe, deepseek_v3, gpt_oss, olmoe"


def demo(
    ranks: Annotated[int | None, typer.Option(help="Ranks; default one a GPU, or 2 on a CPU.")] = None,
    model: Annotated[str, typer.Option(help=f"Model family: {FIVE}.")] = "mixtral",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    steps: Annotated[int, typer.Option(help="Training steps.")] = 200,
    batch: Annotated[
        int, typer.Option(help="Windows a step, of all ranks together; rounded up to a multiple of the ranks.")
    ] = 16,
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

    here = size_under_torchrun()
    try:
        count, kind = choose(here, ranks, device)
        recipe = Recipe(
            model, steps, -(-batch // count) * count, length, new_tokens=new_tokens, seed=seed, compiled=not eager
        )
        recipe.check()
    except ValueError as error:
        typer.echo(error, err=True)
        raise typer.Exit(2) from None
    good = start(work, recipe, count, kind) if here is None else join_torchrun(work, recipe, kind)
    raise typer.Exit(0 if good else 1)


app.command()(demo)


def demo_main() -> None:
    """``python -m epops.demo``."""
    typer.run(demo)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
