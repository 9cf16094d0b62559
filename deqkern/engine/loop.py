"""The only iteration loop of deqkern."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..solvers.presets import Solver
from ..support.eager import uncompiled
from .capture import CapturedIterations
from .host import Bools, Ints, Mailbox
from .iteration import Iteration
from .selection import PATIENCE, Thinning, active, moves, thins
from .solution import Callback, Solution
from .trajectory import Trajectory


def _residuals(norms: Tensor, evaluated: Tensor) -> Tensor:
    """`Solution.residual_history` from the norms (iterations, S, B, 3) of scans, and what was evaluated for them."""
    residual, _, state = norms.sqrt().unbind(-1)
    relative = torch.where(residual == 0, 0.0, (residual / state).nan_to_num(torch.inf, torch.inf))
    return torch.where(evaluated.to(norms.device), relative, torch.nan)


def _stacked(values: list[Tensor], like: Tensor) -> Tensor:
    """`values`, of the shape of `like`, as one tensor; also if there are none."""
    return torch.stack(values) if values else like.new_zeros(0, *like.shape)


class Solve:
    """A solve in progress: the only iteration loop is `while solve.open: solve.iterate()`.

    Who calls the map otherwise does, in place of `iterate`: `select`, the outputs of `trajectory.rows` into
    `iteration.outputs(k)`, `iteration.update(k)`, `settle`, with k = `solve.count`.
    """

    def __init__(
        self,
        trajectory: Trajectory,
        solver: Solver,
        *,
        rtol: float,
        max_iterations: int | None = None,
        patience: int | None = None,
        cuda_graph: bool = False,
    ) -> None:
        self.trajectory, self.rtol = trajectory, rtol
        thinned = trajectory.thins and thins(trajectory.steps, solver.thinning) and not cuda_graph
        self.thinning: Thinning | None = None
        self.iteration = Iteration(trajectory, solver, rtol)
        work = self.iteration.work
        self.mailbox = Mailbox(work.status, work.norms) if thinned else Mailbox(work.status)
        if thinned:
            self.thinning = Thinning(trajectory.table, solver.thinning, rtol)
            self.iteration.path = self.thinning.path.to(trajectory.x.device)
            trajectory.reserve(self.iteration.size * trajectory.batch)
        self.captured = CapturedIterations(self.iteration, trajectory.x.device) if cuda_graph else None
        self.history: list[Tensor] = []
        self.nfe: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.evaluated: list[Bools] = []  # (S, B)
        self.limit = trajectory.steps if max_iterations is None else max_iterations
        self.patience = math.inf if patience is None else patience
        self.waited = np.zeros(trajectory.batch)  # iterations since the window of a sample moved
        self.ages = np.zeros((trajectory.steps, trajectory.batch), dtype=np.int64)  # iterations that a step was open
        self.plain = np.zeros(trajectory.batch, dtype=bool)  # samples that fell back
        self.window: Ints = np.tile([0, self.iteration.size], (trajectory.batch, 1))
        self.moved = moves(np.zeros((trajectory.steps, trajectory.batch, 3)))

    @property
    def count(self) -> int:
        """Iterations that are done."""
        return len(self.history)

    @property
    def open(self) -> bool:
        """Whether there is another iteration to do."""
        going = (self.window[:, 0] < self.trajectory.steps) & (self.waited < self.patience)
        return self.count < self.limit and bool(going.any())

    @uncompiled
    def iterate(self) -> None:
        """One iteration."""
        self.select()
        (self.captured or self.iteration).run(self.count)
        self.settle()

    def select(self) -> None:
        """Choose the rows that the next iteration evaluates."""
        steps = self.trajectory.steps
        evaluated = active(self.window, steps)
        if self.thinning is not None:
            evaluated = self._thin(self.thinning, evaluated)
        self.evaluated.append(evaluated)
        if self.captured is None:
            self.trajectory.select(np.flatnonzero(evaluated))
            return
        # a graph goes on evaluating the rows it was captured with, new steps among them
        rows = np.flatnonzero(np.arange(steps)[:, None] >= self.window[:, 0])
        if 2 * len(rows) <= self.trajectory.selected or not self.count:
            self.trajectory.select(rows)
            self.captured.renew()

    def _thin(self, thinning: Thinning, open_steps: Bools) -> Bools:
        """Which of the open steps (S, B) the next iteration evaluates."""
        moved = self.moved
        moved[:, self.plain] = 0.0  # plain iteration evaluates all of its steps
        moved[self.ages >= PATIENCE] = 0.0
        self.ages += open_steps
        evaluated = thinning.evaluated(open_steps, moved)
        measured = evaluated & self.evaluated[-1] if self.evaluated else evaluated
        self.iteration.thin(open_steps, evaluated, open_steps & ~measured)
        return evaluated

    def settle(self) -> None:
        """Wait for what the iteration reached, and take note of it."""
        self.trajectory.count()
        before = self.window
        diverged = self._read()
        self.waited = np.where(self.window[:, 0] > before[:, 0], 0, self.waited + 1)
        if diverged.any():
            self.iteration.fall_back(diverged, before, self.evaluated[-1], self.count)
        self.history.append(self.iteration.work.errors[:, 0].clone())
        self.nfe.append(self.trajectory.nfe.clone())
        self.norms.append(self.iteration.work.norms.clone())

    def _read(self) -> Bools:
        """Take note of the windows (B, 2), and of how far the states moved; which samples diverged (B,)."""
        status, *norms = self.mailbox.read()
        batch = len(status) // 3
        self.window = status[: 2 * batch].reshape(batch, 2)
        if norms:
            self.moved = moves(norms[0])
        diverged: Bools = status[2 * batch :] != 0
        self.plain |= diverged
        return diverged

    @uncompiled
    def value(self, dtype: torch.dtype) -> Tensor:
        """The last state as it is now (B, *shape); where no window has come to it, a guess from what is known."""
        self.iteration.complete(self.count)
        trajectory = self.trajectory
        first, batch = trajectory.steps * trajectory.batch, trajectory.batch
        rows = torch.arange(first, first + batch, device=trajectory.x.device)
        return trajectory.images(rows).to(dtype, copy=True)

    @uncompiled
    def solution(self, dtype: torch.dtype) -> Solution:
        """The result, once: it gives the memory of the iteration back, and the solve is over."""
        if not hasattr(self, "iteration"):
            raise RuntimeError("the solution of this solve was taken before, which ended it")
        self.iteration.complete(self.count)
        trajectory, history, errors = self.trajectory, self.history, self.iteration.work.errors
        steps, batch = trajectory.steps, trajectory.batch
        converged = torch.from_numpy(self.window[:, 0] >= steps).to(trajectory.x.device)
        estimate, residual = errors[:, 0].clone(), errors[:, 4].clone()
        norms = _stacked(self.norms, self.iteration.work.norms)
        evaluated = torch.from_numpy(np.stack([active(self.window, steps), *self.evaluated])[1:])
        fallen_back = int(self.plain.sum())
        del self.iteration, self.captured, self.mailbox, errors  # their memory makes room for the states
        states = trajectory.x.new_empty(steps + 1, batch, *trajectory.basis.shape)
        rows = torch.arange((steps + 1) * batch, device=states.device)
        trajectory.basis.inverse(trajectory.x.flatten(0, 1), states.flatten(0, 1), rows)
        missed = int((~converged).sum())
        message = f"{batch - missed} of {batch} samples converged in {len(history)} iterations (rtol {self.rtol:g})"
        if fallen_back:
            message += f"; {fallen_back} diverged and went on with plain iteration"
        return Solution(
            value=states[-1].to(dtype, copy=True),
            trajectory=states,
            converged=converged,
            error_estimate=estimate,
            residual=residual,
            iterations=len(history),
            nfe=trajectory.nfe,
            history=_stacked(history, estimate),
            nfe_history=_stacked(self.nfe, trajectory.nfe),
            residual_history=_residuals(norms, evaluated),
            message=message,
        )


@uncompiled
def solve(
    trajectory: Trajectory,
    solver: Solver,
    *,
    rtol: float,
    max_iterations: int | None = None,
    patience: int | None = None,
    callback: Callback | None = None,
    dtype: torch.dtype = torch.float32,
    cuda_graph: bool = False,
) -> Solution:
    """Iterate `solver` on `trajectory` in place until every sample's estimated remaining error is at most rtol.

    rtol = 0 goes on until every step is exact. patience: end when no open sample has settled a step in so many
    iterations. cuda_graph: launch iterations as graphs; no solver.window of so many steps then. Raises ValueError if
    the map gives NaN.
    """
    options: dict[str, Any] = {"rtol": rtol, "max_iterations": max_iterations, "patience": patience}
    running = Solve(trajectory, solver, **options, cuda_graph=cuda_graph)
    while running.open:
        running.iterate()
        if callback is not None:
            callback(running.count, running.value(dtype), running.history[-1].clone())
    return running.solution(dtype)
