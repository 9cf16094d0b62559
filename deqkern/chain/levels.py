"""The noise levels at both ends of every step: what `StepTable.build` makes coefficients of."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .schedulers import own_steps
from .timesteps import FlowSteps, discrete_steps, end_flow_at, flow_steps

_TINY = 1e-12  # a variance that rounding may be off by


class StepLevels(NamedTuple):
    """What the model is called with, the ends alpha x0 + sigma eps of S steps, and the noise that they draw; (S,)."""

    timesteps: Tensor
    alpha: Tensor
    sigma: Tensor
    alpha_next: Tensor
    sigma_next: Tensor
    n: Tensor


def flow_levels(own: Any, total: int, count: int, *, shift: float, sigma_min: float | None) -> StepLevels:
    """Of flow matching with T = `total`; `own`: the scheduler whose noise levels these are, if any."""
    if own is None:
        steps = flow_steps(total, count, shift)
    else:
        timesteps, sigmas = own_steps(own, count)
        if sigmas[0] > 1:
            raise ValueError("scheduler.sigmas must descend within 1 .. 0")
        steps = FlowSteps(timesteps.float(), sigmas)
    if sigma_min is not None:
        steps = end_flow_at(steps, sigma_min)
    sigma, sigma_next = steps.sigmas[:-1], steps.sigmas[1:]
    return StepLevels(
        steps.timesteps,
        alpha=1 - sigma,
        sigma=sigma,
        alpha_next=1 - sigma_next,
        sigma_next=sigma_next,
        n=torch.zeros_like(sigma),
    )


def discrete_levels(
    abar: Tensor,  # (T,)
    count: int,
    *,
    spacing: str,
    offset: int,
    to_one: bool,
    eta: float,
    sigma_min: float | None,
    order: int,
) -> StepLevels:
    """Of a variance preserving schedule: see `discrete_steps`."""
    steps = discrete_steps(abar, count, spacing=spacing, offset=offset, to_one=to_one, sigma_min=sigma_min, order=order)
    return marginal_levels(steps.timesteps, steps.noisy, steps.clean, eta=eta)


def own_levels(own: Any, count: int, *, eta: float, sigma_min: float | None) -> StepLevels:
    """Of a variance preserving scheduler that steps on noise levels of its own."""
    if sigma_min is not None:
        raise ValueError("sigma_min needs the noise levels of training, not the scheduler's own sigmas")
    timesteps, sigmas = own_steps(own, count)
    abar = 1 / (1 + sigmas**2)
    return marginal_levels(timesteps, abar[:-1], abar[1:], eta=eta)


def marginal_levels(timesteps: Tensor, now: Tensor, after: Tensor, *, eta: float) -> StepLevels:
    """Of steps from abar = `now` to `after`, (S,) both, with the noise of arXiv 2010.02502, eq. 16."""
    variance = eta**2 * (1 - after) / (1 - now).clamp_min(_TINY) * (1 - now / after)
    if bool((variance > 1 - after + _TINY).any()):
        raise ValueError(f"eta={eta} adds more noise than a step has room for; it is at most 1")
    return StepLevels(
        timesteps,
        alpha=now.sqrt(),
        sigma=(1 - now).sqrt(),
        alpha_next=after.sqrt(),
        sigma_next=(1 - after).sqrt(),
        n=variance.sqrt(),
    )
