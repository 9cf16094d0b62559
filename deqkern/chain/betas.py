"""The noise of training: betas by the usual rules, and abar from them, in float32 as networks are trained."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..support.checks import to_float, to_int

_ZERO_SNR = 2**-24  # what some diffusers schedulers put for a last abar of 0


def linear(beta_start: float, beta_end: float, total: int) -> Tensor:
    """Evenly spaced (T,)."""
    ends = (to_float("beta_start", beta_start), to_float("beta_end", beta_end))
    return torch.linspace(*ends, check_total(total), dtype=torch.float32, device="cpu")


def scaled_linear(beta_start: float, beta_end: float, total: int) -> Tensor:
    """Of evenly spaced square roots (T,)."""
    first, last = to_float("beta_start", beta_start), to_float("beta_end", beta_end)
    if first < 0 or last < 0:
        raise ValueError(f"beta_start and beta_end must be >= 0, got {beta_start} and {beta_end}")
    return torch.linspace(first**0.5, last**0.5, check_total(total), dtype=torch.float32, device="cpu") ** 2


def cosine(total: int) -> list[float]:
    """The squared cosine, capped at 0.999."""
    total = check_total(total)
    level = [math.cos((i / total + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(total + 1)]
    return [min(1 - after / before, 0.999) for before, after in itertools.pairwise(level)]


def alphas_cumprod_of(betas: Tensor | Sequence[float], rescale_betas_zero_snr: bool) -> Tensor:
    """prod (1 - betas[:t+1]) (T,), scaled to end at 0 if asked for."""
    betas = torch.as_tensor(betas, dtype=torch.float32, device="cpu")
    if betas.ndim != 1 or not len(betas) or not bool(((betas >= 0) & (betas <= 1)).all()):
        raise ValueError(f"betas must be (T,) with values in [0, 1], got shape {tuple(betas.shape)}")
    if rescale_betas_zero_snr:
        betas = _rescaled_to_zero_snr(betas)
    return torch.cumprod(1.0 - betas, dim=0)


def checked_alphas_cumprod(values: object) -> Tensor:
    """abar (T,) as a float64 tensor of its own on the CPU.

    Raises ValueError or TypeError for what no abar can be.
    """
    if values is None:
        raise TypeError("alphas_cumprod must be a tensor (T,), got None")
    abar = torch.as_tensor(values, device="cpu").detach().to(torch.float64, copy=True)
    if abar.ndim != 1 or not len(abar):
        raise ValueError(f"alphas_cumprod must have shape (T,) with T >= 1, got {tuple(abar.shape)}")
    ordered = abar[:-1] if abar[-1] == _ZERO_SNR else abar
    if not bool((ordered[1:] <= ordered[:-1]).all()):
        raise ValueError("alphas_cumprod must not increase")
    if not 0 < float(abar[0]) <= 1 or not bool((abar[:-1] > 0).all()) or abar[-1] < 0:
        raise ValueError("alphas_cumprod must lie in (0, 1]; only its last entry may be 0")
    return abar


def check_total(total: int) -> int:
    """T, an int >= 1."""
    if to_int("num_train_timesteps", total) < 1:
        raise ValueError(f"num_train_timesteps must be >= 1, got {total}")
    return int(total)


def _rescaled_to_zero_snr(betas: Tensor) -> Tensor:
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    if first == last:
        raise ValueError("rescale_betas_zero_snr needs betas (T,) with T > 1 and some noise after the first")
    abar = ((root - last) * (first / (first - last))) ** 2
    return 1 - torch.cat([abar[:1], abar[1:] / abar[:-1]])
