"""Iterations, evaluations and true errors of every solver on the shipped models (docs/records/convergence.md).

    python bench/convergence.py                      # all of it, about half an hour on two cores
    python bench/convergence.py --models digits --steps 50 --etas 0 --seeds 4
    python bench/convergence.py --order 2 --steps 20 --steps 50      # chains of DPM-Solver++ 2M
    python bench/convergence.py --steps 50 --limit 50 --windows 25 --windows 12 --windows 6    # default, in windows
    python bench/convergence.py --etas 0 --thinnings 0 --thinnings 0.25                        # default, thinned so

Each case is one batch of `seeds` samples against its own sequential chain. `to 1e-2` counts the iterations until the
true relative error is below, as the callback sees it; `stop` is what a user gets: the iterations, evaluations
per sample and the largest true error at the solver's own stop. Writes JSON with the figures of each sample.
"""

from __future__ import annotations

import json
import math
import platform
import statistics
import subprocess
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

import deqkern
from deqkern import models, solvers
from deqkern.engine.solution import relative_error

TOLERANCES = (1e-2, 1e-3)
NEVER = 999


@dataclass
class Case:
    """The figures of one solver on one problem; lists are per sample."""

    model: str
    steps: int
    eta: float
    order: int
    solver: str
    iterations_to: dict[str, list[int]]  # NEVER where the error was not reached
    stop_iterations: dict[str, list[int]]
    stop_nfe: dict[str, list[int]]
    stop_error: dict[str, list[float]]


def measure(
    loaded: models.Pretrained, steps: int, eta: float, order: int, solver: solvers.Solver, seeds: int, limit: int
) -> Case:
    generator = torch.Generator().manual_seed(1000)
    noise = torch.randn(seeds, *loaded.shape, generator=generator)
    options: dict[str, object] = {"order": order}
    if eta:
        options |= {"eta": eta, "step_noise": torch.randn(steps, *noise.shape, generator=generator)}
    reference = chain(loaded, noise, steps, options)
    case = Case(loaded.name, steps, eta, order, solver.name, {}, {}, {}, {})
    track: list[list[float]] = []
    finished: list[Tensor] = []

    def watch(iteration: int, estimate: Tensor, error_estimate: Tensor) -> None:
        track.append(relative_error(estimate, reference).tolist())
        finished.append(error_estimate)

    for rtol in (min(TOLERANCES) / 3, *TOLERANCES):
        track.clear(), finished.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", deqkern.ConvergenceWarning)
            solution = deqkern.sample(
                loaded.model,
                noise,
                loaded.schedule,
                steps,
                solver=solver,
                rtol=rtol,
                max_iterations=limit,
                callback=watch,
                **options,
            )
        if rtol not in TOLERANCES:
            for tolerance in TOLERANCES:
                below = [[error[b] <= tolerance for error in track] for b in range(seeds)]
                case.iterations_to[f"{tolerance:g}"] = [hit.index(True) + 1 if True in hit else NEVER for hit in below]
            continue
        history = torch.stack(finished)
        done = [
            int((history[:, b] <= rtol).int().argmax()) + 1 if solution.converged[b] else NEVER for b in range(seeds)
        ]
        case.stop_iterations[f"{rtol:g}"] = done
        case.stop_nfe[f"{rtol:g}"] = solution.nfe.tolist()
        case.stop_error[f"{rtol:g}"] = relative_error(solution.value, reference).tolist()
    return case


_CHAINS: dict[tuple[torch.nn.Module, int, object], Tensor] = {}  # of one order


def chain(loaded: models.Pretrained, noise: Tensor, steps: int, options: dict[str, object]) -> Tensor:
    key = (loaded.model, steps, options.get("eta"))
    if key not in _CHAINS:
        _CHAINS[key] = deqkern.sample(
            loaded.model, noise, loaded.schedule, steps, solver=solvers.sequential(), rtol=0, **options
        ).value
    return _CHAINS[key]


def number(values: list[int]) -> str:
    middle = statistics.median(math.inf if value == NEVER else value for value in values)
    return "never" if math.isinf(middle) else f"{middle:g}"


def row(case: Case) -> str:
    cells = [case.model, str(case.steps), f"{case.eta:g}", case.solver]
    cells.append(" / ".join(number(case.iterations_to[key]) for key in case.iterations_to))
    for key, stop_error in case.stop_error.items():
        counts = f"{number(case.stop_iterations[key])} its, {statistics.median(case.stop_nfe[key]):g} nfe"
        cells.append(f"{counts}, {max(stop_error):.1e}")
    return "| " + " | ".join(cells) + " |"


HEADER = (
    "| model | S | eta | solver | its to 1e-2 / 1e-3 | at the stop, rtol 1e-2 (largest error) | rtol 1e-3 |\n"
    "|---|---|---|---|---|---|---|"
)


def main(
    names: Annotated[list[str] | None, typer.Option("--models", help="digits, photos, or folders")] = None,
    steps: Annotated[list[int] | None, typer.Option(help="S")] = None,
    etas: Annotated[list[float] | None, typer.Option(help="eta")] = None,
    order: Annotated[int, typer.Option(help="1 is DDIM, 2 DPM-Solver++ 2M")] = 1,
    only: Annotated[list[str] | None, typer.Option("--solvers", help="names of presets")] = None,
    windows: Annotated[list[int] | None, typer.Option(help="only the default solver, with these windows")] = None,
    thinnings: Annotated[list[float] | None, typer.Option(help="only the default solver, thinned like this")] = None,
    seeds: Annotated[int, typer.Option(help="samples per case")] = 6,
    limit: Annotated[int, typer.Option(help="iterations at most")] = 34,
    out: Annotated[Path | None, typer.Option(help="JSON to write")] = None,
) -> None:
    """Measure, print the table, write the figures."""
    print(HEADER)
    cases = []
    for name in names or ["digits", "photos"]:
        loaded = models.load(name)
        presets = (
            {"default": solvers.default(), "default+profile": solvers.default(profile=loaded.profile)}
            if loaded.profile
            else {"default": solvers.default()}
        )
        presets |= {"deq_ddim": solvers.deq_ddim(), "parataa": solvers.parataa(), "picard": solvers.picard()}
        if windows or thinnings:
            chosen = [replace(solvers.default(), window=w, name=f"window {w}") for w in windows or []]
            chosen += [replace(solvers.default(), thinning=t, name=f"thinning {t:g}") for t in thinnings or []]
            presets = {solver.name: solver for solver in chosen}
        for count in steps or [50, 100]:
            for eta in etas or [0.0, 1.0]:
                for preset in only or list(presets):
                    cases.append(measure(loaded, count, eta, order, presets[preset], seeds, limit))
                    print(row(cases[-1]), flush=True)
    if out:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
        machine = {"commit": commit, "torch": torch.__version__, "python": platform.python_version(), "seeds": seeds}
        out.write_text(json.dumps({**machine, "cases": [asdict(case) for case in cases]}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
