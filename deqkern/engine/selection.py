"""Which open steps an iteration evaluates, and how the outputs of the others follow from theirs.

Along a chain without noise x0, as the model sees it, changes slowly from step to step. While a state still moves by a
share m of itself from one iteration to the next, its output need not be known better: it is interpolated between those
of two steps that are evaluated. The error of that grows with the square of their distance, which therefore is a
multiple of sqrt(m), and steps whose states have come to rest are all evaluated.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ..chain.step_table import StepTable
from .host import Bools, Ints, Reals

# A state that moves by more than this share of itself, or has not moved yet, counts as moving by so much.
LARGEST_MOVE = 0.1
# Of one that moved by less than this, times rtol, nothing is left out: the end is near, and no error is known before.
LEAST_MOVE = 2.0
# The distance between evaluated steps is at most that to the first open step over this, and one more.
APPROACH = 2
# A step that was open in so many iterations is evaluated, and so is the one after it: where x0 changes abruptly, what
# interpolation gets wrong keeps the states moving, and they would never come to rest.
PATIENCE = 8


def active(windows: Ints, steps: int) -> Bools:
    """Whether a step is in the window of a sample (S, B), for windows (B, 2)."""
    index = np.arange(steps)[:, None]
    found: Bools = (index >= windows[:, 0]) & (index < windows[:, 1])
    return found


def moves(norms: Reals) -> Reals:
    """By what share of itself each state moved where a step begins (S, B), from the norms (S, B, 3) of a scan.

    The first state never moves; one that no scan has come to, or that is not finite, counts as moving without bound.
    """
    moved = np.zeros(norms.shape[:2])
    with np.errstate(divide="ignore", invalid="ignore"):
        moved[1:] = np.sqrt(norms[:-1, :, 1] / norms[:-1, :, 2])
    moved[np.isnan(moved)] = np.inf
    return moved


def thins(steps: int, share: float) -> bool:
    """Whether a chain has so many steps that some are ever left out."""
    return share * steps * math.sqrt(LARGEST_MOVE) >= 2


class Thinning:
    """Steps of an explicit chain without noise, `share` S sqrt(m) apart where a state moves by a share m of itself.

    path: (6, S) float64, of the op `fill_gaps`: x0 is linear in log-SNR between evaluated steps.
    """

    def __init__(self, table: StepTable, share: float, rtol: float) -> None:
        self.distance, level = min(share * table.num_inference_steps, 1e9), table.log_snr  # no chain is longer
        self.least_move = LEAST_MOVE * rtol
        constant = table.constant_x0()
        after = constant.keep.cumprod(0)
        scale = torch.cat([torch.ones_like(after[:1]), after[:-1]])
        sums = torch.stack([constant.x0_gain, constant.x0_gain * level]).div(after).cumsum(1)
        sums = torch.cat([torch.zeros_like(sums[:, :1]), sums[:, :-1]], 1)
        self.path: Tensor = torch.stack([scale, *sums, level, constant.of_x, constant.of_out])

    def evaluated(self, open_steps: Bools, moved: Reals) -> Bools:
        """Whether each open step of a window (S, B) is evaluated (S, B); the first and the last one are.

        moved: (S, B), the last change of the state where a step begins, relative to that state.
        """
        steps, batch = moved.shape
        bounded = np.where(moved < self.least_move, 0.0, np.minimum(moved, LARGEST_MOVE))
        distances = self.distance * np.sqrt(bounded)
        far = (open_steps & (distances >= 2)).any(0)  # (B,), samples that leave something out: others need no walk
        begins, lengths = open_steps.argmax(0), open_steps.sum(0)
        places: list[int] = []
        for b in np.flatnonzero(far).tolist():
            begin, walk = int(begins[b]), distances[:, b].tolist()
            i, end = begin, begin + int(lengths[b])
            while i < end:
                places.append(i * batch + b)
                i += int(max(1, min(walk[i], (i - begin) // APPROACH + 1)))
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
