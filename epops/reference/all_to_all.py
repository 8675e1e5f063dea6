"""all_to_all in plain torch: cut a tensor along one dim, put what arrives together along another.

Also the grouped GEMM that CPU ranks and dtypes without a kernel use.
"""

from __future__ import annotations

import torch

from .. import layout as words


def even_splits(size: int, ep_size: int) -> list[int]:
    return [size // ep_size] * ep_size


def cut(
    x: torch.Tensor, splits: list[int], offsets: list[int], *, scatter_dim: int, gather_dim: int, gather_size: int
) -> list[torch.Tensor]:
    """The chunk of each rank: ``splits[r]`` of dim ``scatter_dim`` from ``offsets[r]``; the first ``gather_size`` of the other."""
    chunks = []
    for size, offset in zip(splits, offsets, strict=True):
        chunk = x.narrow(scatter_dim, offset, size)
        if gather_dim != scatter_dim:
            chunk = chunk.narrow(gather_dim, 0, gather_size)
        chunks.append(chunk)
    return chunks


def join(
    chunks: list[torch.Tensor], offsets: list[int], shape: list[int], *, scatter_dim: int, gather_dim: int
) -> tuple[torch.Tensor, int]:
    """Chunks put at ``offsets`` along ``gather_dim`` of a zero tensor of ``shape``; also how much found no room."""
    out = chunks[0].new_zeros(shape)
    lost = 0
    for chunk, offset in zip(chunks, offsets, strict=True):
        room = max(min(chunk.shape[gather_dim], shape[gather_dim] - offset), 0)
        lost += chunk.shape[gather_dim] - room
        if gather_dim != scatter_dim:
            across = min(chunk.shape[scatter_dim], shape[scatter_dim])
            lost += chunk.shape[scatter_dim] - across
            chunk = chunk.narrow(scatter_dim, 0, across)
            target = out.narrow(gather_dim, min(offset, shape[gather_dim]), room).narrow(scatter_dim, 0, across)
        else:
            target = out.narrow(gather_dim, min(offset, shape[gather_dim]), room)
        target.copy_(chunk.narrow(gather_dim, 0, room))
    return out, lost


def running(splits: torch.Tensor) -> torch.Tensor:
    """Offsets (R,) of splits that follow one another."""
    return torch.cumsum(splits, 0) - splits


def write_plan(input_splits: torch.Tensor, output_splits: torch.Tensor) -> torch.Tensor:
    """A plan tensor, see `words.PLAN_HEADER`."""
    ep_size = input_splits.shape[0]
    header = torch.zeros(words.PLAN_HEADER, dtype=torch.int64, device=input_splits.device)
    # Filled in: an int that is assigned is a copy from the host, which a CUDA graph capture refuses.
    header[0].fill_(1)
    header[1].fill_(ep_size)
    header[2] = input_splits.sum()
    header[3] = output_splits.sum()
    return torch.cat([header, input_splits, running(input_splits), output_splits, running(output_splits)])


def read_plan(plan: torch.Tensor, ep_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Input splits, input offsets, output splits, output offsets."""
    _, a, b, c, d = plan.split([words.PLAN_HEADER, ep_size, ep_size, ep_size, ep_size])
    return a, b, c, d


def reverse_plan(plan: torch.Tensor, ep_size: int) -> torch.Tensor:
    """The plan of the way back."""
    header, sent, sent_at, received, received_at = plan.split([words.PLAN_HEADER, *[ep_size] * 4])
    swapped = torch.stack([header[0], header[1], header[3], header[2]])
    return torch.cat([swapped, received, received_at, sent, sent_at])


def grouped_mm(
    rows: torch.Tensor, weight: torch.Tensor, expert_ends: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """(C, out): rows of expert e, those from the end of e - 1 to ``expert_ends[e]``, times ``weight[e]``; other rows zero.

    ``bias`` (L, out) is added to an expert's rows, alignment gaps among them, before the result is rounded.
    """
    out = rows.new_zeros(rows.shape[0], weight.shape[2])
    start = 0
    for expert, end in enumerate(expert_ends.tolist()):
        end = min(end, rows.shape[0])
        if end > start:
            if bias is None:
                torch.mm(rows[start:end], weight[expert], out=out[start:end])
            else:
                torch.addmm(bias[expert], rows[start:end], weight[expert], out=out[start:end])
            start = end
    return out


def grouped_mm_backward_weight(grad: torch.Tensor, rows: torch.Tensor, expert_ends: torch.Tensor) -> torch.Tensor:
    """(L, in, out): for each expert its rows transposed times its rows' gradients."""
    out = rows.new_zeros(expert_ends.shape[0], rows.shape[1], grad.shape[1])
    start = 0
    for expert, end in enumerate(expert_ends.tolist()):
        end = min(end, rows.shape[0])
        if end > start:
            torch.mm(rows[start:end].t(), grad[start:end], out=out[expert])
            start = end
    return out
