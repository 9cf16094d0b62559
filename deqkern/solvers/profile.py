"""Slopes of one model, measured over earlier solves, on disk and for any number of steps."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike

import torch
from torch import Tensor

from ..chain.schedule import StepTable
from ..support import storage
from .basis import Basis

_FORMAT = "deqkern.SlopeProfile.1"


@dataclass(frozen=True, eq=False)
class SlopeProfile:
    """Shrinkages of one model, measured over earlier solves: per noise level and band, for any number of steps.

    Made by `deqkern.calibrate`. Between two levels the logit of the shrinkage is linear in log_snr, outside constant.

    Args:
        log_snr: (T,) float64, increasing.
        shrinkage: (T, K) float64 in [0, 1].
        shape: That of a sample.

    Raises:
        ValueError: If a shape or a value does not fit.
        TypeError: If log_snr or shrinkage is no float64 tensor.

    Example:
        >>> schedule = deqkern.NoiseSchedule.linear()
        >>> profile = deqkern.calibrate(lambda x, t: 0.1 * x, (1, 8, 8), schedule, 10, samples=1)
        >>> profile.shrinkage.shape
        torch.Size([10, 8])
        >>> solver = deqkern.solvers.default(profile=profile)
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

    def initial(self, table: StepTable, basis: Basis) -> Tensor:
        """See `Slope`."""
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
        """Write a safetensors file.

        Args:
            path: Of the file; one that is there is replaced.

        Raises:
            OSError: If it cannot be written.

        Example:
            >>> level, kappa = torch.zeros(1).double(), torch.full((1, 1), 0.5).double()
            >>> deqkern.SlopeProfile(level, kappa, (4,)).save("profile.safetensors")
        """
        tensors = {"log_snr": self.log_snr, "shrinkage": self.shrinkage}
        storage.write(path, tensors, {"shape": ",".join(map(str, self.shape)), "format": _FORMAT})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> SlopeProfile:
        """Read a file written by `save`.

        Args:
            path: Of the file.

        Returns:
            The profile, on the CPU.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is another kind of file.

        Example:
            >>> level, kappa = torch.zeros(1).double(), torch.full((1, 1), 0.5).double()
            >>> deqkern.SlopeProfile(level, kappa, (4,)).save("profile.safetensors")
            >>> deqkern.SlopeProfile.load("profile.safetensors").shape
            (4,)
        """
        with storage.reading(path, "a SlopeProfile") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError("it was not written by SlopeProfile.save")
            shape = tuple(int(size) for size in metadata["shape"].split(","))
            return cls(file.get_tensor("log_snr"), file.get_tensor("shrinkage"), shape)
