"""Host time of an eager `epops.dispatch` and `epops.combine` at R = 1, T = 16: what the call costs beside the exchange itself.

    python benchmarks/bench_eager.py --out benchmarks/results

``python and dispatcher``: the public call, its checks, torch's dispatcher, autograd's key and our Python kernel up to where a
transport takes the op over (`transport.base.Transport`: a method named like the op); that method hands out a result made
before, so that nothing else is left.  ``whole call``: the same with the transport's real work; on a CPU that is the reference in
plain torch, on a GPU the kernels, whose end is not waited for.

Each figure is the fastest of many short batches of calls, so that other processes of the machine are in none of them (they
still take their share of caches and of a core's second thread: ``torch.empty(1)`` measured alike says how busy it was).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import epops

TOKENS, TOP_K, HIDDEN, EXPERTS = 16, 8, 2048, 64
LIMIT = 60.0


def fastest(call: Callable[[], Any], *, calls: int, seconds: float = 1.0) -> float:
    """Microseconds of a call: of batches of ``calls``, run for ``seconds``, the fastest."""
    for _ in range(calls):
        call()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - start) / calls)
    return best * 1e6


@contextlib.contextmanager
def handing_out(transport: Any, op: str, result: Any) -> Iterator[None]:
    """The transport takes ``op`` over and returns ``result``."""
    before = transport.__dict__.get(op)
    setattr(transport, op, lambda *_, **__: result)
    try:
        yield
    finally:
        delattr(transport, op) if before is None else setattr(transport, op, before)


def measure(group: Any, seconds: float) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, HIDDEN, generator=generator).to(group.device, torch.bfloat16)
    topk_idx = torch.rand(TOKENS, EXPERTS, generator=generator).argsort(dim=1)[:, :TOP_K].to(group.device, torch.int32)
    weights = torch.rand(TOKENS, TOP_K, generator=generator).to(group.device)
    sent = epops.dispatch(x, topk_idx, weights, group=group)
    y = torch.randn(sent.rows.shape, generator=generator).to(group.device, torch.bfloat16)

    def dispatch() -> Any:
        return epops.dispatch(x, topk_idx, weights, group=group)

    def combine() -> Any:
        return epops.combine(y, sent.route, sent.row_weights, group=group, num_tokens=TOKENS, top_k=TOP_K)

    rows = []
    for op, call in (("dispatch", dispatch), ("combine", combine)):
        result = tuple(call())
        for mode in (contextlib.nullcontext, torch.no_grad, torch.inference_mode):
            with mode():
                whole = fastest(call, calls=1 if group.device.type == "cpu" else 20, seconds=seconds)
                with handing_out(group.transport, op, result):
                    ours = fastest(call, calls=5, seconds=seconds)
            name = {contextlib.nullcontext: "plain", torch.no_grad: "no_grad"}.get(mode, "inference_mode")
            rows.append(
                {"op": op, "mode": name, "python_and_dispatcher_us": round(ours, 1), "whole_call_us": round(whole, 1)}
            )
    return rows


def machine(device: torch.device) -> dict[str, str]:
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    facts = {"cpu": cpu, "python": platform.python_version(), "torch": torch.__version__, "epops": epops.__version__}
    return {**facts, "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "none"}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    options = arguments.parse_args()

    torch.set_num_threads(1)
    with epops.ExpertGroup(None, "bench", max_tokens=TOKENS, num_experts=EXPERTS, device=options.device) as group:
        rows = measure(group, options.seconds)
        found = {
            "command": " ".join(["python", *sys.argv]),
            "machine": machine(group.device),
            "transport": repr(group.transport),
            "shape": {
                "tokens": TOKENS,
                "top_k": TOP_K,
                "hidden": HIDDEN,
                "experts": EXPERTS,
                "ranks": 1,
                "dtype": "bfloat16",
            },
            "limit_us": LIMIT,
            "torch_empty_us": round(fastest(lambda: torch.empty(1), calls=5, seconds=options.seconds), 2),
            "results": rows,
        }
    table = Table(
        title=f"eager calls at R = 1, T = {TOKENS}, µs ({found['machine']['gpu']}, {found['machine']['cpu']})"
    )
    for column in ("op", "mode", f"Python and dispatcher (at most {LIMIT:g})", "whole call"):
        table.add_column(column)
    for row in rows:
        ours = row["python_and_dispatcher_us"]
        colour = "green" if ours <= LIMIT else "red"
        table.add_row(row["op"], row["mode"], f"[{colour}]{ours}[/]", str(row["whole_call_us"]))
    Console().print(table)
    print(f"torch.empty(1): {found['torch_empty_us']} µs")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"eager_{group.device.type}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
