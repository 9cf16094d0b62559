"""The command line: `deqkern sample`, `deqkern demo`, `deqkern doctor`. Results go to stdout, progress to stderr."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import math
import platform
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from . import models, ops, plots, sampling, solvers
from .solve import Callback, ConvergenceWarning, Solution, relative_error
from .solvers import Solver

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

_PICTURES = (".png", ".jpg", ".jpeg", ".pdf", ".svg")

# What deqkern's own checks name first in their messages -> the option that set it.
_OPTION_OF = {
    "name_or_path": "--model",
    "path": "--model",
    "model": "--model",
    "scheduler": "--model",
    "class_labels": "--model",
    "num_inference_steps": "--steps",
    "eta": "--eta",
    "rtol": "--rtol",
    "max_iterations": "--max-iterations",
    "max_batch": "--max-batch",
    "profile": "--solver",
}

_ABOUT_THE_TABLE = """\
iterations: batched model calls, one after the other. nfe: model evaluations per sample.
true error: relative distance of each sample from that of the sequential chain, median and largest.
seconds: of this CPU, where a large batch costs about as much as its rows one by one, so that parallel sampling
does not pay. It pays on a GPU that the sequential chain leaves idle."""

_Follow = Callable[[str, int, Callback | None], Callback]  # (description, most iterations, what else to call)


class Preset(StrEnum):
    """The solvers by name; `profile` is the default one started from the model's measured slopes."""

    default = "default"
    profile = "profile"
    deq_ddim = "deq_ddim"
    parataa = "parataa"
    picard = "picard"
    sequential = "sequential"


@dataclass(frozen=True)
class Run:
    """One solve, what it took, and how far from the sequential chain it ended, where that is known."""

    preset: Preset
    solution: Solution
    seconds: float
    true_error: Tensor | None = None  # (B,)

    def against(self, reference: Run) -> Run:
        """The same run with its true error."""
        return replace(self, true_error=relative_error(self.solution.value, reference.solution.value))

    def summary(self) -> dict[str, Any]:
        """The run in numbers, lists and None."""
        return {
            "solver": str(self.preset),
            "iterations": self.solution.iterations,
            "nfe": self.solution.nfe.tolist(),
            "converged": self.solution.converged.tolist(),
            "error_estimate": _spread(self.solution.error_estimate),
            "residual": _spread(self.solution.residual),
            "true_error": None if self.true_error is None else _spread(self.true_error),
            "seconds": round(self.seconds, 3),
            "message": self.solution.message,
        }


@dataclass(frozen=True)
class Chains:
    """A batch of sampling chains, from the same noise for every solver that runs them."""

    pretrained: models.Pretrained
    steps: int
    batch: int
    eta: float
    seed: int

    def run(
        self,
        preset: Preset,
        callback: Callback,
        *,
        rtol: float,
        max_iterations: int | None = None,
        max_batch: int | None = None,
    ) -> Run:
        """Solve them once."""
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(self.batch, *self.pretrained.shape, generator=generator)
        solver, started = _solver(preset, self.pretrained), time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the reports have a column for it
            solution = sampling.sample(
                self.pretrained.model,
                noise,
                self.pretrained.schedule,
                self.steps,
                eta=self.eta,
                solver=solver,
                rtol=rtol,
                max_iterations=max_iterations,
                generator=generator,
                max_batch=max_batch,
                callback=callback,
            )
        return Run(preset, solution, time.perf_counter() - started)


@dataclass
class Trace:
    """A callback that collects a convergence curve: the largest errors of the samples."""

    reference: Tensor  # (B, *shape)
    true_error: list[float] = field(default_factory=list)
    error_estimate: list[float] = field(default_factory=list)

    def __call__(self, iteration: int, value: Tensor, estimate: Tensor) -> None:
        """Take in one iteration."""
        self.true_error.append(float(relative_error(value, self.reference).max()))
        self.error_estimate.append(float(estimate.max()))


def _spread(values: Tensor) -> dict[str, Any]:
    return {"median": float(values.median()), "max": float(values.max()), "per_sample": values.tolist()}


def _solver(preset: Preset, pretrained: models.Pretrained) -> Solver:
    if preset is not Preset.profile:
        build: Callable[[], Solver] = getattr(solvers, preset)
        return build()
    if pretrained.profile is None:
        raise ValueError(f"profile: the model {pretrained.name!r} comes without a profile.safetensors")
    return solvers.default(profile=pretrained.profile)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(_version())
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Parallel-in-time sampling of diffusion models."""


@app.command("sample")
def sample_command(
    model: Annotated[str, typer.Option(help="digits, photos, or the folder of a diffusers UNet2DModel.")] = "digits",
    steps: Annotated[int, typer.Option(help="Steps of the chain.")] = 50,
    batch: Annotated[int, typer.Option(min=1, help="Samples.")] = 16,
    solver: Annotated[Preset, typer.Option(help="How the chain is solved.")] = Preset.default,
    eta: Annotated[float, typer.Option(help="0 is DDIM, 1 is like DDPM.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of all noise.")] = 0,
    rtol: Annotated[float, typer.Option(help="Relative error of a sample at which it is done.")] = 1e-2,
    max_iterations: Annotated[int | None, typer.Option(help="Stop after so many (default: the steps).")] = None,
    max_batch: Annotated[int | None, typer.Option(help="Most rows in one model call (default: all).")] = None,
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("grid.png"),
    compare: Annotated[bool, typer.Option("--compare", help="Run the sequential chain too, and compare.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Sample a batch from a model, write a picture of it, and say what it took."""
    if out.suffix.lower() not in _PICTURES:
        raise typer.BadParameter(f"{out} must end in one of {', '.join(_PICTURES)}", param_hint="--out")
    if not out.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {out.parent}", param_hint="--out")
    with _errors_name_options(), _progress(rtol) as follow:
        chains = Chains(models.load(model), steps, batch, eta, seed)
        callback = follow(solver, min(max_iterations or steps, steps), None)
        runs = [chains.run(solver, callback, rtol=rtol, max_iterations=max_iterations, max_batch=max_batch)]
        if compare:
            callback = follow(Preset.sequential, steps, None)
            runs.append(chains.run(Preset.sequential, callback, rtol=0.0, max_batch=max_batch))
            runs = [run.against(runs[-1]) for run in runs]
        plots.save_comparison(out, _panels(runs), f"{chains.pretrained.name}, {steps} steps, eta {eta:g}")
    if as_json:
        options = {"model": model, "steps": steps, "batch": batch, "eta": eta, "seed": seed, "rtol": rtol}
        typer.echo(_to_json({**options, "out": str(out), "runs": [run.summary() for run in runs]}))
        return
    title = f"{chains.pretrained.name}: {batch} samples, {steps} steps, eta {eta:g}, rtol {rtol:g}"
    Console().print(_table([((run.preset,), run) for run in runs], ("solver",), title))
    typer.echo(f"written: {out}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The folder to write to.")] = Path("out"),
    model: Annotated[list[str] | None, typer.Option(help="Instead of the shipped models; repeatable.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of the chain.")] = 50,
    batch: Annotated[int, typer.Option(min=1, help="Samples.")] = 4,
    rtol: Annotated[float, typer.Option(help="Relative error of a sample at which it is done.")] = 1e-2,
    seed: Annotated[int, typer.Option(help="Seed of all noise.")] = 0,
) -> None:
    """Sample the shipped models with every solver, beside the sequential chain: pictures, curves and a table."""
    out.mkdir(parents=True, exist_ok=True)
    rows: list[tuple[tuple[str, ...], Run]] = []
    records, written = [], []
    with _errors_name_options(), _progress(rtol) as follow:
        for pretrained in [models.load(name) for name in model or models.SHIPPED]:
            sheets: dict[str, Tensor] = {}
            curves: dict[str, list[plots.Curve]] = {}
            for eta in (0.0, 1.0):
                chains = Chains(pretrained, steps, batch, eta, seed)
                runs, curves[f"eta {eta:g}"] = _run_all(chains, rtol, follow)
                rows += [((pretrained.name, f"{eta:g}", run.preset), run) for run in runs]
                records += [{"model": pretrained.name, "eta": eta} | run.summary() for run in runs]
                sheets |= _panels([runs[0], runs[-1]], f"eta {eta:g}, ")
            title = f"{pretrained.name}, {steps} steps"
            written += [out / f"{pretrained.name}.png", out / f"{pretrained.name}_convergence.png"]
            plots.save_comparison(written[-2], sheets, f"{title}: parallel beside sequential")
            plots.convergence(written[-1], curves, rtol=rtol, title=title)
    report = {"deqkern": _version(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    report |= {"steps": steps, "batch": batch, "rtol": rtol, "seed": seed, "runs": records}
    written.append(out / "demo.json")
    written[-1].write_text(_to_json(report) + "\n", encoding="utf-8")
    title = f"{batch} samples, {steps} steps, rtol {rtol:g}, {torch.get_num_threads()} CPU threads"
    Console().print(_table(rows, ("model", "eta", "solver"), title))
    typer.echo(f"{_ABOUT_THE_TABLE}\nwritten: {' '.join(map(str, written))}")


def _run_all(chains: Chains, rtol: float, follow: _Follow) -> tuple[list[Run], list[plots.Curve]]:
    """Every parallel solver that the model has, with its curve; the sequential chain is the last run."""
    where = f"{chains.pretrained.name}, eta {chains.eta:g}: "
    reference = chains.run(Preset.sequential, follow(where + Preset.sequential, chains.steps, None), rtol=0.0)
    runs, curves = [], []
    for preset in Preset:
        if preset is Preset.sequential or (preset is Preset.profile and chains.pretrained.profile is None):
            continue
        trace = Trace(reference.solution.value)
        run = chains.run(preset, follow(where + preset, chains.steps, trace), rtol=rtol)
        runs.append(run.against(reference))
        curves.append(plots.Curve(preset, trace.true_error, trace.error_estimate))
    return [*runs, reference.against(reference)], curves


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Say what is installed, which backends run here, and why the others do not."""
    cuda = torch.cuda.is_available()
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if cuda else []
    report: dict[str, Any] = {
        "deqkern": _version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version_or_reason("triton"),
        "diffusers": _version_or_reason("diffusers"),
        "matplotlib": _version_or_reason("matplotlib"),
        "threads": torch.get_num_threads(),
        "gpu": ", ".join(gpus) or ("none" if torch.version.cuda else "none: this torch was built without CUDA"),
        "deqkern._C": _compiled(),
        "backends": ops.backends(),
    }
    if as_json:
        typer.echo(_to_json(report))
        return
    table = Table(show_header=False)
    backends = {f"backend {name}": entry for name, entry in report.pop("backends").items()}
    for name, entry in (report | backends).items():
        table.add_row(name, _as_text(entry))
    Console().print(table)


def _as_text(entry: Any) -> str:
    if isinstance(entry, Mapping):
        return "\n".join(f"{key}: {_as_text(value)}" for key, value in entry.items())
    return ", ".join(map(str, entry)) if isinstance(entry, list) else str(entry)


def _compiled() -> dict[str, Any] | str:
    try:
        native = importlib.import_module("deqkern._C")
    except ImportError as error:
        return f"no: {error}"
    return {"isa": native.isa(), **native.build_info()}


def _version_or_reason(name: str) -> str:
    try:
        return str(getattr(importlib.import_module(name), "__version__", "unknown version"))
    except Exception as error:  # a broken installation raises anything, and finding it is the purpose
        return f"no: {type(error).__name__}: {error}"


def _version() -> str:
    try:
        return importlib.metadata.version("deqkern")
    except importlib.metadata.PackageNotFoundError:
        return "not installed, imported from its sources"


@contextmanager
def _errors_name_options() -> Iterator[None]:
    """Turn an error about an argument into one about the option that set it (exit code 2)."""
    try:
        yield
    except (ValueError, TypeError) as error:
        name = re.match(r"\w*", str(error))
        option = _OPTION_OF.get(name.group() if name else "")
        if option is None:
            raise
        raise typer.BadParameter(str(error), param_hint=option) from error
    except ImportError as error:
        if "deqkern[demo]" not in str(error):
            raise
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error


@contextmanager
def _progress(rtol: float) -> Iterator[_Follow]:
    """A live display on stderr: gives a function that starts to follow a solve and returns the callback for it."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("iterations, error {task.fields[error]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as display:

        def follow(description: str, limit: int, also: Callback | None) -> Callback:
            for finished in display.task_ids:
                display.remove_task(finished)
            task = display.add_task(description, total=limit, error="?")

            def callback(iteration: int, value: Tensor, estimate: Tensor) -> None:
                display.update(task, completed=iteration, error=f"{float(estimate.max()):.1e}, rtol {rtol:g}")
                if also is not None:
                    also(iteration, value, estimate)

            return callback

        yield follow


def _panels(runs: list[Run], where: str = "") -> dict[str, Tensor]:
    return {f"{where}{run.preset}: {run.solution.iterations} iterations": run.solution.value for run in runs}


def _table(rows: list[tuple[tuple[str, ...], Run]], heads: tuple[str, ...], title: str) -> Table:
    """One line per run; `heads` are the columns before the common ones."""
    compared = any(run.true_error is not None for _, run in rows)
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for head in heads:
        table.add_column(head, no_wrap=True)
    for head in ("iterations", "nfe", "converged", "true error" if compared else "error estimate", "seconds"):
        table.add_column(head, justify="right", no_wrap=True)
    for names, run in rows:
        solution = run.solution
        error = solution.error_estimate if run.true_error is None else run.true_error
        table.add_row(
            *names,
            str(solution.iterations),
            f"{float(solution.nfe.double().mean()):.0f}",
            f"{int(solution.converged.sum())}/{len(solution.converged)}",
            f"{float(error.median()):.0e} .. {float(error.max()):.0e}",
            f"{run.seconds:.2f}",
        )
    return table


def _to_json(value: Any) -> str:
    """Strict JSON: a number that is not finite is null."""

    def finite(item: Any) -> Any:
        if isinstance(item, Mapping):
            return {key: finite(entry) for key, entry in item.items()}
        if isinstance(item, list | tuple):
            return [finite(entry) for entry in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    return json.dumps(finite(value), indent=2, allow_nan=False)
