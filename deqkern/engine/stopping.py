"""When a step has converged, and when a sample is done: every constant and rule of stopping stands here.

What is computed of them on the device is the op `update_convergence`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..chain.step_table import StepTable
from .trajectory import Trajectory

# No contraction from one iteration to the next is believed to be better than this.
CONTRACTION = 0.1
# A last correction that is larger than this times the smallest one before it: the iteration diverges.
GROWTH = 1e3
# A state that is larger than this times the first one is an overshoot of the iteration: what a map makes of it is not
# the map's fault.
OVERSHOOT = 2.0
# No step need converge further than this many roundings, in its one-step residual relative to the state.
ROUNDINGS = 1.7
# Nor further than this many roundings of the map, by the weight of its output: where those of the shipped models come
# to rest in bf16 and fp16, at 0.3 to 0.7.
MAP_ROUNDINGS = 0.75

# What is known of a sample before its first iteration: see `Stopping.errors`.
_INITIAL_ERRORS = (torch.inf, torch.inf, 1.0, torch.inf, torch.inf)


class Status(NamedTuple):
    """What the host reads after each iteration, as views of one piece (3 B,) int64.

    window: (B, 2), the steps of each sample that are open: from the first that has not converged up to the end of
        its window. S, S where a sample is done.
    diverged: (B,), not 0 where the iteration diverges.
    """

    window: Any  # a tensor, or an array of the host
    diverged: Any

    @classmethod
    def of(cls, flat: Any) -> Status:
        """The views of `flat` (3 B,)."""
        batch = len(flat) // 3
        return cls(flat[: 2 * batch].reshape(batch, 2), flat[2 * batch :])


def tolerances(table: StepTable, states: torch.dtype, precision: float, rtol: float) -> Tensor:
    """The one-step residual, relative to its state, at which a step has converged (S,) fp64.

    With rtol > 0 no less than what the map's own rounding makes of it, which no iteration can take away.
    """
    rounding = torch.finfo(states).eps
    if rtol == 0 or precision <= rounding:
        precision = 0.0
    weight = MAP_ROUNDINGS * (table.b.abs() + table.c.abs())
    return (precision * weight).clamp_min(max(rtol / (2 * len(weight)), ROUNDINGS * rounding))


class Stopping:
    """The judgement of each iteration: which steps have converged, and what is left of each sample's error.

    errors: (B, 5) fp64: the error estimate; the last correction of the clean end, relative; the contraction; the
        smallest correction until now; the largest one-step residual.
    """

    def __init__(self, trajectory: Trajectory, width: int, rtol: float) -> None:
        x, batch = trajectory.x, trajectory.batch
        self.trajectory, self.width, self.rtol = trajectory, width, rtol
        self.tolerance = torch.empty(0)  # (S,), once the map has been evaluated
        self.errors = x.new_tensor(_INITIAL_ERRORS, dtype=torch.float64).repeat(batch, 1)
        self.flat = torch.zeros(3 * batch, dtype=torch.int64, device=x.device)  # one piece: one copy tells the host
        self.status = Status.of(self.flat)
        self.status.window[:, 1] = width

    def settle_tolerances(self) -> None:
        """Once, when the first outputs have shown the precision of the map."""
        trajectory, rounding = self.trajectory, self.trajectory.traits.rounding
        found = tolerances(trajectory.table, trajectory.x.dtype, trajectory.precision, self.rtol)
        if rounding is not None:
            found = torch.full_like(found, rounding)
        self.tolerance = found.to(trajectory.x.device)

    def judge(self, op: Any, norms: Tensor, first_missing: Tensor) -> None:
        """Update errors, windows and divergence from the norms (S, B, 3) of a scan.

        op: the ops, checked or not. first_missing: (B,), the first open step whose output was interpolated; S for none.
        """
        op.update_convergence(
            norms,
            self.trajectory.scale,
            gap=first_missing,
            tolerance=self.tolerance,
            rtol=self.rtol,
            contraction=CONTRACTION,
            growth=GROWTH,
            size=self.width,
            implicit=self.trajectory.table.implicit,
            errors=self.errors,
            window=self.status.window,
            diverged=self.status.diverged,
        )

    def reset(self, samples: Tensor) -> None:
        """Forget how fast the `samples` (B,) bool converged, and how near they came: another iteration begins."""
        initial = self.errors.new_tensor(_INITIAL_ERRORS)
        self.errors[:, 1:4] = torch.where(samples[:, None], initial[1:4], self.errors[:, 1:4])
