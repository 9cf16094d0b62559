"""Gradients through the chains of the shipped models: their price and their error, and what optimising with them takes.

    python bench/gradients.py --out bench/results/gradients.json

First table: the gradient of the noise of two losses, against autograd through the sequential chain ("exact"). Products
are batched vector-Jacobian products, one after the other; those per sample count as model evaluations. Second: the
order of AdjointDEIS, on a Gaussian, against its closed form. Third: DEQ-DDIM's objective |value - image|^2 from random
noise to its stop, 0.5, with Adam: evaluations (products included) and sequential calls, real images.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import deqkern
from deqkern import Optimize, Solution, models, solvers
from deqkern.engine.solution import relative_error
from deqkern.gradients import Adjoint, Exact, Gradient, Implicit, Phantom
from deqkern.gradients.pullback import Pullback
from deqkern.network.model import Network

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import problems
from train import BATCHES

Row = dict[str, Any]


def methods(seen: list[Solution]) -> dict[str, Gradient]:
    """The gradients that are compared; an implicit one leaves its solve in `seen`."""
    return {
        "implicit, rtol 1e-5": Implicit(callback=seen.append),
        "implicit, rtol 1e-3": Implicit(rtol=1e-3, callback=seen.append),
        "phantom, 2 steps": Phantom(2),
        "phantom, 5 steps": Phantom(5),
        "residual": Phantom(1, 0.1),
        "adjoint, order 1": Adjoint(1),
        "adjoint, order 2": Adjoint(2),
    }


def measure_errors(name: str, eta: float, batch: int, steps: int) -> list[Row]:
    """All methods on one chain."""
    loaded, generator = models.load(name), torch.Generator().manual_seed(1000)
    loaded.model.requires_grad_(False)
    noise = torch.randn(batch, *loaded.shape, generator=generator)
    z = torch.randn(steps, *noise.shape, generator=generator) if eta else None
    solution = deqkern.sample(loaded.model, noise, loaded.schedule, steps, eta=eta, step_noise=z, rtol=1e-5)
    network = Network(loaded.model, loaded.schedule.steps(steps, eta=eta), {}, noise)
    pixel = torch.zeros_like(noise)
    pixel[:, :, 5, 5] = 1
    image = BATCHES[name](torch.Generator().manual_seed(77), batch)
    rows = []
    for loss, cotangent in {"distance": solution.value - image, "a pixel": pixel}.items():
        exact = Pullback(network, Exact(), 0.0, None)(solution.trajectory, cotangent).first
        seen: list[Solution] = []
        for label, gradient in methods(seen).items():
            found = Pullback(network, gradient, 1e-5, None)(solution.trajectory, cotangent)
            calls = seen.pop().iterations if seen else steps if isinstance(gradient, Adjoint) else gradient.steps - 1
            error = relative_error(found.first, exact)
            cosine = torch.cosine_similarity(found.first.flatten(1), exact.flatten(1))
            row: Row = {"model": name, "eta": eta, "loss": loss, "gradient": label, "calls": calls}
            row |= {"products": found.vjps.tolist(), "error": error.tolist(), "cosine": cosine.tolist()}
            rows.append(row)
            cells = [name, f"{eta:g}", loss, label, calls, f"{statistics.median(row['products']):g}"]
            cells += [f"{float(error.median()):.0e}, {float(error.max()):.0e}", f"{float(cosine.median()):.2f}"]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    return rows


def measure_order(order: int, eta: float) -> Row:
    """Errors of AdjointDEIS on a Gaussian, in float64."""
    errors = {steps: float(problems.adjoint_error(order, eta, steps, total=16384)) for steps in (32, 64, 128, 256, 512)}
    values = list(errors.values())
    slopes = [math.log2(before / after) for before, after in itertools.pairwise(values)]
    cells = ["SDE" if eta else "ODE", order, *(f"{e:.1e}" for e in values), " ".join(f"{s:.2f}" for s in slopes)]
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    return {"order": order, "eta": eta, "error": errors, "slopes": slopes}


def measure_search(name: str, batch: int, steps: int, limit: int) -> list[Row]:
    """Evaluations until the median loss is below DEQ-DDIM's stop."""
    loaded, rows = models.load(name), []
    loaded.model.requires_grad_(False)
    images = BATCHES[name](torch.Generator().manual_seed(77), batch)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    cases: list[tuple[str, str | Gradient, Any, float]] = [
        ("sequential, exact", "exact", solvers.sequential(), 0.0),
        ("joint, residual", "residual", None, 1e-2),
        ("joint, implicit (rtol 0.1)", Implicit(rtol=0.1), None, 1e-2),
    ]
    for label, gradient, solver, rtol in cases:
        found = deqkern.invert(
            loaded.model, images, loaded.schedule, steps, method=Optimize(gradient=gradient, noise=noise, stop=0.5),
            solver=solver, rtol=rtol, sigma_min=None, max_iterations=limit,
        )  # fmt: skip
        best = found.history.cummin(0).values.median(1).values
        row = {"model": name, "steps": steps, "method": label, "loss": best.tolist(), "nfe": found.nfe.tolist()}
        row |= {"calls": found.iterations, "optimizer_steps": len(best)}
        rows.append(row)
        cells = [name, steps, label, len(best), f"{float(best[0]):.0f}", f"{float(best[-1]):.2f}"]
        print(
            "| " + " | ".join(map(str, [*cells, f"{statistics.median(row['nfe']):g}", found.iterations])) + " |",
            flush=True,
        )
    return rows


def main(
    names: Annotated[list[str] | None, typer.Option("--models", help="digits, photos")] = None,
    parts: Annotated[list[str] | None, typer.Option("--part", help="errors, order, search; all if not given")] = None,
    batch: Annotated[int, typer.Option(help="samples per case")] = 4,
    steps: Annotated[int, typer.Option(help="S of the first table")] = 50,
    search_steps: Annotated[int, typer.Option(help="S of the third table")] = 20,
    limit: Annotated[int, typer.Option(help="steps of the optimizer")] = 100,
    out: Annotated[Path | None, typer.Option(help="JSON to write; parts that are not measured now stay")] = None,
) -> None:
    """Measure, print the tables, write the figures."""
    warnings.simplefilter("ignore", deqkern.ConvergenceWarning)
    names, parts = names or ["digits", "photos"], parts or ["errors", "order", "search"]
    results: dict[str, list[Row]] = {}
    if "errors" in parts:
        print("| model | eta | loss | gradient | calls | products | error (median, largest) | cosine |\n|" + "---|" * 8)
        results["errors"] = [row for n in names for eta in (0.0, 1.0) for row in measure_errors(n, eta, batch, steps)]
    if "order" in parts:
        print("\n| chain | order | S=32 | 64 | 128 | 256 | 512 | slopes |\n|" + "---|" * 8)
        results["order"] = [measure_order(order, eta) for eta in (0.0, 1.0) for order in (1, 2)]
    if "search" in parts:
        heads = "| model | S | method | optimizer steps | first loss | last loss | evaluations | calls forward |"
        print(f"\n{heads}\n|" + "---|" * 8)
        results["search"] = [row for n in names for row in measure_search(n, batch, search_steps, limit)]
    if out:
        before = json.loads(out.read_text()) if out.exists() else {}
        out.write_text(json.dumps(before | results, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
