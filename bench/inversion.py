"""Inversion of real images by the shipped models: the measured round trip of each method, and its price.

    python bench/inversion.py --models digits --seeds 8 --out bench/results/inversion-digits.json

The images are scikit-learn's digits and patches of its photographs, as in examples/train.py; no model made them. The
first table is the joint solve alone, looked at while it runs; the second one the methods as `invert` runs them.
"""

from __future__ import annotations

import json
import statistics
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import deqkern
from deqkern import models, solvers
from deqkern.solve import relative_error

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from train import BATCHES

CASES: list[tuple[str, float]] = [("joint", 1e-3), ("joint", 1e-4), ("stepwise", 1e-4), ("naive", 0.0)]
LOOKS = (8, 10, 12, 14, 16, 18)  # iterations of the joint solve


def spread(values: Tensor) -> str:
    """Median and largest."""
    return f"{float(values.median()):.0e}, {float(values.max()):.0e}"


def while_running(loaded: Any, images: Tensor, count: int, sigma_min: float, profile: bool) -> dict[int, list[float]]:
    """The round trip (B,) of the joint solve after so many iterations."""
    noises: dict[int, Tensor] = {}

    def look(iteration: int, value: Tensor, estimate: Tensor) -> None:
        if iteration in LOOKS:
            noises[iteration] = value

    deqkern.invert(
        loaded.model, images, loaded.schedule, count, sigma_min=sigma_min, rtol=1e-7, max_iterations=max(LOOKS),
        solver=solvers.default(profile=loaded.profile if profile else None), callback=look,
    )  # fmt: skip
    found = {}
    for iteration, noise in noises.items():
        again = deqkern.sample(
            loaded.model, noise, loaded.schedule, count, sigma_min=sigma_min, solver=solvers.sequential(), rtol=0.0
        )
        found[iteration] = relative_error(again.value, images).tolist()
    return found


def main(
    names: Annotated[list[str] | None, typer.Option("--models", help="digits, photos")] = None,
    steps: Annotated[list[int] | None, typer.Option(help="S")] = None,
    sigma_mins: Annotated[list[float] | None, typer.Option("--sigma-min", help="ends of the chain")] = None,
    seeds: Annotated[int, typer.Option(help="images per case")] = 8,
    draw: Annotated[int, typer.Option(help="seed that draws the images")] = 77,
    methods: Annotated[bool, typer.Option(help="the second table too")] = True,
    out: Annotated[Path | None, typer.Option(help="JSON to write")] = None,
) -> None:
    """Measure, print the tables, write the figures."""
    warnings.simplefilter("ignore", deqkern.ConvergenceWarning)
    rows: list[dict[str, Any]] = []
    cases = [
        (name, count, sigma_min)
        for name in names or ["digits", "photos"]
        for count in steps or [50]
        for sigma_min in sigma_mins or [deqkern.inversion.SIGMA_MIN]
    ]
    print("| model | S | sigma_min | slopes start | " + " | ".join(f"{look} its" for look in LOOKS) + " |")
    print("|" + "---|" * (4 + len(LOOKS)))
    for name, count, sigma_min in cases:
        loaded = models.load(name)
        images = BATCHES[name](torch.Generator().manual_seed(draw), seeds)
        for profile in (False, True):
            found = while_running(loaded, images, count, sigma_min, profile)
            row = {"model": name, "steps": count, "sigma_min": sigma_min, "profile": profile, "round_trip": found}
            rows.append(row)
            cells = [name, count, sigma_min, "profile" if profile else "measured"]
            print(
                "| " + " | ".join(map(str, cells + [spread(torch.tensor(v)) for v in found.values()])) + " |",
                flush=True,
            )
    if methods:
        heads = ("model", "S", "sigma_min", "method", "rtol", "converged", "iterations", "nfe (median)")
        print("\n| " + " | ".join((*heads, "round trip (median, largest)")) + " |")
        print("|" + "---|" * 9)
        for name, count, sigma_min in cases:
            loaded = models.load(name)
            images = BATCHES[name](torch.Generator().manual_seed(draw), seeds)
            for method, rtol in CASES:
                result = deqkern.invert(
                    loaded.model, images, loaded.schedule, count, method=method, rtol=rtol or 1e-4, round_trip=True,
                    sigma_min=sigma_min,
                )  # fmt: skip
                assert result.round_trip is not None
                done = int(result.converged.sum())
                row = {"model": name, "steps": count, "sigma_min": sigma_min, "method": method, "rtol": rtol}
                row |= {"converged": done, "iterations": result.iterations, "nfe": result.nfe.tolist()}
                rows.append(row | {"round_trip": result.round_trip.tolist(), "message": result.message})
                cells = [name, count, sigma_min, method, f"{rtol:g}" if rtol else "-", f"{done}/{seeds}"]
                cells += [result.iterations, f"{statistics.median(row['nfe']):g}", spread(result.round_trip)]
                print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    if out:
        out.write_text(json.dumps({"images": seeds, "draw": draw, "cases": rows}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
