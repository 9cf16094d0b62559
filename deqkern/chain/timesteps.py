"""Where the steps of a chain lie between the ends of its schedule: timesteps, and the noise levels at their ends."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

TIMESTEP_SPACINGS = ("leading", "linspace", "trailing", "log_snr")

_TINY = 1e-12


class DiscreteSteps(NamedTuple):
    """The timesteps of S steps through a schedule of training, and abar at both ends of each (S,) float64."""

    timesteps: Tensor  # (S,) int64
    noisy: Tensor
    clean: Tensor


def discrete_steps(
    abar: Tensor,  # (T,)
    count: int,
    *,
    spacing: str,
    offset: int,
    to_one: bool,
    order: int,
    sigma_min: float | None,
    joined: bool = False,
) -> DiscreteSteps:
    """The steps that `NoiseSchedule.steps` lays; `to_one`: the last of them leads to abar = 1, not to abar[0].

    joined: each step leads to the next timestep, as with order 2, but from timesteps spaced as those of order 1.
    """
    total = len(abar)
    if spacing == "log_snr":
        timesteps = _log_snr_timesteps(abar, count, to_one)
    else:
        timesteps = (spaced_timesteps if order == 1 else multistep_timesteps)(spacing, total, count, offset=offset)
    if timesteps[0] >= total:
        raise ValueError(
            f"steps_offset={offset} with num_inference_steps={count} starts at timestep {timesteps[0]}, "
            f"beyond the last one, {total - 1}"
        )
    # where each step ends; -1 is the clean sample
    if spacing == "log_snr" and not to_one:
        following = [*timesteps[1:], 0]
    elif spacing == "log_snr" or order == 2 or joined:
        following = [*timesteps[1:], -1]
    else:
        following = [t - total // count for t in timesteps]
    if sigma_min is not None:
        lowest = _timestep_of(abar, count, timesteps[0], sigma_min=sigma_min)
        chain = even_in_log_snr(abar, count, timesteps[0], lowest=lowest)
        timesteps, following = chain[:-1], chain[1:]
    final = abar.new_ones(1) if to_one else abar[:1]
    clean = torch.cat([abar, final])[[t if t >= 0 else total for t in following]]
    return DiscreteSteps(torch.tensor(timesteps, device="cpu"), abar[timesteps], clean)


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
    return spaced_timesteps(spacing, total, count, offset=offset)


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


def _log_snr_timesteps(abar: Tensor, count: int, to_one: bool) -> list[int]:
    """From T - 1 to 0, whence the last step leads to the clean sample; it ends at 0 without `to_one`."""
    top = len(abar) - 1
    if to_one:
        return even_in_log_snr(abar, count - 1, top, lowest=0) if count > 1 else [top]
    if count > top:
        raise ValueError(f"num_inference_steps must be in 1 .. {top} without set_alpha_to_one, got {count}")
    return even_in_log_snr(abar, count, top, lowest=0)[:-1]


def _timestep_of(abar: Tensor, count: int, top: int, sigma_min: float) -> int:
    """The first timestep whose noise-to-signal ratio is no less than `sigma_min`, with room for `count` steps to it."""
    reached = ((1 - abar) >= sigma_min**2 * abar).nonzero()
    lowest = int(reached[0]) if len(reached) else len(abar)
    if lowest >= top:
        raise ValueError(f"sigma_min={sigma_min} is not below the noise of the chain's first timestep, {top}")
    if top - lowest < count:
        raise ValueError(
            f"num_inference_steps={count} is more than the {top - lowest} steps that sigma_min={sigma_min} leaves"
        )
    return lowest


class FlowSteps(NamedTuple):
    """The timesteps of S steps of rectified flow, and the noise levels at their S + 1 ends."""

    timesteps: Tensor  # (S,) float32
    sigmas: Tensor  # (S+1,) float64


def flow_steps(total: int, count: int, shift: float) -> FlowSteps:
    """FlowMatchEulerDiscreteScheduler.set_timesteps."""
    # the ends are shifted twice, here and with all the others below, as the scheduler does
    ends = shifted(torch.tensor([1, total], dtype=torch.float32, device="cpu") / total, shift)
    low, high = (s * total for s in ends.tolist())
    levels = high + torch.arange(count, dtype=torch.float64, device="cpu") * ((low - high) / max(count - 1, 1))
    sigmas = shifted(levels / total, shift).float()
    return FlowSteps(sigmas * total, torch.cat([sigmas.double(), sigmas.new_zeros(1, dtype=torch.float64)]))


def end_flow_at(steps: FlowSteps, sigma_min: float) -> FlowSteps:
    """The same steps, shortened to end at the noise-to-signal ratio `sigma_min`."""
    timesteps, sigmas = steps
    level = sigma_min / (1 + sigma_min)
    if level >= sigmas[0]:
        raise ValueError(f"sigma_min={sigma_min} is not below the noise of the chain's first timestep")
    last = int((sigmas > level).sum()) - 1  # sigma, piecewise linear in the step, crosses the level after this one
    if last + 1 == len(sigmas):
        raise ValueError(f"sigma_min={sigma_min} lies below the end of the scheduler's own sigmas")
    crossing = last + float((sigmas[last] - level) / (sigmas[last] - sigmas[last + 1]))
    position = torch.arange(len(sigmas), dtype=torch.float64, device="cpu") * (crossing / len(timesteps))
    sigmas = _interpolated(sigmas, position)
    return FlowSteps(_interpolated(timesteps.double(), position[:-1]).float(), sigmas)


def _interpolated(values: Tensor, position: Tensor) -> Tensor:
    index = position.long()
    return torch.lerp(values[index], values[(index + 1).clamp_max(len(values) - 1)], position - index)


def shifted(s: Tensor, shift: float) -> Tensor:
    """Levels of flow matching, moved towards the noise (arXiv 2403.03206, eq. 23)."""
    return shift * s / (1 + (shift - 1) * s)
