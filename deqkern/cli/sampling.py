"""`deqkern sample` and `deqkern demo`."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from rich.table import Table
from torch import Tensor

from .. import models, plots, sampling, solvers
from .. import runs as stored_runs
from ..engine.solution import Callback, ConvergenceWarning, Solution, relative_error
from ..solvers.presets import Solver
from ..support.version import version
from .common import (
    PICTURES,
    BatchOption,
    EtaOption,
    Follow,
    JsonOption,
    MaxBatchOption,
    ModelOption,
    OrderOption,
    RtolOption,
    SaveRunOption,
    SeedOption,
    StepsOption,
    check_out,
    errors_name_options,
    new_table,
    plan_summary,
    print_table,
    progress,
    stored_model,
    to_json,
    writing,
)
from .files import Noise

_ABOUT_THE_TABLE = """\
iterations: batched model calls, one after the other. nfe: model evaluations per sample.
true error: relative distance of each sample from that of the sequential chain, median and largest.
seconds: of this CPU, where a large batch costs about as much as its rows one by one, so that parallel sampling
does not pay. It pays on a GPU that the sequential chain leaves idle."""


class Preset(StrEnum):
    """The solvers by name; `profile` is the default one started from the model's measured slopes, `auto` a plan's."""

    default = "default"
    profile = "profile"
    deq_ddim = "deq_ddim"
    parataa = "parataa"
    picard = "picard"
    sequential = "sequential"
    auto = "auto"


class Spacing(StrEnum):
    """Where the steps lie: the names of `deqkern.chain.timesteps.TIMESTEP_SPACINGS`."""

    leading = "leading"
    linspace = "linspace"
    trailing = "trailing"
    log_snr = "log_snr"


@dataclass(frozen=True)
class Run:
    """One solve, what it took, and how far from the sequential chain it ended, where that is known."""

    solver: str
    solution: Solution
    seconds: float
    true_error: Tensor | None = None  # (B,)

    def against(self, reference: Run) -> Run:
        """The same run with its true error."""
        return replace(self, true_error=relative_error(self.solution.value, reference.solution.value))

    def summary(self) -> dict[str, Any]:
        """The run in numbers, lists and None."""
        return {
            "solver": self.solver,
            "iterations": self.solution.iterations,
            "nfe": self.solution.nfe.tolist(),
            "converged": self.solution.converged.tolist(),
            "error_estimate": spread(self.solution.error_estimate),
            "residual": spread(self.solution.residual),
            "true_error": None if self.true_error is None else spread(self.true_error),
            "seconds": round(self.seconds, 3),
            "message": self.solution.message,
            "plan": None if self.solution.plan is None else plan_summary(self.solution.plan),
        }


@dataclass(frozen=True)
class Chains:
    """A batch of sampling chains, from the same noise for every solver that runs them."""

    pretrained: models.Pretrained
    steps: int
    batch: int
    eta: float
    seed: int
    order: int = 1
    noise: Tensor | None = None  # (batch, *shape), else drawn
    sigma_min: float | None = None

    def run(
        self,
        preset: Preset,
        callback: Callback,
        *,
        rtol: float,
        window: int | None = None,
        max_iterations: int | None = None,
        max_batch: int | None = None,
    ) -> Run:
        """Solve them once."""
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randn(self.batch, *self.pretrained.shape, generator=generator)
        solver, started = _solver(preset, self.pretrained, window), time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the reports have a column for it
            solution = sampling.sample(
                self.pretrained.model,
                drawn if self.noise is None else self.noise,
                self.pretrained.schedule,
                self.steps,
                eta=self.eta,
                order=self.order,
                solver=solver,
                rtol=rtol,
                max_iterations=max_iterations,
                generator=generator,
                max_batch=max_batch,
                sigma_min=self.sigma_min,
                callback=callback,
            )
        return Run(str(preset), solution, time.perf_counter() - started)


@dataclass
class Trace:
    """A callback that collects the true errors (B,) after each iteration."""

    reference: Tensor  # (B, *shape)
    errors: list[Tensor] = field(default_factory=list)

    def __call__(self, iteration: int, value: Tensor, estimate: Tensor) -> None:
        """Take in one iteration."""
        self.errors.append(relative_error(value, self.reference))

    @property
    def true_error(self) -> Tensor:
        """(iterations, B) float64."""
        return torch.stack(self.errors)


def median(values: Tensor) -> float:
    """Of all values; of an even number, the mean of the two in the middle, which `Tensor.median` does not take."""
    return float(np.median(values))


def spread(values: Tensor) -> dict[str, Any]:
    """Median, largest and all values (B,)."""
    return {"median": median(values), "max": float(values.max()), "per_sample": values.tolist()}


def _solver(preset: Preset, pretrained: models.Pretrained, window: int | None) -> Solver | Literal["auto"]:
    if window is not None and preset in (Preset.auto, Preset.sequential):
        raise ValueError(f"window: the solver {preset} has its own")
    if preset is Preset.auto:
        return "auto"
    if preset is Preset.profile and pretrained.profile is None:
        raise ValueError(f"profile: the model {pretrained.name!r} comes without a profile.safetensors")
    build: Callable[[], Solver] = getattr(solvers, preset, lambda: solvers.default(profile=pretrained.profile))
    solver = build()
    return solver if window is None else replace(solver, window=window)


def sample(
    context: typer.Context,
    model: ModelOption = "digits",
    steps: StepsOption = 50,
    batch: BatchOption = 16,
    solver: Annotated[Preset, typer.Option(help="How the chain is solved.")] = Preset.default,
    eta: EtaOption = 0.0,
    order: OrderOption = 1,
    spacing: Annotated[Spacing | None, typer.Option(help="Where the steps lie (default: as the model says).")] = None,
    seed: SeedOption = 0,
    rtol: RtolOption = 1e-2,
    window: Annotated[int | None, typer.Option(help="Evaluate so many steps at once (default: the solver's).")] = None,
    max_iterations: Annotated[int | None, typer.Option(help="Stop after so many (default: the steps).")] = None,
    max_batch: MaxBatchOption = None,
    noise: Annotated[
        Path | None, typer.Option(help="What deqkern invert wrote: its noise, model, steps and sigma_min.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("grid.png"),
    compare: Annotated[bool, typer.Option("--compare", help="Run the sequential chain too, and compare.")] = False,
    save_run: SaveRunOption = None,
    as_json: JsonOption = False,
) -> None:
    """Sample a batch from a model, write a picture of it, and say what it took."""
    read = [] if noise is None else [noise]
    check_out(out, "--out", PICTURES, read)
    if save_run is not None:
        check_out(save_run, "--save-run", (".safetensors",), read)
    with errors_name_options(), progress(rtol) as follow:
        if noise is None:
            chains = Chains(_spaced(models.load(model), spacing), steps, batch, eta, seed, order)
        else:
            chains = _stored_chains(noise, context)
            model, steps, batch = context.params["model"], chains.steps, chains.batch
        reference, trace = None, None
        if compare:
            callback = follow(Preset.sequential, steps, None)
            reference = chains.run(Preset.sequential, callback, rtol=0.0, max_batch=max_batch)
            trace = Trace(reference.solution.value)
        callback = follow(solver, min(max_iterations or steps, steps), trace)
        limits = {"window": window, "max_iterations": max_iterations, "max_batch": max_batch}
        run = chains.run(solver, callback, rtol=rtol, **limits)
        runs = [run] if reference is None else [run.against(reference), reference.against(reference)]
        options = {
            "model": model,
            "steps": steps,
            "batch": batch,
            "eta": chains.eta,
            "order": chains.order,
            "rtol": rtol,
            "window": window,
        }
        if noise is None:
            schedule = chains.pretrained.schedule
            options |= {"spacing": schedule.timestep_spacing if schedule.has_spacing else None, "seed": seed}
        else:
            options |= {"noise": str(noise), "sigma_min": chains.sigma_min}
        chain = f"{steps} steps, " + (f"eta {eta:g}" if noise is None else noise.name)
        chain += ", DPM-Solver++ 2M" if chains.order == 2 else ""
        chain += f", {spacing}" if spacing else ""
        chain += f", window {window}" if window else ""
        with writing(out, "--out"):
            plots.save_comparison(out, _panels(runs), f"{chains.pretrained.name}, {chain}")
        if save_run is not None:
            with writing(save_run, "--save-run"):
                described = options | {"model": stored_model(model), "solver": run.solver}
                stored_runs.save(
                    save_run, run.solution, described, true_error=None if trace is None else trace.true_error
                )
    if as_json:
        typer.echo(to_json({**options, "out": str(out), "runs": [run.summary() for run in runs]}))
        return
    title = f"{chains.pretrained.name}: {batch} samples, {chain}, rtol {rtol:g}"
    print_table(run_table([((run.solver,), run) for run in runs], ("solver",), title))
    if runs[0].solution.plan is not None:
        typer.echo(runs[0].solution.plan.message)
    typer.echo(f"written: {out}" + (f" {save_run}" if save_run else ""))


def _spaced(pretrained: models.Pretrained, spacing: Spacing | None) -> models.Pretrained:
    if spacing is None:
        return pretrained
    if not pretrained.schedule.has_spacing:
        raise ValueError(f"timestep_spacing: the scheduler of {pretrained.name!r} has noise levels of its own")
    return replace(pretrained, schedule=replace(pretrained.schedule, timestep_spacing=str(spacing)))


def _stored_chains(path: Path, context: typer.Context) -> Chains:
    """The chains of `--noise`. Only `--model` may say otherwise, for a folder that was moved."""
    stored = Noise.load(path, "--noise")
    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = {name for name, source in sources.items() if source is not None and source.name != "DEFAULT"}
    for name in ("steps", "batch", "eta", "order", "spacing", "seed"):
        if name in given:
            raise typer.BadParameter(f"{path} says it already", param_hint=f"--{name}")
    if "model" not in given:
        context.params["model"] = stored.model
    pretrained = models.load(context.params["model"])
    if stored.noise.shape[1:] != pretrained.shape:
        reason = f"{path} holds noise for samples {tuple(stored.noise.shape[1:])}, {pretrained.name!r} takes "
        raise typer.BadParameter(reason + str(pretrained.shape), param_hint="--model")
    return Chains(pretrained, stored.steps, len(stored.noise), 0.0, 0, 1, stored.noise, stored.sigma_min)


def demo(
    out: Annotated[Path, typer.Option(help="The folder to write to.")] = Path("out"),
    model: Annotated[list[str] | None, typer.Option(help="Instead of the shipped models; repeatable.")] = None,
    steps: StepsOption = 50,
    batch: BatchOption = 4,
    rtol: RtolOption = 1e-2,
    seed: SeedOption = 0,
) -> None:
    """Sample the shipped models with every solver, beside the sequential chain: pictures, curves and a table."""
    with errors_name_options():
        loaded = [models.load(name) for name in model or models.SHIPPED]
    names = [pretrained.name for pretrained in loaded]
    if len(set(names)) < len(names):
        raise typer.BadParameter(f"{', '.join(names)}: pictures are named after models", param_hint="--model")
    with writing(out, "--out"):
        out.mkdir(parents=True, exist_ok=True)
    figures = {name: (out / f"{name}.png", out / f"{name}_convergence.png") for name in names}
    written = [*(path for pair in figures.values() for path in pair), out / "demo.json"]
    for path in written:
        check_out(path, "--out", (path.suffix,))
    rows: list[tuple[tuple[str, ...], Run]] = []
    records = []
    with errors_name_options(), progress(rtol) as follow:
        for pretrained in loaded:
            sheets: dict[str, Tensor] = {}
            curves: dict[str, list[plots.Curve]] = {}
            for eta in (0.0, 1.0):
                chains = Chains(pretrained, steps, batch, eta, seed)
                runs, curves[f"eta {eta:g}"] = _run_all(chains, rtol, follow)
                rows += [((pretrained.name, f"{eta:g}", run.solver), run) for run in runs]
                records += [{"model": pretrained.name, "eta": eta} | run.summary() for run in runs]
                sheets |= _panels([runs[0], runs[-1]], f"eta {eta:g}, ")
            title = f"{pretrained.name}, {steps} steps"
            comparison, convergence = figures[pretrained.name]
            with writing(comparison, "--out"):
                plots.save_comparison(comparison, sheets, f"{title}: parallel beside sequential")
            with writing(convergence, "--out"):
                plots.convergence(convergence, curves, rtol=rtol, title=title)
    report = {"deqkern": version(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    report |= {"steps": steps, "batch": batch, "rtol": rtol, "seed": seed, "runs": records}
    with writing(written[-1], "--out"):
        written[-1].write_text(to_json(report) + "\n", encoding="utf-8")
    title = f"{batch} samples, {steps} steps, rtol {rtol:g}, {torch.get_num_threads()} CPU threads"
    print_table(run_table(rows, ("model", "eta", "solver"), title))
    typer.echo(f"{_ABOUT_THE_TABLE}\nwritten: {' '.join(map(str, written))}")


def _run_all(chains: Chains, rtol: float, follow: Follow) -> tuple[list[Run], list[plots.Curve]]:
    """Every parallel solver that the model has, with its curve; the sequential chain is the last run."""
    where = f"{chains.pretrained.name}, eta {chains.eta:g}: "
    reference = chains.run(Preset.sequential, follow(where + Preset.sequential, chains.steps, None), rtol=0.0)
    runs, curves = [], []
    for preset in Preset:
        if preset in (Preset.sequential, Preset.auto) or (preset == "profile" and chains.pretrained.profile is None):
            continue
        trace = Trace(reference.solution.value)
        run = chains.run(preset, follow(where + preset, chains.steps, trace), rtol=rtol)
        runs.append(run.against(reference))
        errors = (trace.true_error, run.solution.history)
        curves.append(plots.Curve(preset, *(values.amax(1).tolist() for values in errors)))
    return [*runs, reference.against(reference)], curves


def _panels(runs: list[Run], where: str = "") -> dict[str, Tensor]:
    return {f"{where}{run.solver}: {run.solution.iterations} iterations": run.solution.value for run in runs}


def run_table(rows: list[tuple[tuple[str, ...], Run]], heads: tuple[str, ...], title: str) -> Table:
    """One line per run; `heads` are the columns before the common ones."""
    error_head = "true error" if any(run.true_error is not None for _, run in rows) else "error estimate"
    table = new_table(title, heads, ("iterations", "nfe", "converged", error_head, "seconds"))
    for names, run in rows:
        solution = run.solution
        error = solution.error_estimate if run.true_error is None else run.true_error
        table.add_row(
            *names,
            str(solution.iterations),
            f"{float(solution.nfe.double().mean()):.0f}",
            f"{int(solution.converged.sum())}/{len(solution.converged)}",
            f"{median(error):.0e} .. {float(error.max()):.0e}",
            f"{run.seconds:.2f}",
        )
    return table
