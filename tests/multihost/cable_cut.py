"""One rank of the cut-cable test: exchanges until the other host is gone, and says how that was told: `cable_cut.py FOLDER`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import epops


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    x, chosen, weights = torch.ones(2, 16), torch.tensor([[0, 1], [0, 1]]), torch.ones(2, 2)
    group = epops.ExpertGroup(dist.group.WORLD, "ep", num_experts=2, max_tokens=2, timeout=3.0)
    began = time.monotonic()
    try:
        while time.monotonic() - began < 60:
            epops.dispatch(x, chosen, weights, group=group)
            (folder / f"exchanging-{rank}").touch()
            began = time.monotonic() if not (folder / "cut").exists() else began
            time.sleep(0.05)
        print("nothing was noticed")
    except epops.PeerError as error:
        print(f"after {time.monotonic() - began:.1f} s: {error}", flush=True)
        started = time.monotonic()
        group.close(raise_errors=False)
        print(f"closed after {time.monotonic() - started:.1f} s", flush=True)
    # The process groups of torch would wait for the other host at exit.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
