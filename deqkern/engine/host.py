"""What the host computes between two iterations, while a GPU waits: in NumPy, whose small operations are short."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Reals = NDArray[np.float64]


def on_device(value: NDArray[Any], device: torch.device) -> Tensor:
    """The array on a device, without waiting for it; on the CPU in the same memory."""
    tensor = torch.from_numpy(value)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


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
