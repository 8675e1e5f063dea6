"""all_to_all: a ragged exchange whose splits are device tensors, scattering one dim and gathering another on the way."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .. import layout as words
from ..group import ExpertGroup
from ..meta import all_to_all as fakes
from ..meta.checks import fail
from ..reference.all_to_all import cut, even_splits, join, read_plan, reverse_plan
from ..transport import Swap, all_to_all_call
from .arguments import common_arguments
from .device_all_to_all import finish_on_device, prepare_on_device
from .exchange import Blocks, Halves, check_group, settle, start, status_bits, wait, whole
from .registry import bind, call, differentiate


class AllToAllResult(NamedTuple):
    """What `all_to_all` returns: ``rows``, zero after the last received element along ``gather_dim``; ``counts`` (R,) int64, what
    each rank sent along ``gather_dim``; ``status`` int32 (8,)."""

    rows: torch.Tensor
    counts: torch.Tensor
    status: torch.Tensor


def all_to_all_arguments(
    op: str,
    x: torch.Tensor,
    input_splits: torch.Tensor | None,
    output_splits: torch.Tensor | None,
    plan: torch.Tensor | None,
    *,
    group: Any,
    out_size: Any = None,
    scatter_size: Any = None,
    scatter_dim: int = 0,
    gather_dim: int = 0,
    lane: int = 0,
) -> dict[str, Any]:
    facts, _ = common_arguments(op, group, 1, None, None)
    if not x.dim():
        fail(op, "x", "a tensor of at least one dimension", "none", "unsqueeze it")
    for name, dim in (("scatter_dim", scatter_dim), ("gather_dim", gather_dim)):
        if not -x.dim() <= dim < x.dim():
            fail(op, name, f"{-x.dim()} … {x.dim() - 1}", dim, "name a dimension of x")
    scatter_dim, gather_dim = scatter_dim % x.dim(), gather_dim % x.dim()
    ragged_in = input_splits is not None or plan is not None
    ragged_out = output_splits is not None or plan is not None
    same = scatter_dim == gather_dim
    if out_size is None:
        if (same and ragged_in) or ragged_out:
            raise ValueError(
                f"epops.{op}: out_size: expected the size of dim {gather_dim} of the result, as the splits are known on the device "
                "only, got None; pass a bound that holds for every step"
            )
        out_size = x.shape[gather_dim] if same else x.shape[gather_dim] * facts.size
    if same:
        scatter_size = out_size
    elif scatter_size is None:
        if ragged_in:
            raise ValueError(
                f"epops.{op}: scatter_size: expected the size of dim {scatter_dim} of the result, as input_splits are known on the "
                "device only, got None; pass a bound on this rank's split"
            )
        scatter_size = x.shape[scatter_dim] // facts.size
    return {
        "group": facts.name,
        "ep_size": facts.size,
        "out_size": out_size,
        "scatter_size": scatter_size,
        "scatter_dim": scatter_dim,
        "gather_dim": gather_dim,
        "lane": lane,
    }


def all_to_all(
    x: torch.Tensor,
    input_splits: torch.Tensor | None = None,
    output_splits: torch.Tensor | None = None,
    plan: torch.Tensor | None = None,
    **settings: Any,
) -> AllToAllResult:
    """Send a piece of ``x`` to every rank, cut along ``scatter_dim``; put the pieces that arrive together along ``gather_dim``.

    Args:
        x: any shape and strides; elements of 1, 2, 4 or 8 bytes.  Differentiable.
        input_splits: (R,) int64, what goes to each rank along ``scatter_dim``; None: equal parts.
        output_splits: (R,) int64, what comes from each rank along ``gather_dim``; None: as sent.  Where the two dims differ, this
            rank contributes its own entry of it (the first ``output_splits[rank]`` along ``gather_dim``).
        plan: of `plan_all_to_all`, in place of both.
        out_size: size of ``gather_dim`` of the result; needed where its splits are known on the device only.
        scatter_size: size of ``scatter_dim`` of the result, needed where input_splits are given and the two dims differ.

    Over nccl, which moves equal parts, sizes of x and of the result must be those of the other ranks; splits may differ.  Ranks
    compare sizes on the host when they first have them, and `DisagreementError` is raised on all of them where they differ.
    Splits that disagree between ranks, and pieces for which ``out_size`` has no room, are reported by the next op or check.  A
    group with ``overflow="count"`` only counts the latter in ``status``; a backward through a call that dropped some is refused
    over gloo, and over nccl, which reads no split on the host, the gradient of what was dropped is zero.

    >>> import torch, epops
    >>> with epops.ExpertGroup(None, "docs") as group:
    ...     got = epops.all_to_all(torch.arange(3), torch.tensor([2]), group=group, out_size=4)
    >>> got.rows.tolist(), got.counts.tolist()
    ([0, 1, 0, 0], [2])
    """
    a = all_to_all_arguments("all_to_all", x, input_splits, output_splits, plan, **settings)
    return AllToAllResult(*call(torch.ops.epops.all_to_all.default, x, input_splits, output_splits, plan, **a))


def all_to_all_start(
    x: torch.Tensor,
    input_splits: torch.Tensor | None = None,
    output_splits: torch.Tensor | None = None,
    plan: torch.Tensor | None = None,
    **settings: Any,
) -> torch.Tensor:
    """Begin an `all_to_all` and return its ticket."""
    a = all_to_all_arguments("all_to_all_start", x, input_splits, output_splits, plan, **settings)
    return torch.ops.epops.all_to_all_start.default(x, input_splits, output_splits, plan, **a)


def all_to_all_wait(
    ticket: torch.Tensor,
    x: torch.Tensor,
    input_splits: torch.Tensor | None = None,
    output_splits: torch.Tensor | None = None,
    plan: torch.Tensor | None = None,
    **settings: Any,
) -> AllToAllResult:
    """Result of the `all_to_all` that ``ticket`` began."""
    a = all_to_all_arguments("all_to_all_wait", x, input_splits, output_splits, plan, **settings)
    return AllToAllResult(*torch.ops.epops.all_to_all_wait.default(ticket, x, input_splits, output_splits, plan, **a))


# ---- the real kernels ----------------------------------------------------------------------------------------------


def _check(
    group: ExpertGroup, /, x: torch.Tensor, ins: Any = None, outs: Any = None, plan: Any = None, **a: Any
) -> None:
    fakes.check_all_to_all("all_to_all", x, ins, outs, plan, **a)
    check_group("all_to_all", group, x, a["ep_size"])
    if group.transport.host_counts:
        _check_values(group, x, ins, outs, plan, a["scatter_dim"], a["gather_dim"])


def _check_values(
    group: ExpertGroup, x: torch.Tensor, ins: Any, outs: Any, plan: Any, scatter_dim: int, gather_dim: int
) -> None:
    along = x.shape[scatter_dim]
    if plan is not None:
        version, ranks = plan[:2].tolist()
        ins, offsets, outs, _ = read_plan(plan, group.size)
        ends = (ins + offsets).tolist()
        if (version, ranks) != (1, group.size) or min(offsets.tolist()) < 0 or max(ends) > along:
            fail(
                "all_to_all",
                "plan",
                f"a plan for {group.size} ranks of pieces inside dim {scatter_dim} of x, 0 … {along}",
                f"version {version}, {ranks} ranks, pieces {[*zip(offsets.tolist(), ends)]}",
                f"pass the plan that epops.plan_all_to_all made of splits of x{_dropped(group)}",
            )
    values = [0] if ins is None else ins.tolist()
    if min(values) < 0 or sum(values) > along:
        expected = f"splits from 0 whose sum is at most {along}, the size of dim {scatter_dim}"
        fail("all_to_all", "input_splits", expected, values, f"pass splits of x{_dropped(group)}")
    values = [0] * group.size if outs is None else outs.tolist()
    if min(values) < 0:
        fail("all_to_all", "output_splits", "splits from 0", values, "pass what each rank sends")
    if scatter_dim != gather_dim and values[group.rank] > x.shape[gather_dim]:
        expected = f"at most {x.shape[gather_dim]} for rank {group.rank} itself, the size of dim {gather_dim} of its x"
        fail("all_to_all", "output_splits", expected, values, "pass what each rank has")


def _dropped(group: ExpertGroup) -> str:
    """What else may be behind splits that are larger than x: the gradient of a call that dropped pieces, which has the splits of
    all that was sent but a gradient of what had room only."""
    if group.overflow != "count":
        return ""
    return (
        "; in the backward of an all_to_all that dropped what its out_size had no room for (overflow='count'): x is its "
        "gradient, the splits are all that its peers sent, so give that call an out_size with room for them: what is dropped has "
        "no gradient"
    )


def prepare(
    group: ExpertGroup, /, x: torch.Tensor, ins: Any = None, outs: Any = None, plan: Any = None, **a: Any
) -> Any:
    if not group.transport.host_counts:
        return prepare_on_device(group, x, ins, outs, plan, a)
    scatter_dim, gather_dim = a["scatter_dim"], a["gather_dim"]
    if plan is not None:
        ins, offsets, outs, _ = (part.tolist() for part in read_plan(plan, group.size))
    else:
        ins = even_splits(x.shape[scatter_dim], group.size) if ins is None else ins.tolist()
        offsets = [sum(ins[:rank]) for rank in range(group.size)]
        outs = None if outs is None else outs.tolist()
    mine = x.shape[gather_dim]
    if gather_dim != scatter_dim and outs is not None:
        mine = min(outs[group.rank], mine)
    chunks = cut(x, ins, offsets, scatter_dim=scatter_dim, gather_dim=gather_dim, gather_size=mine)
    blocks = [chunk.contiguous().view(-1).view(torch.uint8).unsqueeze(1) for chunk in chunks]
    rest = [size for dim, size in enumerate(x.shape) if dim not in (scatter_dim, gather_dim)]
    width = x.element_size()
    for size in rest:
        width *= size
    call = all_to_all_call(x.shape, scatter_dim, gather_dim, width, a["lane"])
    counts = torch.tensor([block.shape[0] for block in blocks])
    return Blocks(call, blocks, counts, status_bits(group, {}), None, [(size, mine) for size in ins]), (ins, outs)


def finish(group: ExpertGroup, /, swap: Swap, keep: Any, sequence: int, x: torch.Tensor, *_: Any, **a: Any) -> Any:
    if not group.transport.host_counts:
        return finish_on_device(group, swap, keep, sequence, x, a)
    ins, outs = keep
    scatter_dim, gather_dim = a["scatter_dim"], a["gather_dim"]
    same = scatter_dim == gather_dim
    shape = list(x.shape)
    shape[scatter_dim], shape[gather_dim] = a["scatter_size"], a["out_size"]
    assert swap.sizes is not None, "host transports carry the sizes"
    chunks, came = [], []
    bits = swap.bits
    for rank, (block, (split, gathered)) in enumerate(zip(swap.rows, swap.sizes, strict=True)):
        size = split if same else gathered
        wrong = outs is not None and size != outs[rank] or (not same and split != ins[group.rank])
        if wrong:
            bits |= words.STATUS_DISAGREE
        part = list(x.shape)
        part[scatter_dim] = split
        if not same:
            part[gather_dim] = gathered
        chunk = block.contiguous().view(-1).view(x.dtype).view(part)
        # Disagreement is reported; until then its rows are absent, never taken for another's.
        chunks.append(chunk.narrow(gather_dim, 0, 0) if wrong else chunk)
        came.append(size)
    placed = came if outs is None else outs
    out, lost = join(
        chunks,
        [sum(placed[:rank]) for rank in range(group.size)],
        shape,
        scatter_dim=scatter_dim,
        gather_dim=gather_dim,
    )
    status = settle(group, "all_to_all", sequence, bits, num_rows=sum(came), num_dropped=lost, device=x.device)
    return out, torch.tensor(came, dtype=torch.int64), status


ALL_TO_ALL = Halves("all_to_all", _check, prepare, finish)


def full_settings(a: dict[str, Any]) -> dict[str, Any]:
    """The op's settings with the defaults of what was left out."""
    return {"scatter_dim": 0, "gather_dim": 0, "lane": 0, **a}


def _all_to_all(x: Any, ins: Any = None, outs: Any = None, plan: Any = None, **a: Any) -> Any:
    return whole(ALL_TO_ALL, (x, ins, outs, plan), full_settings(a))


def _all_to_all_start(x: Any, ins: Any = None, outs: Any = None, plan: Any = None, **a: Any) -> Any:
    return start(ALL_TO_ALL, (x, ins, outs, plan), full_settings(a))


def _all_to_all_wait(ticket: Any, x: Any, ins: Any = None, outs: Any = None, plan: Any = None, **a: Any) -> Any:
    return wait(ALL_TO_ALL, ticket, (x, ins, outs, plan), full_settings(a), full_settings(a))


bind("all_to_all", _all_to_all, fakes.all_to_all)
bind("all_to_all_start", _all_to_all_start, fakes.all_to_all_start)
bind("all_to_all_wait", _all_to_all_wait, fakes.all_to_all_wait)


# ---- autograd: the same exchange with splits and dims swapped ------------------------------------------------------------


def certainly_equal(left: Any, right: Any) -> bool:
    """Whether two sizes are equal, symbolic ones by their expressions and without a guard."""
    if isinstance(left, int) and isinstance(right, int):
        return left == right
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(left == right))


def goes_back_ragged(x: torch.Tensor, ins: Any, outs: Any, plan: Any, a: dict[str, Any]) -> bool:
    """Whether the gradient needs the counts: pieces that may differ from rank to rank go back as they came."""
    same = a["scatter_dim"] == a["gather_dim"]
    even = x.shape[a["gather_dim"]] * (1 if same else a["ep_size"])
    # Room for other than R pieces like this rank's: pieces differ from rank to rank, and go back as they came.
    other = not certainly_equal(a["out_size"], even)
    return plan is None and (outs is not None or (same and ins is not None) or other)


def _save(ctx: Any, x: Any, ins: Any, outs: Any, plan: Any, settings: dict[str, Any], counts: torch.Tensor) -> None:
    ctx.settings = full_settings(settings)
    ctx.x_shape = x.shape
    ctx.ragged_back = goes_back_ragged(x, ins, outs, plan, ctx.settings)
    ctx.save_for_backward(counts, ins, plan)


def _setup(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    x, ins, outs, plan = inputs
    _save(ctx, x, ins, outs, plan, keyword_only_inputs, output[1])
    ctx.first = ()


def _setup_wait(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    _, x, ins, outs, plan = inputs
    _save(ctx, x, ins, outs, plan, keyword_only_inputs, output[1])
    ctx.first = (None,)


def way_back(
    grad: torch.Tensor, counts: torch.Tensor | None, ins: Any, plan: Any, x_shape: Any, a: dict[str, Any]
) -> torch.Tensor:
    """The gradient of x, of shape ``x_shape``: the same exchange with splits and dims swapped; ``counts`` where it is ragged."""
    grad_x, _, _ = torch.ops.epops.all_to_all.default(
        grad,
        counts,
        ins,
        None if plan is None else reverse_plan(plan, a["ep_size"]),
        group=a["group"],
        ep_size=a["ep_size"],
        out_size=x_shape[a["scatter_dim"]],
        scatter_size=x_shape[a["gather_dim"]],
        scatter_dim=a["gather_dim"],
        gather_dim=a["scatter_dim"],
        lane=a["lane"],
    )
    return grad_x


def _backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    counts, ins, plan = ctx.saved_tensors
    grad_x = way_back(grad, counts if ctx.ragged_back else None, ins, plan, ctx.x_shape, ctx.settings)
    return (*ctx.first, grad_x, None, None, None)


differentiate("all_to_all", _backward, _setup)
differentiate("all_to_all_wait", _backward, _setup_wait)
