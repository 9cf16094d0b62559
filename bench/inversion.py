"""Inversion of real images by the shipped models: iterations, evaluations and the measured round trip of each method.

    python bench/inversion.py --models digits --seeds 8 --out bench/results/inversion-digits.json

The images are scikit-learn's digits and patches of its photographs, as in examples/train.py; no model made them.
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

import deqkern
from deqkern import models

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from train import BATCHES

CASES: list[tuple[str, float]] = [("joint", 1e-3), ("joint", 1e-4), ("stepwise", 1e-4), ("naive", 0.0)]


def main(
    names: Annotated[list[str] | None, typer.Option("--models", help="digits, photos")] = None,
    steps: Annotated[list[int] | None, typer.Option(help="S")] = None,
    seeds: Annotated[int, typer.Option(help="images per case")] = 8,
    out: Annotated[Path | None, typer.Option(help="JSON to write")] = None,
) -> None:
    """Measure, print the table, write the figures."""
    rows: list[dict[str, Any]] = []
    print("| model | S | method | rtol | converged | iterations | nfe (median) | round trip (median, largest) |")
    print("|---|---|---|---|---|---|---|---|")
    for name in names or ["digits", "photos"]:
        loaded = models.load(name)
        images = BATCHES[name](torch.Generator().manual_seed(77), seeds)
        for count in steps or [50]:
            for method, rtol in CASES:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", deqkern.ConvergenceWarning)
                    found = deqkern.invert(
                        loaded.model, images, loaded.schedule, count, method=method, rtol=rtol or 1e-4, round_trip=True
                    )
                assert found.round_trip is not None
                trip, done = found.round_trip.tolist(), int(found.converged.sum())
                row = {"model": name, "steps": count, "method": method, "rtol": rtol, "converged": done}
                row |= {"iterations": found.iterations, "nfe": found.nfe.tolist(), "round_trip": trip}
                rows.append(row | {"message": found.message})
                cells = [name, count, method, f"{rtol:g}" if rtol else "-", f"{done}/{seeds}", found.iterations]
                cells.append(f"{statistics.median(row['nfe']):g}")
                cells.append(f"{statistics.median(trip):.0e}, {max(trip):.0e}")
                print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    if out:
        out.write_text(json.dumps({"images": seeds, "cases": rows}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
