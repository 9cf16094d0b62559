"""Medians of repeated calls on a GPU, calls as one graph, and what machine it was."""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

from deqkern import ops

Row = dict[str, Any]
Call = Callable[[], object]


class Clock:
    """Medians of repeated calls, by CUDA events with the cache emptied before each, or by the host's clock.

    What empties the cache keeps the device busy for some 0.3 ms: the host has launched the call by then, and its own
    time is not in the device's, unless it takes longer than that.
    """

    def __init__(self, device: torch.device, budget: float) -> None:
        self.device, self.budget = device, budget
        self.flush = torch.empty(2**30 if device.type == "cuda" else 1, dtype=torch.int8, device=device)

    def __call__(self, call: Call) -> float:
        """Seconds of one call on the device."""
        for _ in range(3):
            call()
        once = self.wall(call, 1)
        repeats = int(min(max(self.budget / max(once, 1e-6), 5), 200))
        if self.device.type != "cuda":
            return statistics.median(self.wall(call, 1) for _ in range(repeats))
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in events:
            self.flush.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize(self.device)
        return statistics.median(start.elapsed_time(end) * 1e-3 for start, end in events)

    def wall(self, call: Call, repeats: int) -> float:
        """Seconds of one of so many calls in a row, by the host's clock, until the device has finished."""
        self.wait()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        self.wait()
        return (time.perf_counter() - start) / repeats

    def solve(self, call: Call) -> float:
        """Seconds of one call by the host's clock, the median of some after a first one that is not counted."""
        call()
        repeats = int(min(max(2 * self.budget / max(self.wall(call, 1), 1e-6), 3), 20))
        return statistics.median(self.wall(call, 1) for _ in range(repeats))

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def graphed(calls: list[Call], device: torch.device) -> Call:
    """One call that replays all of `calls`, captured as one graph; on a CPU it makes them."""
    if device.type != "cuda":
        return lambda: [call() for call in calls]
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def machine(device: torch.device, commit: str) -> Row:
    """`commit`, where this is no checkout."""

    def printed(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return ""

    found: Row = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit or printed("git", "rev-parse", "HEAD"),
        "backends": {name: state["ops"] for name, state in ops.backends().items()},
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
        found["driver"] = printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found["triton"] = __import__("triton").__version__
    return found


def copies(clock: Clock, sizes: list[int]) -> dict[int, float]:
    """Bytes per second, read and written, of a copy that moves so many bytes in all."""
    found = {}
    for size in sizes:
        source, target = torch.ones(2, max(size // 8, 1), device=clock.device).unbind()
        found[size] = 8 * len(source) / clock(lambda s=source, t=target: t.copy_(s))
    return found
