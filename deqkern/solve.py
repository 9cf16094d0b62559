"""The only iteration loop of deqkern, and what it returns."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops
from .slopes import Secant, slope_of
from .solvers import Solver
from .trajectory import Trajectory

Callback = Callable[[int, Tensor, Tensor], None]

# In exact mode a step is settled when its one-step residual, relative to the state, is at the rounding level of fp32.
SETTLED_EXACT = 2e-7
# No contraction from one iteration to the next is believed to be better than this.
CONTRACTION = 0.1
# A last correction that is larger than this times the smallest one before it: the iteration diverges.
GROWTH = 1e3


class ConvergenceWarning(UserWarning):
    """Some samples did not reach the tolerance; the result says which."""


@dataclass(frozen=True)
class Solution:
    """What a solve gives back.

    value: (B, *shape), the clean end of the chain, in the dtype of the input.
    trajectory: (S+1, B, *shape) fp32, all states, the noise first.
    converged: (B,) bool.
    error_estimate: (B,) fp64, the relative error left in `value`, as estimated.
    iterations: sequential batched model calls (a batch cut by `max_batch` counts once).
    nfe: (B,) int64, model evaluations per sample.
    history: (iterations, B) fp64, the error estimate after each iteration.
    message: one line for people.
    """

    value: Tensor
    trajectory: Tensor
    converged: Tensor
    error_estimate: Tensor
    iterations: int
    nfe: Tensor
    history: Tensor
    message: str


class _Workspace:
    """The memory of a solve, allocated once: (2 m + 6) (S + 1) B D floats at most, with all that `Trajectory` holds."""

    def __init__(self, trajectory: Trajectory, solver: Solver) -> None:
        x, bands = trajectory.x, trajectory.basis.bands
        steps, batch, size = trajectory.steps, trajectory.batch, trajectory.basis.size
        m = solver.history_size
        self.e = x.new_zeros(steps, batch, size)  # becomes e_prev first
        self.e_prev = torch.empty_like(self.e) if solver.slope.adapts else self.e
        moves = x.new_zeros((m + 1) * steps + 1, batch, size)  # the first row stays zero: x[0] never moves
        self.dx = moves[:steps]  # (S, B, D), with m = 0 the last change of x[:-1]
        self.g_ring = moves[1:].view(m + 1, steps, batch, size)
        self.f_ring = x.new_zeros(m + 1, steps, batch, size) if m else x[None, 1:]
        wide = x.new_zeros(0, dtype=torch.float64)
        self.gram = wide.new_zeros(steps, batch, m, m)
        self.rhs = wide.new_zeros(steps, batch, m)
        self.gamma = x.new_zeros(steps, batch, m)
        self.norms = wide.new_zeros(steps, batch, 3)
        self.moments = wide.new_zeros(steps, batch, len(bands) - 1, 2)


class _Iteration:
    """One iteration of a solver on a trajectory: correction, mixing, update of x in place."""

    def __init__(self, trajectory: Trajectory, solver: Solver) -> None:
        table, device = trajectory.table, trajectory.x.device
        self.trajectory, self.solver, self.work = trajectory, solver, _Workspace(trajectory, solver)
        self.a, self.b, self.n = (v.to(device, torch.float32) for v in (table.a, table.b, table.n))
        ends = torch.stack([table.slope_0, table.slope_1]).to(device)
        self.low, self.high = ends.amin(0)[:, None, None], ends.amax(0)[:, None, None]  # (S, 1, 1)
        shrinkage = solver.slope.initial(table, trajectory.basis).to(device)
        slope = slope_of(table, shrinkage)[:, None]  # (S, 1, K)
        self.slope = slope.expand(-1, trajectory.batch, -1).contiguous()  # (S, B, K) float64
        self.frozen = table.slope_0.to(device)[:, None]
        self.fallen_back = torch.zeros(trajectory.batch, dtype=torch.bool, device=device)

    def advance(self, k: int, rows: Tensor, window: Tensor) -> None:
        """Iteration k = 0, 1, .. over the active steps `window` (B, 2), whose flat indices are `rows`."""
        work, x, bands = self.work, self.trajectory.x, self.trajectory.basis.bands
        work.e, work.e_prev = work.e_prev, work.e
        self.trajectory.evaluate(rows, work.e)
        if isinstance(self.solver.slope, Secant) and (k or self.solver.slope.start is None):
            dx = work.dx if k else x[:-1]  # with the first e_prev: the secant from zero to the first states
            ops.band_moments(dx, work.e, work.e_prev, bands, window, work.moments)
            self.slope = self.solver.slope.refine(self.slope, work.moments, self.low, self.high)
        slope = torch.where(self.fallen_back[:, None], self.frozen[:, None], self.slope).to(x.dtype)
        head = k % (self.solver.history_size + 1)
        f, g, z, beta = work.f_ring[head], work.g_ring[head], self.trajectory.z, self.solver.beta
        ops.ddim_scan(x, work.e, z, self.a, self.b, self.n, slope, bands, window, beta, False, f, g, work.norms)
        if self.solver.history_size:
            self._mix(k, head, window)

    def _mix(self, k: int, head: int, window: Tensor) -> None:
        work, solver, count = self.work, self.solver, min(k, self.solver.history_size)
        if count:
            ops.anderson_gram(work.g_ring, head, count, window, work.gram, work.rhs)
            ops.anderson_solve(
                work.gram, work.rhs, window, solver.scope, solver.ridge, solver.ridge_absolute, False, work.gamma
            )
            work.gamma.masked_fill_(self.fallen_back[:, None], 0.0)
        ops.anderson_mix(work.f_ring, head, count, work.gamma, window, self.trajectory.x[1:])

    def fall_back(self, diverged: Tensor, window: Tensor, k: int) -> None:
        """Go on with plain iteration for the samples `diverged` (B,), from the first state that is exact.

        Raises ValueError if it was the model that gave NaN or infinity.
        """
        x, e, timesteps = self.trajectory.x, self.work.e, self.trajectory.table.timesteps
        for b in diverged.nonzero().flatten().tolist():
            begin, end = window[b].tolist()
            bad = ~e[begin:end, b].isfinite().all(-1).cpu()
            if bad.any():
                where = timesteps[begin:end][bad].tolist()
                raise ValueError(f"model returned NaN or infinity at iteration {k + 1}, timesteps {where} (sample {b})")
            x[begin + 2 :, b] = x[begin + 1, b]
        self.fallen_back |= diverged


class _Progress:
    """What is settled, what error is left, and which rows come next. All per sample."""

    def __init__(self, trajectory: Trajectory, solver: Solver, rtol: float) -> None:
        batch, device = trajectory.batch, trajectory.x.device
        self.steps, self.size, self.rtol = trajectory.steps, solver.window or trajectory.steps, rtol
        # A step whose one-step residual is below is settled: it is not evaluated again.
        self.tolerance = rtol / self.steps if rtol else SETTLED_EXACT
        self.estimate = torch.full((batch,), torch.inf, dtype=torch.float64, device=device)
        self.change, self.smallest = self.estimate, self.estimate  # the largest relative correction; |g[S]|
        self.converged = torch.zeros(batch, dtype=torch.bool, device=device)
        self.scale = trajectory.x[0].double().norm(dim=-1)  # (B,)
        self.index = torch.arange(self.steps, device=device)[:, None]
        self._open(torch.zeros(batch, dtype=torch.int64, device=device))

    def _open(self, begin: Tensor) -> None:
        self.window = torch.stack([begin, (begin + self.size).clamp_max(self.steps)], 1)

    def rows(self) -> Tensor:
        """Flat indices i * B + b of the active (step, sample) pairs, in the order of the steps."""
        active = (self.index >= self.window[:, 0]) & (self.index < self.window[:, 1])
        return active.flatten().nonzero().flatten()

    def update(self, norms: Tensor) -> Tensor:
        """Take in the squared norms (S, B, 3) of one iteration; returns the samples (B,) that diverged."""
        residual, correction, state = norms.sqrt().unbind(-1)
        begin, end = self.window.unbind(1)
        active, reaches_end = ~self.converged, end == self.steps
        # A state that is larger than the noise is taken for an overshoot, not for the scale of the data.
        scale = torch.minimum(torch.where(state > 0, state, torch.inf), self.scale)
        change = torch.where(reaches_end, (correction / scale).nan_to_num(0.0, torch.inf).amax(0), torch.inf)
        # What is left after this correction: the last contraction once more. An error above 1 tells nothing of it.
        left = change * (change / self.change.clamp_max(1.0)).clamp(CONTRACTION, 1.0)
        diverged = active & (
            ~norms.isfinite().all(-1).all(0) | (reaches_end & (correction[-1] > GROWTH * self.smallest))
        )
        # The first active step took the plain step, so its end is exact. Settled steps follow up to the first other.
        exact = torch.minimum(begin + 1, end)
        settled = (self.index < begin) | ((self.index < end) & (residual <= self.tolerance * state))
        frontier = torch.maximum(settled.long().cumprod(0).sum(0), exact)
        frontier = torch.where(diverged, exact, frontier)
        finished = frontier >= self.steps
        left = torch.where(finished, left.clamp_max(self.tolerance), left)
        self.estimate = torch.where(active, left, self.estimate)
        self.smallest = torch.where(reaches_end, torch.fmin(self.smallest, correction[-1]), self.smallest)
        self.change = change
        self.converged = self.converged | finished | (active & ~diverged & (self.rtol > 0) & (left <= self.rtol))
        self._open(torch.where(self.converged, self.steps, frontier))
        return diverged


def solve(
    trajectory: Trajectory,
    solver: Solver,
    *,
    rtol: float,
    max_iterations: int | None = None,
    callback: Callback | None = None,
    dtype: torch.dtype = torch.float32,
) -> Solution:
    """Iterate `solver` on `trajectory` in place until every sample's estimated remaining error is at most rtol.

    rtol = 0 goes on until every step is exact. Raises ValueError if the model returns NaN.
    """
    steps, batch, shape = trajectory.steps, trajectory.batch, trajectory.basis.shape
    iteration, progress = _Iteration(trajectory, solver), _Progress(trajectory, solver, rtol)
    history: list[Tensor] = []
    last = torch.arange(steps * batch, (steps + 1) * batch, device=trajectory.x.device)
    limit = steps if max_iterations is None else min(max_iterations, steps)
    while len(history) < limit and not bool(progress.converged.all()):
        window, k = progress.window, len(history)
        iteration.advance(k, progress.rows(), window)
        diverged = progress.update(iteration.work.norms)
        if bool(diverged.any()):
            iteration.fall_back(diverged, window, k)
        history.append(progress.estimate)
        if callback is not None:
            callback(k + 1, trajectory.images(last).to(dtype, copy=True), progress.estimate.clone())
    fallen_back = int(iteration.fallen_back.sum())
    del iteration  # its memory makes room for the states
    states = trajectory.x.new_empty(steps + 1, batch, *shape)
    rows = torch.arange((steps + 1) * batch, device=states.device)
    trajectory.basis.inverse(trajectory.x.flatten(0, 1), states.flatten(0, 1), rows)
    missed = int((~progress.converged).sum())
    message = f"{batch - missed} of {batch} samples converged in {len(history)} iterations (rtol {rtol:g})"
    if fallen_back:
        message += f"; {fallen_back} diverged and went on with plain iteration"
    if missed:
        warnings.warn(message, ConvergenceWarning, stacklevel=3)
    return Solution(
        value=states[-1].to(dtype, copy=True),
        trajectory=states,
        converged=progress.converged,
        error_estimate=progress.estimate,
        iterations=len(history),
        nfe=trajectory.nfe,
        history=torch.stack(history) if history else torch.zeros(0, batch, dtype=torch.float64),
        message=message,
    )
