"""The noise levels at both ends of every step: what `StepTable.build` makes coefficients of."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .reading import OwnLevels
from .timesteps import DiscreteSteps, FlowSteps, discrete_steps, end_flow_at, flow_steps

_TINY = 1e-12  # a variance that rounding may be off by
_LEAST_VARIANCE = 1e-20  # of a DDPM step that does not start at timestep 0


class StepLevels(NamedTuple):
    """What the model is called with, the ends alpha x0 + sigma eps of S steps, and the noise that they draw; (S,)."""

    timesteps: Tensor
    alpha: Tensor
    sigma: Tensor
    alpha_next: Tensor
    sigma_next: Tensor
    n: Tensor


def levels_of(
    schedule: Any, own: OwnLevels | None, count: int, *, eta: float, sigma_min: float | None, order: int
) -> StepLevels:
    """Of `count` steps through a `NoiseSchedule`; `own`: the levels to take in place of those that it lays, if any."""
    if schedule.alphas_cumprod is None:
        if eta > 0:
            raise ValueError(f"eta must be 0 for prediction_type='flow', got {eta}")
        return flow_levels(own, schedule.num_train_timesteps, count, shift=schedule.shift, sigma_min=sigma_min)
    ddpm = schedule.process != "ddim"
    if own is not None:
        steps = own_steps(own, count, sigma_min=sigma_min)
    else:
        steps = discrete_steps(
            schedule.alphas_cumprod, count, spacing=schedule.timestep_spacing, offset=schedule.steps_offset,
            to_one=schedule.set_alpha_to_one, sigma_min=sigma_min, order=order, joined=ddpm,
        )  # fmt: skip
    return ddpm_levels(steps, large=schedule.process == "ddpm_large") if ddpm else ddim_levels(steps, eta=eta)


def flow_levels(own: OwnLevels | None, total: int, count: int, *, shift: float, sigma_min: float | None) -> StepLevels:
    """Of flow matching with T = `total`."""
    if own is None:
        steps = flow_steps(total, count, shift)
    else:
        timesteps, sigmas = own.steps(count)
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


def own_steps(own: OwnLevels, count: int, *, sigma_min: float | None) -> DiscreteSteps:
    """Of a variance preserving scheduler that steps on noise levels of its own."""
    if sigma_min is not None:
        raise ValueError("sigma_min needs the noise levels of training, not the scheduler's own sigmas")
    timesteps, sigmas = own.steps(count)
    abar = 1 / (1 + sigmas**2)
    return DiscreteSteps(timesteps, abar[:-1], abar[1:])


def ddim_levels(steps: DiscreteSteps, *, eta: float) -> StepLevels:
    """Of steps between these abar, with the noise of arXiv 2010.02502, eq. 16."""
    timesteps, now, after = steps
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


def ddpm_levels(steps: DiscreteSteps, *, large: bool) -> StepLevels:
    """Of the ancestral steps of arXiv 2006.11239 (eq. 7) between these abar, as diffusers' DDPMScheduler has them:

    x_next = sqrt(next) beta / (1 - now) x0 + sqrt(now / next) (1 - next) / (1 - now) x + s z,   beta = 1 - now / next,
    s^2 = beta (1 - next) / (1 - now), or beta if `large`; a step from timestep 0 draws no noise.

    now / next is rounded to fp32, as the scheduler has it: of 1000 steps that changes beta in the fourth digit, and
    what x0 and x then add up to. The clean end counts that, and all noise of the step, which if `large` is more than
    the schedule has there.
    """
    timesteps, now, after = steps
    ratio, room = (now.float() / after.float()).double(), (1 - now).clamp_min(_TINY)
    beta = 1 - ratio
    variance = beta if large else (beta * (1 - after) / room).clamp_min(_LEAST_VARIANCE)
    variance = torch.where(timesteps > 0, variance, 0.0)
    alpha, sigma, of_x = now.sqrt(), (1 - now).sqrt(), ratio.sqrt() * (1 - after) / room
    return StepLevels(
        timesteps,
        alpha=alpha,
        sigma=sigma,
        alpha_next=after.sqrt() * beta / room + of_x * alpha,
        sigma_next=((of_x * sigma) ** 2 + variance).sqrt(),
        n=variance.sqrt(),
    )
