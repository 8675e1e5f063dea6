"""pytest's plugin that runs tests/gpu on emulated kernels: ``EPOPS_EMULATED=_C.so python -m pytest -p tests.emulated.plugin …``.

``EPOPS_EMULATED_CHECKS=1`` looks for races too, and ``EPOPS_EMULATED_BLOCKS`` is the number of blocks of a kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import ranks  # before tests.gpu

import tests.gpu.ranks as on_gpu  # isort: skip

quantize_rows = on_gpu.quantize_rows


class AsOnCuda(TorchDispatchMode):
    """Eager torch on a GPU divides by a number as it multiplies by its inverse."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.div.Tensor and not isinstance(args[1], torch.Tensor):
            return args[0] * float(torch.tensor(1.0) / torch.tensor(args[1]))
        return func(*args, **(kwargs or {}))


def quantize_as_on_cuda(x: torch.Tensor, **settings: Any) -> Any:
    with AsOnCuda():
        return quantize_rows(x, **settings)


on_gpu.Ranks = ranks.Ranks  # type: ignore[misc]
on_gpu.quantize_rows = quantize_as_on_cuda
torch.Tensor.cuda = lambda self: self  # type: ignore[method-assign,assignment]
torch.cuda.current_device = lambda: 0
