"""Where the steps of a chain lie between the ends of its schedule."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_TINY = 1e-12


def spaced_timesteps(spacing: str, total: int, count: int, offset: int) -> list[int]:
    """DDIMScheduler.set_timesteps, descending, to the last rounding (table 2 of arXiv 2305.08891)."""
    if spacing == "leading":
        return [i * (total // count) + offset for i in range(count)][::-1]
    if spacing == "linspace":
        return [round(i * ((total - 1) / max(count - 1, 1))) for i in range(count)][::-1]
    # numpy.arange steps by the rounded difference of its first two values. For some S it gives one value too many, and
    # the scheduler a timestep -1, which is not part of any schedule: left out here
    delta = (total - total / count) - total
    return [round(total + i * delta) - 1 for i in range(count)]


def multistep_timesteps(spacing: str, total: int, count: int, offset: int) -> list[int]:
    """DPMSolverMultistepScheduler.set_timesteps, descending: S + 1 timesteps but for the last, or trailing."""
    if spacing == "leading":
        return [i * (total // (count + 1)) + offset for i in range(1, count + 1)][::-1]
    if spacing == "linspace":
        return [round(i * ((total - 1) / count)) for i in range(1, count + 1)][::-1]
    return spaced_timesteps(spacing, total, count, offset)


def even_in_log_snr(abar: Tensor, count: int, top: int, lowest: int) -> list[int]:
    """Timesteps from `top` down to `lowest` in `count` steps (count + 1,), no two the same."""
    log_snr = (abar / (1 - abar)).log()[lowest : top + 1]
    if log_snr[0] == math.inf:
        log_snr[0] = 2 * log_snr[1] - log_snr[2] if top - lowest > 1 else log_snr[1] + 1
    if log_snr[-1] == -math.inf:
        log_snr[-1] = 2 * log_snr[-2] - log_snr[-3] if top - lowest > 1 else log_snr[-2] - 1
    target = torch.lerp(log_snr[0], log_snr[-1], torch.arange(count + 1, dtype=torch.float64, device="cpu") / count)
    right = torch.searchsorted(-log_snr, -target).clamp(1, len(log_snr) - 1)
    before, after = log_snr[right - 1], log_snr[right]
    part = (before - target) / (before - after).clamp_min(_TINY)
    chain = [lowest, *(lowest + right - 1 + part).round().int().tolist()[1:-1], top]
    for k in range(1, count):
        chain[k] = max(chain[k], chain[k - 1] + 1)
    for k in range(count - 1, 0, -1):
        chain[k] = min(chain[k], chain[k + 1] - 1)
    return chain[::-1]


def end_flow_at(timesteps: Tensor, sigmas: Tensor, sigma_min: float) -> tuple[Tensor, Tensor]:
    level = sigma_min / (1 + sigma_min)
    if level >= sigmas[0]:
        raise ValueError(f"sigma_min={sigma_min} is not below the noise of the chain's first timestep")
    last = int((sigmas > level).sum()) - 1  # sigma, piecewise linear in the step, crosses the level after this one
    if last + 1 == len(sigmas):
        raise ValueError(f"sigma_min={sigma_min} lies below the end of the scheduler's own sigmas")
    crossing = last + float((sigmas[last] - level) / (sigmas[last] - sigmas[last + 1]))
    position = torch.arange(len(sigmas), dtype=torch.float64, device="cpu") * (crossing / len(timesteps))
    sigmas = _interpolated(sigmas, position)
    return _interpolated(timesteps.double(), position[:-1]).float(), sigmas


def _interpolated(values: Tensor, position: Tensor) -> Tensor:
    index = position.long()
    return torch.lerp(values[index], values[(index + 1).clamp_max(len(values) - 1)], position - index)


def shifted(s: Tensor, shift: float) -> Tensor:
    return shift * s / (1 + (shift - 1) * s)
