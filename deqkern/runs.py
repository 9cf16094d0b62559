"""Stored runs: how a solve converged, without its states. `deqkern plot` draws them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from .engine.solution import Solution
from .support import storage
from .support.version import version

_FORMAT = "deqkern.Run.1"
_HISTORIES = ("history", "nfe_history", "residual_history")


@dataclass(frozen=True, eq=False)
class StoredRun:
    """What `load` returns: the histories of a `Solution`, and the metadata of the run.

    Attributes:
        history: (iterations, B) fp64, the error estimates.
        nfe_history: (iterations, B) int64, the evaluations per sample up to each iteration.
        residual_history: (iterations, S, B) fp64, the one-step residual of every step; NaN where it was not evaluated.
        true_error: (iterations, B) fp64, the relative error after each iteration, or None if it was not measured.
        metadata: As given to `save`, and under "deqkern" the version that wrote it.

    Raises:
        TypeError: A history is no tensor.
        ValueError: A history has another shape or dtype, or `metadata` is no dictionary.

    Example:
        >>> noise, schedule = torch.randn(2, 1, 8, 8), deqkern.NoiseSchedule.linear()
        >>> solution = deqkern.sample(lambda x, t: 0.1 * x, noise, schedule, 10)
        >>> deqkern.runs.save("run.safetensors", solution)
        >>> run = deqkern.runs.load("run.safetensors")
        >>> run.residual_history.shape == (solution.iterations, 10, 2)
        True

    """

    history: Tensor
    nfe_history: Tensor
    residual_history: Tensor
    true_error: Tensor | None
    metadata: dict[str, Any]

    def __post_init__(self) -> None:
        if not isinstance(self.metadata, dict):
            raise ValueError(f"metadata must be a dictionary, got {type(self.metadata).__name__}")
        found = {name: getattr(self, name) for name in _HISTORIES}
        found |= {} if self.true_error is None else {"true_error": self.true_error}
        for name, values in found.items():
            if not isinstance(values, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(values).__name__}")
            expected = torch.int64 if name == "nfe_history" else torch.float64
            if values.dtype is not expected:
                raise ValueError(f"{name} must have dtype {expected}, got {values.dtype}")
        residuals = found.pop("residual_history")
        if residuals.ndim != 3 or 0 in residuals.shape:
            raise ValueError(f"residual_history must have shape (iterations, S, B), got {tuple(residuals.shape)}")
        count, _, batch = residuals.shape
        for name, values in found.items():
            if values.shape != (count, batch):
                raise ValueError(f"{name} must have shape {(count, batch)}, got {tuple(values.shape)}")


def save(
    path: str | PathLike[str],
    solution: Solution,
    metadata: Mapping[str, Any] | None = None,
    *,
    true_error: Tensor | None = None,  # (iterations, B)
) -> None:
    """Write how a solve converged to a safetensors file, without its states.

    Args:
        path: The file, which is overwritten.
        solution: Of `sample`, `invert` or `fixed_point`.
        metadata: Anything that can be written as JSON. `deqkern plot` names runs by "solver", "model", "steps" and
            "eta", and draws a line at "rtol".
        true_error: (iterations, B) of any floating dtype, the relative error after each iteration, if it is known.

    Raises:
        OSError: `path` cannot be written.
        TypeError: An argument is of another type.
        ValueError: No chain was solved (naive inversion, a search), or an argument has another shape or dtype.

    Example:
        >>> noise, schedule = torch.randn(2, 1, 8, 8), deqkern.NoiseSchedule.linear()
        >>> solution = deqkern.sample(lambda x, t: 0.1 * x, noise, schedule, 10)
        >>> deqkern.runs.save("run.safetensors", solution, {"solver": "default", "rtol": 1e-2})

    """
    if not isinstance(solution, Solution):
        raise TypeError(f"solution must be a Solution, got {type(solution).__name__}")
    if bool(solution.residual_history.isnan().all()):
        raise ValueError("solution has no residuals: no chain was solved")
    if not isinstance(metadata, Mapping | None):
        raise TypeError(f"metadata must be a mapping, got {type(metadata).__name__}")
    if isinstance(true_error, Tensor) and true_error.is_floating_point():
        true_error = true_error.double()
    histories = {name: getattr(solution, name) for name in _HISTORIES}
    run = StoredRun(**histories, true_error=true_error, metadata={**(metadata or {}), "deqkern": version()})
    tensors = histories | ({} if true_error is None else {"true_error": true_error})
    try:
        written = json.dumps(run.metadata, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise type(error)(f"metadata cannot be written as JSON: {error}") from error
    storage.write(path, tensors, {"format": _FORMAT, "metadata": written})


def load(path: str | PathLike[str]) -> StoredRun:
    """Read a file written by `save`.

    Args:
        path: The file.

    Returns:
        The `StoredRun`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is another kind of file.

    Example:
        >>> noise, schedule = torch.randn(2, 1, 8, 8), deqkern.NoiseSchedule.linear()
        >>> solution = deqkern.sample(lambda x, t: 0.1 * x, noise, schedule, 10)
        >>> deqkern.runs.save("run.safetensors", solution, {"solver": "default"})
        >>> deqkern.runs.load("run.safetensors").metadata["solver"]
        'default'

    """
    with storage.reading(path, "a run") as file:
        found = file.metadata() or {}
        if found.get("format") != _FORMAT:
            raise ValueError("it was not written by deqkern.runs.save")
        histories = {name: file.get_tensor(name) for name in _HISTORIES}
        true_error = file.get_tensor("true_error") if "true_error" in file.keys() else None  # noqa: SIM118
        return StoredRun(**histories, true_error=true_error, metadata=json.loads(found["metadata"]))
