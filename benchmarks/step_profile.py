"""What a step on a GPU is made of: its kernels by kind, how often the host launches something; for `bench_decode.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

PROFILED = 10
"""Steps under the profiler."""
KINDS = {
    "exchange": (
        "dispatch_kernel",
        "dispatch_lines_kernel",
        "combine_kernel",
        "combine_lines_kernel",
        "combine_streams_kernel",
        "scatter_kernel",
        "ncclDevKernel",
    ),
    "grouped product": ("GroupProblemShape", "grouped_mm", "prepare_grouped"),
    "attention": ("fmha", "flash", "attention"),
    "rows": ("map_rows",),
    "product": ("gemm", "nvjet", "cublas", "_mm_", "splitK"),
}
"""Kind of kernel → what one of its names has in it, in this order; everything else is "other"."""


class Parts(NamedTuple):
    """What one step is made of, on the first rank; microseconds of the device, kernels that overlap counted twice."""

    kinds: dict[str, float]
    exchange_a_layer: float
    exchange_share: float
    """Of the kernels' sum."""
    graph_launches: float
    """A step."""
    other_launches: float
    """Kernels that the host launches outside of a graph, a step."""
    kernels: list[tuple[str, float, float]]
    """Name, count a step, microseconds a step: the largest."""


def profile(step: Callable[[int], Any], at: int, layers: int) -> Parts:
    """What the steps after ``at`` are made of; all ranks call it."""
    from torch.profiler import DeviceType, ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        for _ in range(PROFILED):
            step(at)
        torch.cuda.synchronize()
    found = seen.key_averages()
    on_device = [event for event in found if event.device_type == DeviceType.CUDA]
    kernels = [
        (event.key, event.count / PROFILED, event.self_device_time_total / PROFILED)
        for event in on_device
        if not event.key.startswith(("Memcpy", "Memset"))
    ]
    kinds = dict.fromkeys((*KINDS, "other"), 0.0)
    for key, _, microseconds in kernels:
        kind = next((kind for kind, words in KINDS.items() if any(word in key for word in words)), "other")
        kinds[kind] += microseconds
    counts = {event.key: event.count / PROFILED for event in found}
    return Parts(
        kinds=kinds,
        exchange_a_layer=kinds["exchange"] / layers,
        exchange_share=kinds["exchange"] / max(sum(kinds.values()), 1e-9),
        graph_launches=counts.get("cudaGraphLaunch", 0.0),
        other_launches=sum(
            count for key, count in counts.items() if key.startswith(("cudaLaunchKernel", "cuLaunchKernel"))
        ),
        kernels=sorted(kernels, key=lambda kernel: -kernel[2])[:20],
    )


def told(name: str, parts: Parts) -> list[str]:
    """The lines of a profile."""
    kinds = ", ".join(f"{kind} {microseconds:.0f}" for kind, microseconds in parts.kinds.items())
    lines = [
        f"{name}, captured step, µs of the device by kind of kernel: {kinds}.",
        f"Exchanges take {parts.exchange_a_layer:.1f} µs a layer, {parts.exchange_share:.0%} of the kernels' time.  The host makes "
        f"{parts.graph_launches:g} graph launches and {parts.other_launches:g} kernel launches a step.",
        "",
        "| kernel | a step | µs a step |",
        "| --- | --- | --- |",
    ]
    for name, count, microseconds in parts.kernels:
        lines.append(f"| `{name[:100]}` | {count:g} | {microseconds:.1f} |")
    return lines
