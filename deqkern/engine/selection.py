"""Which rows an iteration evaluates, and how the outputs of the other open steps follow from theirs.

Along a chain without noise x0, as the model sees it, changes slowly from step to step. While a state still moves by a
share m of itself from one iteration to the next, its output need not be known better: it is interpolated between those
of two steps that are evaluated. The error of that grows with the square of their distance, which therefore is a
multiple of sqrt(m), and steps whose states have come to rest are all evaluated.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..chain.step_table import StepTable
from ..ops.state import Norms, OutputPath
from .host import Bools, Ints, Reals, Upload

# A state that moves by more than this share of itself, or has not moved yet, counts as moving by this much.
LARGEST_MOVE = 0.1
# Of one that moved by less than this, times rtol, nothing is left out: the end is near, and no error is known before.
LEAST_MOVE = 2.0
# The distance between evaluated steps is at most that to the first open step over this, and one more.
APPROACH = 2
# A step that was open in this many iterations is evaluated, and so is the one after it: where x0 changes abruptly, what
# interpolation gets wrong keeps the states moving, and they would never come to rest.
PATIENCE = 8


def active(windows: Ints, steps: int) -> Bools:
    """Whether a step is in the window of a sample (S, B), for windows (B, 2)."""
    index = np.arange(steps)[:, None]
    found: Bools = (index >= windows[:, 0]) & (index < windows[:, 1])
    return found


def relative_changes(norms: Reals) -> Reals:
    """By what share of itself each state moved where a step begins (S, B), from the norms (S, B, 3) of a scan.

    The first state never moves; one that no scan has come to, or that is not finite, counts as moving without bound.
    """
    changes, squares = np.zeros(norms.shape[:2]), Norms.view(norms)
    with np.errstate(divide="ignore", invalid="ignore"):
        changes[1:] = np.sqrt(squares.correction[:-1] / squares.state[:-1])
    changes[np.isnan(changes)] = np.inf
    return changes


def is_worth_thinning(steps: int, share: float) -> bool:
    """Whether a chain is long enough for any step to be left out."""
    return share * steps * math.sqrt(LARGEST_MOVE) >= 2


class Thinning:
    """Steps of an explicit chain without noise, `share` S sqrt(m) apart where a state moves by a share m of itself.

    path: (6, S) float64, of the op `interpolate_outputs`: x0 is linear in log-SNR between evaluated steps.
    """

    def __init__(self, table: StepTable, share: float, rtol: float) -> None:
        self.distance, level = min(share * table.num_inference_steps, 1e9), table.log_snr  # no chain is longer
        self.least_move = LEAST_MOVE * rtol
        constant = table.constant_x0()
        after = constant.keep.cumprod(0)
        scale = torch.cat([torch.ones_like(after[:1]), after[:-1]])
        sums = torch.stack([constant.x0_gain, constant.x0_gain * level]).div(after).cumsum(1)
        gain, gain_level = torch.cat([torch.zeros_like(sums[:, :1]), sums[:, :-1]], 1)
        rows = OutputPath(scale, gain, gain_level, level=level, of_x=constant.of_x, of_out=constant.of_out)
        self.path: Tensor = torch.stack(rows)

    def choose_steps(self, open_steps: Bools, changes: Reals) -> Bools:
        """Whether each open step of a window (S, B) is evaluated (S, B); the first and the last one are.

        changes: (S, B), the last change of the state where a step begins, relative to that state.
        """
        steps, batch = changes.shape
        bounded = np.where(changes < self.least_move, 0.0, np.minimum(changes, LARGEST_MOVE))
        distances = self.distance * np.sqrt(bounded)
        far = (open_steps & (distances >= 2)).any(0)  # (B,), samples that leave something out: others are not looked at
        begins, lengths = open_steps.argmax(0), open_steps.sum(0)
        places: list[int] = []
        for b in np.flatnonzero(far).tolist():
            begin, reach = int(begins[b]), distances[:, b].tolist()
            i, end = begin, begin + int(lengths[b])
            while i < end:
                places.append(i * batch + b)
                i += int(max(1, min(reach[i], (i - begin) // APPROACH + 1)))
            places.append((end - 1) * batch + b)
        met = np.zeros(steps * batch, dtype=bool)
        met[places] = True
        chosen: Bools = open_steps & (met.reshape(steps, batch) | ~far)
        return chosen


def gaps(open_steps: Bools, evaluated: Bools) -> tuple[Ints, Ints]:
    """(B,) and (3, N): the first open step of each sample that is not evaluated, S if all are; and, of all that

    are not, the rows i * B + b: their own, and those of the evaluated steps before and after them.
    """
    steps, batch = evaluated.shape
    index = np.arange(steps)[:, None]
    missing = open_steps & ~evaluated
    before = np.maximum.accumulate(np.where(evaluated, index, 0), axis=0)
    after = np.minimum.accumulate(np.where(evaluated, index, steps)[::-1], axis=0)[::-1]
    i, b = missing.nonzero()
    first = np.where(missing, index, steps).min(0)
    return first, np.stack([i, before[i, b], after[i, b]]) * batch + b


class Gaps(NamedTuple):
    """The open steps whose outputs are interpolated in an iteration, on the device.

    first: (B,) int64, the first one of each sample; S where there is none.
    rows: (3, N) int64, of the op `interpolate_outputs`; None where no sample has one.
    unmeasured: (S, B) bool, the open steps whose slope cannot be measured; None if all can.
    """

    first: Tensor
    rows: Tensor | None = None
    unmeasured: Tensor | None = None

    @classmethod
    def none(cls, steps: int, batch: int, device: torch.device) -> Gaps:
        """Every open step is evaluated."""
        return cls(torch.full((batch,), steps, dtype=torch.int64, device=device))


class Selection:
    """Chooses on the host, before each iteration, the rows i * B + b that it evaluates.

    thinning: leaves out open steps; None evaluates them all. whole_batch: all rows, whether their samples are done or
    not. for_graph: keeps the rows that a graph was captured with until half of them have converged.
    """

    def __init__(
        self, steps: int, batch: int, *, thinning: Thinning | None, whole_batch: bool, for_graph: bool
    ) -> None:
        self.steps, self.batch, self.thinning = steps, batch, thinning
        self.whole_batch, self.for_graph = whole_batch, for_graph
        self.rows: Ints = np.zeros(0, dtype=np.int64)  # (N,)
        self.open_steps = self.evaluated = np.zeros((steps, batch), dtype=bool)
        self.measured = self.evaluated  # the steps whose outputs changed from a known one
        self.ages = np.zeros((steps, batch), dtype=np.int64)  # iterations in which a step was open
        self.plain = np.zeros(batch, dtype=bool)  # samples that fell back: all of their steps are evaluated
        self.changes = relative_changes(np.zeros((steps, batch, 3)))

    def choose(self, window: Ints, first: bool) -> bool:
        """Choose the rows for windows (B, 2), of the first iteration or a later one; whether they are new ones."""
        self.open_steps, before = active(window, self.steps), self.evaluated
        self.evaluated = self.open_steps if self.thinning is None else self._thinned(self.thinning)
        self.measured = self.evaluated if first else before & self.evaluated
        if self.whole_batch:
            self.rows = np.arange(self.steps * self.batch)
        elif self.for_graph:  # a graph evaluates the rows it was captured with, new steps among them
            rows = np.flatnonzero(np.arange(self.steps)[:, None] >= window[:, 0])
            if not first and 2 * len(rows) > len(self.rows):
                return False
            self.rows = rows
        else:
            self.rows = np.flatnonzero(self.evaluated)
        return True

    def _thinned(self, thinning: Thinning) -> Bools:
        changes = self.changes
        changes[:, self.plain] = 0.0
        changes[self.ages >= PATIENCE] = 0.0
        self.ages += self.open_steps
        return thinning.choose_steps(self.open_steps, changes)

    @property
    def counts(self) -> Ints:
        """The evaluations of each sample in an iteration (B,)."""
        return np.bincount(self.rows % self.batch, minlength=self.batch)

    def send(self, upload: Upload, timesteps: NDArray[Any], no_gaps: Gaps) -> tuple[list[Tensor], Gaps]:
        """Rows, their steps, samples and timesteps (each (N,)) on the device, and the gaps between them.

        timesteps: (S,), of the table. no_gaps: what stands for none.
        """
        steps, samples = np.divmod(self.rows, self.batch)  # here: no kernels for it in an iteration
        arrays: list[NDArray[Any]] = [self.rows, steps, samples, timesteps[steps]]
        thinned = self.thinning is not None and not np.array_equal(self.open_steps, self.evaluated)
        unmeasured = self.open_steps & ~self.measured
        measures = self.thinning is not None and bool(unmeasured.any())
        if thinned:
            arrays += gaps(self.open_steps, self.evaluated)
        if measures:
            arrays.append(unmeasured)
        sent = upload(arrays)
        found = no_gaps
        if thinned:
            found = Gaps(sent[4], sent[5])
        if measures:
            found = found._replace(unmeasured=sent[-1])
        return sent[:4], found
