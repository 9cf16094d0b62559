"""A small model, and what the tests of gradients solve with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deqkern import solvers

BATCH, SHAPE, STEPS = 3, (2, 5, 4), 8
SEQUENTIAL: dict[str, Any] = {"rtol": 0.0, "solver": solvers.sequential()}


class Tiny(torch.nn.Module):
    """Two convolutions with a time and a condition in between."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(2, 6, 3, padding=1, dtype=dtype)
        self.last = torch.nn.Conv2d(6, 2, 3, padding=1, dtype=dtype)
        self.time = torch.nn.Linear(1, 6, dtype=dtype)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        hidden = self.first(x) + self.time((t.to(x) / 1000)[:, None])[:, :, None, None]
        if condition is not None:
            hidden = hidden + condition[:, :, None, None]
        return 0.5 * x + self.last(torch.tanh(hidden))


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)
