"""The only iteration loop of deqkern, and what it returns."""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import ops
from .capture import CapturedIterations
from .eager import uncompiled
from .host import Bools, Ints, Mailbox, on_device
from .planning import Plan
from .slopes import Secant
from .solvers import Solver
from .thinning import PATIENCE, Thinning, active, gaps, moves, thins
from .trajectory import Trajectory, initial_slope

Callback = Callable[[int, Tensor, Tensor], None]

# No contraction from one iteration to the next is believed to be better than this.
CONTRACTION = 0.1
# A last correction that is larger than this times the smallest one before it: the iteration diverges.
GROWTH = 1e3
# A state that is larger than this times the first one is an overshoot of the iteration: what a map makes of it is not
# the map's fault.
OVERSHOOT = 2.0


# Whose frames a warning passes over: torch's stand between a layer, or a backward pass, and who calls it.
_INSIDE = tuple(os.path.dirname(os.path.abspath(path)) + os.sep for path in (__file__, torch.__file__))


class ConvergenceWarning(UserWarning):
    """Some samples did not reach the tolerance; the result says which."""


@dataclass(frozen=True, eq=False)
class Solution:
    """What a solve gives back.

    Tensors are where the input is, but for `nfe` and `nfe_history`, which the host counts on the CPU. The histories
    hold 8 (S + 2) bytes per iteration and sample; while a solve runs, 25 S + 16.

    value: (B, *shape), the clean end of the chain, in the dtype of the input.
    trajectory: (S+1, B, *shape) fp32 (fp64 if the input is), all states, the noise first.
    converged: (B,) bool.
    error_estimate: (B,) fp64, the relative error left in `value`, as estimated.
    residual: (B,) fp64, the largest one-step residual of a step relative to its state, |r[i+1]| / |x[i+1]|, at the
        last iteration in which the sample was open; of a step that was left out, by its interpolated output.
    iterations: sequential batched model calls (a batch cut by `max_batch` counts once).
    nfe: (B,) int64, model evaluations per sample.
    history: (iterations, B) fp64, the error estimate after each iteration.
    nfe_history: (iterations, B) int64, model evaluations per sample after each iteration.
    residual_history: (iterations, S, B) fp64, the one-step residual of every step i of `trajectory` relative to its
        state, |r[i+1]| / |x[i+1]| (inverting: |x[i]|), at the states that each iteration evaluated, before it moved
        them. NaN for a step that it did not evaluate, one that is settled, left out or that a window has not reached,
        and throughout where no chain is solved: naive inversion, a search.
    message: one line for people.
    round_trip: (B,) or None, of `invert` on request: the relative error of the sample made from `value` again.
    plan: of `sample(solver="auto")`: what was measured and chosen.
    """

    value: Tensor
    trajectory: Tensor
    converged: Tensor
    error_estimate: Tensor
    residual: Tensor
    iterations: int
    nfe: Tensor
    history: Tensor
    nfe_history: Tensor
    residual_history: Tensor
    message: str
    round_trip: Tensor | None = None
    plan: Plan | None = None


class _Workspace:
    """The memory of a solve, allocated once: (2 m + 6) (S + 1) B D floats at most, with all that `Trajectory` holds."""

    def __init__(self, trajectory: Trajectory, solver: Solver, size: int) -> None:
        x, bands = trajectory.x, trajectory.basis.bands
        steps, batch, elements = trajectory.steps, trajectory.batch, trajectory.basis.size
        m = solver.history_size
        self.e = [x.new_zeros(steps, batch, elements) for _ in range(2 if solver.slope.adapts else 1)]
        moves = x.new_zeros((m + 1) * steps + 1, batch, elements)  # the first row stays zero: x[0] never moves
        self.dx = moves[:steps]  # (S, B, D), without history the last change of x[:-1]
        self.g_ring = moves[1:].view(m + 1, steps, batch, elements)
        self.f_ring = x.new_zeros(m + 1, steps, batch, elements) if m else x[None, 1:]
        wide = x.new_zeros(0, dtype=torch.float64)
        self.gram = wide.new_zeros(steps, batch, m, m)
        self.rhs = wide.new_zeros(steps, batch, m)
        self.gamma = x.new_zeros(steps, batch, m)
        self.norms = wide.new_zeros(steps, batch, 3)
        self.moments = wide.new_zeros(steps, batch, len(bands) - 1, 2)
        self.fresh = wide.new_tensor([torch.inf, torch.inf, 1.0, torch.inf, torch.inf])
        self.errors = self.fresh.repeat(batch, 1)
        self.status = wide.new_zeros(3 * batch, dtype=torch.int64)  # one piece, so that one copy tells the host
        self.window, self.diverged = self.status[: 2 * batch].view(batch, 2), self.status[2 * batch :]
        self.window[:, 1] = size
        self.before = self.window.clone()  # in the last iteration


class _Iteration:
    """One iteration of a solver on a trajectory: correction, mixing, update of x in place, and what it reached.

    Nothing in it waits for the device or depends on what it computed, so that it can be captured in a CUDA graph.
    """

    def __init__(self, trajectory: Trajectory, solver: Solver, rtol: float) -> None:
        table, device, steps = trajectory.table, trajectory.x.device, trajectory.steps
        self.size = solver.width(steps)
        self.trajectory, self.solver, self.work = trajectory, solver, _Workspace(trajectory, solver, self.size)
        self.rtol, self.tolerance = rtol, torch.empty(0)  # (S,), once the map has been called
        x, self.implicit = trajectory.x, table.implicit
        self.arguments = x[1:] if self.implicit else x[:-1]  # the states that the model is called at
        self.moved = self.work.g_ring[0] if self.implicit else self.work.dx  # their last change, if nothing mixes
        self.a, self.b, self.c, self.n = table.coefficients(x)
        self.samples = torch.arange(trajectory.batch, device=device)
        ends = torch.stack([table.slope_0, table.slope_1]).to(device)
        self.low, self.high = ends.amin(0), ends.amax(0)  # (S,) float64
        self.slope = initial_slope(solver, table, trajectory.basis, x)  # (S, B, K)
        self.frozen = table.slope_0.to(device, x.dtype)[:, None, None]
        self.scale = trajectory.scale  # (B,)
        self.fallen_back = torch.zeros(trajectory.batch, dtype=torch.bool, device=device)
        self.any_fallen = False
        held = trajectory.held() if self.size < steps else None
        self.held = None if held is None else held.to(device, x.dtype)  # (4, S), if windows move on
        self.path = torch.empty(0)  # (6, S), with thinning
        self.gap: Tensor | None = None  # (B,), and of all that are not evaluated:
        self.gap_rows: Tensor | None = None  # (3, N)
        self.unmeasured: Tensor | None = None  # (S, B, 1, 1)

    def phase(self, k: int) -> tuple[int, ...]:
        """Iterations k > 0 of one phase launch the same kernels on the same memory."""
        m = self.solver.history_size
        return (k % len(self.work.e), k % (m + 1), min(k, m), self.any_fallen)

    def outputs(self, k: int) -> Tensor:
        """Where iteration k finds what the map gives (S, B, D), in the basis."""
        return self.work.e[k % len(self.work.e)]

    def run(self, k: int) -> None:
        """Iteration k = 0, 1, .. over the rows that the trajectory has selected."""
        self.trajectory.evaluate(self.outputs(k))
        self.update(k)

    def thin(self, open_steps: Bools, evaluated: Bools, unmeasured: Bools) -> None:
        """The next iteration interpolates the outputs of open steps that are not evaluated (S, B),

        and takes no secant of steps `unmeasured` (S, B).
        """
        device, batch, self.gap, self.gap_rows = self.slope.device, self.trajectory.batch, None, None
        if not np.array_equal(open_steps, evaluated):
            first, rows = gaps(open_steps, evaluated)
            place = batch + batch % 2  # kernels are compiled for pointers that are divisible by 16, or again
            sent = on_device(np.concatenate([first, first[: place - batch], rows.ravel()]), device)  # one copy
            self.gap, self.gap_rows = sent[:batch], sent[place:].view(3, -1)
        self.unmeasured = on_device(unmeasured, device)[..., None, None] if unmeasured.any() else None

    def update(self, k: int) -> None:
        """Iteration k once its `outputs` are there."""
        work, solver, trajectory, bands = self.work, self.solver, self.trajectory, self.trajectory.basis.bands
        x, window, m = trajectory.x, work.window, solver.history_size
        op = ops.unchecked if k > m else ops  # by then all of them have been called with these tensors
        if not k:
            self.tolerance = on_device(trajectory.settled(self.rtol).numpy(), x.device)
        e, e_prev = self.outputs(k), self.outputs(k + 1)
        if isinstance(solver.slope, Secant) and (k or solver.slope.start is None):
            dx = self.moved if k else self.arguments  # with the first e_prev: from zero to the first states
            op.band_moments(dx, e, e_prev, bands, window, work.moments)
            if self.unmeasured is not None:
                work.moments.masked_fill_(self.unmeasured, 0.0)
            solver.slope.refine(self.slope, work.moments, self.low, self.high)
        if self.any_fallen:
            self.slope.copy_(torch.where(self.fallen_back[:, None], self.frozen, self.slope))
        if self.gap_rows is not None:
            op.interpolate_outputs(x, self.slope, bands, self.gap_rows, self.path, e)
        head = k % (m + 1)
        f, g = work.f_ring[head], work.g_ring[head]
        op.ddim_scan(
            *(x, e, trajectory.z, self.a, self.b, self.c, self.n, self.slope, bands, window),
            *(solver.beta, self.implicit, f, g, work.norms),
        )
        if m:
            self._mix(op, head, min(k, m))
        if self.held is not None:
            work.before.copy_(window)
        op.update_convergence(
            *(work.norms, self.scale, self.gap, self.tolerance, self.rtol, CONTRACTION, GROWTH, self.size),
            *(self.implicit, work.errors, window, work.diverged),
        )
        self.extend(op, k, window, work.diverged)
        if self.c is not None and e_prev is not e:  # the next scan reads the output before its window
            before = (window[:, 0] - 1).clamp_min(0)
            e_prev[before, self.samples] = e[before, self.samples]

    def _mix(self, op: Any, head: int, count: int) -> None:
        work, solver, window, gamma = self.work, self.solver, self.work.window, self.work.gamma
        if count:
            op.anderson_gram(work.g_ring, head, count, window, work.gram, work.rhs)
            op.anderson_solve(
                work.gram, work.rhs, window, solver.scope, solver.ridge, solver.ridge_absolute, self.implicit, gamma
            )
            if self.any_fallen:
                gamma.masked_fill_(self.fallen_back[:, None], 0.0)
        op.anderson_mix(work.f_ring, head, count, gamma, window, self.trajectory.x[1:])

    def extend(self, op: Any, k: int, window: Tensor, skip: Tensor) -> None:
        """Guess the states that the steps lead to which came into the `window` (B, 2) after iteration k."""
        if self.held is not None:
            x, z, before = self.trajectory.x, self.trajectory.z, self.work.before
            op.extrapolate_states(
                *(x, self.moved, self.outputs(k), z, self.held, self.n, before, window, skip),
                *(self.solver.beta, self.implicit),
            )

    def complete(self, count: int) -> None:
        """Guess the states that no window came to in `count` iterations; they are guessed anew when one does."""
        if count and self.held is not None:
            rest = torch.full_like(self.work.window, self.trajectory.steps)
            self.extend(ops, count - 1, rest, self.fallen_back.long())

    def fall_back(self, diverged: Bools, window: Ints, evaluated: Bools, k: int) -> None:
        """Go on with plain iteration for the samples `diverged` (B,), from the first state that is exact.

        window: (B, 2), what was active in iteration k; evaluated: (S, B). Raises ValueError if it was the map that gave
        NaN or infinity, at a state that was no overshoot.
        """
        x, work = self.trajectory.x, self.work
        for b in np.flatnonzero(diverged).tolist():
            begin, end = window[b].tolist()
            exact = begin if self.implicit else begin + 1
            bad = torch.from_numpy(evaluated[begin:end, b]) & ~self.outputs(k)[begin:end, b].isfinite().all(-1).cpu()
            if not self.implicit:  # the map was called at x[i], of which norms hold |x[i+1]|^2
                bad[1:] &= work.norms[begin : end - 1, b, 2].sqrt().cpu() <= OVERSHOOT * self.scale[b].cpu()
            if bad.any():
                where = self.trajectory.where(begin + bad.nonzero().flatten())
                what = self.trajectory.map.what
                raise ValueError(f"{what} NaN or infinity at iteration {k + 1}{where} (sample {b})")
            x[exact + 1 :, b] = x[exact, b]
            if self.solver.history_size:  # what is not finite would get through a weight of zero
                work.f_ring[:, :, b] = 0.0
        fallen = torch.from_numpy(diverged).to(x.device)
        # how fast it converged, and how near it had come, were those of another iteration
        work.errors[:, 1:4] = torch.where(fallen[:, None], work.fresh[1:4], work.errors[:, 1:4])
        self.fallen_back |= fallen
        self.any_fallen = True


def warn_unless_converged(solution: Solution, of: str = "") -> None:
    """One `ConvergenceWarning` if a sample did not converge, at the line from which deqkern was called."""
    if bool(solution.converged.all()):
        return
    level, frame = 1, sys._getframe()
    while frame.f_code.co_filename.startswith(_INSIDE) and frame.f_back is not None:
        level, frame = level + 1, frame.f_back
    warnings.warn(of + solution.message, ConvergenceWarning, stacklevel=level)


def relative_error(value: Tensor, reference: Tensor) -> Tensor:
    """|value - reference| / |reference| (B,) per sample (B, *shape), in float64."""
    value, reference = value.double().flatten(1), reference.double().flatten(1)
    return (value - reference).norm(dim=1) / reference.norm(dim=1)


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
        self.iteration = _Iteration(trajectory, solver, rtol)
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
