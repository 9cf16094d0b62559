"""Iterations and true errors of `deqkern.fixed_point` on maps of four kinds: the table in docs/fixed_point.md.

    python bench/fixed_point.py                       # two minutes on one core
    python bench/fixed_point.py --all                 # other history sizes and ridges too

`linear r` is z = A z + c with A random of spectral radius r, `symmetric r` the same with real eigenvalues, `tanh g` a
recurrent net with random weights of gain g, and `layer` a convolutional DEQ trained here for a while on scikit-learn's
digits, at other digits.
The true error is that of each sample against a solve in float64; iterations are those of the slowest sample.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated

import torch
import typer
from sklearn.datasets import load_digits
from torch import Tensor

import deqkern
from deqkern import solvers
from deqkern.engine.solution import relative_error
from deqkern.gradients import Implicit
from deqkern.solvers.presets import Solver

BATCH, SIZE, LIMIT = 16, 100, 1000


@dataclass
class Problem:
    """z = f(z), for a state of any dtype, from zeros like `example`."""

    name: str
    f: Callable[[Tensor], Tensor]
    example: Tensor


def linear(radius: float, symmetric: bool) -> Problem:
    matrix = torch.randn(SIZE, SIZE, dtype=torch.float64)
    matrix = matrix + matrix.T if symmetric else matrix
    matrix = matrix * (radius / torch.linalg.eigvals(matrix).abs().max())
    offset = torch.randn(BATCH, SIZE, dtype=torch.float64)
    name = f"{'symmetric' if symmetric else 'linear'} {radius:g}"
    return Problem(name, lambda z: z @ matrix.to(z.dtype) + offset.to(z.dtype), offset.float())


def recurrent(gain: float) -> Problem:
    matrix = torch.randn(SIZE, SIZE, dtype=torch.float64) * gain / SIZE**0.5
    offset = torch.randn(BATCH, SIZE, dtype=torch.float64)
    return Problem(f"tanh {gain:g}", lambda z: torch.tanh(z @ matrix.to(z.dtype) + offset.to(z.dtype)), offset.float())


class Layer(torch.nn.Module):
    """The residual cell of implicit-layers-tutorial.org, chapter 4."""

    def __init__(self, channels: int = 16, inner: int = 32) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(channels, inner, 3, padding=1, bias=False)
        self.last = torch.nn.Conv2d(inner, channels, 3, padding=1, bias=False)
        self.norms = torch.nn.ModuleList(torch.nn.GroupNorm(4, size) for size in (inner, channels, channels))
        torch.nn.init.normal_(self.first.weight, std=0.01)
        torch.nn.init.normal_(self.last.weight, std=0.01)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        inside = self.norms[0](torch.relu(self.first(z)))
        return self.norms[2](torch.relu(z + self.norms[1](x + self.last(inside))))


def layer(steps: int) -> Problem:
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(load_digits().target)
    inject, cell = torch.nn.Conv2d(1, 16, 3, padding=1), Layer()
    head = torch.nn.Linear(16 * 64, 10)
    model = deqkern.nn.DEQ(cell, rtol=1e-2)
    parameters = [*inject.parameters(), *cell.parameters(), *head.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=2e-3)
    for _ in range(steps):
        chosen = torch.randint(0, 1500, (64,))
        x = inject(images[chosen])
        loss = torch.nn.functional.cross_entropy(head(model(torch.zeros_like(x), x).flatten(1)), labels[chosen])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        x = inject(images[1500 : 1500 + BATCH])
        accuracy = (head(model(torch.zeros_like(x), x).flatten(1)).argmax(1) == labels[1500 : 1500 + BATCH]).sum()
    print(f"layer: loss {float(loss.detach()):.2f} after {steps} steps, {int(accuracy)} of {BATCH} digits right")
    cells = {dtype: Layer().to(dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16)}
    for other in cells.values():
        other.load_state_dict(cell.state_dict())
        other.requires_grad_(False)
    return Problem("layer", lambda z: cells[z.dtype](z, x.to(z.dtype)), torch.zeros_like(x))


def report(problem: Problem, name: str, solver: Solver, rtol: float, dtype: torch.dtype, truth: Tensor) -> None:
    start = torch.zeros_like(problem.example, dtype=dtype)
    found = deqkern.fixed_point(problem.f, start, solver=solver, rtol=rtol, max_iterations=LIMIT, gradient=None)
    errors = relative_error(found.value, truth)
    count = f"{found.iterations}" if bool(found.converged.all()) else f"{int(found.converged.sum())}/{BATCH} converged"
    print(
        f"| {problem.name} | {name} | {str(dtype)[6:]} | {rtol:g} | {count} "
        f"| {float(errors.median()):.0e}, {float(errors.max()):.0e} |",
        flush=True,
    )


def gradient(problem: Problem, rtol: float, dtype: torch.dtype) -> tuple[int, Tensor]:
    """Products with the transposed Jacobian, and the gradient by an offset of f of one fixed functional of z."""
    seen: list[deqkern.Solution] = []
    zero = torch.zeros_like(problem.example, dtype=dtype)
    offset = zero.clone().requires_grad_()
    method = Implicit(rtol=rtol, max_iterations=4000, callback=seen.append)
    z = deqkern.fixed_point(
        lambda z: problem.f(z) + offset, zero, rtol=rtol, max_iterations=4000, gradient=method
    ).value
    (found,) = torch.autograd.grad((z * torch.cos(torch.arange(z[0].numel()).view(z[0].shape))).sum(), offset)
    return seen[0].iterations, found


def main(
    everything: Annotated[bool, typer.Option("--all", help="other history sizes and ridges too")] = False,
    train: Annotated[int, typer.Option(help="steps of training of the layer")] = 200,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Measure and print."""
    torch.manual_seed(seed)
    warnings.simplefilter("ignore", deqkern.ConvergenceWarning)
    problems = [linear(0.95, False), linear(0.99, False), linear(0.99, True), recurrent(0.9), recurrent(1.2)]
    problems.append(layer(train))
    methods = {"anderson()": solvers.anderson(), "picard()": solvers.picard()}
    if everything:
        methods |= {
            f"m={m}, ridge={ridge:g}": replace(solvers.anderson(m), ridge=ridge)
            for m in (3, 5, 8, 10)
            for ridge in (1e-4, 1e-8, 1e-12)
        }
        methods |= {"beta=0.7": solvers.anderson(beta=0.7)}
    print("| problem | solver | dtype | rtol | iterations | true error (median, largest) |\n|---|---|---|---|---|---|")
    for problem in problems:
        wide = torch.zeros_like(problem.example, dtype=torch.float64)
        exact = deqkern.fixed_point(problem.f, wide, rtol=1e-10, max_iterations=4000, gradient=None)
        for name, solver in methods.items():
            for rtol in (1e-2, 1e-4):
                report(problem, name, solver, rtol, torch.float32, exact.value)
        report(problem, "anderson()", solvers.anderson(), 1e-4, torch.bfloat16, exact.value)
    print("| problem | rtol | products | error of the implicit gradient (median, largest) |\n|---|---|---|---|")
    for problem in problems:
        truth = gradient(problem, 1e-10, torch.float64)[1]
        for rtol in (1e-2, 1e-4):
            count, found = gradient(problem, rtol, torch.float32)
            errors = relative_error(found, truth)
            print(f"| {problem.name} | {rtol:g} | {count} | {float(errors.median()):.0e}, {float(errors.max()):.0e} |")


if __name__ == "__main__":
    typer.run(main)
