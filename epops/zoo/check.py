"""Is a sharded model still the model?  Each function here runs on every rank and compares with the one-process model.

A rank has its own batch and its own length.  The one-process result of a forward is the unsharded model on the same
batch; that of a backward is the unsharded model on all ranks' batches, with the mean of the ranks' mean losses.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import CompileConfig

from ..models.shard import UNREAD
from .build import tiny
from .inputs import inputs, loss_of, output_of
from .routing import flips, watch
from .tweaks import EVAL_GRADIENTS, GENERATE

MAX_TOKENS = 128


class Case(NamedTuple):
    """What a check works on: twice the same model, one of them sharded, and this rank's batch."""

    family: str
    ref: Any
    model: Any
    rank: int
    ranks: int
    seed: int

    def batch(self, rank: int) -> dict[str, Any]:
        """The batch of any rank: sizes differ from rank to rank."""
        return inputs(self.family, self.ref, batch=1 + rank % 2, seqlen=5 + 3 * rank, seed=rank + 100 * self.seed)


def group() -> Any:
    """The process's group, made at first use: checks follow one another in the same ranks."""
    import epops

    try:
        return epops.get_group("zoo")
    except epops.GroupError:
        return epops.ExpertGroup(dist.group.WORLD, name="zoo", max_tokens=MAX_TOKENS)


def case(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> Case:
    """The two models of a check on this rank."""
    import epops

    torch.compiler.reset()
    torch.manual_seed(0)
    ranks = group()
    ref = tiny(family, seed, dtype, **overrides)
    model = epops.parallelize(tiny(family, seed, dtype, **overrides), ranks)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (ref, model)]
    assert ranks.size == 1 or sizes[1] < sizes[0], f"{family}: nothing was sharded, {sizes[1]} elements of {sizes[0]}"
    return Case(family, ref, model, ranks.rank, ranks.size, seed)


def difference(value: Tensor, reference: Tensor) -> float:
    """The largest difference, relative to the largest value of the reference."""
    assert value.shape == reference.shape, f"shape {tuple(value.shape)}, expected {tuple(reference.shape)}"
    value, reference = value.detach().float(), reference.detach().float()
    assert value.isfinite().all(), "a value is not finite"
    return ((value - reference).abs().max() / reference.abs().max().clamp(min=1e-30)).item()


COMPILERS = ("eager", "capture", "graph", "epops")
"""How a model runs: as it is; captured by Dynamo; captured, traced backward and rewritten by the passes, its graphs run node by
node; or compiled."""


def _compiled(model: Any, compiler: str, fullgraph: bool = True) -> Any:
    if compiler == "eager":
        return model
    if compiler == "epops":
        return torch.compile(model, fullgraph=fullgraph, backend="epops")
    if compiler == "capture":
        return torch.compile(model, fullgraph=fullgraph, backend="eager")
    from ..inspection.capture import all_passes, apply_passes
    from ..torch_private import graphs_backend

    def rewrite(module: torch.fx.GraphModule, kind: str) -> None:
        apply_passes(module, all_passes(), kind)

    return torch.compile(model, fullgraph=fullgraph, backend=graphs_backend(rewrite, run=True))


def graph_breaks() -> int:
    """Graph breaks since the last reset."""
    return sum(torch._dynamo.utils.counters["graph_break"].values())


def forward(family: str, *, compiler: str = "eager", fullgraph: bool = True, **overrides: Any) -> dict[str, Any]:
    """Outputs of the sharded model against the one-process model, each rank on its own batch."""
    c = case(family, **overrides)
    with torch.no_grad():
        batch = c.batch(c.rank)
        expected = output_of(c.ref(**batch))
        got = output_of(_compiled(c.model, compiler, fullgraph)(**batch))
    return {"error": difference(got, expected), "breaks": graph_breaks()}


SEEDS = 6
"""Instances that are tried in bf16, until one-process, sharded and wider model choose the same experts; float32 takes the first."""

LIMIT = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest difference, relative to the largest value of a tensor."""

WIDER = {torch.float32: torch.float64, torch.bfloat16: torch.float32}


class Step(NamedTuple):
    """Outputs on this rank's batch, gradients of the mean loss over all ranks' batches, and the routing of it all."""

    output: Tensor
    gradients: dict[str, Tensor]
    choices: list[Tensor]


def gradients(
    family: str,
    dtype: torch.dtype = torch.float32,
    *,
    compiler: str = "eager",
    fullgraph: bool = True,
    **overrides: Any,
) -> dict[str, Any]:
    """Outputs and all gradients of a training step against the one-process model on all ranks' batches.

    A tensor may differ by `LIMIT`, or by twice what the one-process model's own gradient differs from the one that it has in
    the wider dtype: that is what two roundings of one value can be apart.
    """
    for seed in range(SEEDS if dtype == torch.bfloat16 and compiler == "eager" else 1):
        c = case(family, dtype, seed, **overrides)
        expected = _one_process_step(c, c.ref)
        if family not in EVAL_GRADIENTS:
            c.model.train()
        with contextlib.ExitStack() as stack:
            # hooks would change the graph that is compiled
            choices = stack.enter_context(watch(c.model)) if compiler == "eager" else []
            answer = _compiled(c.model, compiler, fullgraph)(**c.batch(c.rank))
        loss_of(answer).backward()
        output, got = output_of(answer), full_gradients(c.model, c.ranks)
        _require_all(set(got), set(expected.gradients))
        errors = {"": difference(output, expected.output), **_differences(got, expected.gradients)}
        noise = _noise(c, expected) if max(errors.values()) > LIMIT[dtype] else {}
        limits = {name: max(LIMIT[dtype], 2 * noise.get(name, 0.0)) for name in errors}
        flipped = flips(choices, _own(c, expected.choices))
        unclear = torch.tensor([flipped, not noise and max(errors.values()) > LIMIT[dtype]])
        dist.all_reduce(unclear)
        if not unclear.any():
            break
    worst = max(errors, key=lambda name: errors[name] / limits[name])
    return {
        "error": errors[worst],
        "limit": limits[worst],
        "worst": worst,
        "over": {name: error for name, error in errors.items() if error > LIMIT[dtype]},
        "flips": flipped,
        "breaks": graph_breaks(),
    }


def _one_process_step(c: Case, model: Any) -> Step:
    if c.family not in EVAL_GRADIENTS:
        model.train()
    total: dict[str, Tensor] = {}
    with watch(model) as choices:
        for rank in range(c.ranks):
            answer = model(**c.batch(rank))
            if rank == c.rank:
                output = output_of(answer).detach()
            model.zero_grad()
            loss_of(answer).backward()
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    total[name] = total.get(name, 0) + parameter.grad.double() / c.ranks
    return Step(output, total, choices)


def _own(c: Case, choices: list[Tensor]) -> list[Tensor]:
    """Those of the choices for all ranks' batches that were made for this rank's."""
    each = len(choices) // c.ranks
    return choices[c.rank * each : (c.rank + 1) * each]


def _noise(c: Case, expected: Step) -> dict[str, float]:
    """How far the one-process model's outputs and gradients are from those of the same weights in a wider dtype."""
    dtype = next(c.ref.parameters()).dtype
    try:
        wide = tiny(c.family, c.seed, dtype).to(WIDER[dtype])
        if WIDER[dtype] == torch.float64:
            wide.set_experts_implementation("eager")  # the others have no float64 kernels
        step = _one_process_step(c, wide)
    except (RuntimeError, ValueError, NotImplementedError):
        return {}  # it has code that knows no wider dtype
    if flips(step.choices, expected.choices):
        return {}
    return {"": difference(expected.output, step.output), **_differences(expected.gradients, step.gradients)}


def generate(family: str, *, compiler: str = "eager", max_new_tokens: int = 6, **overrides: Any) -> dict[str, Any]:
    """Greedy tokens of ``generate`` against the one-process model's, with a static cache where the family has one.

    Prompts differ in length from rank to rank and generations end at different steps: rank 0 ends at the token that it
    would give second.
    """
    c = case(family, **overrides)
    with torch.no_grad():
        prompt = c.batch(c.rank)["input_ids"][:1]
        settings: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "do_sample": False,
            "eos_token_id": -1,
            "pad_token_id": 0,
        }
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


def _differences(got: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Per tensor that both have: the largest difference, relative to the largest gradient of that very tensor."""
    found = {}
    for name, want in expected.items():
        if name in got:
            assert got[name].shape == want.shape, (
                f"{name}: shape {tuple(got[name].shape)}, expected {tuple(want.shape)}"
            )
            found[name] = (got[name].double() - want).abs().max().item() / max(want.abs().max().item(), 1e-30)
    return found


def full_gradients(model: Any, ranks: int) -> dict[str, Tensor]:
    """Gradients in the unsharded layout: of experts as their rank has them, of all others averaged over the ranks.

    A state dict speaks the unsharded layout, so gradients stand in for the weights while it is made.  Experts that are
    modules of their own are in the state dict of their own rank only.
    """
    parameters = {id(p): p for p in model.parameters()}
    weights = {key: p.data for key, p in parameters.items()}
    unread = [buffer for name, buffer in model.named_buffers() if name.rpartition(".")[2].startswith(UNREAD)]
    values = [buffer.clone() for buffer in unread]
    replicated = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    try:
        for p in parameters.values():
            p.data = torch.zeros_like(p.data) if p.grad is None else p.grad.detach()
        for buffer in unread:
            buffer.zero_()
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
        for buffer, value in zip(unread, values, strict=True):
            buffer.copy_(value)
