"""Inversion of real images by the shipped models: the measured round trip of each method, and its price.

    python bench/inversion.py --models digits --seeds 8 --out bench/results/inversion-digits.json

The images are scikit-learn's digits and patches of its photographs, as in examples/train.py; no model made them.
`mixture` and `density` are analytic: five narrow Gaussians with draws from them, the kernel density of the digits with
digits. The first table is the joint solve alone, looked at while it runs; the second the methods as `invert` runs them.
"""

from __future__ import annotations

import json
import statistics
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import deqkern
from deqkern import NoiseSchedule, SlopeProfile, models, solvers
from deqkern.engine.solution import relative_error

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import problems
from train import BATCHES

# method, rtol, window of the joint solve
CASES: list[tuple[str, float, int | None]] = [
    ("joint", 1e-3, None),
    ("joint", 1e-4, None),
    *(("joint", 1e-4, window) for window in (25, 12, 6)),
    ("stepwise", 1e-4, None),
    ("naive", 0.0, None),
]
LOOKS = (8, 10, 12, 14, 16, 18)  # iterations of the joint solve


@dataclass(frozen=True)
class Case:
    """A model, and images that it did not make."""

    model: Any
    schedule: NoiseSchedule
    profile: SlopeProfile | None
    images: Tensor

    @classmethod
    def of(cls, name: str, draw: int, count: int) -> Case:
        """One of the shipped models, or of the analytic problems."""
        generator, schedule = torch.Generator().manual_seed(draw), NoiseSchedule.linear()
        if name == "density":
            model = problems.digits_density(schedule)
            index = torch.randint(len(model.means), (count,), generator=generator)
            return cls(model, schedule, None, model.means[index].view(-1, 1, 8, 8))
        if name == "mixture":
            model = problems.mixture(schedule, (3, 8, 8), generator)
            noise = torch.randn(count, model.means.shape[1], generator=generator)
            images = model.means[torch.arange(count) % len(model.means)] + model.width * noise
            return cls(model, schedule, None, images.view(-1, 3, 8, 8))
        loaded = models.load(name)
        return cls(loaded.model, loaded.schedule, loaded.profile, BATCHES[name](generator, count))


def spread(values: Tensor) -> str:
    """Median and largest."""
    return f"{float(values.median()):.0e}, {float(values.max()):.0e}"


def while_running(case: Case, count: int, sigma_min: float, profile: bool) -> dict[int, list[float]]:
    """The round trip (B,) of the joint solve after so many iterations."""
    noises: dict[int, Tensor] = {}

    def look(iteration: int, value: Tensor, estimate: Tensor) -> None:
        if iteration in LOOKS:
            noises[iteration] = value

    deqkern.invert(
        case.model, case.images, case.schedule, count, sigma_min=sigma_min, rtol=1e-7, max_iterations=max(LOOKS),
        solver=solvers.default(profile=case.profile if profile else None), callback=look,
    )  # fmt: skip
    found = {}
    for iteration, noise in noises.items():
        again = deqkern.sample(
            case.model, noise, case.schedule, count, sigma_min=sigma_min, solver=solvers.sequential(), rtol=0.0
        )
        found[iteration] = relative_error(again.value, case.images).tolist()
    return found


def line(*cells: object) -> None:
    """One line of a table."""
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def run_methods(
    case: Case, count: int, sigma_min: float, tried: list[tuple[str, float, int | None]]
) -> list[dict[str, Any]]:
    """Each method, as `invert` runs it."""
    rows = []
    for method, rtol, window in tried:
        solver = None if window is None else solvers.default(window=window)
        found = deqkern.invert(
            case.model, case.images, case.schedule, count, method=method, rtol=rtol or 1e-4, round_trip=True,
            sigma_min=sigma_min, solver=solver,
        )  # fmt: skip
        assert found.round_trip is not None
        row: dict[str, Any] = {"method": method, "rtol": rtol, "window": window}
        row["converged"] = int(found.converged.sum())
        row |= {"iterations": found.iterations, "nfe": found.nfe.tolist(), "message": found.message}
        rows.append(row | {"round_trip": found.round_trip.tolist()})
    return rows


def main(
    names: Annotated[list[str] | None, typer.Option("--models", help="digits, photos, mixture, density")] = None,
    steps: Annotated[list[int] | None, typer.Option(help="S")] = None,
    sigma_min: Annotated[float, typer.Option(help="end of the chain")] = deqkern.inversion.SIGMA_MIN,
    seeds: Annotated[int, typer.Option(help="images per case")] = 8,
    draw: Annotated[int, typer.Option(help="seed that draws the images")] = 77,
    look: Annotated[bool, typer.Option(help="the first table")] = True,
    methods: Annotated[str, typer.Option(help="of the second table: all, joint or none")] = "all",
    dtype: Annotated[
        str, typer.Option(help="of the weights of a shipped model: float32, bfloat16 or float16")
    ] = "float32",
    out: Annotated[Path | None, typer.Option(help="JSON to write")] = None,
) -> None:
    """Measure, print the tables, write the figures."""
    warnings.simplefilter("ignore", deqkern.ConvergenceWarning)
    rows: list[dict[str, Any]] = []
    cases = {(n, s): Case.of(n, draw, seeds) for n in names or ["digits", "photos"] for s in steps or [50]}
    for case in cases.values():
        if isinstance(case.model, torch.nn.Module):
            case.model.to(getattr(torch, dtype))
    if look:
        line("model", "S", "slopes start", *(f"{count} its" for count in LOOKS))
        print("|" + "---|" * (3 + len(LOOKS)))
        for (name, count), case in cases.items():
            for profile in (False, True)[: 1 + (case.profile is not None)]:
                found = while_running(case, count, sigma_min, profile)
                rows.append({"model": name, "steps": count, "profile": profile, "while_running": found})
                cells = [spread(torch.tensor(values)) for values in found.values()]
                line(name, count, "profile" if profile else "measured", *cells)
        print()
    if methods != "none":
        line(
            "model",
            "S",
            "method",
            "window",
            "rtol",
            "converged",
            "iterations",
            "nfe (median)",
            "round trip (median, largest)",
        )
        print("|" + "---|" * 9)
        for (name, count), case in cases.items():
            for row in run_methods(case, count, sigma_min, CASES if methods == "all" else CASES[:2]):
                rows.append({"model": name, "steps": count} | row)
                cells = [row["method"], row["window"] or "-", f"{row['rtol']:g}" if row["rtol"] else "-"]
                cells += [
                    f"{row['converged']}/{seeds}",
                    row["iterations"],
                    f"{statistics.median(row['nfe']):g}",
                    spread(torch.tensor(row["round_trip"])),
                ]
                line(name, count, *cells)
    if out:
        out.write_text(
            json.dumps({"images": seeds, "draw": draw, "sigma_min": sigma_min, "dtype": dtype, "cases": rows}, indent=1)
            + "\n"
        )


if __name__ == "__main__":
    typer.run(main)
