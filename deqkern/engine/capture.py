"""Iterations as CUDA graphs: launched once by the host instead of kernel by kernel."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from .rows import Rows


class Iteration(Protocol):
    """What can be captured: `run` launches the same kernels on the same memory for all k of one phase."""

    def phase(self, k: int) -> tuple[int, ...]:
        """The phase of iteration k."""

    def run(self, k: int, rows: Rows, outputs: Iterable[Tensor]) -> None:
        """Launch iteration k on the current stream, the evaluation of its `outputs` included."""


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures on a device: cuBLAS keeps a workspace for each stream that it has seen."""
    return torch.cuda.Stream(device)


class CapturedIterations:
    """Runs the first iteration as it is, which warms the model up, then captures each phase when it first comes.

    The graphs share one memory pool, since one runs at a time. A model that waits for the device, or moves memory
    between it and the host, cannot be captured: RuntimeError.
    """

    def __init__(self, iteration: Iteration, device: torch.device) -> None:
        self.iteration, self.device = iteration, device
        self.stream = capture_stream(device)
        self.renew()

    def renew(self) -> None:
        """Drop the graphs: what they launch has changed."""
        self.graphs: dict[tuple[int, ...], torch.cuda.CUDAGraph] = {}
        self.pool = torch.cuda.graph_pool_handle()  # a pool that its last graph has left takes no other
        self.warm = False

    def run(self, k: int, rows: Rows, outputs: Iterable[Tensor]) -> None:
        """Iteration k on the current stream. A replay evaluates as captured: it does not touch `outputs`."""
        if not self.warm:
            self.iteration.run(k, rows, outputs)
            self.warm = True
            return
        phase = self.iteration.phase(k)
        if phase not in self.graphs:
            self.graphs[phase] = self._capture(k, rows, outputs)
        with torch.cuda.device(self.device):
            self.graphs[phase].replay()

    def _capture(self, k: int, rows: Rows, outputs: Iterable[Tensor]) -> torch.cuda.CUDAGraph:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            try:
                # relaxed: a kernel that is compiled now loads its module
                graph.capture_begin(pool=self.pool, capture_error_mode="relaxed")
                self.iteration.run(k, rows, outputs)
                graph.capture_end()
            except BaseException as error:
                with contextlib.suppress(RuntimeError):
                    graph.capture_end()  # the stream can be used again
                with contextlib.suppress(RuntimeError):
                    self._capture_nothing()
                if not isinstance(error, RuntimeError):
                    raise
                raise RuntimeError(f"the model cannot be captured, use cuda_graph=False: {error}") from error
        current.wait_stream(self.stream)
        return graph

    def _capture_nothing(self) -> None:
        """On the current stream. torch's generator takes the device for capturing until a capture ends well."""
        scratch, graph = torch.zeros(1, device=self.device), torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="relaxed")
        scratch.zero_()
        graph.capture_end()
