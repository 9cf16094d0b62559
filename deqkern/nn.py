"""Modules of torch.nn that solve."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from .engine.solution import Solution
from .fixed_point.solve import check_options, fixed_point
from .gradients.pullback import Gradient
from .solvers.presets import Solver, anderson

__all__ = ["DEQ"]


class DEQ(torch.nn.Module):
    """A deep equilibrium layer: the z that solves z = f(z, *inputs).

    torch.compile around the layer leaves the solve as it is: give `torch.compile(f)`.

    Args:
        f: A module or function, called with the whole batch.
        solver: As in `deqkern.fixed_point`.
        rtol: As in `deqkern.fixed_point`.
        max_iterations: As in `deqkern.fixed_point`.
        gradient: As in `deqkern.fixed_point`.

    Attributes:
        solution: The `Solution` of the last call, without its graph; None before the first.

    Raises:
        ValueError: If an option is out of range.
        TypeError: If an option is of another type.

    Example:
        >>> weight = torch.nn.Parameter(0.1 * torch.randn(8, 8))
        >>> layer = deqkern.nn.DEQ(lambda z, x: torch.tanh(z @ weight + x))
        >>> x = torch.randn(4, 8)
        >>> layer(torch.zeros_like(x), x).square().mean().backward()
        >>> layer.solution.converged.all(), weight.grad.shape
        (tensor(True), torch.Size([8, 8]))

    Reference:
        Bai, Kolter, Koltun: Deep equilibrium models, arXiv 1909.01377.
    """

    solution: Solution | None

    def __init__(
        self,
        f: Callable[..., Any],
        *,
        solver: Solver | None = None,
        rtol: float = 1e-3,
        max_iterations: int = 40,
        gradient: str | Gradient | None = "implicit",
    ) -> None:
        super().__init__()
        self.solver = anderson() if solver is None else solver
        self.gradient = check_options(f, self.solver, rtol, max_iterations, gradient)
        self.f, self.rtol, self.max_iterations = f, rtol, max_iterations
        self.solution = None

    def forward(self, z0: Any, *inputs: Any) -> Any:
        """Solve from z0. In eval mode differentiable too.

        Args:
            z0: The initial guess: a tensor (B, *shape), or a tuple or list of tensors.
            inputs: What f is called with besides.

        Returns:
            The solution, as z0.
        """
        solution = fixed_point(
            lambda z: self.f(z, *inputs),
            z0,
            solver=self.solver,
            rtol=self.rtol,
            max_iterations=self.max_iterations,
            gradient=self.gradient,
        )
        value: Any = solution.value
        cut = value.detach() if isinstance(value, torch.Tensor) else type(value)(part.detach() for part in value)
        self.solution = replace(solution, value=cut)
        return value

    def extra_repr(self) -> str:
        return f"solver={self.solver.name}, rtol={self.rtol:g}, max_iterations={self.max_iterations}"
