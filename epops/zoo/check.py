"""Is a sharded model still the model?  Each function here runs on every rank and compares with the one-process model.

A rank has its own batch and its own length.  The one-process result of a forward is the unsharded model on the same
batch; that of a backward is the unsharded model on all ranks' batches, with the mean of the ranks' mean losses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import CompileConfig

from .build import tiny
from .inputs import inputs, loss_of, output_of
from .tweaks import EVAL_GRADIENTS, GENERATE

MAX_TOKENS = 128


class Case(NamedTuple):
    """What a check works on: twice the same model, one of them sharded, and this rank's batch."""

    family: str
    ref: Any
    model: Any
    rank: int
    ranks: int

    def batch(self, rank: int) -> dict[str, Any]:
        """The batch of any rank: sizes differ from rank to rank."""
        return inputs(self.family, self.ref, batch=1 + rank % 2, seqlen=5 + 3 * rank, seed=rank)


def group() -> Any:
    """The process's group, made at first use: checks follow one another in the same ranks."""
    import epops

    try:
        return epops.get_group("zoo")
    except epops.GroupError:
        return epops.ExpertGroup(dist.group.WORLD, name="zoo", max_tokens=MAX_TOKENS)


def case(family: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Case:
    """The two models of a check on this rank."""
    import epops

    torch.compiler.reset()
    torch.manual_seed(0)
    ranks = group()
    ref = tiny(family, dtype=dtype, **overrides)
    model = epops.parallelize(tiny(family, dtype=dtype, **overrides), ranks)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (ref, model)]
    assert ranks.size == 1 or sizes[1] < sizes[0], f"{family}: nothing was sharded, {sizes[1]} elements of {sizes[0]}"
    return Case(family, ref, model, ranks.rank, ranks.size)


def difference(value: Tensor, reference: Tensor) -> float:
    """The largest difference, relative to the largest value of the reference."""
    assert value.shape == reference.shape, f"shape {tuple(value.shape)}, expected {tuple(reference.shape)}"
    value, reference = value.detach().float(), reference.detach().float()
    assert value.isfinite().all(), "a value is not finite"
    return ((value - reference).abs().max() / reference.abs().max().clamp(min=1e-30)).item()


COMPILERS = ("eager", "graph", "epops")
"""How a model runs: as it is; captured whole and rewritten by the passes, its graph run node by node; or compiled."""


def _compiled(model: Any, compiler: str, fullgraph: bool = True) -> Any:
    if compiler == "eager":
        return model
    if compiler == "epops":
        return torch.compile(model, fullgraph=fullgraph, backend="epops")
    from ..inspection.capture import all_passes, apply_passes
    from ..torch_private import graphs_backend

    def rewrite(module: torch.fx.GraphModule, kind: str) -> None:
        apply_passes(module, all_passes(), kind)

    return torch.compile(model, fullgraph=fullgraph, backend=graphs_backend(rewrite, run=True))


def graph_breaks() -> int:
    """Graph breaks since the last reset."""
    return sum(torch._dynamo.utils.counters["graph_break"].values())


def forward(
    family: str,
    dtype: torch.dtype = torch.float32,
    *,
    compiler: str = "eager",
    fullgraph: bool = True,
    **overrides: Any,
) -> dict[str, Any]:
    """Outputs of the sharded model against the one-process model, each rank on its own batch."""
    c = case(family, dtype, **overrides)
    with torch.no_grad():
        batch = c.batch(c.rank)
        with record_routing(c.ref) as routing:
            expected = output_of(c.ref(**batch))
        with replay_routing(c.model, routing if dtype != torch.float32 else {}):
            got = output_of(_compiled(c.model, compiler, fullgraph)(**batch))
        return {"error": difference(got, expected), "breaks": graph_breaks()}


def gradients(
    family: str,
    dtype: torch.dtype = torch.float32,
    *,
    compiler: str = "eager",
    fullgraph: bool = True,
    **overrides: Any,
) -> dict[str, Any]:
    """Outputs and all gradients of a training step against the one-process model on all ranks' batches."""
    c = case(family, dtype, **overrides)
    if family not in EVAL_GRADIENTS:
        c.ref.train()
        c.model.train()
    total: dict[str, Tensor] = {}
    routing: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for rank in range(c.ranks):
        with record_routing(c.ref) as heard:
            answer = c.ref(**c.batch(rank))
        if rank == c.rank:
            expected, routing = output_of(answer).detach(), heard
        c.ref.zero_grad()
        loss_of(answer).backward()
        for name, parameter in c.ref.named_parameters():
            if parameter.grad is not None:
                total[name] = total.get(name, 0) + parameter.grad.float() / c.ranks
    with replay_routing(c.model, routing if dtype != torch.float32 else {}):
        answer = _compiled(c.model, compiler, fullgraph)(**c.batch(c.rank))
    loss_of(answer).backward()
    got = full_gradients(c.model, c.ranks)
    _require_all(set(got), set(total))
    largest = max(g.abs().max().item() for g in total.values())
    worst, name = max((_gradient_difference(got[n], g, largest), n) for n, g in total.items() if n in got)
    return {
        "error": difference(output_of(answer), expected),
        "gradient_error": worst,
        "worst": name,
        "breaks": graph_breaks(),
    }


def generate(family: str, *, compiler: str = "eager", max_new_tokens: int = 6, **overrides: Any) -> dict[str, Any]:
    """Greedy tokens of ``generate`` against the one-process model's, with a static cache where the family has one.

    Prompts differ in length from rank to rank and generations end at different steps: rank 0 ends at the token that it
    would give second.
    """
    c = case(family, **overrides)
    with torch.no_grad():
        prompt = c.batch(c.rank)["input_ids"][:1]
        settings = {"max_new_tokens": max_new_tokens, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
        settings |= GENERATE.get(family, {})
        cache = _cache(c.ref, prompt, settings)
        settings["cache_implementation"] = cache
        first = _tokens(c.ref, prompt, settings)
        start = 1 if c.ref.config.is_encoder_decoder else prompt.shape[1]
        if c.rank == 0 and first.shape[1] > start + 2:
            settings["eos_token_id"] = first[0, start + 1].item()
        expected = _tokens(c.ref, prompt, settings)
        if compiler == "epops":
            settings["compile_config"] = CompileConfig(backend="epops", fullgraph=True)
            settings["compile_config"]._compile_all_devices = True
        got = _tokens(c.model, prompt, settings)
        assert torch.equal(got, expected), f"generated {got.tolist()}, expected {expected.tolist()}"
        return {"tokens": expected.shape[1], "cache": cache or "dynamic", "breaks": graph_breaks()}


def _tokens(model: Any, prompt: Tensor, settings: dict[str, Any]) -> Tensor:
    torch.manual_seed(0)  # for families that draw numbers while they generate
    answer = model.generate(input_ids=prompt, **settings)
    return getattr(answer, "sequences", answer)


def _cache(model: Any, prompt: Tensor, settings: dict[str, Any]) -> str | None:
    """ "static", unless the one-process model cannot: some families' attention knows the dynamic cache only."""
    if "cache_implementation" in settings:
        return settings["cache_implementation"]
    try:
        _tokens(model, prompt, {**settings, "cache_implementation": "static"})
        return "static"
    except Exception:
        return None


def _require_all(here: set[str], expected: set[str]) -> None:
    """Every parameter of the unsharded model has a gradient on some rank at least."""
    everywhere: list[set[str]] = [set() for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, here)
    missing = sorted(expected - set().union(*everywhere))
    assert not missing, f"the sharded model's state dict lacks {len(missing)} parameters, {missing[:4]} among them"


def _gradient_difference(got: Tensor, expected: Tensor, largest: float) -> float:
    """Relative to the tensor's largest gradient, or to a thousandth of the model's where the tensor's is tinier: such
    gradients are what is left of terms that cancel, and carry the rounding of those terms."""
    assert got.shape == expected.shape, f"gradient shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    scale = max(expected.abs().max().item(), 1e-3 * largest, 1e-30)
    return (got - expected).abs().max().item() / scale


def full_gradients(model: Any, ranks: int) -> dict[str, Tensor]:
    """Gradients in the unsharded layout: of experts as their rank has them, of all others averaged over the ranks.

    A state dict speaks the unsharded layout, so gradients stand in for the weights while it is made.  Experts that are
    modules of their own are in the state dict of their own rank only.
    """
    parameters = {id(p): p for p in model.parameters()}
    weights = {key: p.data for key, p in parameters.items()}
    replicated = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    try:
        for p in parameters.values():
            p.data = torch.zeros_like(p.data) if p.grad is None else p.grad.detach()
        gathered = {}
        for name, value in model.state_dict().items():
            if hasattr(value, "full_tensor"):
                gathered[name] = value.full_tensor().float()
                continue
            gathered[name] = value.detach().float().clone()
            if name in replicated:
                dist.all_reduce(gathered[name])
                gathered[name] /= ranks
        return gathered
    finally:
        for key, p in parameters.items():
            p.data = weights[key]


# ---- the same routing in both models ----------------------------------------------------------------------------------


def _experts(model: Any) -> dict[str, Any]:
    """Modules on transformers' experts interface: they get ``(hidden, top_k_index, top_k_weights)``."""
    return {name: module for name, module in model.named_modules() if hasattr(type(module), "_apply_gate")}


@contextlib.contextmanager
def record_routing(model: Any) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
    """What every experts module was asked for, call by call."""
    heard: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def listen(name: str) -> Any:
        return lambda _, args: heard.setdefault(name, []).append((args[1].detach(), args[2].detach()))

    handles = [module.register_forward_pre_hook(listen(name)) for name, module in _experts(model).items()]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def replay_routing(model: Any, heard: dict[str, list[tuple[Tensor, Tensor]]]) -> Iterator[None]:
    """Ask for the recorded experts wherever the model would ask for others.

    In bf16 a last-bit difference before a router can flip a near tie; outputs are compared with the same routing.
    """

    def steer(name: str) -> Any:
        calls = iter(heard[name])

        def hook(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            index, weights = next(calls)
            same = (args[1] == index).all(dim=-1, keepdim=True)
            return (args[0], torch.where(same, args[1], index), torch.where(same, args[2], weights), *args[3:])

        return hook

    handles = [m.register_forward_pre_hook(steer(name)) for name, m in _experts(model).items() if name in heard]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
