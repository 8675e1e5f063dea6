"""`ExpertGroup`: what outlives a call, found by name. Every op gets the name as a str."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .. import layout as words
from ..errors import DisagreementError, GroupError, PeerError
from ..torch_private import is_capturing, private_backend, private_store
from ..transport import CaptureTransport, GlooTransport, NcclTransport
from ..transport.mailbox import MESSAGE_WORDS, Absent, Mailbox
from . import registry
from .settings import Settings
from .turns import Turns

CONTROL_TAG = 73
CONTROL_MAGIC = 0x45504F43

_generations: dict[str, int] = {}
"""How often a name was used by the same ranks: the part of a communicator's name that tells two groups of one name apart."""


class ExpertGroup(Turns):
    """Ranks that share the experts of MoE layers, with their transport, expert map, mask and error state.

    Created collectively by every rank, before any compile or capture; closed explicitly or by a ``with`` statement.

    Args:
        ranks: the ``ProcessGroup`` or one-dimensional ``DeviceMesh`` of the experts; None is the default group, or this
            process alone when torch.distributed is not initialized.
        name: what ops and graphs call the group by; the same on every rank and from run to run.
        max_tokens: M, a bound on the tokens that any rank sends in one call.
        num_experts, num_slots: E and L for calls that name none; a call may give its own (layers may differ).
        alignment: rows to whose multiple each expert's rows are aligned; default 1 on CPU, 16 on CUDA.
        timeout: seconds that a rank waits for another in one exchange.
        transport: "auto" or "c10d" (gloo for CPU tensors, nccl for CUDA tensors), or "nvlink".
        overflow: "raise" reports dropped rows (a ``capacity`` below the worst case) as an error; "count" only counts them.
        device: "cpu" or "cuda"; default: CUDA when the process group has nccl, else CPU.

    Raises:
        GroupError: inside a CUDA graph capture, or when the name is taken.
        DisagreementError: when the ranks gave different settings; on every rank.
    """

    def __init__(
        self,
        ranks: Any = None,
        name: str = "ep",
        *,
        max_tokens: int = 1024,
        num_experts: int | None = None,
        num_slots: int | None = None,
        alignment: int | None = None,
        timeout: float = 30.0,
        transport: str = "auto",
        overflow: str = "raise",
        device: str | torch.device | None = None,
    ) -> None:
        if is_capturing():
            raise GroupError(
                f"epops.ExpertGroup: {name!r} cannot be created inside a CUDA graph capture; create it before"
            )
        super().__init__()
        self.closed = True
        self.process_group = _resolve_process_group(ranks)
        self.device_mesh = ranks if _is_mesh(ranks) else None
        self.name = name
        self.size = self.process_group.size() if self.process_group is not None else 1
        self.rank = self.process_group.rank() if self.process_group is not None else 0
        self.device = _resolve_device(device, self.process_group)
        self.max_tokens = max_tokens
        self.alignment = alignment if alignment is not None else (16 if self.device.type == "cuda" else 1)
        self.num_experts = num_experts or 0
        self.num_slots = num_slots or words.num_slots_for(self.num_experts, self.size)
        self.timeout = timeout
        self.overflow = overflow
        self.token_mask: torch.Tensor | None = None
        self._check_settings(transport)
        registry.add(self)
        self.control: Any = None
        try:
            self.prefix = self._make_prefix()
            self._agree(transport)
            self.control = self._communicator("gloo", "control")
            self._mailbox = Mailbox(self.control, timeout, CONTROL_TAG)
            self.transport = self._make_transport(transport)
        except BaseException:
            registry.remove(self)
            raise
        self.closed = False
        self.settings = Settings(name, self.size, max_tokens, self.num_experts, self.num_slots, self.alignment)
        self.tag = self.settings.tag
        self._maps: dict[tuple[int, int, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}
        self.cache: dict[Any, torch.Tensor] = {}
        self.known_calls: set[Any] = set()

    def __repr__(self) -> str:
        state = "closed" if self.closed else repr(self.transport)
        return (
            f"ExpertGroup({self.name!r}, rank {self.rank} of {self.size}, {state}, {self.device.type}, "
            f"max_tokens={self.max_tokens}, alignment={self.alignment}, timeout={self.timeout:g} s)"
        )

    def __enter__(self) -> ExpertGroup:
        self._require_open("enter")
        return self

    def __exit__(self, exc_type: Any, *_: Any) -> None:
        # An error on its way out says more than the one that it left behind here.
        self.close(raise_errors=exc_type is None)

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertGroup:
        """A group is a place, not a value: a copied model keeps its group."""
        return self

    # ---- maps ------------------------------------------------------------------------------------------------------

    def maps(self, num_experts: int, num_slots: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """``expert_slot`` (E,) int64, the global slot of each expert, and ``mask`` (R,) int64, 1 = the rank takes part."""
        key = (num_experts, num_slots, device)
        found = self._maps.get(key)
        if found is None:
            block = words.num_slots_for(num_experts, self.size)
            expert = torch.arange(num_experts, device=device)
            slot = expert // block * num_slots + expert % block
            found = self._maps[key] = (slot, torch.ones(self.size, dtype=torch.int64, device=device))
        return found

    def local_experts(self, num_experts: int) -> range:
        """The experts of a layer of ``num_experts`` that live on this rank: a block of E / R rounded up."""
        block = words.num_slots_for(num_experts, self.size)
        return range(min(self.rank * block, num_experts), min((self.rank + 1) * block, num_experts))

    # ---- life ------------------------------------------------------------------------------------------------------

    def close(self, *, raise_errors: bool = True) -> None:
        """Give back the transport and the name; a second close does nothing.  Waits for nobody that is dead.

        Raises what `check` would raise, and `GroupError` for a started exchange that nobody waited for.
        """
        with self._lock:
            if self.closed:
                return
            self.closed = True
        registry.remove(self)
        unfinished = self._end_turns()
        self._maps.clear()
        self.cache.clear()
        self.known_calls.clear()
        self.transport.close()
        self._mailbox.close()
        self.control = None
        if raise_errors:
            if unfinished:
                raise GroupError(
                    f"epops.ExpertGroup.close: {', '.join(unfinished)} of group {self.name!r} was never waited for; call the "
                    "wait half of each start"
                )
            self.check()

    def _has_peers(self) -> bool:
        return self.size > 1 and not _is_fake(self.process_group)

    def _make_prefix(self) -> str:
        ranks = dist.get_process_group_ranks(self.process_group) if self.process_group is not None else [0]
        stem = f"epops/{self.name}/{'_'.join(map(str, ranks))}"
        _generations[stem] = _generations.get(stem, 0) + 1
        return f"{stem}/{_generations[stem]}"

    def _communicator(self, kind: str, purpose: str) -> Any:
        if not self._has_peers():
            return None
        return private_backend(kind, self.process_group, f"{self.prefix}/{purpose}", self.timeout)

    def host_all_gather(self, values: list[int]) -> list[list[int]]:
        """``values`` of every rank, by rank: a small exchange on the host, for what ranks agree on between steps.

        Every rank gives as many values.  Raises `PeerError` when a rank does not take part within the group's timeout, unless
        it compiles, and `DisagreementError` when one gave another number of values.
        """
        self._require_open("ExpertGroup.host_all_gather")
        every = [list(values) if rank == self.rank else [] for rank in range(self.size)]
        if self.control is None:
            return every
        most = MESSAGE_WORDS - 2
        try:
            for begin in range(0, max(len(values), 1), most):
                part = values[begin : begin + most]
                message = [CONTROL_MAGIC, len(values), *part, *[0] * (most - len(part))]
                theirs = self._mailbox.swap(torch.tensor([message] * self.size, dtype=torch.int64))
                for peer, said in theirs.items():
                    if said[:2] != message[:2]:
                        raise DisagreementError(
                            f"epops.ExpertGroup.host_all_gather: rank {self.rank} of group {self.name!r}: expected {len(values)} "
                            f"values as here, got {said[1]} from rank {peer}; all ranks must make the same calls in the same order"
                        )
                    every[peer] += said[2 : 2 + len(part)]
        except Absent as error:
            raise PeerError(
                f"epops.ExpertGroup.host_all_gather: rank {self.rank} of group {self.name!r}: peer {error.peer} did not take part "
                f"within {self.timeout:g} s, or left; see what ended it [{error}]"
            ) from error
        return every

    def mailboxes(self) -> list[Mailbox]:
        """Where peers may be waiting for this rank on the host."""
        if self.closed or self.control is None:
            return []
        own = getattr(self.transport, "mailbox", None)
        return [self._mailbox] if own is None else [self._mailbox, own]

    def _check_settings(self, transport: str) -> None:
        def demand(good: bool, what: str, expected: str, got: Any) -> None:
            if not good:
                raise ValueError(f"epops.ExpertGroup: {what}: expected {expected}, got {got!r}")

        demand(bool(self.name) and isinstance(self.name, str), "name", "a str that is not empty", self.name)
        demand(self.max_tokens >= 1, "max_tokens", "at least 1", self.max_tokens)
        demand(self.alignment >= 1, "alignment", "at least 1", self.alignment)
        demand(self.timeout > 0, "timeout", "seconds above 0", self.timeout)
        demand(self.overflow in ("raise", "count"), "overflow", '"raise" or "count"', self.overflow)
        demand(transport in ("auto", "c10d", "nvlink"), "transport", '"auto", "c10d" or "nvlink"', transport)
        least = words.num_slots_for(self.num_experts, self.size)
        demand(self.num_slots >= least, "num_slots", f"at least {least} for {self.num_experts} experts", self.num_slots)

    def _agree(self, transport: str) -> None:
        """Compare the settings of all ranks; a group is made by all of them alike or by none."""
        if not self._has_peers():
            return
        mine = {
            "name": self.name,
            "max_tokens": self.max_tokens,
            "num_experts": self.num_experts,
            "num_slots": self.num_slots,
            "alignment": self.alignment,
            "timeout": self.timeout,
            "transport": transport,
            "overflow": self.overflow,
            "device": self.device.type,
        }
        store = private_store(f"{self.prefix}/settings")
        store.set(str(self.rank), json.dumps(mine))
        for peer in range(self.size):
            try:
                store.wait([str(peer)], timedelta(seconds=self.timeout))
                theirs = json.loads(store.get(str(peer)))
            except RuntimeError as error:
                raise PeerError(
                    f"epops.ExpertGroup: {self.name!r}: rank {peer} of {self.size} did not make the group within "
                    f"{self.timeout:g} s; all ranks must create it, in the same order as other groups of that name"
                ) from error
            for key, value in mine.items():
                if theirs[key] != value:
                    raise DisagreementError(
                        f"epops.ExpertGroup: {key}: expected the same on every rank, got {value!r} on rank {self.rank} and "
                        f"{theirs[key]!r} on rank {peer}; give all ranks the same settings"
                    )

    def _make_transport(self, transport: str) -> Any:
        if _is_fake(self.process_group):
            return CaptureTransport(self.name)
        if self.device.type == "cuda" and transport in ("auto", "nvlink"):
            made = _nvlink_transport(self, required=transport == "nvlink")
            if made is not None:
                return made
        if self.device.type == "cuda":
            return NcclTransport(self._communicator("nccl", "rows"), self.name, self.timeout)
        if transport == "nvlink":
            raise GroupError("epops.ExpertGroup: transport 'nvlink' needs CUDA devices; use 'auto' or 'c10d'")
        return GlooTransport(self._communicator("gloo", "rows"), self.name, self.timeout)


def _nvlink_transport(group: ExpertGroup, *, required: bool) -> Any:
    try:
        from ..transport import nvlink  # type: ignore[attr-defined]
    except ImportError as error:
        if required:
            raise GroupError(
                f"epops.ExpertGroup: transport 'nvlink' needs the CUDA kernels, which are not built ({error}); install epops "
                "with nvcc and --no-build-isolation on this machine, or use transport='c10d'"
            ) from error
        return None
    return nvlink.make(group, required=required)


def _is_mesh(ranks: Any) -> bool:
    return hasattr(ranks, "get_group") and hasattr(ranks, "mesh")


def _resolve_process_group(ranks: Any) -> dist.ProcessGroup | None:
    if ranks is None:
        return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    if _is_mesh(ranks):
        if ranks.ndim != 1:
            raise ValueError(
                f"epops.ExpertGroup: ranks: expected a DeviceMesh of one dimension, got {ranks.ndim}; pass mesh['name']"
            )
        return ranks.get_group()
    if not isinstance(ranks, dist.ProcessGroup):
        raise ValueError(
            f"epops.ExpertGroup: ranks: expected a ProcessGroup, a DeviceMesh or None, got {type(ranks).__name__}"
        )
    return ranks


def _resolve_device(device: str | torch.device | None, process_group: dist.ProcessGroup | None) -> torch.device:
    if device is None:
        has_nccl = process_group is not None and "nccl" in str(dist.get_backend(process_group))
        device = "cuda" if has_nccl and torch.cuda.is_available() else "cpu"
    if torch.device(device).type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(device)


def _is_fake(process_group: dist.ProcessGroup | None) -> bool:
    return process_group is not None and str(dist.get_backend(process_group)) == "fake"
