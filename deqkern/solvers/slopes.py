"""Cheap models of d output / d x: one number per step, sample and frequency band.

Every slope is held between the two ends of the physical range by its shrinkage kappa in [0, 1]:
d eps / dx = kappa / sigma and d x0 / dx = (1 - kappa) / alpha, whatever it is that the model predicts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from os import PathLike

import torch
from torch import Tensor

from .. import ops
from ..chain.schedule import StepTable
from ..support import storage
from ..support.checks import check_number
from .basis import Basis

_FORMAT = "deqkern.SlopeProfile.1"


def slope_of(table: StepTable, shrinkage: Tensor) -> Tensor:
    """The slope d output / d x (S, ...) of a shrinkage (S, ...)."""
    shape = (-1, *[1] * (shrinkage.ndim - 1))
    low, high = table.slope_0.view(shape).to(shrinkage), table.slope_1.view(shape).to(shrinkage)
    return low + (high - low) * shrinkage


@dataclass(frozen=True)
class Frozen:
    """A constant shrinkage: 0 freezes epsilon (Picard on the DDIM sum), 1 freezes x0 (Picard in data prediction)."""

    shrinkage: float = 0.0
    adapts = False

    def __post_init__(self) -> None:
        check_number("shrinkage", self.shrinkage)
        if not math.isfinite(self.shrinkage):
            raise ValueError(f"shrinkage must be finite, got {self.shrinkage}")

    def initial(self, table: StepTable, basis: Basis) -> Tensor:  # (S, K)
        return torch.full(
            (table.num_inference_steps, len(basis.bands) - 1), self.shrinkage, dtype=torch.float64, device="cpu"
        )


@dataclass(frozen=True)
class Gaussian:
    """The Wiener filter of data with `variance` P in every band: kappa = sigma^2 / (alpha^2 P + sigma^2)."""

    variance: float = 0.25
    adapts = False

    def __post_init__(self) -> None:
        check_number("variance", self.variance)
        if not 0 < self.variance < math.inf:
            raise ValueError(f"variance must be finite and > 0, got {self.variance}")

    def initial(self, table: StepTable, basis: Basis) -> Tensor:  # (S, K)
        return table.shrinkage(self.variance)[:, None].expand(-1, len(basis.bands) - 1)


@dataclass(frozen=True, eq=False)
class SlopeProfile:
    """Shrinkages of one model, measured over earlier solves: per noise level and band, for any number of steps.

    log_snr: (T,) float64, increasing. shrinkage: (T, K) float64 in [0, 1]. shape: the sample's shape.
    Made by `deqkern.calibrate`. Between two levels the logit of the shrinkage is linear in log_snr, outside constant.
    """

    log_snr: Tensor
    shrinkage: Tensor
    shape: tuple[int, ...]
    adapts = False

    def __post_init__(self) -> None:
        for name, dimensions in (("log_snr", 1), ("shrinkage", 2)):
            value = getattr(self, name)
            if not isinstance(value, Tensor) or value.dtype is not torch.float64:
                raise TypeError(f"{name} must be a float64 tensor")
            if value.ndim != dimensions or len(value) != len(self.log_snr) or len(value) == 0:
                raise ValueError(
                    f"log_snr and shrinkage must have shapes (T,) and (T, K), got {name} {tuple(value.shape)}"
                )
        if not bool(self.log_snr.isfinite().all() & (self.log_snr.diff() > 0).all()):
            raise ValueError("log_snr must be finite and increase")
        if not bool(((self.shrinkage >= 0) & (self.shrinkage <= 1)).all()):
            raise ValueError("shrinkage must lie in [0, 1]")

    def initial(self, table: StepTable, basis: Basis) -> Tensor:  # (S, K)
        if self.shape != basis.shape or self.shrinkage.shape[1] != len(basis.bands) - 1:
            raise ValueError(
                f"profile was made for samples {self.shape} in {self.shrinkage.shape[1]} bands, "
                f"got samples {basis.shape} in {len(basis.bands) - 1}"
            )
        if len(self.log_snr) == 1:
            return self.shrinkage.expand(table.num_inference_steps, -1)
        levels = table.log_snr
        right = torch.searchsorted(self.log_snr, levels).clamp(1, len(self.log_snr) - 1)
        low, high = self.log_snr[right - 1], self.log_snr[right]
        part = ((levels - low) / (high - low)).clamp(0, 1)[:, None]
        logit = torch.logit(self.shrinkage, eps=1e-6)  # of a Gaussian: linear in log_snr
        return torch.sigmoid(torch.lerp(logit[right - 1], logit[right], part))

    def save(self, path: str | PathLike[str]) -> None:
        """Write a safetensors file. Raises OSError if `path` cannot be written."""
        tensors = {"log_snr": self.log_snr, "shrinkage": self.shrinkage}
        storage.write(path, tensors, {"shape": ",".join(map(str, self.shape)), "format": _FORMAT})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> SlopeProfile:
        """Read a file written by `save`. Raises FileNotFoundError, or ValueError if it is another kind of file."""
        with storage.reading(path, "a SlopeProfile") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError("it was not written by SlopeProfile.save")
            shape = tuple(int(size) for size in metadata["shape"].split(","))
            return cls(file.get_tensor("log_snr"), file.get_tensor("shrinkage"), shape)


@dataclass(frozen=True)
class Secant:
    """Slopes measured in the last iteration, <dx, de> / <dx, dx> per step, sample and band (Barzilai-Borwein).

    They are pulled to the previous guess by the relative weight `pull`. `start` gives the first guess: `Gaussian()`,
    `Frozen()` or a `SlopeProfile` of the same model. With None the first evaluation measures it, with the states
    themselves for dx and the outputs for de: the secant to zero, where a model of centred data gives about zero.
    """

    start: Frozen | Gaussian | SlopeProfile | None = None
    pull: float = 1e-2
    adapts = True

    def __post_init__(self) -> None:
        if self.start is not None and not isinstance(self.start, Frozen | Gaussian | SlopeProfile):
            raise TypeError(f"start must be None, Gaussian, Frozen or a SlopeProfile, got {type(self.start).__name__}")
        check_number("pull", self.pull)
        if not self.pull >= 0 or math.isinf(self.pull):
            raise ValueError(f"pull must be finite and >= 0, got {self.pull}")

    def initial(self, table: StepTable, basis: Basis) -> Tensor:  # (S, K)
        return (self.start or Gaussian()).initial(table, basis)

    def refine(self, slope: Tensor, moments: Tensor, low: Tensor, high: Tensor) -> None:
        """Make `slope` (S, B, K) the next one, from moments (S, B, K, 2) and within low .. high (S,)."""
        ops.secant_slope(moments, low, high, self.pull, slope)


Slope = Frozen | Gaussian | SlopeProfile | Secant
