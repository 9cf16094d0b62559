"""The shipped models with the default solver: iterations as measured, true errors within bounds.

Run with -s to see the figures. docs/records/convergence.md has all solvers and what was aimed for.
"""

from __future__ import annotations

import statistics

import pytest
import torch
from asserts import relative_error

import deqkern
from deqkern import models, solvers

pytest.importorskip("diffusers")
SEEDS = 4
# model, S, eta: median iterations to a true relative error of 1e-2 and 1e-3, as measured with these seeds
MEASURED = [
    ("digits", 50, 0.0, 6.5, 8.5),
    ("digits", 50, 1.0, 9, 11),
    ("photos", 50, 0.0, 6.5, 8),
    ("photos", 50, 1.0, 9, 10.5),
]


class Remembered:
    """A model that is evaluated once at each state and timestep: two solves begin alike, whatever their tolerance."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.outputs = model, dict[tuple[int, bytes], torch.Tensor]()

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        keys = [(int(step), row.numpy().tobytes()) for step, row in zip(t, x, strict=True)]
        new = [i for i, key in enumerate(keys) if key not in self.outputs]
        if new:
            found = self.model(x[new], t[new]).sample
            self.outputs |= {keys[i]: output for i, output in zip(new, found, strict=True)}
        return torch.stack([self.outputs[key] for key in keys])


@pytest.mark.parametrize(("name", "steps", "eta", "coarse", "fine"), MEASURED)
def test_the_default_keeps_its_counts(name: str, steps: int, eta: float, coarse: int, fine: int) -> None:
    loaded = models.load(name)
    model = Remembered(loaded.model)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(SEEDS, *loaded.shape, generator=generator)
    step_noise = torch.randn(steps, *noise.shape, generator=generator) if eta else None

    def run(solver: solvers.Solver, rtol: float, callback: deqkern.solve.Callback | None = None) -> deqkern.Solution:
        return deqkern.sample(
            model,
            noise,
            loaded.schedule,
            steps,
            eta=eta,
            step_noise=step_noise,
            solver=solver,
            rtol=rtol,
            callback=callback,
        )

    reference = run(solvers.sequential(), 0.0).value
    track: list[torch.Tensor] = []
    finer = run(
        solvers.default(), 3e-4, lambda iteration, estimate, left: track.append(relative_error(estimate, reference))
    )
    for rtol, bar, solution in ((1e-2, coarse, run(solvers.default(), 1e-2)), (1e-3, fine, finer)):
        below = torch.stack(track) <= rtol  # (iterations, B)
        median = statistics.median(int(hit.int().argmax()) + 1 for hit in below.T)
        figures = f"{median:g} iterations to {rtol:g} (measured {bar:g}); stop: {solution.iterations} iterations, "
        largest = float(relative_error(solution.value, reference).max())
        figures += f"nfe {solution.nfe.tolist()}, largest error {largest:.1e}"
        print(f"\n{name} S={steps} eta={eta:g}: {figures}")
        assert median <= bar + 1  # a borderline sample may go either way on another machine
        assert solution.converged.all() and largest <= rtol * (3 if solution is not finer else 1)
