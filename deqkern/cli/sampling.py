"""`deqkern sample` and `deqkern demo`."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from torch import Tensor

from .. import models, plots, sampling, solvers
from .. import runs as stored_runs
from ..engine.solution import Callback, ConvergenceWarning
from ..solvers.presets import Solver
from .common import (
    PICTURES,
    BatchOption,
    EtaOption,
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
    load_model,
    print_table,
    progress,
    stored_model,
    to_json,
    writing,
)
from .files import Noise
from .results import Run, Trace, panels_of, run_table


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


def _solver(preset: Preset, pretrained: models.Pretrained, window: int | None) -> Solver | Literal["auto"]:
    if window is not None and preset in (Preset.auto, Preset.sequential):
        raise ValueError(f"window: the solver {preset} has its own")
    if preset is Preset.auto:
        return "auto"
    if preset is Preset.profile and pretrained.profile is None:
        raise ValueError(f"profile: the model {pretrained.name!r} comes without a profile.safetensors")
    solver: Solver
    solver = solvers.default(pretrained.profile) if preset is Preset.profile else getattr(solvers, preset)()
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
            chains = Chains(_spaced(load_model(model), spacing), steps, batch, eta, seed, order)
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
            plots.save_comparison(out, panels_of(runs), f"{chains.pretrained.name}, {chain}")
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
    pretrained = load_model(context.params["model"])
    if stored.noise.shape[1:] != pretrained.shape:
        reason = f"{path} holds noise for samples {tuple(stored.noise.shape[1:])}, {pretrained.name!r} takes "
        raise typer.BadParameter(reason + str(pretrained.shape), param_hint="--model")
    return Chains(
        pretrained,
        stored.steps,
        batch=len(stored.noise),
        eta=0.0,
        seed=0,
        noise=stored.noise,
        sigma_min=stored.sigma_min,
    )
