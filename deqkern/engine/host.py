"""What the host computes between two iterations, while a GPU waits: in NumPy, whose small operations are short."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Reals = NDArray[np.float64]

# Kernels are compiled for pointers that are divisible by it, or compiled again.
_ALIGNMENT = 16


class Upload:
    """Arrays of the host on a device: one copy for all arrays of a call, from memory that is pinned once.

    What a call gave is overwritten by the next one, in the order of the stream. On the CPU the tensors are the arrays.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pinned = self.sent = torch.empty(0, dtype=torch.uint8, device="cpu")

    def __call__(self, arrays: Sequence[NDArray[Any]]) -> list[Tensor]:
        """The arrays as tensors, each contiguous and aligned to 16 bytes. Nothing waits for the device."""
        if self.device.type != "cuda":
            return [torch.from_numpy(array) for array in arrays]
        ends = np.cumsum([-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays]).tolist()
        if len(self.pinned) < ends[-1]:
            self.pinned = torch.empty(2 * ends[-1], dtype=torch.uint8, pin_memory=True)
            self.sent = torch.empty(2 * ends[-1], dtype=torch.uint8, device=self.device)
        host, found = self.pinned.numpy(), []
        for array, begin in zip(arrays, [0, *ends], strict=False):
            host[begin : begin + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            dtype = torch.from_numpy(array).dtype
            found.append(self.sent[begin : begin + array.nbytes].view(dtype).view(array.shape))
        self.sent[: ends[-1]].copy_(self.pinned[: ends[-1]], non_blocking=True)
        return found


class Mailbox:
    """What the host sees of the iterations: a few small copies, and the one wait, between two iterations.

    The alternative, to read it an iteration late, costs a whole iteration of model evaluations after the last one.
    """

    def __init__(self, *sent: Tensor) -> None:
        self.sent, self.on_gpu = sent, sent[0].is_cuda
        if self.on_gpu:
            self.hosts = [torch.empty_like(value, device="cpu", pin_memory=True) for value in sent]
            self.arrived = torch.cuda.Event()

    def read(self) -> list[NDArray[Any]]:
        """Copies of what was `sent`."""
        if not self.on_gpu:
            return [value.numpy().copy() for value in self.sent]
        for host, value in zip(self.hosts, self.sent, strict=True):
            host.copy_(value, non_blocking=True)
        self.arrived.record(torch.cuda.current_stream(self.sent[0].device))
        self.arrived.synchronize()
        return [host.numpy().copy() for host in self.hosts]
