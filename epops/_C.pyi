"""The CUDA kernels, where they are built: what is in it is said by csrc/bindings.cpp."""

from typing import Any

def __getattr__(name: str) -> Any: ...
