"""A checkpoint folder's safetensors files: names and shapes without reading, and single tensors or rows of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"


class Checkpoint:
    """The tensors of a folder.  What was read is counted: ``read`` maps names to bytes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.read: dict[str, int] = {}
        self._open: dict[str, Any] = {}
        self.files = self._index()

    def _index(self) -> dict[str, str]:
        """Name of each tensor → file."""
        index = self.folder / INDEX
        if index.exists():
            files = json.loads(index.read_text())["weight_map"]
            absent = sorted({file for file in files.values() if not (self.folder / file).exists()})
            if absent:
                raise ValueError(
                    f"epops.serving.load: folder: {self.folder} lacks {', '.join(absent[:3])}, which its index names; "
                    "download the checkpoint again"
                )
            return files
        found = [self.folder / WHOLE] if (self.folder / WHOLE).exists() else sorted(self.folder.glob("*.safetensors"))
        if not found:
            raise ValueError(
                f"epops.serving.load: folder: expected *.safetensors files in {self.folder}, got none; other formats are not "
                "read: load the model by transformers and save it with save_pretrained"
            )
        return {name: file.name for file in found for name in self._handle(file.name).keys()}  # noqa: SIM118

    def _handle(self, file: str) -> Any:
        from safetensors import safe_open

        if file not in self._open:
            self._open[file] = safe_open(str(self.folder / file), framework="pt", device="cpu")
        return self._open[file]

    def shape(self, name: str) -> torch.Size:
        return torch.Size(self._handle(self.files[name]).get_slice(name).get_shape())

    def tensor(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """A tensor, or its rows ``[first, last)``, on the CPU; no other part of the file is read."""
        handle = self._handle(self.files[name])
        value = handle.get_tensor(name) if rows is None else handle.get_slice(name)[rows[0] : rows[1]]
        self.read[name] = self.read.get(name, 0) + value.numel() * value.element_size()
        return value

    def close(self) -> None:
        """Let go of the files."""
        self._open.clear()
