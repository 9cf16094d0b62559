"""How long a call of a network takes, by its rows."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from .model import Network

# The device is full where twice the rows take this many times as long, twice in a row; more rows are not measured.
FULL = 1.8


@dataclass(frozen=True)
class Latencies:
    """The time of a call by its rows, as measured.

    Attributes:
        seconds: Rows -> seconds.
        out_of_memory: The rows with which the model ran out of memory, or None.
    """

    seconds: dict[int, float]
    out_of_memory: int | None = None

    @property
    def sizes(self) -> list[int]:
        """The rows that were measured, ascending."""
        return sorted(self.seconds)

    def of(self, rows: int, max_batch: int) -> float:
        """The time of a call with `rows`, cut into parts of at most `max_batch`, a size that was measured."""
        whole, rest = divmod(rows, max_batch)
        return whole * self._interpolated(max_batch) + (self._interpolated(rest) if rest else 0.0)

    def _interpolated(self, rows: int) -> float:
        """Linear between sizes. Fewer rows than the smallest take no less; beyond the largest each takes its share."""
        sizes = self.sizes
        above = bisect_left(sizes, rows)
        if above == len(sizes):
            return self.seconds[sizes[-1]] * rows / sizes[-1]
        if above == 0:
            return self.seconds[sizes[0]]
        low, high = sizes[above - 1], sizes[above]
        share = (rows - low) / (high - low)
        return (1 - share) * self.seconds[low] + share * self.seconds[high]


def measure_latencies(
    network: Network,
    example: Tensor,  # (B, *shape)
    most: int,
    repeats: int,
    sequential_calls: int,
) -> Latencies:
    """Call the network with B, 2 B, 4 B, .. rows up to `most`, out of memory, or where the device is full.

    The smallest size is measured once more at the end, for as long as the largest: the sequential chain takes it
    `sequential_calls` times.
    """
    found = _measure(network, example, most, repeats)
    seconds, sizes = found.seconds, found.sizes
    longer = min(seconds[sizes[-1]] / seconds[sizes[0]], sequential_calls)
    again = _latency(network, example, sizes[0], max(repeats, math.ceil(repeats * longer)))
    seconds[sizes[0]] = min(seconds[sizes[0]], again)
    return found


def _measure(network: Network, example: Tensor, most: int, repeats: int) -> Latencies:
    latencies: dict[int, float] = {}
    rows, slower = min(len(example), most), 0
    while True:
        try:
            seconds = _latency(network, example, rows, repeats)
        except (RuntimeError, MemoryError) as error:
            if not latencies or not is_out_of_memory(error):
                raise
            if example.is_cuda:
                torch.cuda.empty_cache()
            return Latencies(latencies, rows)
        previous = latencies.get(rows // 2)
        slower = slower + 1 if previous is not None and seconds >= FULL * previous else 0
        latencies[rows] = seconds
        if rows == most or slower == 2:
            return Latencies(latencies)
        rows = min(2 * rows, most)


def _latency(network: Network, example: Tensor, rows: int, repeats: int) -> float:
    index = torch.arange(rows, device=example.device)
    steps, samples = index // len(example), index % len(example)
    states = example[samples].to(torch.promote_types(example.dtype, torch.float32))
    seconds = []
    for _ in range(1 + repeats):
        _wait(example)
        started = perf_counter()
        network(states, steps, samples)
        _wait(example)
        seconds.append(perf_counter() - started)
    return min(seconds[1:])


def _wait(example: Tensor) -> None:
    if example.is_cuda:
        torch.cuda.synchronize(example.device)


def is_out_of_memory(error: Exception) -> bool:
    """Whether it says that the memory was not enough."""
    # Of a CPU, torch reports it as a plain RuntimeError.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
