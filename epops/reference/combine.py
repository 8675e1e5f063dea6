"""combine and the gradients in plain torch: sum a token's rows on their rank, answer, sum over ranks.

Sums run in float32, over k first and then over ranks in rank order, so that equal inputs give equal bits.
"""

from __future__ import annotations

import torch

from .dispatch import take_rows
from .quantize import dequantize_rows
from .routing import sends


def answered_pairs(recv_row: torch.Tensor) -> torch.Tensor:
    """(R, M) bool: the (source rank, token) pairs that this rank received a record of, and owes an answer."""
    return (recv_row != -1).any(dim=2)


def reduce_rows(
    y: torch.Tensor,
    y_scales: torch.Tensor | None,
    row_weights: torch.Tensor | None,
    recv_row: torch.Tensor,
    *,
    layout: str,
) -> torch.Tensor:
    """(N, H) float32: for each of N pairs ``recv_row`` (N, K) the sum over k of weight times row; -1 and -2 count as zero.

    In the ``rank`` layout a pair has one row, whatever K is.
    """
    hidden = y.shape[-1]
    flat = y.reshape(-1, hidden)
    scales = None if y_scales is None else y_scales.reshape(flat.shape[0], -1)
    weights = None if row_weights is None else row_weights.reshape(-1)
    total = torch.zeros(recv_row.shape[0], hidden, dtype=torch.float32, device=y.device)
    if flat.shape[0] == 0:
        return total
    columns = recv_row.amax(dim=1, keepdim=True) if layout == "rank" else recv_row
    for k in range(columns.shape[1]):
        index = columns[:, k].to(torch.int64)
        present = (index >= 0) & (index < flat.shape[0])
        index = torch.where(present, index, 0)
        values = take_rows(flat, index)
        values = values.float() if scales is None else dequantize_rows(values, take_rows(scales, index))
        if weights is not None:
            values = values * weights[index].unsqueeze(1)
        total = total + values.masked_fill(~present.unsqueeze(1), 0.0)
    return total


def sum_over_ranks(answers: list[torch.Tensor], tokens: list[torch.Tensor], num_tokens: int) -> torch.Tensor:
    """(T, W) float32: row i of ``answers[r]`` (N_r, W) belongs to ``tokens[r][i]``; summed per token, rank 0 first.

    A token number of T marks padding.
    """
    total = torch.zeros(num_tokens + 1, answers[0].shape[1], dtype=torch.float32, device=answers[0].device)
    for rows, owner in zip(answers, tokens, strict=True):
        total.index_copy_(0, owner, take_rows(total, owner) + rows.float())
    return total[:num_tokens]


def finish(
    total: torch.Tensor,
    addend: torch.Tensor | None,
    *,
    out_dtype: torch.dtype,
    out_scale: float,
    addend_scale: float,
) -> torch.Tensor:
    """``out_scale * total + addend_scale * addend`` in float32, as ``out_dtype``."""
    if out_scale != 1.0:
        total = total * out_scale
    if addend is not None:
        extra = addend.float()
        total = total + (extra if addend_scale == 1.0 else extra * addend_scale)
    return total.to(out_dtype)


def weight_gradients(grad_row_weights: torch.Tensor | None, recv_row: torch.Tensor, *, layout: str) -> torch.Tensor:
    """(N, K) float32: gradients of the routing weights of N pairs ``recv_row`` (N, K), zero for other ranks' k."""
    if grad_row_weights is None or grad_row_weights.numel() == 0:
        return torch.zeros(recv_row.shape, dtype=torch.float32, device=recv_row.device)
    index = recv_row.to(torch.int64)
    present = index >= 0
    index = index.clamp(min=0)
    if layout == "rank":
        grads = torch.gather(
            grad_row_weights[index.amax(dim=1)], 1, torch.arange(index.shape[1], device=index.device).expand_as(index)
        )
    else:
        grads = grad_row_weights.reshape(-1)[index]
    return grads.float().masked_fill(~present, 0.0)


def scatter_gradients(
    grads: torch.Tensor,
    recv_row: torch.Tensor,
    y: torch.Tensor,
    y_scales: torch.Tensor | None,
    row_weights: torch.Tensor | None,
    *,
    layout: str,
    out_scale: float,
    grad_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token gradients ``grads`` (N, H) of N pairs ``recv_row`` (N, K) onto the rows that made them.

    Returns ``grad_y`` like ``y`` (zero in rows that no token owns) and ``grad_row_weights`` float32 like ``row_weights``
    (empty without weights).
    """
    hidden = y.shape[-1]
    flat = y.reshape(-1, hidden)
    num_rows = flat.shape[0]
    columns = recv_row.amax(dim=1, keepdim=True) if layout == "rank" else recv_row
    pairs, ks = torch.nonzero(columns >= 0, as_tuple=True) if y.device.type == "cpu" else _all_entries(columns)
    index = columns[pairs, ks].to(torch.int64)
    index = torch.where((index >= 0) & (index < num_rows), index, num_rows)
    wide = take_rows(grads, pairs).float() * out_scale
    grad_dtype = grads.dtype if y.element_size() == 1 else y.dtype
    safe = index.clamp(max=max(num_rows - 1, 0))
    spread = wide if row_weights is None else wide * row_weights.reshape(-1)[safe].unsqueeze(1)
    grad_y = torch.zeros(num_rows + 1, hidden, dtype=grad_dtype, device=y.device)
    grad_y.index_copy_(0, index, (spread if grad_scale == 1.0 else spread * grad_scale).to(grad_dtype))
    if row_weights is None:
        return grad_y[:num_rows].reshape(y.shape), torch.empty(0, dtype=torch.float32, device=y.device)
    values = (
        take_rows(flat, safe).float()
        if y_scales is None
        else dequantize_rows(take_rows(flat, safe), take_rows(y_scales.reshape(num_rows, -1), safe))
    )
    grad_w = torch.zeros(num_rows + 1, dtype=torch.float32, device=y.device)
    grad_w[index] = (values * wide).sum(dim=1)
    return grad_y[:num_rows].reshape(y.shape), grad_w[:num_rows].reshape(row_weights.shape)


def _all_entries(columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, width = columns.shape
    every = torch.arange(rows * width, device=columns.device)
    return every // max(width, 1), every % max(width, 1)


__all__ = [
    "answered_pairs",
    "finish",
    "reduce_rows",
    "scatter_gradients",
    "sends",
    "sum_over_ranks",
    "weight_gradients",
]
