"""`deqkern plot`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from .. import plots
from ..runs import StoredRun, load
from .common import PICTURES, check_out, errors_name_options, writing


def plot(
    stored: Annotated[list[Path], typer.Argument(metavar="RUNS", help="What --save-run wrote.")],
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("convergence.png"),
) -> None:
    """Draw how runs converged: error against iterations and evaluations, and the residual of every step."""
    check_out(out, "--out", PICTURES)
    count = Counter(path.resolve() for path in stored)
    for path in stored:
        if count[path.resolve()] > 1:
            raise typer.BadParameter(f"{path} is given more than once", param_hint="RUNS")
    runs = [_load(path) for path in stored]
    names, title = _names(runs, stored)
    with errors_name_options(), writing(out, "--out"):
        plots.save_runs(out, dict(zip(names, runs, strict=True)), title=title)
    typer.echo(f"written: {out}")


def _load(path: Path) -> StoredRun:
    try:
        return load(path)
    except (FileNotFoundError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="RUNS") from error


def _names(runs: Sequence[StoredRun], paths: Sequence[Path]) -> tuple[list[str], str]:
    """A name per run, of its solver and of what the runs do not share; and what they share."""
    facts = [_facts(run) for run in runs]
    shared = [fact for fact in facts[0] if all(fact in others for others in facts)]
    names = [
        ", ".join([str(run.metadata.get("solver", path.stem)), *(fact for fact in own if fact not in shared)])
        for run, own, path in zip(runs, facts, paths, strict=True)
    ]
    count = Counter(names)
    named = [name if count[name] == 1 else f"{name} ({path})" for name, path in zip(names, paths, strict=True)]
    return named, ", ".join(shared)


def _facts(run: StoredRun) -> list[str]:
    said = run.metadata
    facts = [Path(str(said["model"])).name] if "model" in said else []
    facts += [f"{said['steps']} steps"] if isinstance(said.get("steps"), int) else []
    facts += ["2M"] if said.get("order") == 2 else []
    return facts + [f"{name} {said[name]:g}" for name in ("eta", "rtol") if isinstance(said.get(name), int | float)]
