"""`deqkern plan`."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

from .. import planning
from .common import (
    BatchOption,
    EtaOption,
    JsonOption,
    MaxBatchOption,
    ModelOption,
    OrderOption,
    RtolOption,
    StepsOption,
    errors_name_options,
    load_model,
    new_table,
    plan_summary,
    print_table,
    to_json,
)


def plan(
    model: ModelOption = "digits",
    steps: StepsOption = 50,
    batch: BatchOption = 1,
    eta: EtaOption = 0.0,
    order: OrderOption = 1,
    rtol: RtolOption = 1e-2,
    iterations: Annotated[
        int | None, typer.Option(help="Iterations of a solve (default: what the shipped models need).")
    ] = None,
    evaluations: Annotated[float | None, typer.Option(help="Model evaluations per sample, likewise.")] = None,
    max_batch: MaxBatchOption = None,
    repeats: Annotated[int, typer.Option(help="Calls per size, of which the fastest counts.")] = 3,
    as_json: JsonOption = False,
) -> None:
    """Measure the model here, and say whether parallel sampling pays."""
    with errors_name_options():
        pretrained = load_model(model)
        found = planning.plan(
            pretrained.model,
            torch.randn(batch, *pretrained.shape, generator=torch.Generator().manual_seed(0)),
            pretrained.schedule,
            steps,
            eta=eta,
            order=order,
            rtol=rtol,
            iterations=iterations,
            evaluations=evaluations,
            max_batch=max_batch,
            repeats=repeats,
        )
    if as_json:
        report = {
            "model": model,
            "steps": steps,
            "batch": batch,
            "eta": eta,
            "order": order,
            "rtol": rtol,
            "threads": torch.get_num_threads(),
        }
        typer.echo(to_json(report | plan_summary(found)))
        return
    title = f"{pretrained.name}, {steps} steps, batch {batch}, eta {eta:g}, "
    title += ("DPM-Solver++ 2M, " if order == 2 else "") + f"{torch.get_num_threads()} CPU threads"
    table = new_table(title, ("window",), ("max_batch", "iterations", "nfe", "seconds"))
    table.add_row("sequential", str(max_batch or "all"), str(steps), str(steps), f"{found.sequential_seconds:.3g}")
    for way in found.ways:
        names = (str(way.window), str(way.max_batch or "all"))
        table.add_row(*names, str(way.iterations), f"{way.evaluations:.0f}", f"{way.seconds:.3g}")
    print_table(table)
    typer.echo(found.message)
