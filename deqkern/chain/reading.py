"""What `NoiseSchedule` takes of a scheduler of diffusers, as it is set."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .schedulers import OTHER_LEVELS, SchedulerRow, few_steps, in_place_of, nearest_row, own_options, row_of
from .timesteps import FlowSteps, shifted

# What is read of one that has the noise levels of training must be among these, where it has the option at all.
_READ: Mapping[str, tuple[Any, ...]] = {
    "timestep_type": ("discrete",),
    "lambda_min_clipped": (-math.inf,),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
}
# Its options that `NoiseSchedule` has by the same name.
_TAKEN = (
    "prediction_type", "num_train_timesteps", "timestep_spacing", "steps_offset", "clip_sample", "clip_sample_range",
    "thresholding", "dynamic_thresholding_ratio", "sample_max_value",
)  # fmt: skip
_LOWER_ORDER_FINAL = 15  # a chain of fewer steps ends with a first-order one: DPMSolverMultistepScheduler


class OwnLevels(Protocol):
    """Noise levels that stand in place of those that a schedule lays."""

    def steps(self, count: int) -> FlowSteps:
        """The timesteps (S,) and noise-to-signal ratios, or levels of flow matching, (S+1,) of `count` steps."""


@dataclass(frozen=True)
class GivenLevels:
    """A list of the user's own, which serves as many steps as it has. `owner` names whose it is."""

    timesteps: Tensor
    sigmas: Tensor
    owner: str

    def steps(self, count: int) -> FlowSteps:
        """See `OwnLevels`."""
        if count != len(self.timesteps):
            raise ValueError(
                f"num_inference_steps must be {len(self.timesteps)}, as many as the timesteps or sigmas that the "
                f"{self.owner} was given, got {count}"
            )
        return _descending(self.timesteps, self.sigmas)


@dataclass(frozen=True)
class ScheduledLevels:
    """The levels that a scheduler takes itself: those that it is set to, if they are `count`, else as if it were."""

    scheduler: Any

    def steps(self, count: int) -> FlowSteps:
        """See `OwnLevels`."""
        scheduler = self.scheduler
        if len(scheduler.timesteps) != count or len(scheduler.sigmas) != count + 1:
            scheduler = copy.deepcopy(scheduler)
            try:
                scheduler.set_timesteps(count)
            except ValueError as error:
                raise ValueError(
                    f"num_inference_steps={count}: the scheduler cannot be set to it ({error}); call its set_timesteps "
                    "with all that it needs, such as mu, before from_diffusers"
                ) from error
        return _descending(scheduler.timesteps.detach().cpu(), scheduler.sigmas.detach().to("cpu", torch.float64))


def given_flow_levels(sigmas: Any, total: int, shift: float) -> GivenLevels:
    """The levels `sigmas` (S,) of a user's own, within 1 .. 0 before the shift; the last step ends at 0."""
    try:
        levels = torch.as_tensor(sigmas, dtype=torch.float32, device="cpu").detach()
    except (RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"sigmas must be a list of numbers, got {type(sigmas).__name__}") from error
    if levels.ndim != 1 or len(levels) == 0:
        raise ValueError(f"sigmas must be a list of at least one number, got shape {tuple(levels.shape)}")
    if len(levels) > 1 and levels[-1] == 0:
        levels = levels[:-1]  # the end, said
    falling = bool((levels[1:] < levels[:-1]).all())
    if not (falling and levels[-1] > 0 and levels[0] <= 1):  # not so for NaN
        raise ValueError(f"sigmas must descend within 1 .. 0, got {levels.tolist()}")
    levels = shifted(levels, shift)
    return GivenLevels(levels * total, torch.cat([levels.double(), levels.new_zeros(1).double()]), "schedule")


def _descending(timesteps: Tensor, sigmas: Tensor) -> FlowSteps:
    if not bool((sigmas[1:] <= sigmas[:-1]).all()) or sigmas[-1] < 0:
        raise ValueError("scheduler.sigmas must descend to no less than 0")
    return FlowSteps(timesteps, sigmas)


@dataclass(frozen=True)
class OwnChain:
    """What a `NoiseSchedule` keeps of the scheduler that it was read from.

    levels: the noise levels, where they are not those of the schedule.
    order: of its chain. eta: of its chain.
    lower_order_final: whether a short chain of order 2 ends with a step of order 1. euler_at_final: whether any does.
    unsolved: why its own steps are no chain of `NoiseSchedule.steps`, in words, if they are none.
    """

    levels: OwnLevels | None = None
    order: int = 1
    eta: float = 0.0
    lower_order_final: bool = True
    euler_at_final: bool = False
    unsolved: str | None = None

    def ends_in_order_1(self, count: int) -> bool:
        """Whether the last of `count` steps of order 2 is of order 1, also where it ends with noise."""
        return self.euler_at_final or (self.lower_order_final and count < _LOWER_ORDER_FINAL)


class Reading(NamedTuple):
    """What `NoiseSchedule` takes of a scheduler."""

    alphas_cumprod: Tensor | None  # (T,); None for flow matching
    options: dict[str, Any]
    own: OwnChain


def read(scheduler: Any) -> Reading:
    """See `NoiseSchedule.from_diffusers`."""
    name, config, row = type(scheduler).__name__, getattr(scheduler, "config", None), row_of(scheduler)
    preserving = isinstance(config, Mapping) and getattr(scheduler, "alphas_cumprod", None) is not None
    few = few_steps(scheduler)
    if few is not None:
        raise (ValueError if preserving else TypeError)(f"scheduler is {few}")
    if preserving:
        return _read_preserving(name, scheduler, row)
    if isinstance(config, Mapping) and row.flow:
        _refuse(scheduler, config, row.refused)
        options = {"prediction_type": "flow", "num_train_timesteps": config.get("num_train_timesteps", 1000)}
        return Reading(None, options, OwnChain(_levels_of(scheduler, row, always=True)))
    use = nearest_row(scheduler, flow=True).name
    raise TypeError(f"scheduler must have alphas_cumprod or be a {use}, got {name}")


def _read_preserving(name: str, scheduler: Any, row: SchedulerRow) -> Reading:
    config = own_options(scheduler, scheduler.config)
    always = any(config.get(option) for option in row.own_levels or ())
    config |= dict.fromkeys(row.own_levels or ())
    _refuse(scheduler, config, row.refused)
    for option, values in _READ.items():
        if config.get(option, values[0]) not in values:
            raise ValueError(f"scheduler: {name} with {option}={config[option]!r} is not supported")
    options = {key: config[key] for key in _TAKEN if config.get(key) is not None}
    options["set_alpha_to_one"] = config.get("set_alpha_to_one", config.get("final_sigmas_type") != "sigma_min")
    unsolved = row.unsolved_option(config)
    if row.processes:
        if unsolved is not None:
            raise ValueError(f"scheduler is {unsolved}: a variance that the model predicts is none of its states'")
        options["process"] = row.processes[config["variance_type"]]
    own = OwnChain(
        _levels_of(scheduler, row, always=always),
        order=row.order_of(scheduler),
        eta=0.0 if row.processes else row.noise_of(scheduler).eta or 0.0,
        lower_order_final=bool(config.get("lower_order_final", True)),
        euler_at_final=bool(config.get("euler_at_final", False)),
        unsolved=unsolved and f"scheduler is {unsolved}; its noise levels alone serve order=1",
    )
    return Reading(scheduler.alphas_cumprod, options, own)


def _levels_of(scheduler: Any, row: SchedulerRow, *, always: bool) -> OwnLevels | None:
    """The noise levels that are the scheduler's own; `always`: also where it takes them itself."""
    if _is_given(scheduler):
        name = type(scheduler).__name__
        if not row.reads_given:
            raise ValueError(
                f"scheduler: {name} was set to timesteps or sigmas other than its own, which are not read; call its "
                "set_timesteps(num_inference_steps) before, or give them to a DPMSolverMultistepScheduler or a "
                "DDPMScheduler"
            )
        timesteps = scheduler.timesteps.detach().cpu().clone()
        if not hasattr(scheduler, "sigmas"):
            abar = scheduler.alphas_cumprod.detach().to("cpu", torch.float64)[timesteps]
            sigmas = torch.cat([((1 - abar) / abar).sqrt(), abar.new_zeros(1)])
        else:
            sigmas = scheduler.sigmas.detach().to("cpu", torch.float64, copy=True)
        return GivenLevels(timesteps, sigmas, name)
    return ScheduledLevels(copy.deepcopy(scheduler)) if always else None


def _is_given(scheduler: Any) -> bool:
    """Whether it is set to timesteps or sigmas that it does not take itself for as many steps."""
    if getattr(scheduler, "custom_timesteps", False):
        return True
    count = getattr(scheduler, "num_inference_steps", None)
    if count is None:
        return False
    usual = copy.copy(scheduler)  # set_timesteps assigns: the scheduler keeps its own
    try:
        type(scheduler).set_timesteps(usual, count)
    except (AssertionError, AttributeError, TypeError, ValueError):
        return False  # it needs more, such as mu
    return not all(
        _same(getattr(scheduler, name, None), getattr(usual, name, None)) for name in ("timesteps", "sigmas")
    )


def _same(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return one is other or (not isinstance(one, Tensor) and not isinstance(other, Tensor))
    return one.shape == other.shape and bool((one.detach().cpu().double() == other.detach().cpu().double()).all())


def _refuse(scheduler: Any, config: Mapping[str, Any], options: Sequence[str]) -> None:
    for option in options:
        if config.get(option):
            use = in_place_of(scheduler, nearest_row(scheduler), "scheduler") + " without it"
            if option in OTHER_LEVELS:
                use = "DPMSolverMultistepScheduler.from_config(scheduler.config), of which it is read"
            raise ValueError(
                f"scheduler: {type(scheduler).__name__} with {option}={config[option]!r} is not supported; give {use}"
            )
