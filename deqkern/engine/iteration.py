"""One iteration of a solver on a trajectory: measure, interpolate, scan, mix, judge, extend."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..ops.state import Norms
from ..solvers.presets import Solver
from ..solvers.slopes import learns
from .extension import Extension
from .host import Bools, Ints
from .mixing import Mixing
from .rows import Rows
from .selection import Gaps
from .stopping import OVERSHOOT, Stopping
from .trajectory import Trajectory, initial_slope


class Slopes:
    """The slopes (S, B, K) of a solve, as they are measured from iteration to iteration."""

    def __init__(self, trajectory: Trajectory, solver: Solver) -> None:
        table, x = trajectory.table, trajectory.x
        self.model, self.bands = solver.slope, trajectory.basis.bands
        self.now = initial_slope(solver, table, trajectory.basis, x)  # (S, B, K)
        self.at_zero_shrinkage = table.slope_0.to(x.device, x.dtype)[:, None, None]
        ends = torch.stack([table.slope_0, table.slope_1]).to(x.device)
        self.low, self.high = ends.amin(0), ends.amax(0)  # (S,) float64
        self.moments = x.new_zeros(*self.now.shape, 2, dtype=torch.float64)

    def measure(self, op: Any, dx: Tensor, e: Tensor, e_prev: Tensor, window: Tensor) -> None:
        """The moments of the changes dx of states and e - e_prev of outputs (S, B, D), in the window (B, 2)."""
        op.band_moments(dx, e, e_prev, bands=self.bands, window=window, moments=self.moments)

    def refine(self, unmeasured: Tensor | None) -> None:
        """The next slopes. unmeasured: (S, B) bool, where the moments say nothing; None if they do everywhere."""
        if unmeasured is not None:
            self.moments.masked_fill_(unmeasured[..., None, None], 0.0)
        assert learns(self.model)
        self.model.refine(self.now, self.moments, self.low, self.high)

    def freeze(self, samples: Tensor) -> None:
        """Take the slopes of plain iteration for the `samples` (B,) bool."""
        self.now.copy_(torch.where(samples[:, None], self.at_zero_shrinkage, self.now))


class Iteration:
    """The state of a solve on the device, and what one iteration does to it.

    Nothing in `run` waits for the device or depends on what it computed, so that it can be captured in a CUDA graph.
    """

    def __init__(self, trajectory: Trajectory, solver: Solver, stopping: Stopping) -> None:
        x, steps, batch = trajectory.x, trajectory.steps, trajectory.batch
        self.trajectory, self.solver, self.stopping = trajectory, solver, stopping
        self.coefficients = trajectory.table.coefficients(x)
        self.slopes, self.mixing = Slopes(trajectory, solver), Mixing(trajectory, solver)
        # Where a window is narrower than the chain, states are guessed when it reaches them.
        window = stopping.status.window
        self.extension = Extension(trajectory, window, solver.beta) if stopping.width < steps else None
        count = 2 if solver.slope.adapts else 1
        self.e = [x.new_zeros(steps, batch, trajectory.basis.size) for _ in range(count)]
        self.norms = x.new_zeros(steps, batch, 3, dtype=torch.float64)
        self.samples = torch.arange(batch, device=x.device)
        self.gaps = self.no_gaps = Gaps.none(steps, batch, x.device)
        self.path = torch.empty(0)  # (6, S), with thinning
        self.fallen_back = torch.zeros(batch, dtype=torch.bool, device=x.device)
        self.any_fallen = False

    def phase(self, k: int) -> tuple[int, ...]:
        """Iterations k > 0 of one phase launch the same kernels on the same memory."""
        m = self.solver.history_size
        return (k % len(self.e), k % (m + 1), min(k, m), self.any_fallen)

    def outputs(self, k: int) -> Tensor:
        """What the map gave in iteration k (S, B, D), in the basis."""
        return self.e[k % len(self.e)]

    def run(self, k: int, rows: Rows, outputs: Iterable[Tensor]) -> None:
        """Iteration k = 0, 1, .. with the outputs of the map at `rows`, in parts of any size."""
        out, begin = self.outputs(k), 0
        for output in outputs:
            count = self.trajectory.check(output)
            if begin + count > len(rows):
                begin += count
                break
            part = slice(begin, begin + count)
            self.trajectory.receive(rows.index[part], rows.steps[part], output, out)
            begin = part.stop
        if begin != len(rows):
            raise ValueError(f"outputs must hold one row for each that was asked for, {len(rows)}, got {begin}")
        if not k:
            self.stopping.settle_tolerances()
        self._update(k)

    def _update(self, k: int) -> None:
        trajectory, solver, slopes, mixing = self.trajectory, self.solver, self.slopes, self.mixing
        x, bands, implicit = trajectory.x, trajectory.basis.bands, trajectory.table.implicit
        window, diverged = self.stopping.status
        op = ops.unchecked if k > solver.history_size else ops  # by then all of them have had these tensors
        e, e_prev = self.outputs(k), self.outputs(k + 1)

        # Measure: the slopes, from how outputs changed with their states.
        if learns(solver.slope) and (k or solver.slope.measures_at_once):
            dx = mixing.last_change if k else x[1:] if implicit else x[:-1]  # at first: from zero to the first states
            slopes.measure(op, dx, e, e_prev, window)
            slopes.refine(self.gaps.unmeasured)
        if self.any_fallen:
            slopes.freeze(self.fallen_back)

        # Interpolate: the outputs of open steps that were not evaluated.
        if self.gaps.rows is not None:
            op.interpolate_outputs(x, slopes.now, bands, rows=self.gaps.rows, path=self.path, e=e)

        # Scan: the correction of all states.
        a, b, c, n = self.coefficients
        updated, correction = mixing.slots(k)
        op.ddim_scan(
            x,
            e,
            trajectory.z,
            a=a,
            b=b,
            c=c,
            n=n,
            slope=slopes.now,
            bands=bands,
            window=window,
            beta=solver.beta,
            implicit=implicit,
            f=updated,
            g=correction,
            norms=self.norms,
        )

        # Mix: the updates of the last iterations.
        mixing.mix(op, k, window, self.fallen_back if self.any_fallen else None)

        # Judge: which steps have converged; windows move on.
        if self.extension is not None:
            self.extension.note(window)
        self.stopping.judge(op, self.norms, self.gaps.first)

        # Extend: guesses of the states that windows have reached.
        if self.extension is not None:
            self.extension.extend(op, mixing.last_change, e, window, diverged)
        if c is not None and e_prev is not e:  # the next scan reads the output before its window
            before = (window[:, 0] - 1).clamp_min(0)
            e_prev[before, self.samples] = e[before, self.samples]

    def fill_unreached(self, count: int) -> None:
        """Guess the states that no window reached in `count` iterations."""
        if count and self.extension is not None:
            skip = self.fallen_back.long()
            self.extension.fill_unreached(ops, self.mixing.last_change, self.outputs(count - 1), skip)

    def fall_back(self, diverged: Bools, window: Ints, evaluated: Bools, k: int) -> None:
        """Go on with plain iteration for the samples `diverged` (B,), from the first state that is exact.

        Args:
            diverged: (B,).
            window: (B, 2), what was open in iteration k.
            evaluated: (S, B), where the map was evaluated in it.
            k: The iteration.

        Raises:
            ValueError: It was the map that gave NaN or infinity, at a state that was no overshoot.

        """
        trajectory, x, implicit = self.trajectory, self.trajectory.x, self.trajectory.table.implicit
        for b in np.flatnonzero(diverged).tolist():
            begin, end = window[b].tolist()
            exact = begin if implicit else begin + 1
            bad = torch.from_numpy(evaluated[begin:end, b]) & ~self.outputs(k)[begin:end, b].isfinite().all(-1).cpu()
            if not implicit:  # the map was evaluated at x[i], of which norms hold |x[i+1]|^2
                sizes = Norms.view(self.norms).state[begin : end - 1, b].sqrt().cpu()
                bad[1:] &= sizes <= OVERSHOOT * trajectory.scale[b].cpu()
            if bad.any():
                steps = trajectory.describe(begin + bad.nonzero().flatten())
                prefix = trajectory.traits.error_prefix
                raise ValueError(f"{prefix} NaN or infinity at iteration {k + 1}{steps} (sample {b})")
            x[exact + 1 :, b] = x[exact, b]
            self.mixing.reset(b)
        fallen = torch.from_numpy(diverged).to(x.device)
        self.stopping.reset(fallen)
        self.fallen_back |= fallen
        self.any_fallen = True
