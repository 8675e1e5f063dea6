"""Definition of the ops of `epops.schema` in torch's dispatcher, and their binding to kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..group import compiling
from ..schema import SCHEMAS
from ..torch_private import below_autograd, transforms_active

library = torch.library.Library("epops", "DEF")

for _schema in SCHEMAS.values():
    library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def bind(name: str, real: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Give op ``name`` its real kernel, for CPU and CUDA tensors, and its fake kernel."""
    for key in ("CPU", "CUDA"):
        library.impl(name, real, key)

    def traced(*args: Any, **kwargs: Any) -> Any:
        compiling.watch()  # whoever the backend is, and after torch.compiler.reset too
        return fake(*args, **kwargs)

    torch.library.register_fake(f"epops::{name}", traced, lib=library)


def differentiate(name: str, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
    """Give op ``name`` its gradient."""
    torch.library.register_autograd(f"epops::{name}", backward, setup_context=setup_context, lib=library)
    op = getattr(torch.ops.epops, name).default

    class Eager(torch.autograd.Function):
        """The same gradient, for `call`."""

        @staticmethod
        def forward(ctx: Any, a: dict[str, Any], *tensors: Any) -> Any:
            with below_autograd():
                output = op(*tensors, **a)
            setup_context(ctx=ctx, inputs=tensors, keyword_only_inputs=a, output=output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return None, *backward(ctx, *grads)

    _eager[op] = Eager


_eager: dict[Any, type[torch.autograd.Function]] = {}


def call(op: Any, *tensors: torch.Tensor | None, **a: Any) -> Any:
    """``op(*tensors, **a)``, where ``tensors`` are all its positional arguments.

    Eager calls skip the dispatcher's autograd key: for an op of Python it goes through Python twice, which costs as much as all
    the rest of a call.  What traces (compilers, torch.func) sees the op as it is.
    """
    if torch.compiler.is_compiling() or transforms_active():
        return op(*tensors, **a)
    if torch.is_grad_enabled() and any(getattr(tensor, "requires_grad", False) for tensor in tensors):
        return _eager[op].apply(a, *tensors)
    with below_autograd():
        return op(*tensors, **a)
