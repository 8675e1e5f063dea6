"""The facts of a group that graphs are built from."""

from __future__ import annotations

from typing import NamedTuple


class Settings(NamedTuple):
    """The facts of a group that graphs are built from: equal on every rank and from run to run."""

    name: str
    size: int
    max_tokens: int
    num_experts: int
    num_slots: int
    alignment: int

    @property
    def tag(self) -> str:
        """The same as one str, which `parse_tag` reads.

        Under ``dynamic=True`` Dynamo makes graph inputs of the ints that it finds in objects, but never of a str: what a
        graph is built from goes by way of it and stays constant.
        """
        return f"{self.size} {self.max_tokens} {self.num_experts} {self.num_slots} {self.alignment} {self.name}"


def parse_tag(tag: str) -> Settings:
    """`Settings` from their ``tag``."""
    size, max_tokens, num_experts, num_slots, alignment, name = tag.split(" ", 5)
    return Settings(name, int(size), int(max_tokens), int(num_experts), int(num_slots), int(alignment))
