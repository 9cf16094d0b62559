"""What a solve gives back."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops.state import Norms

Callback = Callable[[int, Tensor, Tensor], None]

# Whose frames a warning passes over: torch's stand between a layer, or a backward pass, and who calls it.
_INSIDE = tuple(os.path.dirname(os.path.abspath(path)) + os.sep for path in (os.path.dirname(__file__), torch.__file__))


class ConvergenceWarning(UserWarning):
    """Some samples did not reach the tolerance; the result says which."""


@dataclass(frozen=True, eq=False)
class Solution:
    """What a solve gives back.

    Tensors are where the input is, but for `nfe` and `nfe_history`, which the host counts on the CPU. The histories
    hold 8 (S + 2) bytes per iteration and sample; while a solve runs, 25 S + 16.

    Attributes:
        value: (B, *shape), the clean end of the chain, in the dtype of the input.
        trajectory: (S+1, B, *shape) fp32 (fp64 if the input is), all states, the noise first.
        converged: (B,) bool.
        error_estimate: (B,) fp64, the relative error left in `value`, as estimated.
        residual: (B,) fp64, the largest one-step residual of a step relative to its state, |r[i+1]| / |x[i+1]|, at the
            last iteration in which the sample was open; of a step that was left out, by its interpolated output.
        iterations: Sequential batched model calls (a batch cut by `max_batch` counts once).
        nfe: (B,) int64, model evaluations per sample.
        history: (iterations, B) fp64, the error estimate after each iteration.
        nfe_history: (iterations, B) int64, model evaluations per sample after each iteration.
        residual_history: (iterations, S, B) fp64, the one-step residual of every step i of `trajectory` relative to its
            state, |r[i+1]| / |x[i+1]| (inverting: |x[i]|), at the states that each iteration evaluated, before it moved
            them. NaN for a step that it did not evaluate, one that has converged, was left out or that no window has
            reached, and throughout where no chain is solved: naive inversion, a search.
        message: One line for people.
        round_trip: (B,) or None, of `invert` on request: the relative error of the sample made from `value` again.
        plan: Of `sample(solver="auto")`: the `Plan` of what was measured and chosen.

    Example:
        >>> model, schedule = lambda x, t: 0.5 * x, deqkern.NoiseSchedule.linear()
        >>> solution = deqkern.sample(model, torch.randn(2, 8), schedule, 20)
        >>> solution.history.shape == (solution.iterations, 2)
        True
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
    plan: Any = None


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


class Record:
    """What a solve notes down of each iteration, for the histories of its `Solution`."""

    def __init__(self, batch: int) -> None:
        self.nfe = torch.zeros(batch, dtype=torch.int64, device="cpu")
        self.errors: list[Tensor] = []  # (B,) fp64
        self.evaluations: list[Tensor] = []  # (B,) int64
        self.norms: list[Tensor] = []  # (S, B, 3) fp64
        self.evaluated: list[Tensor] = []  # (S, B) bool, on the CPU

    @property
    def count(self) -> int:
        """Iterations that are done."""
        return len(self.errors)

    def note(self, error: Tensor, counts: Tensor, norms: Tensor, evaluated: Tensor) -> None:
        """One iteration: the estimates (B,), the evaluations (B,), the norms (S, B, 3), and what was evaluated."""
        self.nfe = self.nfe + counts
        self.errors.append(error.clone())
        self.evaluations.append(self.nfe)
        self.norms.append(norms.clone())
        self.evaluated.append(evaluated)

    def histories(self, error: Tensor, norms: Tensor) -> dict[str, Tensor]:
        """The histories of a `Solution`; `error` and `norms` give the shapes where no iteration was done."""
        all_norms = _stacked(self.norms, norms)
        evaluated = _stacked(self.evaluated, norms[..., 0].cpu().bool())
        return {
            "history": _stacked(self.errors, error),
            "nfe_history": _stacked(self.evaluations, self.nfe),
            "residual_history": _residuals(all_norms, evaluated),
        }


def _residuals(norms: Tensor, evaluated: Tensor) -> Tensor:
    """`Solution.residual_history` from the norms (iterations, S, B, 3) of scans, and what was evaluated for them."""
    squares = Norms.view(norms.sqrt())
    relative = (squares.residual / squares.state).nan_to_num(torch.inf, torch.inf)
    relative = torch.where(squares.residual == 0, 0.0, relative)
    return torch.where(evaluated.to(norms.device), relative, torch.nan)


def _stacked(values: list[Tensor], like: Tensor) -> Tensor:
    """`values`, of the shape of `like`, as one tensor; also if there are none."""
    return torch.stack(values) if values else like.new_zeros(0, *like.shape)
