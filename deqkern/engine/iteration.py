"""One iteration of a solver on a trajectory: measure, interpolate, scan, mix, judge, extend."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..solvers.presets import Solver
from ..solvers.slopes import learns
from .host import Bools, Ints, on_device
from .selection import gaps
from .trajectory import Trajectory, initial_slope

# No contraction from one iteration to the next is believed to be better than this.
CONTRACTION = 0.1
# A last correction that is larger than this times the smallest one before it: the iteration diverges.
GROWTH = 1e3
# A state that is larger than this times the first one is an overshoot of the iteration: what a map makes of it is not
# the map's fault.
OVERSHOOT = 2.0


class Workspace:
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


class Iteration:
    """One iteration of a solver on a trajectory: correction, mixing, update of x in place, and what it reached.

    Nothing in it waits for the device or depends on what it computed, so that it can be captured in a CUDA graph.
    """

    def __init__(self, trajectory: Trajectory, solver: Solver, rtol: float) -> None:
        table, device, steps = trajectory.table, trajectory.x.device, trajectory.steps
        self.size = solver.width(steps)
        self.trajectory, self.solver, self.work = trajectory, solver, Workspace(trajectory, solver, self.size)
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
        if learns(solver.slope) and (k or solver.slope.measures_at_once):
            dx = self.moved if k else self.arguments  # with the first e_prev: from zero to the first states
            op.band_moments(dx, e, e_prev, bands, window, work.moments)
            if self.unmeasured is not None:
                work.moments.masked_fill_(self.unmeasured, 0.0)
            solver.slope.refine(self.slope, work.moments, self.low, self.high)
        if self.any_fallen:
            self.slope.copy_(torch.where(self.fallen_back[:, None], self.frozen, self.slope))
        if self.gap_rows is not None:
            op.fill_gaps(x, self.slope, bands, self.gap_rows, self.path, e)
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
        op.progress(
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
            op.extend(
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
