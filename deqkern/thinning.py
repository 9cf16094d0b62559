"""Which open steps an iteration evaluates, and how the outputs of the others follow from theirs.

Along a chain without noise x0, as the model sees it, changes slowly from step to step. While a state still moves by a
share m of itself from one iteration to the next, its output need not be known better: it is interpolated between those
of two steps that are evaluated. The error of that grows with the square of their distance, which therefore is a
multiple of sqrt(m), and steps whose states have come to rest are all evaluated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .step_table import StepTable

# A state that moves by more than this share of itself, or has not moved yet, counts as moving by so much.
LARGEST_MOVE = 0.1
# Of one that moved by less than this, times rtol, nothing is left out: the end is near, and no error is known before.
LEAST_MOVE = 2.0
# The distance between evaluated steps is at most that to the first open step over this, and one more.
APPROACH = 2
# A step that was open in so many iterations is evaluated, and so is the one after it: where x0 changes abruptly, what
# interpolation gets wrong keeps the states moving, and they would never come to rest.
PATIENCE = 8


def active(windows: Tensor, steps: int) -> Tensor:
    """Whether a step is in the window of a sample (.., S, B) bool, for windows (.., B, 2), on the CPU."""
    index = torch.arange(steps, device="cpu")[:, None]
    return (index >= windows[..., None, :, 0]) & (index < windows[..., None, :, 1])


def thins(steps: int, share: float) -> bool:
    """Whether a chain has so many steps that some are ever left out."""
    return share * steps * math.sqrt(LARGEST_MOVE) >= 2


@dataclass(frozen=True)
class Gaps:
    """The steps of an iteration that are not evaluated; all on the CPU."""

    first: Tensor  # (B,) int64, the first open step that is not evaluated, or the end of the window
    rows: Tensor  # (3, N) int64, i * B + b: one that is not, and the evaluated ones before and after it
    weights: Tensor  # (N, 8) float64, of the op `fill_gaps`


class Thinning:
    """Steps of an explicit chain without noise, `share` S sqrt(m) apart where a state moves by a share m of itself."""

    def __init__(self, table: StepTable, share: float, rtol: float) -> None:
        self.distance, self.level = share * table.num_inference_steps, table.log_snr
        self.least_move = LEAST_MOVE * rtol
        keep, pull, self.of_x, self.of_out = table.held_x0()
        # the state before step i is scale[i] (x[j] / scale[j] + sum of pull[m] x0[m] / scale[m+1] over j <= m < i)
        self.scale = torch.cat([torch.ones_like(keep[:1]), keep.cumprod(0)])  # (S+1,)
        pull = pull / self.scale[1:]
        sums = torch.stack([pull, pull * self.level]).cumsum(1)
        self.sums = torch.nn.functional.pad(sums, (1, 0))  # (2, S+1), over m < i

    def evaluated(self, window: Tensor, moves: Tensor) -> Tensor:
        """Whether each open step is evaluated (S, B) bool, on the CPU; the first and the last one are.

        window: (B, 2). moves: (S, B), the last change of the state where a step begins, relative to that state.
        """
        steps, batch = moves.shape
        chosen = active(window, steps)
        moves = torch.where(moves < self.least_move, 0.0, moves.clamp_max(LARGEST_MOVE))
        distances = self.distance * moves.sqrt()
        far = (chosen & (distances >= 2)).any(0)  # (B,), samples that leave something out: others need no walk
        walks, spans, places = distances.mT.tolist(), window.tolist(), []
        for b in far.nonzero().flatten().tolist():
            (begin, end), walk = spans[b], walks[b]
            i = begin
            while i < end:
                places.append(i * batch + b)
                i += int(max(1, min(walk[i], (i - begin) // APPROACH + 1)))
            places.append((end - 1) * batch + b)
        met = torch.zeros_like(chosen)
        met.view(-1)[places] = True
        chosen &= met | ~far
        return chosen

    def gaps(self, evaluated: Tensor, window: Tensor) -> Gaps:
        """What is not evaluated within `window` (B, 2), and where its outputs come from."""
        steps, batch = evaluated.shape
        index = torch.arange(steps, device="cpu")[:, None]
        missing = ~evaluated & active(window, steps)
        before = torch.where(evaluated, index, 0).cummax(0).values
        after = torch.where(evaluated, index, steps).flip(0).cummin(0).values.flip(0)
        i, b = missing.nonzero().unbind(1)
        left, right = before[i, b], after[i, b]
        first = torch.where(missing, index, steps).amin(0)
        rows = torch.stack([i, left, right]) * batch + b
        return Gaps(torch.minimum(first, window[:, 1]), rows, self._weights(i, left, right))

    def _weights(self, i: Tensor, left: Tensor, right: Tensor) -> Tensor:  # (N,) each -> (N, 8)
        """Of x and out at both ends, in the state at i and in its output: x0 is linear in log-SNR between them."""
        span = self.level[right] - self.level[left]
        span = torch.where(span == 0, torch.inf, span)
        part = (self.level[i] - self.level[left]) / span  # of x0 at i that is of the right end
        pulls, levels = self.sums[:, i] - self.sums[:, left]
        pulled = self.scale[i] * (levels - self.level[left] * pulls) / span  # likewise, in the state at i
        held = self.scale[i] * pulls - pulled
        state = [held * self.of_x[left] + self.scale[i] / self.scale[left], held * self.of_out[left]]
        state += [pulled * self.of_x[right], pulled * self.of_out[right]]
        x0 = [(1 - part) * self.of_x[left], (1 - part) * self.of_out[left]]
        x0 += [part * self.of_x[right], part * self.of_out[right]]
        output = [(clean - self.of_x[i] * mixed) / self.of_out[i] for clean, mixed in zip(x0, state, strict=True)]
        return torch.stack(state + output, 1)
