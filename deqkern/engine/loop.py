"""The only iteration loop of deqkern: `Solve` asks for evaluations of a map and is told their outputs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..chain.step_table import StepTable
from ..ops.state import Status
from ..solvers.presets import Solver
from ..support.eager import uncompiled
from .capture import CapturedIterations
from .host import Ints, Mailbox, Upload
from .iteration import Iteration
from .rows import Rows
from .selection import Selection, Thinning, is_worth_thinning, relative_changes
from .solution import Callback, Record, Solution
from .stopping import Stopping
from .trajectory import Traits, Trajectory, start


class Map(Protocol):
    """What a chain is linear in: states (N, *shape) of steps (N,) and samples (N,) to outputs (N, *shape)."""

    def __call__(self, states: Tensor, steps: Tensor, samples: Tensor) -> Tensor:
        """Evaluate; the result may be of any floating dtype."""


class Evaluation:
    """The outputs of a map at some rows, in parts, evaluated while they are iterated over; each time anew."""

    def __init__(self, map: Map, rows: Rows) -> None:
        self.map, self.rows = map, rows

    def __iter__(self) -> Iterator[Tensor]:
        for part in self.rows.split():
            yield self.map(part.states, part.steps, part.samples)


class Solve:
    """A solve in progress, whose caller evaluates the map.

    The only iteration loop is

        while solve.open:
            rows = solve.ask()
            solve.tell(map(rows.states, rows.steps, rows.samples))

    Each turn evaluates the states of all open steps in one batch and moves all of them (arXiv 2210.12867). Made by
    `deqkern.begin`.

    Attributes:
        window: (B, 2), on the host: the open steps of each sample, from the first that has not converged to the end of
            its window.

    Example:
        >>> solve = deqkern.begin(torch.randn(2, 8), deqkern.NoiseSchedule.linear(), 20)
        >>> while solve.open:
        ...     rows = solve.ask()
        ...     solve.tell(0.5 * rows.states)
        >>> solve.solution().converged.tolist()
        [True, True]
    """

    def __init__(
        self,
        trajectory: Trajectory,
        solver: Solver,
        *,
        rtol: float,
        dtype: torch.dtype,
        max_iterations: int | None = None,
        patience: int | None = None,
        cuda_graph: bool = False,
    ) -> None:
        """Begin.

        Args:
            trajectory: The states, moved in place.
            solver: What an iteration does.
            rtol: Until every sample's estimated remaining error is at most this; 0 until every step is exact.
            dtype: Of the result.
            max_iterations: At most that many; the S of the chain if None, which always suffices.
            patience: End when the window of no open sample moved in that many iterations.
            cuda_graph: Launch iterations as graphs. The outputs that are told must then be an iterable that evaluates
                the map anew each time (`Evaluation`).

        """
        steps, batch, device = trajectory.steps, trajectory.batch, trajectory.x.device
        self.trajectory, self.rtol, self.dtype = trajectory, rtol, dtype
        thinned = trajectory.can_thin and is_worth_thinning(steps, solver.thinning) and not cuda_graph
        thinning = Thinning(trajectory.table, solver.thinning, rtol) if thinned else None
        stopping = Stopping(trajectory, solver.width(steps), rtol)
        self.iteration = Iteration(trajectory, solver, stopping)
        if thinning is not None:
            self.iteration.path = thinning.path.to(device)
            trajectory.reserve(stopping.width * batch)
        self.mailbox = Mailbox(stopping.flat, self.iteration.norms) if thinned else Mailbox(stopping.flat)
        self.upload = Upload(device)
        whole = trajectory.traits.whole_batch
        self.selection = Selection(steps, batch, thinning=thinning, whole_batch=whole, for_graph=cuda_graph)
        self.captured = CapturedIterations(self.iteration, device) if cuda_graph else None
        self.record = Record(batch)
        self.limit = steps if max_iterations is None else max_iterations
        self.patience = math.inf if patience is None else patience
        self.waited = np.zeros(batch)  # iterations since the window of a sample moved
        self.window: Ints = np.tile([0, stopping.width], (batch, 1))
        self._told = True  # whether the outputs of the rows have been told

    @property
    def count(self) -> int:
        """Iterations that are done."""
        return self.record.count

    @property
    def history(self) -> list[Tensor]:
        """The error estimates (B,) fp64 after each iteration."""
        return self.record.errors

    @property
    def open(self) -> bool:
        """Whether there is another iteration to do."""
        going = (self.window[:, 0] < self.trajectory.steps) & (self.waited < self.patience)
        return self.count < self.limit and bool(going.any())

    @uncompiled
    def ask(self) -> Rows:
        """The rows to evaluate next; asked again before `tell`, the same ones.

        Raises:
            RuntimeError: The solve is over: it is not `open`.

        """
        if self._told:
            if not self.open:
                raise RuntimeError("the solve is over: ask while it is open")
            if self.selection.choose(self.window, first=not self.count):
                timesteps = self.trajectory.table.timesteps.numpy()
                sent, self.iteration.gaps = self.selection.send(self.upload, timesteps, self.iteration.no_gaps)
                self._rows = Rows(self.trajectory, *sent)
                if self.captured is not None:
                    self.captured.renew()
            self._told = False
        return self._rows

    @uncompiled
    def tell(self, outputs: Tensor | Iterable[Tensor]) -> None:
        """Do one iteration with what the map gave at the rows that were asked for.

        Args:
            outputs: (N, *shape) of any floating dtype, a model's own output for each row; or the parts of it in their
                order, which are taken one after the other.

        Raises:
            RuntimeError: Nothing was asked for.
            TypeError, ValueError: They are no such tensors, or NaN or infinite at states that were no overshoot.

        """
        if self._told:
            raise RuntimeError("ask for rows before their outputs are told")
        k, before = self.count, self.window
        (self.captured or self.iteration).run(k, self._rows, [outputs] if isinstance(outputs, Tensor) else outputs)
        self._told = True
        # Wait for what the iteration reached, and take note of it.
        flat, *norms = self.mailbox.read()
        self.window, diverged = Status.view(flat)
        diverged = diverged != 0
        selection, evaluated = self.selection, self.selection.evaluated
        if norms:
            selection.changes = relative_changes(norms[0])
        selection.plain |= diverged
        self.waited = np.where(self.window[:, 0] > before[:, 0], 0, self.waited + 1)
        if diverged.any():
            self.iteration.fall_back(diverged, before, evaluated, k)
        counts = torch.from_numpy(selection.counts)
        error = self.iteration.stopping.convergence.estimate
        self.record.note(error, counts, self.iteration.norms, torch.from_numpy(evaluated))

    def correct_first(self, first: Tensor) -> None:
        """Give the known state (B, *shape) again, in more digits than the solve began with."""
        self.trajectory.basis.forward(first, self.trajectory.x[0], self.iteration.samples)

    @uncompiled
    def value(self, dtype: torch.dtype | None = None) -> Tensor:
        """The clean end of the chain as it is now (B, *shape), where no window has reached it a guess.

        Args:
            dtype: Of the result; that of the solve if None.

        """
        return self.state(self.trajectory.steps, dtype)

    @uncompiled
    def state(self, step: int, dtype: torch.dtype | None = None) -> Tensor:
        """State `step` of 0 .. S as it is now (B, *shape)."""
        self.iteration.fill_unreached(self.count)
        trajectory = self.trajectory
        rows = step * trajectory.batch + self.iteration.samples
        return trajectory.images(rows).to(dtype or self.dtype, copy=True)

    @uncompiled
    def solution(self, dtype: torch.dtype | None = None) -> Solution:
        """The result, once: it gives the memory of the iteration back, and the solve is over.

        Args:
            dtype: Of its `value`; that of the solve if None.

        Raises:
            RuntimeError: It was taken before.

        """
        if not hasattr(self, "iteration"):
            raise RuntimeError("the solution of this solve was taken before, which ended it")
        self.iteration.fill_unreached(self.count)
        trajectory, record, stopping = self.trajectory, self.record, self.iteration.stopping
        steps, batch = trajectory.steps, trajectory.batch
        converged = torch.from_numpy(self.window[:, 0] >= steps).to(trajectory.x.device)
        estimate, residual = stopping.convergence.estimate.clone(), stopping.convergence.residual.clone()
        histories = record.histories(estimate, self.iteration.norms)
        fallen_back = int(self.selection.plain.sum())
        # Their memory makes room for the states.
        del self.iteration, self.captured, self.mailbox, stopping
        states = trajectory.x.new_empty(steps + 1, batch, *trajectory.basis.shape)
        rows = torch.arange((steps + 1) * batch, device=states.device)
        trajectory.basis.inverse(trajectory.x.flatten(0, 1), states.flatten(0, 1), rows)
        missed = int((~converged).sum())
        message = f"{batch - missed} of {batch} samples converged in {record.count} iterations (rtol {self.rtol:g})"
        if fallen_back:
            message += f"; {fallen_back} diverged and continued with plain iteration"
        return Solution(
            value=states[-1].to(dtype or self.dtype, copy=True),
            trajectory=states,
            converged=converged,
            error_estimate=estimate,
            residual=residual,
            iterations=record.count,
            nfe=record.nfe,
            message=message,
            **histories,
        )


def run(solve: Solve, map: Map, callback: Callback | None = None) -> Solution:
    """Evaluate `map` for a solve until it is over; `callback` is called after each iteration."""
    while solve.open:
        solve.tell(Evaluation(map, solve.ask()))
        if callback is not None:
            callback(solve.count, solve.value(), solve.history[-1].clone())
    return solve.solution()


@uncompiled
def begin(
    first: Tensor,  # (B, *shape)
    table: StepTable,
    solver: Solver,
    traits: Traits,
    *,
    rtol: float,
    dtype: torch.dtype | None = None,
    max_iterations: int | None = None,
    patience: int | None = None,
    cuda_graph: bool = False,
    guess: Tensor | None = None,  # (S+1, B, *shape)
    step_noise: Tensor | None = None,  # (S, B, *shape)
    generator: torch.Generator | None = None,
    noisy: bool = True,
) -> Solve:
    """A solve of the chain `table` from the state `first` that is known of it. Options as in `start` and `Solve`."""
    trajectory = start(
        first, table, solver, traits, guess=guess, step_noise=step_noise, generator=generator, noisy=noisy
    )
    return Solve(
        trajectory,
        solver,
        rtol=rtol,
        dtype=dtype or first.dtype,
        max_iterations=max_iterations,
        patience=patience,
        cuda_graph=cuda_graph,
    )
