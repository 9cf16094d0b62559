"""What the commands share: options, errors that name options, progress, checks of what is to be written, JSON."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from ..engine.solution import Callback
from ..models import SHIPPED, Pretrained, load
from ..network.latency import is_out_of_memory
from ..planning import Plan

# Options of several commands.
ModelOption = Annotated[str, typer.Option(help="digits, photos, or the folder of a diffusers UNet2DModel.")]
StepsOption = Annotated[int, typer.Option(help="Steps of the chain.")]
BatchOption = Annotated[int, typer.Option(min=1, help="Samples.")]
EtaOption = Annotated[float, typer.Option(help="0 is DDIM, 1 is like DDPM.")]
OrderOption = Annotated[int, typer.Option(min=1, max=2, help="1 is DDIM, 2 is DPM-Solver++ 2M.")]
SeedOption = Annotated[int, typer.Option(min=0, max=2**64 - 1, help="Seed of all noise.")]
RtolOption = Annotated[float, typer.Option(help="Relative error of a sample at which it is done.")]
MaxBatchOption = Annotated[int | None, typer.Option(help="Most rows in one model call (default: all).")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]

_NAME = 12  # characters of a name that stay on one line

PICTURES = (".png", ".jpg", ".jpeg", ".pdf", ".svg")

SaveRunOption = Annotated[
    Path | None, typer.Option(help="Where to write how the run converged, for deqkern plot (default: nowhere).")
]

# What deqkern's own checks name first in their messages -> the option that set it.
_OPTION_OF = {
    "name_or_path": "--model",
    "path": "--model",
    "model": "--model",
    "scheduler": "--model",
    "schedule": "--model",
    "class_labels": "--model",
    "prediction_type": "--model",
    "num_inference_steps": "--steps",
    "steps_offset": "--steps",
    "timestep_spacing": "--spacing",
    "eta": "--eta",
    "order": "--order",
    "rtol": "--rtol",
    "max_iterations": "--max-iterations",
    "max_batch": "--max-batch",
    "iterations": "--iterations",
    "evaluations": "--evaluations",
    "repeats": "--repeats",
    "sigma_min": "--sigma-min",
    "noise": "--noise",
    "profile": "--solver",
    "window": "--window",
}

# (description, most iterations, what else to call) -> the callback of the solve
Follow = Callable[[str, int, Callback | None], Callback]


@contextmanager
def errors_name_options() -> Iterator[None]:
    """Turn an error about an argument into one about the option that set it (exit code 2), and a lack of memory too."""
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
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        typer.echo("Error: not enough memory: take fewer samples, or fewer rows in one call (--max-batch)", err=True)
        raise typer.Exit(1) from error


def check_out(path: Path, option: str, suffixes: tuple[str, ...], others: Collection[Path] = ()) -> None:
    """Refuse a file that cannot be written, before the work whose result it is to hold.

    others: the files that the command reads, or writes for another option.
    """
    if path.suffix.lower() not in suffixes:
        raise typer.BadParameter(f"{path} must end in {_one_of(suffixes)}", param_hint=option)
    if not os.path.isdir(path.parent):  # False, and no error, for what the system does not take for a path
        raise typer.BadParameter(f"there is no folder {path.parent}", param_hint=option)
    if os.path.isdir(path):
        raise typer.BadParameter(f"{path} is a folder", param_hint=option)
    if os.path.realpath(path) in map(os.path.realpath, others):
        raise typer.BadParameter(f"{path} is read or written by this command already", param_hint=option)
    if not os.access(path if os.path.exists(path) else path.parent, os.W_OK):
        raise typer.BadParameter(f"{path} cannot be written: permission denied", param_hint=option)


def _one_of(suffixes: tuple[str, ...]) -> str:
    return suffixes[0] if len(suffixes) == 1 else f"one of {', '.join(suffixes)}"


def load_model(name_or_path: str) -> Pretrained:
    """`--model`; its chain is one of DDIM's or DPM-Solver++'s, as `--eta` and `--order` say, whatever its scheduler."""
    loaded = load(name_or_path)
    return replace(loaded, schedule=loaded.schedule.as_ddim())


def stored_model(model: str) -> str:
    """`--model` as it is written into files: a folder so that it is found from elsewhere."""
    return model if model in SHIPPED else str(Path(model).resolve())


@contextmanager
def writing(path: Path, option: str) -> Iterator[None]:
    """Turn a failure to write `path` into an error of its option."""
    try:
        yield
    except OSError as error:
        raise typer.BadParameter(f"{path} cannot be written: {error}", param_hint=option) from error


@contextmanager
def progress(rtol: float | None) -> Iterator[Follow]:
    """A live display on stderr: gives a function that starts to follow a solve and returns the callback for it.

    rtol: what the errors are to reach; None if they are losses.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn(f"iterations, {'loss' if rtol is None else 'error'} {{task.fields[error]}}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as display:

        def follow(description: str, limit: int, also: Callback | None) -> Callback:
            for finished in display.task_ids:
                display.remove_task(finished)
            task = display.add_task(description, total=limit, error="?")

            def callback(iteration: int, value: Tensor, estimate: Tensor) -> None:
                error = f"{float(estimate.max()):.1e}" + ("" if rtol is None else f", rtol {rtol:g}")
                display.update(task, completed=iteration, total=max(limit, iteration), error=error)
                if also is not None:
                    also(iteration, value, estimate)

            return callback

        yield follow


def new_table(title: str, names: tuple[str, ...], figures: tuple[str, ...]) -> Table:
    """An empty table: columns of names, on several lines where they are too long, then columns of figures."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for head in names:
        table.add_column(head, overflow="fold")
    for head in figures:
        table.add_column(head, justify="right", no_wrap=True)
    return table


def print_table(table: Table) -> None:
    """On stdout; wider than the terminal if figures or short names would be cut otherwise."""
    console = Console()
    for column in table.columns:
        longest = max(len(str(cell)) for cell in (column.header, *column.cells))
        column.min_width = longest if column.no_wrap else min(longest, _NAME)
    console.width = max(console.width, console.measure(table, options=console.options.update(width=10_000)).minimum)
    console.print(table)


def plan_summary(plan: Plan) -> dict[str, Any]:
    """The plan in numbers, lists and None."""
    names = {"solver": plan.solver.name, "window": plan.solver.window}
    return vars(plan) | names | {"ways": [vars(way) for way in plan.ways]}


def to_json(value: Any) -> str:
    """Strict JSON: a number that is not finite is null."""

    def finite(item: Any) -> Any:
        if isinstance(item, Mapping):
            return {key: finite(entry) for key, entry in item.items()}
        if isinstance(item, list | tuple):
            return [finite(entry) for entry in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    return json.dumps(finite(value), indent=2, allow_nan=False)
