"""Transport ``nvlink``: epops' own kernels store to peers' memory; torch's symmetric memory maps it.

Chosen by "auto" where NVLink reaches every rank (`domain`).  A start half launches its op on a second stream, and the wait
half has the caller's stream wait for it.  What has no kernel here goes over nccl, on a communicator of the group's.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import torch

from .. import layout as words
from ..errors import GroupError
from ..reference.all_to_all import write_plan
from ..torch_private import is_capturing, symmetric_addresses, symmetric_empty
from . import kernel_all_to_all, kernels
from .base import Pending
from .c10d import begin_equal
from .domain import refusal

SUMS = "combine", "dispatch_backward"  # ops that add rows up
PHASES = {1: "header", 2: "counts", 3: "rows", 4: "answers", 5: "credits"}


def make(group: Any, *, required: bool) -> NvlinkTransport | None:
    """The transport for ``group``, or None where NVLink does not reach every rank; collective.

    Raises:
        GroupError: ``required``, and it does not.
    """
    setting = os.environ.get("EPOPS_NVLINK", "")
    reason = refusal(group, setting)
    if reason:
        if required:
            raise GroupError(
                f"epops.ExpertGroup: transport 'nvlink' of group {group.name!r}: {reason}; use transport='auto' or 'c10d'"
            )
        if group.rank == 0 and setting != "0":
            warnings.warn(f"epops.ExpertGroup: group {group.name!r} takes transport 'c10d': {reason}", stacklevel=3)
        return None
    return NvlinkTransport(group)


class PeerMemory:
    """One lane's memory on every rank: allocated, zeroed and mapped collectively; found by address from then on."""

    def __init__(self, group: Any, sizes: kernels.Sizes) -> None:
        self.sizes = sizes
        self.workspace, self.num_bytes = kernels.lay_out(group.rank, group.size, sizes, group.timeout)
        self.errors = kernels.error_words()
        self.workspace.error_host = self.errors.data_ptr()
        self.handle: Any = None
        if group.size == 1:
            self.tensor = torch.zeros(self.num_bytes, dtype=torch.uint8, device=group.device)
            addresses = [self.tensor.data_ptr()]
        else:
            self.tensor = symmetric_empty(self.num_bytes, group.device)
            self.tensor.zero_()
            torch.cuda.synchronize(group.device)
            self.handle, addresses = symmetric_addresses(self.tensor, group.process_group)
            # Nobody stores to a peer's memory before the peer has zeroed it.
            group.host_all_gather([self.num_bytes])
        self.workspace.set_peers(addresses)
        torch.cuda.synchronize(group.device)


class NvlinkTransport:
    """Whole ops by kernels over peer-mapped memory; methods are named like the ops and take their arguments."""

    name = "nvlink"
    host_counts = False
    row_alignment = 16

    def __init__(self, group: Any) -> None:
        self.rank, self.size, self.device = group.rank, group.size, group.device
        self.tuning = kernels.Tuning()
        self.num_sms = torch.cuda.get_device_properties(group.device).multi_processor_count
        self._memories: dict[int, list[PeerMemory]] = {}
        self._plans: dict[tuple[str, int, int, bool], kernels.Plan] = {}
        self._nccl = group._communicator("nccl", "rows")
        # Made here and not at first use, which may be inside a capture.
        self._side = torch.cuda.Stream(group.device)

    def __repr__(self) -> str:
        return f"nvlink, {self.workspace_bytes / 2**20:.1f} MiB of peer memory"

    @property
    def workspace_bytes(self) -> int:
        """Bytes of peer-mapped memory that this rank holds."""
        return sum(memory.num_bytes for memories in self._memories.values() for memory in memories)

    def memory(self, group: Any, lane: int, sizes: kernels.Sizes) -> PeerMemory:
        """The lane's memory, made or made larger on first need; what graphs were captured with stays until close."""
        found = self._memories.setdefault(lane, [])
        if found and found[-1].sizes.covers(sizes):
            return found[-1]
        if is_capturing():
            raise GroupError(
                f"epops: group {group.name!r} needs more peer memory than it has (lane {lane}), and a CUDA graph capture "
                "cannot allocate it; run one step eagerly, with the largest shapes, before capturing"
            )
        base = kernels.Sizes(group.max_tokens, 8, max(group.num_slots, 1), 0)
        want = base.join(sizes) if not found else found[-1].sizes.join(sizes)
        made = PeerMemory(group, want)
        found.append(made)
        return made

    def plan(self, op: str, max_tokens: int, hidden: int) -> kernels.Plan:
        beside = kernels.is_beside()
        key = (op, max_tokens, hidden, beside)
        plan = self._plans.get(key)
        if plan is None:
            tuning = self.tuning.beside() if beside else self.tuning
            plan = self._plans[key] = tuning.plan(op, max_tokens, self.size, self.num_sms, hidden)
        return plan

    def runs_beside(self, op: str, row_bytes: int, a: dict[str, Any]) -> bool:
        """Whether an op with these arguments pays beside other work (`Tuning`): from what is equal on all ranks."""
        tokens = a.get("max_tokens", 0)
        return tokens * row_bytes <= self.tuning.beside_bytes and (
            op not in SUMS or tokens <= self.tuning.beside_sum_tokens
        )

    def beside(self, run: Callable[[], Any]) -> Pending:
        """Begin ``run``, one of the ops below, on a stream of its own and on few multiprocessors.

        All memory is of the caller's stream: results, and copies of arguments, which are kept until the op's end.
        """
        with kernels.launched_beside(self._side) as held:
            result = run()
            event = self._side.record_event()

        def behind() -> None:
            torch.cuda.current_stream(self.device).wait_event(event)

        def take() -> Any:
            behind()
            held.clear()
            return result

        return Pending(take, behind)

    def tune(self, **settings: Any) -> None:
        """Change settings of `kernels.Tuning`, alike on every rank and before any capture."""
        for name, value in settings.items():
            if not hasattr(self.tuning, name):
                known = ", ".join(vars(self.tuning))
                raise ValueError(f"epops: tune: expected one of {known}, got {name!r}")
            setattr(self.tuning, name, value)
        self._plans.clear()

    # ---- ops -----------------------------------------------------------------------------------------------------------

    def dispatch(
        self,
        owner: Any,
        /,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        x_scales: Any = None,
        **a: Any,
    ) -> tuple[torch.Tensor, ...]:
        return self._dispatch(owner, x, topk_idx, topk_weights, x_scales, None, a)

    def dispatch_quant(
        self, owner: Any, /, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, **a: Any
    ) -> tuple[torch.Tensor, ...]:
        quant = kernels.QuantSettings(**{name: a.pop(name) for name in kernels.QuantSettings._fields})
        if quant.block not in kernels.QUANT_BLOCKS:
            raise _unfit("dispatch_quant", "block", f"one of {kernels.QUANT_BLOCKS}", quant.block)
        if quant.scale_math not in kernels.QUANT_MATHS:
            raise _unfit("dispatch_quant", "scale_math", f"one of {tuple(kernels.QUANT_MATHS)}", quant.scale_math)
        if x.dtype not in kernels.DTYPES:
            raise _unfit("dispatch_quant", "x", "bfloat16, float16 or float32", x.dtype)
        return self._dispatch(owner, x, topk_idx, topk_weights, None, quant, a)

    def _dispatch(
        self,
        owner: Any,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        x_scales: torch.Tensor | None,
        quant: kernels.QuantSettings | None,
        a: dict[str, Any],
    ) -> tuple[torch.Tensor, ...]:
        num_experts, num_slots, max_tokens = a["num_experts"], a["num_slots"], a["max_tokens"]
        hidden, top_k = x.shape[1], topk_idx.shape[1]
        itemsize = x.element_size() if quant is None else quant.quant_dtype.itemsize
        if hidden * itemsize % 16:
            raise _unfit("dispatch", "x", "rows of a multiple of 16 bytes on the wire", f"{hidden * itemsize} bytes")
        if top_k > kernels.MAX_TOP_K:
            raise _unfit("dispatch", "topk_idx", f"at most {kernels.MAX_TOP_K} choices a token", top_k)
        scales = 0
        if x_scales is not None:
            if x_scales.element_size() not in (1, 4):
                raise _unfit("dispatch", "x_scales", "elements of 1 or 4 bytes", x_scales.dtype)
            scales = kernels.scale_bytes(x_scales.shape[1], x_scales.element_size())
        elif quant is not None:
            scales = kernels.scale_bytes(words.num_scales(hidden, quant.block), 4)
        # The answers to a quantizing dispatch are rows of x's type.
        row_bytes = max(hidden * itemsize + scales, hidden * x.element_size(), hidden * 2 if itemsize == 1 else 0)
        memory = self.memory(owner, a["lane"], kernels.Sizes(max_tokens, top_k, num_slots, row_bytes))
        expert_slot, mask = owner.maps(num_experts, num_slots, x.device)
        result = kernels.dispatch(
            memory.workspace,
            self.plan("dispatch", max_tokens, hidden),
            expert_slot,
            mask,
            x.contiguous(),
            topk_idx.contiguous(),
            topk_weights.contiguous(),
            x_scales,
            num_experts=num_experts,
            num_slots=num_slots,
            max_tokens=max_tokens,
            capacity=a["capacity"],
            layout=a["layout"],
            alignment=a["alignment"],
            lane=a["lane"],
            quant=quant,
        )
        return tuple(result)

    def combine(
        self,
        owner: Any,
        /,
        y: torch.Tensor,
        route: torch.Tensor,
        row_weights: Any = None,
        y_scales: Any = None,
        addend: Any = None,
        **a: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out_dtype = a["out_dtype"]
        if y_scales is not None:
            from ..reference.quantize import dequantize_rows

            y = dequantize_rows(y, y_scales)
        out, _, status = self._combine(owner, "combine", y, route, row_weights, addend, None, out_dtype, a)
        return out, status

    def dispatch_backward(
        self, owner: Any, /, grad_rows: torch.Tensor, grad_row_weights: Any, route: torch.Tensor, **a: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        a = {**a, "out_scale": a["grad_scale"], "addend_scale": 1.0}
        grads = (
            None if grad_row_weights is None or grad_row_weights.numel() == 0 else grad_row_weights.float().contiguous()
        )
        grad_x, grad_weights, status = self._combine(
            owner, "dispatch_backward", grad_rows, route, None, None, grads, grad_rows.dtype, a
        )
        if grads is None:
            grad_weights = grad_x.new_zeros(a["num_tokens"], a["top_k"], dtype=torch.float32)
        return grad_x, grad_weights, status

    def _combine(
        self,
        owner: Any,
        op: str,
        y: torch.Tensor,
        route: torch.Tensor,
        row_weights: Any,
        addend: Any,
        grad_row_weights: Any,
        out_dtype: torch.dtype,
        a: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        self._check_values(op, "y", y)
        if out_dtype not in kernels.DTYPES:
            raise _unfit(op, "out_dtype", "bfloat16, float16 or float32", out_dtype)
        sizes = kernels.Sizes(a["max_tokens"], a["top_k"], a["num_slots"], y.shape[-1] * out_dtype.itemsize)
        memory = self.memory(owner, a["lane"], sizes)
        return kernels.combine(
            memory.workspace,
            self.plan("combine", a["max_tokens"], y.shape[-1]),
            y.contiguous(),
            route,
            None if row_weights is None else row_weights.contiguous(),
            None if addend is None else addend.to(out_dtype).contiguous(),
            grad_row_weights,
            num_experts=a["num_experts"],
            num_slots=a["num_slots"],
            max_tokens=a["max_tokens"],
            num_tokens=a["num_tokens"],
            top_k=a["top_k"],
            layout=a["layout"],
            out_dtype=out_dtype,
            out_scale=a["out_scale"],
            addend_scale=a.get("addend_scale", 1.0),  # a start half has no addend
            lane=a["lane"],
            op=op,
        )

    def combine_backward(
        self,
        owner: Any,
        /,
        grad_out: torch.Tensor,
        y: torch.Tensor,
        route: torch.Tensor,
        row_weights: Any = None,
        y_scales: Any = None,
        **a: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if y_scales is not None:
            from ..reference.quantize import dequantize_rows

            y = dequantize_rows(y, y_scales).to(grad_out.dtype)
        self._check_values("combine_backward", "y", y)
        self._check_values("combine_backward", "grad_out", grad_out)
        row_bytes = grad_out.shape[-1] * grad_out.element_size()
        memory = self.memory(owner, a["lane"], kernels.Sizes(a["max_tokens"], a["top_k"], a["num_slots"], row_bytes))
        return kernels.combine_backward(
            memory.workspace,
            self.plan("combine_backward", a["max_tokens"], y.shape[-1]),
            grad_out.contiguous(),
            y.contiguous(),
            route,
            None if row_weights is None else row_weights.contiguous(),
            num_experts=a["num_experts"],
            num_slots=a["num_slots"],
            max_tokens=a["max_tokens"],
            top_k=a["top_k"],
            layout=a["layout"],
            out_scale=a["out_scale"],
            grad_scale=a["grad_scale"],
            lane=a["lane"],
        )

    def all_to_all(
        self,
        owner: Any,
        /,
        x: torch.Tensor,
        input_splits: torch.Tensor | None = None,
        output_splits: torch.Tensor | None = None,
        plan: torch.Tensor | None = None,
        **a: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        memory = self.memory(owner, a["lane"], kernels.Sizes(1, 1, 1, 0, self.tuning.ring_bytes))
        splits = [None if each is None else each.contiguous() for each in (input_splits, output_splits, plan)]
        return kernel_all_to_all.all_to_all(
            memory.workspace,
            self.tuning.beside() if kernels.is_beside() else self.tuning,
            self.num_sms,
            x,
            *splits,
            out_size=a["out_size"],
            scatter_size=a["scatter_size"],
            scatter_dim=a["scatter_dim"],
            gather_dim=a["gather_dim"],
            lane=a["lane"],
        )

    def plan_all_to_all(
        self, owner: Any, /, input_splits: torch.Tensor, output_splits: Any = None, **a: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Ranks tell one another one number each; with output_splits nothing is asked of the transport.
        sizes = {"out_size": self.size, "scatter_size": self.size, "scatter_dim": 0, "gather_dim": 0}
        came, _, status = self.all_to_all(owner, input_splits, lane=a.get("lane", 0), **sizes)
        return write_plan(input_splits, came), status

    def _check_values(self, op: str, name: str, tensor: torch.Tensor) -> None:
        if tensor.dtype not in kernels.DTYPES:
            raise _unfit(op, name, "bfloat16, float16 or float32", tensor.dtype)
        if tensor.shape[-1] % 8:
            raise _unfit(op, name, "a hidden size that is a multiple of 8", tensor.shape[-1])

    # ---- what has no kernel here ------------------------------------------------------------------------------------------

    def swap_padded(self, buffer: torch.Tensor) -> torch.Tensor:
        """Exchange ``buffer`` (R, bytes) uint8 over nccl: row r goes to rank r, row s of the result came from rank s."""
        return self.begin_padded(buffer).take()

    def begin_padded(self, buffer: torch.Tensor) -> Pending:
        """`swap_padded`, taken later."""
        return Pending(buffer.clone) if self.size == 1 else begin_equal(self._nccl, buffer)

    # ---- errors and the end ------------------------------------------------------------------------------------------------

    def take_errors(self) -> list[tuple[int, str]]:
        """Bits and text of what the kernels found since the last call; reads pinned memory only."""
        found = []
        for memories in self._memories.values():
            for memory in memories:
                error = kernels.take_error(memory.errors)
                if error is None:
                    continue
                where = f"rank {self.rank}, epoch {error.epoch}"
                if error.peer >= 0:
                    where += f", peer {error.peer}, phase {PHASES.get(error.phase, str(error.phase))}"
                found.append((error.bits, where))
        return found

    def close(self) -> None:
        torch.cuda.synchronize(self.device)
        self._memories.clear()
        self._plans.clear()
        self._nccl = None


def _unfit(op: str, what: str, expected: str, got: Any) -> ValueError:
    return ValueError(
        f"epops.{op}: {what}: expected {expected} for transport 'nvlink', got {got}; change it, or make the group with "
        "transport='c10d'"
    )
