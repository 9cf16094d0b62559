"""A clock that waits for the device, and the copy that every bandwidth is compared with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


class Copy:
    """A copy whose source and destination together have `working_set` bytes; it reads and writes that many in all.

    `run` copies once and keeps the time: called between the rounds of something else, both meet the same noise.
    """

    def __init__(self, working_set: int, device: torch.device) -> None:
        count = max(working_set // 8, 1)
        self.source, self.target = torch.ones(2, count, device=device).unbind()
        self.seconds: list[float] = []
        self._copy()

    def run(self) -> None:
        self.seconds.append(seconds(self._copy, self.source.device))

    def _copy(self) -> None:
        self.target.copy_(self.source)

    def bandwidth(self) -> float:
        """Bytes per second, read and written, by the median time."""
        return 8 * len(self.source) / statistics.median(self.seconds)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """The time that one call takes until the device has finished."""
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rounds_for(call: Callable[[], object], device: torch.device, budget: float) -> int:
    """How often a call fits in `budget` seconds, 3 .. 200; it is run twice to find out."""
    call()
    return int(min(max(budget / seconds(call, device), 3), 200))
