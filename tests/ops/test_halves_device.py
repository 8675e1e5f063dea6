"""Started halves of transports that read nothing on the host, in place of a GPU: nccl over gloo, kernels as another group's ops."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist

import epops
from epops.transport import Pending
from tests.ops import test_halves
from tests.ops.test_all_to_all_padded import Padded
from tests.ranks import run_ranks


class Later(Padded):
    """Equal parts for all pairs that arrive when they are taken, as on nccl."""

    def begin_padded(self, buffer: torch.Tensor) -> Pending:
        buffer = buffer.contiguous()
        received = torch.empty_like(buffer)
        work = dist.all_to_all_single(received, buffer, async_op=True)
        return Pending(lambda: work.wait() and received)


class Native(Later):
    """Whole ops of its own, as nvlink has them; a thread stands for the second stream."""

    def __init__(self, group: epops.ExpertGroup) -> None:
        super().__init__(group)
        self.host = epops.ExpertGroup(
            name="host", max_tokens=group.max_tokens, num_experts=group.num_experts, device="cpu"
        )
        self.side = ThreadPoolExecutor(1)
        self.running: list[Any] = []

    def runs_beside(self, op: str, row_bytes: int, a: dict[str, Any]) -> bool:
        return True

    def beside(self, run: Any) -> Pending:
        future = self.side.submit(run)
        self.running.append(future)
        return Pending(future.result, lambda: future.result() and None)

    def __getattr__(self, name: str) -> Any:
        if name not in ("dispatch", "dispatch_quant", "combine", "combine_backward", "dispatch_backward"):
            raise AttributeError(name)

        def run(owner: Any, /, *tensors: Any, **a: Any) -> Any:
            if name == "combine":
                y, route, w, y_scales, *addend = tensors
                tensors = (y, route, w, *(addend or [None]), y_scales)
            return getattr(torch.ops.epops, name).default(*tensors, **{**a, "group": "host"})

        return run

    def close(self) -> None:
        self.side.shutdown()
        self.host.close()


class AtTheWait(Native):
    """Whole ops that do not pay beside other work: the wait runs them."""

    def runs_beside(self, op: str, row_bytes: int, a: dict[str, Any]) -> bool:
        return False

    def beside(self, run: Any) -> Pending:
        raise AssertionError("begun after all")


def over(transport: type[Padded]) -> Any:
    """`epops.ExpertGroup`, but for the transport."""

    def make(*args: Any, **settings: Any) -> epops.ExpertGroup:
        group = epops.ExpertGroup(*args, **settings)
        dist.barrier()  # a slower rank may still be connecting to the transport that is closed here
        group.transport.close()
        group.transport = transport(group)
        group.record_on_device = lambda status: None
        return group

    return make


class Epops:
    """The package with another way to make a group, for tests that are written for any."""

    def __init__(self, transport: type[Padded]) -> None:
        self.ExpertGroup = over(transport)

    def __getattr__(self, name: str) -> Any:
        return getattr(epops, name)


TRANSPORTS = {"nccl": Later, "kernels": Native, "kernels at the wait": AtTheWait}


def check(rank: int, size: int, name: str, kind: str) -> None:
    made = Epops(TRANSPORTS[kind])
    scenario = getattr(test_halves, name)
    kept = test_halves.epops
    test_halves.epops = made  # type: ignore[assignment]
    try:
        scenario(rank, size)
    finally:
        test_halves.epops = kept


@pytest.mark.parametrize("kind", TRANSPORTS)
@pytest.mark.parametrize("size", (1, 3))
def test_halves_are_the_whole(kind: str, size: int) -> None:
    run_ranks(check, size, "all_halves", kind)


@pytest.mark.parametrize("kind", TRANSPORTS)
def test_halves_have_the_gradients_of_the_whole(kind: str) -> None:
    run_ranks(check, 2, "halves_have_gradients", kind)


def whole_ops_come_behind(rank: int, size: int) -> list[bool]:
    """Kernels of one lane share its memory: what is launched after a start waits for it, whichever stream it is on."""
    with over(Native)(None, "ep", max_tokens=4, num_experts=4) as group:
        x = torch.ones(3, 8)
        idx, w = torch.tensor([[0, 2]] * 3), torch.ones(3, 2)
        ticket = epops.dispatch_start(x, idx, w, group=group)
        second = epops.dispatch_start(2 * x, idx, w, group=group)
        whole = epops.dispatch(3 * x, idx, w, group=group)
        done = [future.done() for future in group.transport.running]
        first = epops.dispatch_wait(ticket, x, idx, w, group=group)
        other = epops.dispatch_wait(second, 2 * x, idx, w, group=group)
        end = int(whole.expert_ends[-1])
        assert torch.equal(whole.rows[:end], 3 * first.rows[:end]) and torch.equal(
            other.rows[:end], 2 * first.rows[:end]
        )
        return done


def test_whole_ops_come_behind_started_ones() -> None:
    assert run_ranks(whole_ops_come_behind, 2) == [[True, True]] * 2


def addend_in_bf16(rank: int, size: int, kind: str) -> float:
    """A sum that is rounded before the late addend comes: within bf16's rounding of the whole op."""
    with over(TRANSPORTS[kind])(None, "ep", max_tokens=4, num_experts=4) as group:
        generator = torch.Generator().manual_seed(rank)
        x = torch.randn(4, 16, generator=generator).bfloat16()
        idx, w = torch.tensor([[0, 3]] * 4), torch.rand(4, 2, generator=generator)
        sent = epops.dispatch(x, idx, w, group=group)
        args = {"group": group, "num_tokens": 4, "top_k": 2}
        whole = epops.combine(sent.rows, sent.route, sent.row_weights, x, addend_scale=0.5, **args).out
        ticket = epops.combine_start(sent.rows, sent.route, sent.row_weights, **args)
        late = epops.combine_wait(ticket, sent.rows, sent.route, sent.row_weights, x, addend_scale=0.5, **args).out
        assert late.dtype == whole.dtype == torch.bfloat16
        return ((late - whole).abs() / whole.abs().clamp(min=1.0)).max().item()


def test_a_late_addend_is_within_rounding() -> None:
    assert max(run_ranks(addend_in_bf16, 2, "kernels")) <= 2**-7


def test_an_op_that_runs_at_the_wait_has_its_addend_in_time() -> None:
    assert run_ranks(addend_in_bf16, 2, "kernels at the wait") == [0.0, 0.0]


def a_start_that_nobody_waits_for(rank: int, size: int, kind: str) -> str:
    group = over(TRANSPORTS[kind])(None, "ep", max_tokens=4, num_experts=4)
    epops.dispatch_start(torch.ones(2, 8), torch.tensor([[0], [3]]), torch.ones(2, 1), group=group)
    try:
        group.close()
    except epops.GroupError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("kind", TRANSPORTS)
def test_a_start_that_nobody_waits_for_is_named(kind: str) -> None:
    for said in run_ranks(a_start_that_nobody_waits_for, 2, kind, fresh=True):
        assert "epops.dispatch_start (epoch 1) of group 'ep' was never waited for" in said
