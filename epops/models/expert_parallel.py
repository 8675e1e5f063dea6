"""Transformers' expert-parallel registry (5.23): ``DistributedConfig(ep_implementation="epops")``.

Transformers shards and loads the weights; this brings the tokens. Ranks with their own batches send them all; ranks of a
tensor-parallel group, which share one batch, send a slice each and gather the results.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import epops

from ..group import ExpertGroup, Settings, open_groups, parse_tag
from . import interface
from .experts import Rows, exchange
from .site import Site, facts_of, serving


def register(module: ModuleType) -> None:
    """Enter ``"epops"`` into the registry of ``transformers.distributed.expert_parallel``."""

    class EpopsEP(module.EPImplementation):  # type: ignore[name-defined]
        """Dispatch and combine of epops around the experts' own rows, which arrive grouped and are not sorted again."""

        def __init__(self, experts: Any, ep_mesh: Any, tp_mesh: Any) -> None:
            super().__init__(experts, ep_mesh, tp_mesh)
            self.experts = experts
            group = group_of(ep_mesh, "ep")
            num_experts = self.num_local_experts * group.size
            # Transformers divides the gradients of experts by the number of batches itself.
            facts = facts_of(num_experts, self.num_local_experts, group, "sum")
            self.site = Site(type(experts).__name__, facts, serving(group))
            self.slices = None
            if tp_mesh.size() > 1:
                # The slice is chosen by a tensor, since all ranks are to have one graph.
                batch = group if self.shares_batch else group_of(tp_mesh, "tp")
                self.slices = (batch.tag, torch.tensor(batch.rank, device=group.device))

        def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            if self.slices is None:
                return self._run(hidden_states, top_k_index, top_k_weights)
            tag, rank = self.slices
            size, num_tokens = int(tag.split()[0]), hidden_states.shape[0]
            share = (num_tokens + size - 1) // size
            rows = rank * share + torch.arange(share, device=rank.device)
            index = torch.where((rows < num_tokens)[:, None], top_k_index[rows.clamp(max=num_tokens - 1)], -1)
            x = _Slice.apply(hidden_states, rows, tag)
            y = self._run(x, index, _Slice.apply(top_k_weights, rows, tag))
            return epops.gather_tokens(y, group=_Tagged(tag), num_tokens=num_tokens)

        def _run(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            def compute(rows: Rows) -> Tensor:
                return interface.run(self.experts, self.site.group, rows)

            return exchange(
                self.site, x, interface.unskipped(self.site, top_k_index), top_k_weights, compute, shares=True
            )

    module.EPImplementationInterface.register("epops", EpopsEP)


class _Tagged:
    """Stands for a group where only its facts are asked for."""

    def __init__(self, tag: str) -> None:
        self.tag = tag

    @property
    def settings(self) -> Settings:
        return parse_tag(self.tag)


class _Slice(torch.autograd.Function):
    """This rank's slice of what all ranks hold alike; its gradient is put together from all ranks' slices."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, tag: str) -> Tensor:
        ctx.tag, ctx.num_tokens = tag, x.shape[0]
        return x[rows.clamp(max=x.shape[0] - 1)]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return epops.gather_tokens(grad, group=_Tagged(ctx.tag), num_tokens=ctx.num_tokens), None, None


def group_of(mesh: Any, name: str) -> ExpertGroup:
    """The open group over the ranks of ``mesh``, or a new one with default settings; collective."""
    process_group = mesh.get_group()
    ranks = dist.get_process_group_ranks(process_group)
    for group in open_groups():
        if group.process_group is not None and dist.get_process_group_ranks(group.process_group) == ranks:
            return group
    return ExpertGroup(process_group, name)
