"""Maps that contract, and the solvers that the tests of fixed points take."""

from __future__ import annotations

import torch
from torch import Tensor

from deqkern import solvers

WIDE = torch.float64
BATCH, SIZE = 4, 6


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=WIDE, requires_grad=True)


def contraction(size: int, radius: float, dtype: torch.dtype = WIDE) -> Tensor:
    """A random matrix of spectral norm `radius`."""
    matrix = torch.randn(size, size, dtype=WIDE)
    return (matrix * (radius / torch.linalg.matrix_norm(matrix, 2))).to(dtype)


class Cell(torch.nn.Module):
    """Contracts by 0.7; the injected input is x."""

    def __init__(self, dtype: torch.dtype = WIDE) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(contraction(SIZE, 0.7, dtype))
        self.inject = torch.nn.Linear(3, SIZE, dtype=dtype)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ self.weight + self.inject(x))


SOLVERS = [solvers.anderson(), solvers.picard(), solvers.anderson(0, beta=0.7), solvers.anderson(3, beta=0.5)]
