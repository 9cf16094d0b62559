"""Diffusion problems with known answers: epsilon-predicting models that need no training, and the sequential chain.

Each model is a callable model(x, t) on samples (N, *shape), exact for its data under `schedule.alphas_cumprod`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deqkern import NoiseSchedule
from deqkern.engine.solution import relative_error
from deqkern.gradients import Adjoint
from deqkern.gradients.pullback import Pullback
from deqkern.network.model import Network

Model = Callable[[Tensor, Tensor], Tensor]


@dataclass
class _Exact:
    schedule: NoiseSchedule
    calls: list[int] = field(default_factory=list, kw_only=True)  # rows of each call
    levels: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False)  # no copy in a CUDA graph

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls.append(len(x))
        if x.device not in self.levels:
            self.levels[x.device] = self.schedule.alphas_cumprod.to(x.device)
        abar = self.levels[x.device][t.long()].to(torch.float32)
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


def chain(
    model: Callable[..., Any],
    noise: Tensor,  # (B, *shape)
    schedule: NoiseSchedule,
    steps: int,
    *,
    step_noise: Tensor | None = None,  # (S, B, *shape)
    model_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Tensor:
    """The sequential chain as a loop, under autograd: the ground truth (B, *shape), fp32 or fp64."""
    table, x = schedule.steps(steps, **options), noise.to(torch.promote_types(noise.dtype, torch.float32))
    before = torch.zeros_like(x)
    for i in range(steps):
        out = model(x, table.timesteps[i].expand(len(x)), **(model_kwargs or {}))
        out = getattr(out, "sample", out)
        if table.converts:
            out = table.effective_output(x, out, torch.full((len(x),), i))
        x = float(table.a[i]) * x + float(table.b[i]) * out + float(table.c[i]) * before
        before = out
        if step_noise is not None:
            x = x + float(table.n[i]) * step_noise[i]
    return x


def adjoint_error(order: int, eta: float, steps: int, total: int, batch: int = 1) -> Tensor:
    """The relative error (B,) of AdjointDEIS by the noise, on a Gaussian over `total` timesteps, in float64.

    Against its closed form: P = alpha lam grows by e^l / (1 + e^(2l) v)^(1/2) for the ODE, and by the square of that
    for the SDE. The Jacobian of the model does not depend on the states.
    """
    variance = torch.linspace(0.1, 2, 5, dtype=torch.float64)
    schedule = NoiseSchedule.linear(0.1 / total, 20 / total, total)
    abar = schedule.alphas_cumprod
    assert abar is not None

    def model(x: Tensor, t: Tensor) -> Tensor:
        level = abar[t.long()][:, None]
        return (1 - level).sqrt() / (level * variance + 1 - level) * x

    table, noise = schedule.steps(steps, eta=eta, sigma_min=0.1), torch.zeros(batch, 5, dtype=torch.float64)
    pullback = Pullback(Network(model, table, {}, noise), Adjoint(order), 0.0, None)
    found = pullback(noise.expand(steps + 1, batch, 5), torch.ones_like(noise)).first
    ends = [(table.alpha[0], table.sigma[0]), (table.alpha_next[-1], table.sigma_next[-1])]
    grown = [(a / s) / (1 + (a / s) ** 2 * variance).sqrt() for a, s in ends]
    expected = ends[1][0] / ends[0][0] * (grown[0] / grown[1]) ** (1 + eta**2)
    return relative_error(found, expected.expand(batch, 5))
