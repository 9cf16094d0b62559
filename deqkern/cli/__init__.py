"""The command line. Results go to stdout, progress and notes to stderr; the only modules that print."""

from __future__ import annotations

from typing import Annotated

import typer

from ..support.version import version
from . import demo, doctor, inversion, planning, plotting, sampling

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version())
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Parallel-in-time sampling of diffusion models."""


_commands = (
    sampling.sample,
    demo.demo,
    inversion.invert,
    inversion.interpolate,
    planning.plan,
    plotting.plot,
    doctor.doctor,
)
for _command in _commands:
    app.command()(_command)
