"""All that the integrations use of the engine: a solve that asks for the outputs of states and is told them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..chain.step_table import StepTable
from ..engine.loop import Solve
from ..engine.solution import Solution
from ..engine.trajectory import Map, start
from ..solvers.presets import Solver


@dataclass(frozen=True)
class Rows:
    """The states to evaluate."""

    steps: Tensor  # (N,) int64
    samples: Tensor  # (N,) int64
    _states: Callable[[], Tensor]

    @property
    def states(self) -> Tensor:
        """(N, *shape), in memory that the next call uses again."""
        return self._states()


class JointSolve:
    """The chain `table` from its first state, by `solver`.

    Args:
        first: (B, *shape), the state that is known.
        table: The coefficients of the chain.
        solver: The solver.
        rtol: As in `deqkern.sample`.
        dtype: Of the states that are asked for; their own if None.
        step_noise: (S, B, *shape); drawn from torch's global generator if the chain needs some and none is given.
        max_iterations: As in `deqkern.sample`.
        network: What `iterate` calls; without one the outputs are told.
        max_batch: Rows in one call of it.
        error_prefix: How an error about outputs that are told begins.
    """

    def __init__(
        self,
        first: Tensor,
        table: StepTable,
        solver: Solver,
        *,
        rtol: float,
        dtype: torch.dtype | None = None,
        step_noise: Tensor | None = None,
        max_iterations: int | None = None,
        network: Map | None = None,
        max_batch: int | None = None,
        error_prefix: str = "model returned",
    ) -> None:
        self.table, self.dtype = table, dtype or first.dtype
        called: Map = network or _Told(self.dtype, error_prefix)
        trajectory = start(called, first, table, solver=solver, step_noise=step_noise, max_batch=max_batch)
        self._solve = Solve(trajectory, solver, rtol=rtol, max_iterations=max_iterations)

    @property
    def open(self) -> bool:
        """Whether there is another iteration to do."""
        return self._solve.open

    @property
    def count(self) -> int:
        """Iterations that are done."""
        return self._solve.count

    @property
    def converged_steps(self) -> int:
        """How many steps, from the first one, are converged in every sample."""
        return int(self._solve.window[:, 0].min())

    def ask(self) -> Rows:
        """The states to evaluate in the next iteration."""
        self._solve.select()
        trajectory = self._solve.trajectory
        rows = trajectory.rows
        return Rows(trajectory.row_steps, trajectory.row_samples, lambda: trajectory.images(rows).to(self.dtype))

    def tell(self, outputs: Tensor) -> None:
        """One iteration, with the model's own outputs (N, *shape) at the states that were asked for."""
        solve, trajectory = self._solve, self._solve.trajectory
        if self.table.converts:
            states = trajectory.images(trajectory.rows)
            outputs = self.table.effective_output(states, outputs, trajectory.row_steps)
        trajectory.basis.forward(outputs, solve.iteration.outputs(solve.count).flatten(0, 1), trajectory.rows)
        solve.iteration.update(solve.count)
        solve.settle()

    def iterate(self) -> None:
        """One iteration, with the network called for its outputs."""
        self._solve.iterate()

    def correct_first(self, first: Tensor) -> None:
        """Replace the first state (B, *shape), which was not known better, before anything is told."""
        self._solve.trajectory.basis.forward(first, self._solve.trajectory.x[0], self._solve.iteration.samples)

    def state(self, step: int, dtype: torch.dtype) -> Tensor:
        """State `step` of 0 .. S as it is now (B, *shape)."""
        trajectory = self._solve.trajectory
        rows = step * trajectory.batch + torch.arange(trajectory.batch, device=trajectory.x.device)
        return trajectory.images(rows).to(dtype, copy=True)

    def value(self, dtype: torch.dtype) -> Tensor:
        """The last state as it is now (B, *shape)."""
        return self._solve.value(dtype)

    def solution(self, dtype: torch.dtype) -> Solution:
        """The result, once: the solve is over."""
        return self._solve.solution(dtype)


class _Told:
    """In the place of a map that is evaluated elsewhere."""

    def __init__(self, dtype: torch.dtype, error_prefix: str) -> None:
        self.what, self.precision = error_prefix, torch.finfo(dtype).eps
        self.dtype: torch.dtype | None = dtype

    def __call__(self, states: Tensor, steps: Tensor, samples: Tensor) -> Tensor:
        raise NotImplementedError
