"""When a step has converged, and when a sample is done: every constant and rule of stopping stands here.

What is computed of them on the device is the op `update_convergence`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..chain.step_table import StepTable
from ..ops.state import INITIAL_CONVERGENCE, Convergence, Status
from .trajectory import Trajectory

# No contraction from one iteration to the next is believed to be better than this.
BEST_CONTRACTION = 0.1
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

    Attributes:
        convergence: What is known of each sample.
        status: What the host reads.
    """

    def __init__(self, trajectory: Trajectory, width: int, rtol: float) -> None:
        x, batch = trajectory.x, trajectory.batch
        self.trajectory, self.width, self.rtol = trajectory, width, rtol
        self.tolerance = torch.empty(0)  # (S,), once the map has been evaluated
        self._convergence = x.new_tensor(INITIAL_CONVERGENCE, dtype=torch.float64).repeat(batch, 1)
        self.convergence = Convergence.view(self._convergence)
        self.flat = torch.zeros(3 * batch, dtype=torch.int64, device=x.device)  # one piece: one copy tells the host
        self.status = Status.view(self.flat)
        self.status.window[:, 1] = width

    def settle_tolerances(self) -> None:
        """Once, when the first outputs have shown the precision of the map."""
        trajectory, rounding = self.trajectory, self.trajectory.traits.rounding
        found = tolerances(trajectory.table, trajectory.x.dtype, trajectory.precision, self.rtol)
        if rounding is not None:
            found = torch.full_like(found, rounding)
        self.tolerance = found.to(trajectory.x.device)

    def judge(self, op: Any, norms: Tensor, first_interpolated: Tensor) -> None:
        """Update convergence, windows and divergence from the norms (S, B, 3) of a scan.

        op: the ops, checked or not. first_interpolated: (B,), the first open step whose output was interpolated; S
        where there is none.
        """
        op.update_convergence(
            norms,
            self.trajectory.scale,
            first_interpolated=first_interpolated,
            tolerance=self.tolerance,
            rtol=self.rtol,
            best_contraction=BEST_CONTRACTION,
            growth=GROWTH,
            window_size=self.width,
            implicit=self.trajectory.table.implicit,
            convergence=self._convergence,
            window=self.status.window,
            diverged=self.status.diverged,
        )

    def reset(self, samples: Tensor) -> None:
        """Forget how fast the `samples` (B,) bool converged, and how near they came: another iteration begins."""
        for name in ("last_correction", "contraction", "smallest_correction"):
            getattr(self.convergence, name).masked_fill_(samples, getattr(INITIAL_CONVERGENCE, name))
