"""The joint system: all states of a sampling chain in the solver's basis, and the only caller of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .schedule import StepTable
from .spectral import Basis

Model = Callable[..., Any]


def model_dtype(model: Model, default: torch.dtype) -> torch.dtype:
    """The dtype of the model's first floating-point parameter, or `default` for a plain function."""
    if isinstance(model, torch.nn.Module):
        for parameter in model.parameters():
            if parameter.is_floating_point():
                return parameter.dtype
    return default


def kwargs_of(model_kwargs: Mapping[str, Any], samples: Tensor, batch: int) -> dict[str, Any]:
    """The model's arguments for `samples` (N,) of the batch: of tensors whose first dimension is B, those rows."""
    return {
        name: value[samples] if isinstance(value, Tensor) and value.ndim and len(value) == batch else value
        for name, value in model_kwargs.items()
    }


@dataclass
class Trajectory:
    """States x[0] .. x[S] of B chains; `evaluate` calls the model at the rows that `select` chose, in one batch.

    Rows are flat indices i * B + b of (step, sample); step i takes the model's output at x[i], or at x[i+1] if the
    table is implicit. The model sees `(N, *shape)` in its own dtype, timesteps `(N,)`, and those tensors of
    `model_kwargs` whose first dimension is B, repeated per row. Its output, in the dtype of the states and after
    clipping where the schedule clips, is written in the solver's basis. The states are fp32 or fp64.
    """

    model: Model
    table: StepTable
    basis: Basis
    x: Tensor  # (S+1, B, D), in the basis
    z: Tensor | None  # (S, B, D), in the basis
    dtype: torch.dtype  # what the model is called with
    model_kwargs: Mapping[str, Any]
    max_batch: int | None = None
    nfe: Tensor = field(init=False)  # (B,) int64, on the CPU

    def __post_init__(self) -> None:
        self.nfe = torch.zeros(self.batch, dtype=torch.int64)
        self._images: Tensor | None = None  # (rows, *shape), in the dtype of x
        self._inputs: Tensor | None = None  # the same in the model's dtype, if that is another
        self._timesteps = self.table.timesteps.to(self.x.device)
        self._rows = torch.empty(0, dtype=torch.int64)  # on the device
        self._counts = torch.zeros_like(self.nfe)

    @property
    def steps(self) -> int:
        """S."""
        return self.x.shape[0] - 1

    @property
    def batch(self) -> int:
        """B."""
        return self.x.shape[1]

    def images(self, rows: Tensor) -> Tensor:
        """The states `rows` (N,) of all S+1, as samples (N, *shape). The memory is reused by the next call."""
        count = len(rows)
        if self._images is None or len(self._images) < count:
            self._images = self.x.new_empty(count, *self.basis.shape)
        image = self._images[:count]
        self.basis.inverse(self.x.flatten(0, 1), image, rows)
        return image

    @property
    def selected(self) -> int:
        """The number of selected rows."""
        return len(self._rows)

    def select(self, rows: Tensor) -> None:
        """Choose the states `rows` (N,) int64, on the CPU, that `evaluate` calls the model at."""
        self._counts = torch.bincount(rows % self.batch, minlength=self.batch)
        if self.x.is_cuda:
            rows = rows.pin_memory().to(self.x.device, non_blocking=True)
        self._rows = rows

    def count(self) -> None:
        """Add the selected rows to `nfe`: once per evaluation, also where a captured one is replayed."""
        self.nfe += self._counts

    def evaluate(self, out: Tensor) -> None:
        """Call the model at the selected states; its output goes to `out` (S, B, D), in the basis."""
        for part in self._rows.split(self.max_batch or max(self.selected, 1)):
            steps, samples = part // self.batch, part % self.batch
            image = self.images(part + self.batch if self.table.implicit else part)
            output = self._call(self._input(image), self._timesteps[steps], samples)
            if self.table.clips:
                output = self.table.effective_output(image, output.to(image.dtype), steps)
            elif output.dtype != image.dtype or not output.is_contiguous():
                output = image.copy_(output)  # the images are not needed any more
            self.basis.forward(output, out.flatten(0, 1), part)

    def _input(self, image: Tensor) -> Tensor:
        """The images (N, *shape) in the model's dtype, in memory that the next call reuses."""
        if image.dtype == self.dtype:
            return image
        if self._inputs is None or len(self._inputs) < len(image):
            self._inputs = torch.empty_like(image, dtype=self.dtype)
        return self._inputs[: len(image)].copy_(image)

    def _call(self, image: Tensor, timesteps: Tensor, samples: Tensor) -> Tensor:
        output = self.model(image, timesteps, **kwargs_of(self.model_kwargs, samples, self.batch))
        output = getattr(output, "sample", output)
        if not isinstance(output, Tensor):
            raise TypeError(f"model must return a tensor or an object with .sample, got {type(output).__name__}")
        if output.shape != image.shape:
            raise ValueError(f"model returned shape {tuple(output.shape)} for an input of shape {tuple(image.shape)}")
        if output.device != image.device or not output.is_floating_point():
            raise ValueError(f"model returned {output.dtype} on {output.device} for an input on {image.device}")
        return output
