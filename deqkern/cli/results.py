"""Runs of a chain, and the tables and pictures that commands show of them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from ..engine.solution import Solution, relative_error
from .common import new_table, plan_summary


@dataclass(frozen=True)
class Run:
    """One solve, what it took, and how far from the sequential chain it ended, where that is known."""

    solver: str
    solution: Solution
    seconds: float
    true_error: Tensor | None = None  # (B,)

    def against(self, reference: Run) -> Run:
        """The same run with its true error."""
        return replace(self, true_error=relative_error(self.solution.value, reference.solution.value))

    def summary(self) -> dict[str, Any]:
        """The run in numbers, lists and None."""
        return {
            "solver": self.solver,
            "iterations": self.solution.iterations,
            "nfe": self.solution.nfe.tolist(),
            "converged": self.solution.converged.tolist(),
            "error_estimate": spread(self.solution.error_estimate),
            "residual": spread(self.solution.residual),
            "true_error": None if self.true_error is None else spread(self.true_error),
            "seconds": round(self.seconds, 3),
            "message": self.solution.message,
            "plan": None if self.solution.plan is None else plan_summary(self.solution.plan),
        }


@dataclass
class Trace:
    """A callback that collects the true errors (B,) after each iteration."""

    reference: Tensor  # (B, *shape)
    errors: list[Tensor] = field(default_factory=list)

    def __call__(self, iteration: int, value: Tensor, estimate: Tensor) -> None:
        """Take in one iteration."""
        self.errors.append(relative_error(value, self.reference))

    @property
    def true_error(self) -> Tensor:
        """(iterations, B) float64."""
        return torch.stack(self.errors)


def median(values: Tensor) -> float:
    """Of all values; of an even number, the mean of the two in the middle, which `Tensor.median` does not take."""
    return float(np.median(values))


def spread(values: Tensor) -> dict[str, Any]:
    """Median, largest and all values (B,)."""
    return {"median": median(values), "max": float(values.max()), "per_sample": values.tolist()}


def panels_of(runs: list[Run], where: str = "") -> dict[str, Tensor]:
    """The samples of each run under its name."""
    return {f"{where}{run.solver}: {run.solution.iterations} iterations": run.solution.value for run in runs}


def run_table(rows: list[tuple[tuple[str, ...], Run]], heads: tuple[str, ...], title: str) -> Table:
    """One line per run; `heads` are the columns before the common ones."""
    error_head = "true error" if any(run.true_error is not None for _, run in rows) else "error estimate"
    table = new_table(title, heads, ("iterations", "nfe", "converged", error_head, "seconds"))
    for names, run in rows:
        solution = run.solution
        error = solution.error_estimate if run.true_error is None else run.true_error
        table.add_row(
            *names,
            str(solution.iterations),
            f"{float(solution.nfe.double().mean()):.0f}",
            f"{int(solution.converged.sum())}/{len(solution.converged)}",
            f"{median(error):.0e} .. {float(error.max()):.0e}",
            f"{run.seconds:.2f}",
        )
    return table
