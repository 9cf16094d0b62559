"""What a better model of the Jacobian could bring: the default's slopes, corrections of low rank, and Newton's method.

    python bench/newton.py --models digits --seeds 8 --out bench/results/newton-digits.json

One iteration is the default's, in plain torch, with J(x[i]) g in the scan replaced: by the slopes alone; by the slopes
and a rank-h correction from the last h differences of the step (Broyden's, and the symmetric one of Powell); by the
exact product, a central difference of the model along g, which costs two more sequential calls per step and is the
limit for every method of this kind. Counts are iterations to a true relative error, as in bench/convergence.py.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from convergence import NEVER, TOLERANCES, number
from torch import Tensor

from deqkern import models, solvers
from deqkern.engine.trajectory import Traits, start
from deqkern.network.model import Network
from deqkern.ops import reference
from deqkern.solvers.slopes import slope_of

RIDGE = 1e-3  # relative, of the differences' Gram matrix
LIMIT = 14
# From the differences of a step, newest first (S, B, D, h) each, and slopes (S, B, D): step, g (B, D) -> J g (B, D).
Product = Callable[[int, Tensor], Tensor]


class Problem:
    """A chain of one of the shipped models in the default's basis, with its sequential states."""

    def __init__(self, name: str, steps: int, eta: float, seeds: int) -> None:
        loaded, solver = models.load(name), solvers.default()
        generator = torch.Generator().manual_seed(1000)
        noise = torch.randn(seeds, *loaded.shape, generator=generator)
        step_noise = torch.randn(steps, *noise.shape, generator=generator) if eta else None
        table = loaded.schedule.steps(steps, eta=eta)
        self.network = Network(loaded.model, table, {}, noise)
        self.trajectory = start(noise, table, solver, Traits(), step_noise=step_noise)
        self.steps, self.batch = steps, seeds
        self.a, self.b, self.n = (v.float()[:, None, None] for v in (table.a, table.b, table.n))
        ends = torch.stack([table.slope_0, table.slope_1])
        self.low, self.high = ends.amin(0), ends.amax(0)
        self.slope = slope_of(table, solver.slope.initial(table, self.trajectory.basis))[:, None].float()
        self.first = self.trajectory.x.clone()
        z = self.trajectory.z
        self.noise = torch.zeros_like(self.first[1:]) if z is None else self.n * z
        self.chain = [self.first[0]]
        for i in range(steps):
            x = self.chain[-1]
            self.chain.append(self.a[i] * x + self.b[i] * self.output(x, i) + self.noise[i])

    def outputs(self, x: Tensor) -> Tensor:  # (S+1, B, D) -> (S, B, D)
        self.trajectory.x.copy_(x)
        return self._at(torch.arange(self.steps * self.batch), torch.empty_like(x[1:]))

    def output(self, x: Tensor, i: int) -> Tensor:  # (B, D)
        self.trajectory.x[i] = x
        return self._at(i * self.batch + torch.arange(self.batch), torch.empty_like(self.first[1:]))[i]

    def _at(self, rows: Tensor, out: Tensor) -> Tensor:
        steps, samples = rows // self.batch, rows % self.batch
        output = self.network(self.trajectory.inputs(rows), steps, samples)
        self.trajectory.receive(rows, steps, output, out)
        return out

    def error(self, x: Tensor) -> Tensor:  # (B,)
        return (x[-1] - self.chain[-1]).norm(dim=-1) / self.chain[-1].norm(dim=-1)


def low_rank(wide: Tensor, dx: Tensor, de: Tensor, symmetric: bool) -> Product:
    """The slopes and a correction that maps each dx to its de; symmetric: Powell's, least in the Frobenius norm."""
    rest = de - wide[..., None] * dx
    values, vectors = torch.linalg.eigh(dx.double().mT @ dx.double())
    if symmetric:
        kept = values > RIDGE * values.amax(-1, keepdim=True)
        weights = torch.where(kept, values.clamp_min(1e-300).rsqrt(), 0.0)
        mixed = (vectors * weights[..., None, :]).float()
        q, y = dx @ mixed, rest @ mixed  # q orthonormal
        middle = (q.mT @ y + (q.mT @ y).mT) / 2
    else:
        damped = values + RIDGE * values.mean(-1, keepdim=True)
        weights = torch.where(damped > 0, 1 / damped, 0.0)  # an exact step does not move any more
        inverse = (vectors * weights[..., None, :] @ vectors.mT).float()

    def product(i: int, g: Tensor) -> Tensor:
        plain = wide[i] * g
        if not symmetric:
            return plain + (rest[i] @ (inverse[i] @ (dx[i].mT @ g[..., None])))[..., 0]
        along, across = q[i].mT @ g[..., None], y[i].mT @ g[..., None]
        return plain + (y[i] @ along + q[i] @ (across - middle[i] @ along))[..., 0]

    return product


def newton(problem: Problem, x: Tensor) -> Product:
    """Central differences of the model along g, at the current states."""

    def product(i: int, g: Tensor) -> Tensor:
        step = (1e-3 * x[i].norm(dim=-1) / g.norm(dim=-1).clamp_min(1e-12))[:, None]
        return (problem.output(x[i] + step * g, i) - problem.output(x[i] - step * g, i)) / (2 * step)

    return product


def iterate(problem: Problem, method: str) -> list[list[int]]:
    """Iterations of each sample to each tolerance."""
    kind, _, rank = method.partition(" ")
    bands, x = problem.trajectory.basis.bands, problem.first.clone()
    slope = problem.slope.expand(-1, problem.batch, -1).contiguous()
    moments = torch.empty(*slope.shape, 2, dtype=torch.float64)
    window = torch.tensor([[0, problem.steps]] * problem.batch)
    states, outputs, errors = [torch.zeros_like(x[1:])], [torch.zeros_like(x[1:])], []
    while len(errors) < LIMIT and (not errors or bool((errors[-1] > min(TOLERANCES)).any())):
        states.append(x[:-1].clone())
        outputs.append(problem.outputs(x))
        dx = torch.stack([after - before for before, after in itertools.pairwise(states)][::-1], -1)
        de = torch.stack([after - before for before, after in itertools.pairwise(outputs)][::-1], -1)
        reference.band_moments(dx[..., 0], outputs[-1], outputs[-2], bands, window, moments)
        reference.secant_slope(moments, problem.low, problem.high, 1e-2, slope)
        wide = torch.repeat_interleave(slope, bands.diff(), dim=-1)
        count = min(int(rank or 0), len(states) - 2)  # the difference to zero gives slopes only
        if kind == "newton":
            product = newton(problem, x)
        elif count:
            product = low_rank(wide, dx[..., :count], de[..., :count], kind == "powell")
        else:
            product = lambda i, g, wide=wide: wide[i] * g  # noqa: E731
        plain = problem.a * x[:-1] + problem.b * outputs[-1] + problem.noise
        g, after = torch.zeros_like(x[0]), x.clone()
        for i in range(problem.steps):
            moved = product(i, g) if i else torch.zeros_like(g)
            g = problem.a[i] * g + problem.b[i] * moved + plain[i] - x[i + 1]
            after[i + 1] = x[i + 1] + g
        done = len(errors) + 1  # the first steps are exact
        after[1 : done + 1] = plain[:done]
        x = after
        errors.append(problem.error(x))
    below = torch.stack(errors)
    return [
        [int(hit.int().argmax()) + 1 if hit.any() else NEVER for hit in (below <= tolerance).T]
        for tolerance in TOLERANCES
    ]


METHODS = ("secant", "broyden 1", "broyden 2", "broyden 4", "powell 1", "powell 2", "newton")


def main(
    names: Annotated[list[str] | None, typer.Option("--models", help="digits, photos, or folders")] = None,
    steps: Annotated[int, typer.Option(help="S")] = 50,
    seeds: Annotated[int, typer.Option(help="samples per case")] = 6,
    out: Annotated[Path | None, typer.Option(help="JSON to write")] = None,
) -> None:
    """Measure, print the table, write the figures."""
    rows = []
    print("| model | S | eta | J | its to 1e-2 / 1e-3 |\n|---|---|---|---|---|")
    with torch.no_grad():
        for name in names or ["digits", "photos"]:
            for eta in (0.0, 1.0):
                problem = Problem(name, steps, eta, seeds)
                for method in METHODS:
                    counts = iterate(problem, method)
                    rows.append({"model": name, "steps": steps, "eta": eta, "method": method, "counts": counts})
                    cells = [name, str(steps), f"{eta:g}", method, " / ".join(number(count) for count in counts)]
                    print("| " + " | ".join(cells) + " |", flush=True)
    if out:
        out.write_text(json.dumps({"seeds": seeds, "cases": rows}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
