"""Diffusion problems with known answers: epsilon-predicting models that need no training.

Each is a callable model(x, t) on samples (N, *shape), exact for its data under `schedule.alphas_cumprod`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deqkern import NoiseSchedule

Model = Callable[[Tensor, Tensor], Tensor]


@dataclass
class _Exact:
    schedule: NoiseSchedule
    calls: list[int] = field(default_factory=list, kw_only=True)  # rows of each call

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls.append(len(x))
        abar = self.schedule.alphas_cumprod.to(x.device)[t.long()].to(torch.float32)
        alpha, sigma = abar.sqrt()[:, None], (1 - abar).sqrt()[:, None]
        flat = x.flatten(1).float()
        x0 = self.denoise(flat, alpha, sigma)
        return ((flat - alpha * x0) / sigma).view_as(x).to(x.dtype)

    def denoise(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:  # (N, D), (N, 1), (N, 1) -> (N, D)
        raise NotImplementedError


@dataclass
class Gaussian(_Exact):
    """Data N(mean, diag(variance)), both (D,): the chain is affine in the noise, element by element."""

    mean: Tensor
    variance: Tensor

    def denoise(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        gain = alpha * self.variance / (alpha**2 * self.variance + sigma**2)
        return self.mean + gain * (x - alpha * self.mean)


@dataclass
class GaussianMixture(_Exact):
    """Data drawn evenly from N(means[j], width^2), means (M, D). With a small width: a kernel density of the means."""

    means: Tensor
    width: float

    def denoise(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        total = alpha**2 * self.width**2 + sigma**2  # (N, 1)
        squared = x.square().sum(1, keepdim=True) - 2 * alpha * (x @ self.means.T)
        squared = squared + alpha**2 * self.means.square().sum(1)
        mean = torch.softmax(-squared / (2 * total), 1) @ self.means
        return mean + alpha * self.width**2 / total * (x - alpha * mean)


def gaussian(schedule: NoiseSchedule, shape: tuple[int, ...], generator: torch.Generator) -> Gaussian:
    """A Gaussian with a random mean and variances from 1e-3 to 10."""
    size = int(torch.tensor(shape).prod())
    variance = 10 ** (4 * torch.rand(size, generator=generator) - 3)
    return Gaussian(schedule, torch.randn(size, generator=generator), variance)


def mixture(schedule: NoiseSchedule, shape: tuple[int, ...], generator: torch.Generator) -> GaussianMixture:
    """Five well-separated Gaussians."""
    size = int(torch.tensor(shape).prod())
    return GaussianMixture(schedule, torch.randn(5, size, generator=generator), 0.2)


def digits_density(schedule: NoiseSchedule) -> GaussianMixture:
    """Kernel density of scikit-learn's 1797 digits, as samples (1, 8, 8) in [-1, 1]."""
    from sklearn.datasets import load_digits

    return GaussianMixture(schedule, torch.as_tensor(load_digits().data, dtype=torch.float32) / 8 - 1, 0.1)
