"""How near samples come to the exact ones, and how many sequential model calls that takes: docs/images/quality.png.

    python bench/quality.py measure digits --seeds 8 --out bench/results/quality-digits.json
    python bench/quality.py measure photos --seeds 6 --out bench/results/quality-photos.json
    python bench/quality.py draw bench/results/quality-*.json --out docs/images/quality.png

Every chain starts from the same noise at the last timestep of training and ends at the clean sample: in diffusers'
words "trailing" spacing and final sigma 0. The exact sample is the end of the probability-flow ODE, to which all of
them converge: DPM-Solver++ 2M in as many steps as there are timesteps. `floors` holds how far other chains as long
end from it: smaller errors mean nothing. Errors are relative 2-norms per sample.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import warnings
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import diffusers
import torch
import typer
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

import deqkern
from deqkern import NoiseSchedule, models, solvers
from deqkern.engine.solution import relative_error
from deqkern.plots.style import COLOURS, new_figure

BUDGETS = (4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50)  # S of the sequential chains
SHOWN = (5, 6, 8, 10, 15, 20, 30, 50)  # of them in the table
JOINT = {  # S of the joint ones
    ("DDIM", "even in t"): (50, 100, 200),
    ("DPM-Solver++ 2M", "even in t"): (15, 20, 25, 50, 100),
    ("DPM-Solver++ 2M", "even in log-SNR"): (15, 20, 25, 50),
}
ITERATIONS = 8
RTOL = 1e-4  # so that no sample stops earlier
# DDIM is DPM-Solver++ of order 1. DDIMScheduler itself steps by T // S, past its next timestep if S does not divide T.
SAMPLERS: dict[str, tuple[Any, int]] = {
    "DDIM": (DPMSolverMultistepScheduler, 1),
    "DPM-Solver++ 2M": (DPMSolverMultistepScheduler, 2),
    "UniPC": (UniPCMultistepScheduler, 2),
}
SPACINGS = {
    "even in t": {"timestep_spacing": "trailing"},
    "even in log-SNR": {"use_exponential_sigmas": True},
    "Karras": {"use_karras_sigmas": True},
}
DASHES = {"even in t": "--", "even in log-SNR": ":"}  # of the sequential chains in the picture
DRAWN = {  # joint chains in the picture, and their markers
    ("DDIM", "even in t", 100): "o",
    ("DPM-Solver++ 2M", "even in t", 50): "s",
    ("DPM-Solver++ 2M", "even in log-SNR", 50): "^",
}
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass
class Point:
    """The samples of one chain after so many sequential model calls."""

    sampler: str
    spacing: str
    solver: str  # "sequential", or of the joint solve
    steps: int
    calls: int
    nfe: float  # model evaluations per sample, mean
    error: list[float]  # per sample
    error_ddim: list[float]  # against the DDIM chain of `floors` in place of the exact sample

    @property
    def median(self) -> float:
        return statistics.median(self.error)


@dataclass
class Problem:
    """A model, its noise (B, *shape) at the last timestep, and the samples that chains are compared with."""

    loaded: models.Pretrained
    noise: Tensor
    exact: Tensor
    ddim: Tensor

    def errors(self, value: Tensor) -> tuple[list[float], list[float]]:
        return relative_error(value, self.exact).tolist(), relative_error(value, self.ddim).tolist()


def scheduler_of(schedule: NoiseSchedule, sampler: str, spacing: str, steps: int) -> Any:
    """One of diffusers' schedulers, set to S steps from the last timestep to the clean sample."""
    abar = schedule.alphas_cumprod
    assert abar is not None
    kind, order = SAMPLERS[sampler]
    scheduler = kind(
        num_train_timesteps=len(abar),
        trained_betas=(1 - abar / torch.cat([abar.new_ones(1), abar[:-1]])).float().numpy(),
        solver_order=order,
        prediction_type=schedule.prediction_type,
        **SPACINGS[spacing],
    )
    scheduler.set_timesteps(steps)
    top = ((1 - abar[-1]) / abar[-1]).sqrt().item()
    assert len(scheduler.timesteps) == steps
    assert math.isclose(scheduler.sigmas[0], top, rel_tol=1e-3) and scheduler.sigmas[-1] == 0
    return scheduler


@torch.no_grad()
def sequential(problem: Problem, sampler: str, spacing: str, steps: int) -> Point:
    value = chain(problem.loaded, problem.noise, sampler, spacing, steps)
    return Point(sampler, spacing, "sequential", steps, steps, steps, *problem.errors(value))


@torch.no_grad()
def chain(loaded: models.Pretrained, noise: Tensor, sampler: str, spacing: str, steps: int) -> Tensor:
    """The clean samples (B, *shape) of a sequential chain."""
    scheduler, x = scheduler_of(loaded.schedule, sampler, spacing, steps), noise
    for t in scheduler.timesteps:
        x = scheduler.step(loaded.model(x, t).sample, t, x).prev_sample
    return x


def long_chain(loaded: models.Pretrained, noise: Tensor, sampler: str, steps: int, cache: Path) -> Tensor:
    """The same with steps even in t, kept in a file."""
    weights = b"".join(value.numpy().tobytes() for value in (*loaded.model.state_dict().values(), noise))
    path = cache / f"{loaded.name}-{zlib.crc32(weights):08x}-{sampler.replace(' ', '')}-{steps}.pt"
    if not path.is_file():
        value = chain(loaded, noise, sampler, "even in t", steps)
        cache.mkdir(parents=True, exist_ok=True)
        torch.save(value, path)
    return torch.load(path)


def joint(problem: Problem, sampler: str, spacing: str, steps: int, solver: solvers.Solver) -> list[Point]:
    """The joint solve of the same chain, after each iteration."""
    loaded, noise = problem.loaded, problem.noise
    schedule = NoiseSchedule.from_diffusers(scheduler_of(loaded.schedule, sampler, spacing, steps))
    rows, points = 0, list[Point]()

    def model(x: Tensor, t: Tensor) -> Tensor:
        nonlocal rows
        rows += len(x)
        return loaded.model(x, t).sample

    def watch(iteration: int, estimate: Tensor, error_estimate: Tensor) -> None:
        nfe = rows / len(noise)
        points.append(Point(sampler, spacing, solver.name, steps, iteration, nfe, *problem.errors(estimate)))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", deqkern.ConvergenceWarning)
        deqkern.sample(
            model,
            noise,
            schedule,
            steps,
            order=SAMPLERS[sampler][1],
            solver=solver,
            rtol=RTOL,
            max_iterations=ITERATIONS,
            callback=watch,
        )
    return points


def cell(point: Point) -> str:
    return f"{point.median:.1e} ({max(point.error):.1e})"


def markdown(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def sequential_table(points: list[Point]) -> str:
    found = {(p.sampler, p.spacing, p.steps): cell(p) for p in points if p.solver == "sequential"}
    rows = [["sampler", "spacing", *(f"S = {steps}" for steps in SHOWN)]]
    for name, spacing in dict.fromkeys(key[:2] for key in found):
        rows.append([name, spacing, *(found.get((name, spacing, steps), "") for steps in SHOWN)])
    return markdown(rows)


def joint_table(points: list[Point]) -> str:
    calls = range(3, ITERATIONS + 1)
    rows = [["chain", "spacing", "S", "solver", *(f"{k} its" for k in calls), "nfe", "the chain"]]
    solves: dict[tuple[str, str, int, str], dict[int, Point]] = {}
    for p in points:
        solves.setdefault((p.sampler, p.spacing, p.steps, p.solver), {})[p.calls] = p
    for key, found in solves.items():
        if key[-1] != "sequential":
            own = solves[*key[:3], "sequential"][key[2]]
            nfe = " / ".join(f"{found[k].nfe:.0f}" for k in calls if k in found)
            errors = [cell(found[k]) if k in found else "" for k in calls]
            rows.append([*map(str, key), *errors, nfe, cell(own)])
    return markdown(rows)


@app.command()
def measure(
    name: Annotated[str, typer.Argument(help="digits, photos, or a folder")],
    seeds: Annotated[int, typer.Option(help="samples")] = 8,
    budgets: Annotated[list[int] | None, typer.Option(help="S of the sequential chains")] = None,
    joint_steps: Annotated[list[int] | None, typer.Option("--joint", help="S of the joint ones")] = None,
    profile: Annotated[bool, typer.Option(help="solve with the model's profile too")] = True,
    exact_steps: Annotated[int | None, typer.Option(help="S of the exact sample; all timesteps if None")] = None,
    cache: Annotated[Path, typer.Option(help="where long chains are kept")] = Path("out/quality"),
    out: Annotated[Path | None, typer.Option(help="JSON to write")] = None,
) -> None:
    """Measure, print the tables, write the figures."""
    loaded = models.load(name)
    noise = torch.randn(seeds, *loaded.shape, generator=torch.Generator().manual_seed(1000))
    steps = exact_steps or loaded.schedule.num_train_timesteps
    long = {sampler: long_chain(loaded, noise, sampler, steps, cache) for sampler in SAMPLERS}
    problem = Problem(loaded, noise, exact=long["DPM-Solver++ 2M"], ddim=long["DDIM"])
    floors = {f"{sampler}, S={steps}": problem.errors(value)[0] for sampler, value in long.items()}
    for label, errors in floors.items():
        print(f"{label}: {statistics.median(errors):.1e} ({max(errors):.1e}) from the exact sample")
    points = []
    for sampler in SAMPLERS:
        for spacing in SPACINGS:
            counts = {*(budgets or BUDGETS), *(joint_steps or JOINT.get((sampler, spacing), ()))}
            points += [sequential(problem, sampler, spacing, steps) for steps in sorted(counts)]
    print("", sequential_table(points), "", sep="\n", flush=True)
    presets = [solvers.default(window=None, thinning=0)]
    if profile and loaded.profile is not None:
        presets.append(solvers.default(loaded.profile, window=None, thinning=0))
    for (sampler, spacing), counts in JOINT.items():
        for steps in joint_steps or counts:
            for solver in presets:
                points += joint(problem, sampler, spacing, steps, solver)
    print(joint_table(points))
    if out:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
        head = {"model": loaded.name, "commit": commit, "torch": torch.__version__, "seeds": seeds}
        head |= {"diffusers": diffusers.__version__}
        out.write_text(json.dumps(head | {"floors": floors, "points": list(map(asdict, points))}, indent=1) + "\n")


@app.command()
def draw(
    files: Annotated[list[Path], typer.Argument(help="what `measure` wrote")],
    out: Annotated[Path, typer.Option(help="the picture")] = Path("docs/images/quality.png"),
    solver: Annotated[str, typer.Option(help="of the joint solves")] = "default+profile",
) -> None:
    """Median errors against sequential model calls, a panel per file: joint solves solid, sequential chains not."""
    figure = new_figure(6.2 * len(files), 5.4, layout="constrained")
    axes = figure.subplots(1, len(files), sharey=True, squeeze=False)[0]
    colours = dict(zip(SAMPLERS, COLOURS, strict=False))
    for axis, file in zip(axes, files, strict=True):
        figures = json.loads(file.read_text())
        lines: dict[tuple[str, str, int | None], list[Point]] = {}
        for point in (Point(**point) for point in figures["points"]):
            if point.solver == "sequential" and point.spacing in DASHES and point.calls <= max(BUDGETS):
                lines.setdefault((point.sampler, point.spacing, None), []).append(point)
            elif point.solver == solver and (point.sampler, point.spacing, point.steps) in DRAWN:
                lines.setdefault((point.sampler, point.spacing, point.steps), []).append(point)
        for (sampler, spacing, steps), found in lines.items():
            calls, errors = [point.calls for point in found], [point.median for point in found]
            colour, label = colours[sampler], f"{sampler}, {spacing}"
            if steps is None:
                axis.loglog(calls, errors, DASHES[spacing], color=colour, linewidth=1.4, label=f"{label}, step by step")
            else:
                marker = DRAWN[sampler, spacing, steps]
                label = f"{label}, S = {steps}, jointly"
                axis.loglog(calls, errors, f"{marker}-", color=colour, markersize=5, linewidth=1.6, label=label)
        ticks = [1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 50]
        axis.set_xticks(ticks, list(map(str, ticks)))
        axis.minorticks_off()
        axis.set(
            title=f"{figures['model']}, {figures['seeds']} samples", xlabel="sequential model calls", ylim=(1e-3, 1)
        )
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("relative error of the sample, median")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    figure.savefig(out, dpi=150)


if __name__ == "__main__":
    app()
