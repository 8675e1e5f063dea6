"""Definition of the ops of `epops.schema` in torch's dispatcher, and their binding to kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..schema import SCHEMAS

library = torch.library.Library("epops", "DEF")

for _schema in SCHEMAS.values():
    library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def bind(name: str, real: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Give op ``name`` its real kernel, for CPU and CUDA tensors, and its fake kernel."""
    for key in ("CPU", "CUDA"):
        library.impl(name, real, key)
    torch.library.register_fake(f"epops::{name}", fake, lib=library)


def differentiate(name: str, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
    """Give op ``name`` its gradient."""
    torch.library.register_autograd(f"epops::{name}", backward, setup_context=setup_context, lib=library)
