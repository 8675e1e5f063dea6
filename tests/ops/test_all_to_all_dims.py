"""Dims as the all_to_all kernel walks them: the same elements of x and of the result, in the same order, in fewer dims."""

from __future__ import annotations

import itertools

import pytest
import torch

from epops.transport.dims import dims_of


def offsets(size, stride):
    """Of all elements, in row-major order."""
    return [sum(i * s for i, s in zip(place, stride)) for place in itertools.product(*(range(n) for n in size))]


CASES = [
    ((6, 4, 8), (0, 1, 2)),
    ((6, 4, 8), (2, 0, 1)),
    ((3, 1, 5, 2), (1, 3, 0, 2)),
    ((1, 1, 7), (0, 2, 1)),
    ((5,), (0,)),
    ((2, 3), (1, 0)),
]


@pytest.mark.parametrize("gather_from", [1, 3])
@pytest.mark.parametrize(("shape", "order"), CASES)
def test_merged_dims_name_the_same_elements(shape, order, gather_from):
    x = torch.empty([shape[dim] for dim in torch.tensor(order).argsort()]).permute(order)[..., : shape[-1]]
    for scatter_dim, gather_dim in itertools.product(range(x.dim()), repeat=2):
        out_shape = list(x.shape)
        if scatter_dim == gather_dim:
            out_shape[scatter_dim] += gather_from
        else:
            out_shape[gather_dim] *= gather_from
            out_shape[scatter_dim] += 1
        dims = dims_of(x.shape, x.stride(), out_shape, scatter_dim, gather_dim)
        out_stride = torch.empty(out_shape, device="meta").stride()
        assert len(dims.size) <= x.dim() + 1 and dims.x_stride[-1] == dims.out_stride[-1] == 1
        assert offsets(dims.size, dims.x_stride) == offsets(x.shape, x.stride())
        assert offsets(dims.size, dims.out_stride) == offsets(x.shape, out_stride)
        # A step of either dim is so many elements of the merged one.
        for dim, at, unit in (
            (scatter_dim, dims.scatter_at, dims.scatter_unit),
            (gather_dim, dims.gather_at, dims.gather_unit),
        ):
            assert dims.size[at] == x.shape[dim] * unit
            assert x.shape[dim] == 1 or dims.x_stride[at] * unit == x.stride(dim)
