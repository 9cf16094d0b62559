"""Stored runs: how a solve converged, without its states. `deqkern plot` draws them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .solve import Solution
from .version import version

_FORMAT = "deqkern.Run.1"
_HISTORIES = ("history", "nfe_history", "residual_history")


@dataclass(frozen=True)
class StoredRun:
    """What `load` gives back: the histories of a `Solution`, and what was said of the run.

    history: (iterations, B) fp64. nfe_history: (iterations, B) int64. residual_history: (iterations, S, B) fp64.
    true_error: (iterations, B) fp64, the relative error after each iteration, or None if it was not measured.
    metadata: of `save`, and under "deqkern" the version that wrote it.
    """

    history: Tensor
    nfe_history: Tensor
    residual_history: Tensor
    true_error: Tensor | None
    metadata: dict[str, Any]

    def __post_init__(self) -> None:
        if not isinstance(self.metadata, dict):
            raise ValueError(f"metadata must be a dictionary, got {type(self.metadata).__name__}")
        count, steps, batch = (*self.residual_history.shape, 0, 0, 0)[:3]
        if count * steps * batch == 0:
            raise ValueError(f"residual_history has shape {tuple(self.residual_history.shape)}")
        for name in ("history", "nfe_history", "true_error"):
            found = getattr(self, name)
            if found is not None and found.shape != (count, batch):
                raise ValueError(f"{name} must have shape {(count, batch)}, got {tuple(found.shape)}")


def save(
    path: str | PathLike[str],
    solution: Solution,
    metadata: Mapping[str, Any] | None = None,
    *,
    true_error: Tensor | None = None,  # (iterations, B)
) -> None:
    """Write how `solution` was reached to a safetensors file.

    solution: of `sample`, `invert` or `fixed_point`; ValueError if no chain was solved (naive inversion, a search).
    metadata: what can be written as JSON. `deqkern plot` names runs by "solver", "model", "steps" and "eta", and draws
        a line at "rtol".
    true_error: (iterations, B), the relative error after each iteration, where it is known.
    """
    if not isinstance(solution, Solution):
        raise TypeError(f"solution must be a Solution, got {type(solution).__name__}")
    if bool(solution.residual_history.isnan().all()):
        raise ValueError("solution has no residuals: no chain was solved")
    histories = {name: getattr(solution, name) for name in _HISTORIES}
    run = StoredRun(**histories, true_error=true_error, metadata={"deqkern": version(), **(metadata or {})})
    tensors = histories | ({} if true_error is None else {"true_error": true_error.double()})
    try:
        written = json.dumps(run.metadata, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise type(error)(f"metadata cannot be written as JSON: {error}") from error
    clones = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    save_file(clones, path, {"format": _FORMAT, "metadata": written})


def load(path: str | PathLike[str]) -> StoredRun:
    """Read a file written by `save`. Raises FileNotFoundError, or ValueError if it is another kind of file."""
    try:
        with safe_open(path, "pt") as file:
            found = file.metadata() or {}
            if found.get("format") != _FORMAT:
                raise ValueError("it was not written by deqkern.runs.save")
            histories = {name: file.get_tensor(name) for name in _HISTORIES}
            true_error = file.get_tensor("true_error") if "true_error" in file.keys() else None  # noqa: SIM118
            return StoredRun(**histories, true_error=true_error, metadata=json.loads(found["metadata"]))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no file {path}") from error
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"path {path} does not hold a run: {error}") from error
