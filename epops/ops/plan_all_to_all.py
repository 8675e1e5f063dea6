"""plan_all_to_all: splits and their offsets, worked out once for the exchanges of every layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .. import layout as words
from ..group import ExpertGroup, get_group
from ..meta import all_to_all as fakes
from ..meta.checks import fail
from ..reference.all_to_all import write_plan
from ..transport import Swap
from .all_to_all import finish, full_settings, prepare
from .arguments import common_arguments
from .exchange import Halves, check_group, checked, whole
from .registry import bind


class Plan(NamedTuple):
    """What `plan_all_to_all` returns: ``plan`` int64, see `epops.layout.PLAN_HEADER`; ``status`` int32 (8,)."""

    plan: torch.Tensor
    status: torch.Tensor


def plan_all_to_all(
    input_splits: torch.Tensor, output_splits: torch.Tensor | None = None, *, group: Any, lane: int = 0
) -> Plan:
    """Compute offsets once, for the `all_to_all` calls of every layer; their splits are not passed again.

    ``input_splits`` (R,) int64 lie along ``scatter_dim`` of those calls, ``output_splits`` along ``gather_dim``.  Where the two are
    one dim, ``output_splits`` may be None: ranks then tell one another what they send.  Given splits are not exchanged; whether
    ranks agree on them is found by the first `all_to_all`.
    """
    facts, _ = common_arguments("plan_all_to_all", group, 1, None, None)
    found = torch.ops.epops.plan_all_to_all.default(
        input_splits, output_splits, group=facts.name, ep_size=facts.size, lane=lane
    )
    return Plan(*found)


def _check_plan(group: ExpertGroup, /, ins: torch.Tensor, outs: Any = None, **a: Any) -> None:
    fakes.plan_all_to_all(ins, outs, **a)
    check_group("plan_all_to_all", group, ins, a["ep_size"])
    if group.transport.host_counts:
        for name, splits in (("input_splits", ins), ("output_splits", outs)):
            if splits is not None and min(splits.tolist()) < 0:
                fail("plan_all_to_all", name, "splits from 0", splits.tolist(), "pass sizes")


def _prepare_plan(group: ExpertGroup, /, ins: torch.Tensor, outs: Any = None, **a: Any) -> Any:
    ones = torch.ones_like(ins)
    out, keep = prepare(group, ins, ones, ones, None, **_of_plan(group, a))
    return out._replace(call=out.call._replace(op="plan_all_to_all")), keep


def _finish_plan(
    group: ExpertGroup, /, swap: Swap, keep: Any, sequence: int, ins: torch.Tensor, *_: Any, **a: Any
) -> Any:
    came, _, status = finish(group, swap, keep, sequence, ins, **_of_plan(group, a))
    return write_plan(ins, came), status


def _of_plan(group: ExpertGroup, a: dict[str, Any]) -> dict[str, Any]:
    return {**full_settings(a), "out_size": group.size, "scatter_size": group.size}


PLAN = Halves("plan_all_to_all", _check_plan, _prepare_plan, _finish_plan)


def _plan_all_to_all(ins: torch.Tensor, outs: torch.Tensor | None = None, **a: Any) -> Any:
    if outs is None:
        return whole(PLAN, (ins, None), a)
    group = get_group(a["group"])
    checked(group, PLAN, (ins, outs), a)
    status = torch.zeros(words.STATUS_WORDS, dtype=torch.int32, device=ins.device)
    status[5].fill_(-1)
    return write_plan(ins, outs), status


bind("plan_all_to_all", _plan_all_to_all, fakes.plan_all_to_all)
