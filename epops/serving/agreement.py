"""The ranks agree on each round on the host, over a communicator of their own, while the round before is still running."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..errors import PeerError
from ..torch_private import private_backend
from .schedule import Need

_made: dict[str, int] = {}
"""Engines made on a group so far, by the group's own prefix: two engines of one group never share a communicator."""


class Agreement:
    """A few words from every rank to every rank.  Made by all ranks of the group, in the same order."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.communicator: Any = None
        if group.control is not None:
            number = _made[group.prefix] = _made.get(group.prefix, 0) + 1
            self.communicator = private_backend(
                "gloo", group.process_group, f"{group.prefix}/serving/{number}", group.timeout
            )

    def start(self, need: Need) -> Callable[[], list[Need]]:
        """Send this rank's need; calling the result waits for everybody's, by rank.

        Raises PeerError when a rank does not take part within the group's timeout.
        """
        if self.communicator is None:
            return lambda: [need]
        mine = torch.tensor(need, dtype=torch.int64)
        every = [torch.empty_like(mine) for _ in range(self.group.size)]
        work = self.communicator.allgather([every], [mine])

        def wait() -> list[Need]:
            try:
                work.wait()
            except RuntimeError as error:
                said = str(error).splitlines()[0][:200]
                raise PeerError(
                    f"epops.serving.Engine.run: rank {self.group.rank} of group {self.group.name!r}: a peer did not come to the "
                    f"next round within {self.group.timeout:g} s, or left; call run() on every rank, and see what ended it [{said}]"
                ) from error
            return [Need(*part.tolist()) for part in every]

        return wait

    def close(self) -> None:
        self.communicator = None
