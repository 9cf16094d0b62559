"""`deqkern doctor`."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Mapping
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from .. import ops
from ..support.version import version
from .common import JsonOption, to_json


def doctor(as_json: JsonOption = False) -> None:
    """Say what is installed, which backends run here, and why the others do not."""
    cuda = torch.cuda.is_available()
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if cuda else []
    report: dict[str, Any] = {
        "deqkern": version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version_or_reason("triton"),
        "diffusers": _version_or_reason("diffusers"),
        "matplotlib": _version_or_reason("matplotlib"),
        "pillow": _version_or_reason("PIL"),
        "threads": torch.get_num_threads(),
        "gpu": ", ".join(gpus) or ("none" if torch.version.cuda else "none: this torch was built without CUDA"),
        "deqkern._C": _compiled(),
        "backends": ops.backends(),
    }
    if as_json:
        typer.echo(to_json(report))
        return
    table = Table(show_header=False)
    for head in ("", ""):
        table.add_column(head, overflow="fold")
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
