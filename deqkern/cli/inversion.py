"""`deqkern invert` and `deqkern interpolate`."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import Tensor

from .. import inversion, models, optimization, plots, runs, sampling
from ..engine.solution import Callback, ConvergenceWarning, relative_error
from ..interpolation import slerp
from ..optimization import Optimize
from ..solvers.presets import sequential
from .common import (
    PICTURES,
    JsonOption,
    MaxBatchOption,
    ModelOption,
    SaveRunOption,
    StepsOption,
    check_out,
    errors_name_options,
    load_model,
    new_table,
    print_table,
    progress,
    stored_model,
    to_json,
    writing,
)
from .files import Noise, read_pictures
from .results import Run, median, run_table

_FRAME = 112  # pixels

SigmaMinOption = Annotated[
    float, typer.Option(help="Noise-to-signal ratio at which the chain ends; 0 is the schedule's own end.")
]


class Method(StrEnum):
    """How noise is found: the names of `deqkern.inversion.METHODS`."""

    joint = "joint"
    stepwise = "stepwise"
    naive = "naive"
    optimize = "optimize"


@dataclass(frozen=True)
class Chain:
    """What makes pictures of noise, and noise of pictures."""

    pretrained: models.Pretrained
    steps: int
    sigma_min: float | None
    max_batch: int | None

    def invert(
        self, images: Tensor, method: Method, rtol: float, max_iterations: int | None, callback: Callback
    ) -> Run:
        """Find the noise of `images`; the search of "optimize" starts from noise of seed 0."""
        started = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the reports have a column for it
            solution = inversion.invert(
                self.pretrained.model,
                images,
                self.pretrained.schedule,
                self.steps,
                method=Optimize(generator=torch.Generator().manual_seed(0)) if method == Method.optimize else method,
                rtol=rtol,
                max_iterations=max_iterations,
                sigma_min=self.sigma_min,
                max_batch=self.max_batch,
                callback=callback,
            )
        return Run(str(method), solution, time.perf_counter() - started)

    def sample(self, noise: Tensor, rtol: float, callback: Callback | None) -> Run:
        """Make pictures of noise; rtol 0 is the sequential chain, step by step."""
        started = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            solution = sampling.sample(
                self.pretrained.model,
                noise,
                self.pretrained.schedule,
                self.steps,
                solver=None if rtol else sequential(),
                rtol=rtol,
                sigma_min=self.sigma_min,
                max_batch=self.max_batch,
                callback=callback,
            )
        return Run("default" if rtol else "sequential", solution, time.perf_counter() - started)

    def limit(self, method: Method, max_iterations: int | None) -> int:
        """Iterations after which `invert` ends, where it does not hand on to another method."""
        joint, stepwise = inversion.JOINT_LIMIT, inversion.STEP_LIMIT * self.steps
        limits = {Method.joint: joint, Method.stepwise: stepwise, Method.naive: self.steps}
        return max_iterations or limits.get(method, optimization.OPTIMIZER_STEPS)


def invert(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES", help="Pictures, of any size.")],
    model: ModelOption = "digits",
    steps: StepsOption = 50,
    method: Annotated[
        Method, typer.Option(help="All steps at once, one by one, not solved, or a search.")
    ] = Method.joint,
    rtol: Annotated[
        float | None, typer.Option(help="Relative error at which an image is done (default: 1e-4, of optimize 1e-2).")
    ] = None,
    max_iterations: Annotated[int | None, typer.Option(help="Stop after so many (default: the method's).")] = None,
    sigma_min: SigmaMinOption = inversion.SIGMA_MIN,
    max_batch: MaxBatchOption = None,
    out: Annotated[Path, typer.Option(help="The noise to write, for deqkern sample --noise.")] = Path(
        "noise.safetensors"
    ),
    report: Annotated[Path | None, typer.Option(help="A picture of the round trip to write (default: none).")] = None,
    save_run: SaveRunOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find the noise that a model turns into given pictures, and say how well it does."""
    check_out(out, "--out", (".safetensors",), images)
    if report is not None:
        check_out(report, "--report", PICTURES, images)
    if save_run is not None:
        check_out(save_run, "--save-run", (".safetensors",), [*images, out])
        if method in (Method.naive, Method.optimize):
            raise typer.BadParameter(f"--method {method} does not solve a chain", param_hint="--save-run")
    if method == Method.naive:
        for option, value in (("--rtol", rtol), ("--max-iterations", max_iterations)):
            if value is not None:
                raise typer.BadParameter("--method naive does not iterate", param_hint=option)
    tolerance = rtol if rtol is not None else 1e-2 if method == Method.optimize else 1e-4
    names = [str(image) for image in images]
    with errors_name_options():
        pretrained = load_model(model)
        pictures = read_pictures(images, pretrained, "IMAGES")
        chain = Chain(pretrained, steps, sigma_min or None, max_batch)
        with progress(None if method == Method.optimize else tolerance) as follow:
            callback = follow(method, chain.limit(method, max_iterations), None)
            run = chain.invert(pictures, method, tolerance, max_iterations, callback)
            found = run.solution
            again = chain.sample(found.value, 0.0, follow("round trip", steps, None)).solution.value
        round_trip = relative_error(again, pictures)
        with writing(out, "--out"):
            Noise(found.value, model, steps, chain.sigma_min).save(out, found, round_trip, names)
        if report is not None:
            with writing(report, "--report"):
                _draw(report, names, pictures, again=again, run=run, chain=chain, rtol=tolerance)
        options: dict[str, Any] = {"model": model, "steps": steps, "sigma_min": chain.sigma_min, "method": str(method)}
        options |= {"rtol": None if method == Method.naive else tolerance}
        if save_run is not None:
            with writing(save_run, "--save-run"):
                facts = {"model": stored_model(model), "solver": f"{method} inversion", "eta": 0, "images": names}
                runs.save(save_run, found, options | facts)
    if as_json:
        options |= {"out": str(out), "report": str(report) if report else None}
        totals = {"iterations": found.iterations, "seconds": round(run.seconds, 3), "message": found.message}
        typer.echo(to_json({**options, **totals, "images": _entries(names, run, round_trip)}))
        return
    title = f"{pretrained.name}: {_count(names)}, {steps} steps, {method}, "
    title += ("" if method == Method.naive else f"rtol {tolerance:g}, ") + _end(chain)
    print_table(_image_table(_entries([image.name for image in images], run, round_trip), title, method))
    trips = f"round trip {median(round_trip):.0e} (median), {float(round_trip.max()):.0e} (largest)"
    written = f"written: {' '.join(str(path) for path in (out, report, save_run) if path)}"
    typer.echo(f"{found.message}; {trips}; {run.seconds:.1f} seconds\n{written}")


def _entries(names: list[str], run: Run, round_trip: Tensor) -> list[dict[str, Any]]:
    """Per image, what it took and how well it went."""
    found = run.solution
    columns = {
        "image": names,
        "converged": found.converged.tolist(),
        "iterations": _iterations(run),
        "nfe": found.nfe.tolist(),
        "error_estimate": found.error_estimate.tolist(),
        "residual": found.residual.tolist(),
        "round_trip": round_trip.tolist(),
    }
    return [dict(zip(columns, entry, strict=True)) for entry in zip(*columns.values(), strict=True)]


def _image_table(entries: list[dict[str, Any]], title: str, method: Method) -> Table:
    table = new_table(title, ("image",), ("converged", "iterations", "nfe", "error estimate", "round trip"))
    for entry in entries:
        converged, estimate = "yes" if entry["converged"] else "NO", f"{entry['error_estimate']:.0e}"
        if method == Method.naive:  # which estimates nothing
            converged = estimate = "-"
        counts = (str(entry["iterations"]), str(entry["nfe"]))
        table.add_row(entry["image"], converged, *counts, estimate, f"{entry['round_trip']:.0e}")
    return table


def _iterations(run: Run) -> list[int]:
    """Per image, up to the last one that evaluated it; the search keeps no such count, but one for all."""
    found = run.solution
    if run.solver == Method.optimize:
        return [found.iterations] * len(found.value)
    evaluated = found.nfe_history.diff(dim=0, prepend=torch.zeros_like(found.nfe_history[:1])) > 0  # (iterations, B)
    return (evaluated * torch.arange(1, len(evaluated) + 1)[:, None]).amax(0).tolist()


def _draw(
    path: Path, names: list[str], pictures: Tensor, *, again: Tensor, run: Run, chain: Chain, rtol: float
) -> None:
    difference, factor = plots.amplified(again - pictures)
    panels = {"source": pictures, "reconstruction": again, f"difference x {factor:g} (grey: none)": difference}
    searched = run.solver == Method.optimize
    history, ends = run.solution.history, _iterations(run)
    curves = {f"{i + 1}: {Path(name).name}": history[: ends[i], i].tolist() for i, name in enumerate(names)}
    title = f"{chain.pretrained.name}, {chain.steps} steps, {run.solver}: {run.solution.iterations} iterations"
    if searched:
        plots.save_inversion(
            path, panels, curves, label="squared distance", along="evaluations of the loss", title=title
        )
    else:
        plots.save_inversion(path, panels, curves, label="error estimate", rtol=rtol, title=title)


def interpolate(
    first: Annotated[Path, typer.Argument(metavar="A", help="A picture, of any size.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    model: ModelOption = "digits",
    frames: Annotated[int, typer.Option(min=2, help="Pictures from A to B, made of noise.")] = 7,
    steps: StepsOption = 50,
    rtol: Annotated[float, typer.Option(help="Relative error at which a noise or a frame is done.")] = 1e-3,
    max_iterations: Annotated[
        int | None, typer.Option(help="Stop inverting after so many (default: 40, then step by step).")
    ] = None,
    sigma_min: SigmaMinOption = inversion.SIGMA_MIN,
    max_batch: MaxBatchOption = None,
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("strip.png"),
    as_json: JsonOption = False,
) -> None:
    """Go from one picture to another through their noise: invert both, interpolate spherically, sample all frames."""
    check_out(out, "--out", PICTURES, [first, second])
    with errors_name_options():
        pretrained = load_model(model)
        pictures = read_pictures([first], pretrained, "A"), read_pictures([second], pretrained, "B")
        ends = torch.cat(pictures)
        chain = Chain(pretrained, steps, sigma_min or None, max_batch)
        with progress(rtol) as follow:
            callback = follow("invert", chain.limit(Method.joint, max_iterations), None)
            inverted = chain.invert(ends, Method.joint, rtol, max_iterations, callback)
            t = torch.linspace(0, 1, frames)
            start, end = inverted.solution.value.split(1)
            noise = slerp(start, end, t).flatten(0, 1)  # (frames, *shape)
            sampled = chain.sample(noise, rtol, follow("sample", steps, None))
        made = sampled.solution.value
        round_trip = relative_error(made[[0, -1]], ends).tolist()
        panels: dict[str, Tensor] = {"A": pictures[0]}
        panels |= {f"t = {float(t[i]):.2f}": made[i : i + 1] for i in range(frames)} | {"B": pictures[1]}
        title = f"{first.name} to {second.name}: {pretrained.name}, {steps} steps"
        with writing(out, "--out"):
            plots.save_comparison(out, panels, title, smallest=_FRAME)
    if as_json:
        record: dict[str, Any] = {"model": model, "steps": steps, "sigma_min": chain.sigma_min, "rtol": rtol}
        record |= {"images": [str(first), str(second)], "frames": frames, "out": str(out), "round_trip": round_trip}
        typer.echo(to_json(record | {"inversion": inverted.summary(), "sampling": sampled.summary()}))
        return
    title = f"{pretrained.name}: {frames} frames, {steps} steps, rtol {rtol:g}, {_end(chain)}"
    rows: list[tuple[tuple[str, ...], Run]] = [(("invert", "2"), inverted), (("sample", str(frames)), sampled)]
    print_table(run_table(rows, ("", "pictures"), title))
    typer.echo(f"round trip: {round_trip[0]:.0e} ({first.name}), {round_trip[1]:.0e} ({second.name})\nwritten: {out}")


def _count(names: list[str]) -> str:
    return "1 image" if len(names) == 1 else f"{len(names)} images"


def _end(chain: Chain) -> str:
    return "the schedule's own end" if chain.sigma_min is None else f"sigma_min {chain.sigma_min:g}"
