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


class DEQ(torch.nn.Module):
    """A deep equilibrium layer (arXiv 1909.01377): the z that solves z = f(z, *inputs).

    f: a module or function, called with the whole batch. solver, rtol, max_iterations, gradient: as in
    `deqkern.fixed_point`. `solution` is the `Solution` of the last call, without its graph; None before the first.
    torch.compile around the layer leaves the solve as it is: give `torch.compile(f)`.
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
        """The solution, as z0: a tensor (B, *shape), or a tuple or list of tensors. In eval mode differentiable too."""
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
