"""`deqkern demo`: every solver on the shipped models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from .. import models, plots
from ..support.version import version
from .common import (
    BatchOption,
    Follow,
    RtolOption,
    SeedOption,
    StepsOption,
    check_out,
    errors_name_options,
    load_model,
    print_table,
    progress,
    to_json,
    writing,
)
from .results import Run, Trace, panels_of, run_table
from .sampling import Chains, Preset

_ABOUT_THE_TABLE = """\
iterations: batched model calls, one after the other. nfe: model evaluations per sample.
true error: relative distance of each sample from that of the sequential chain, median and largest.
seconds: of this CPU, where a large batch costs about as much as its rows one by one, so that parallel sampling
does not pay. It pays on a GPU that the sequential chain leaves idle."""


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
        loaded = [load_model(name) for name in model or models.SHIPPED]
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
                sheets |= panels_of([runs[0], runs[-1]], f"eta {eta:g}, ")
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
