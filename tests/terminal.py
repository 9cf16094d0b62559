"""The command line as a person uses it."""

from __future__ import annotations

from typing import Any

from typer.testing import CliRunner

from deqkern.cli import app


def run(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def plain(text: str) -> str:
    """What rich printed, without its frames and line breaks."""
    return " ".join("".join(c if c.isascii() else " " for c in text).split())
