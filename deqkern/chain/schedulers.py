"""All that is known of diffusers' schedulers: one table, `SCHEDULERS`, and how the options of a scheduler are read.

A row says which chain a scheduler steps along, with which options it does, and how its steps draw noise. It is read by
`NoiseSchedule.from_diffusers`, by `deqkern.integrations.diffusers.parallel` and by all that is refused there. A new
scheduler is a row here and, if its chain is new, the coefficients in `StepTable.build`. diffusers is not imported.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .timesteps import FlowSteps

Values = Mapping[str, tuple[Any, ...]]  # option -> what it may be


@dataclass(frozen=True)
class Noise:
    """How the steps of a scheduler draw noise.

    eta: the `eta` of their chain; None where each call of the pipeline gives it.
    dtype: in which it is drawn; None for that of the states.
    """

    eta: float | None = 0.0
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class SchedulerRow:
    """A scheduler of diffusers whose steps are those of a chain of `NoiseSchedule.steps`.

    name: of its class; a subclass counts as well.
    flow: whether it is one of flow matching; else it is variance preserving.
    order: of its chain, or the name of its option that says so.
    accepted: options that must have one of these values, for its steps to be the chain's.
    accepted_final: the same, where its chain does not end without noise (`final_sigmas_type`).
    refused: options that replace its noise levels by others which are not read.
    own_levels: options by which it steps on noise levels of its own, which are read as they stand; None: always.
    noise: how its steps draw noise; a mapping by the value of its `algorithm_type`.
    result: the dtype of the state after a step, "output" for that of the model's output, or "wider" for the wider one
        of that and the state's.
    invertible: whether its chain can be run backwards by `deqkern.integrations.diffusers.invert`.
    """

    name: str
    flow: bool = False
    order: int | str = 1
    accepted: Values = field(default_factory=dict)
    accepted_final: Values = field(default_factory=dict)
    refused: tuple[str, ...] = ()
    own_levels: tuple[str, ...] | None = ()
    noise: Noise | Mapping[str, Noise] = Noise()
    result: str = "wider"
    invertible: bool = False

    def order_of(self, scheduler: Any) -> int:
        """The order of the chain of `scheduler`, as it is set."""
        return int(scheduler.config[self.order]) if isinstance(self.order, str) else self.order

    def noise_of(self, scheduler: Any) -> Noise:
        """How the steps of `scheduler`, as it is set, draw noise."""
        return self.noise if isinstance(self.noise, Noise) else self.noise[scheduler.config["algorithm_type"]]

    def result_dtype(self, output: torch.dtype, state: torch.dtype) -> torch.dtype:
        """The dtype of the state after a step."""
        return output if self.result == "output" else torch.promote_types(output, state)


# Options that replace the noise levels of training.
OTHER_LEVELS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
# An option that makes a variance preserving scheduler one of flow matching, whose shift is `flow_shift` then.
FLOW_OPTION = "use_flow_sigmas"
# What no scheduler that steps on the noise levels of training is read with.
_REFUSED = (*OTHER_LEVELS, FLOW_OPTION, "original_inference_steps")

SCHEDULERS = (
    SchedulerRow("DDIMScheduler", refused=_REFUSED, noise=Noise(eta=None), invertible=True),
    SchedulerRow(
        "DPMSolverMultistepScheduler",
        order="solver_order",
        accepted={
            "solver_order": (2,),
            "solver_type": ("midpoint",),
            "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
        },
        accepted_final={"euler_at_final": (False,), "lower_order_final": (True,)},
        refused=_REFUSED,
        own_levels=OTHER_LEVELS,
        noise={"dpmsolver++": Noise(), "sde-dpmsolver++": Noise(eta=1.0, dtype=torch.float32)},
    ),
    SchedulerRow(
        "FlowMatchEulerDiscreteScheduler",
        flow=True,
        refused=("invert_sigmas", "stochastic_sampling"),
        own_levels=None,
        result="output",
    ),
)
# Any other one that has the noise levels of training: they are read, its steps are not.
_OTHER = SchedulerRow("", refused=_REFUSED)
# What is read of one that has the noise levels of training must be among these, where it has the option at all.
_READ: Values = {
    "timestep_type": ("discrete",),
    "lambda_min_clipped": (-math.inf,),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
}
# Its options that `NoiseSchedule` has by the same name.
_TAKEN = (
    "prediction_type", "num_train_timesteps", "timestep_spacing", "steps_offset", "clip_sample", "clip_sample_range",
    "thresholding", "dynamic_thresholding_ratio", "sample_max_value",
)  # fmt: skip


def default_row(flow: bool) -> SchedulerRow:
    """The scheduler to use in place of another one."""
    return next(row for row in SCHEDULERS if row.flow == flow)


def defining_class(owner: Any, method: str) -> str | None:
    """The class of diffusers in which the type of `owner` has its `method`."""
    function = getattr(type(owner), method, None)
    if not getattr(function, "__module__", "").startswith("diffusers."):
        return None
    return getattr(function, "__qualname__", "").rpartition(".")[0]


def row_by_step(scheduler: Any) -> SchedulerRow | None:
    """The row whose class gives `scheduler` its `step`."""
    name = defining_class(scheduler, "step")
    return next((row for row in SCHEDULERS if row.name == name), None)


def replaced_methods(scheduler: Any, row: SchedulerRow) -> list[str]:
    """The methods of the class of `row` that a subclass, or the object itself, replaces."""
    kinds = type(scheduler).__mro__
    at = next(i for i, kind in enumerate(kinds) if kind.__name__ == row.name)
    names = {name for owner in (*kinds[:at], scheduler) for name in vars(owner) if not name.startswith("__")}
    return sorted(names & {name for name in dir(kinds[at]) if callable(getattr(kinds[at], name))})


class Reading(NamedTuple):
    """What `NoiseSchedule` takes of a scheduler."""

    alphas_cumprod: Tensor | None  # (T,); None for flow matching
    options: dict[str, Any]
    own: Any = None  # a copy of it, where the noise levels are its own


def read(scheduler: Any) -> Reading:
    """See `NoiseSchedule.from_diffusers`."""
    name, config = type(scheduler).__name__, getattr(scheduler, "config", None)
    kinds = {kind.__name__ for kind in type(scheduler).__mro__}
    row = next((row for row in SCHEDULERS if row.name in kinds), _OTHER)
    if isinstance(config, Mapping) and getattr(scheduler, "alphas_cumprod", None) is not None:
        config, own = own_options(scheduler, config), None
        if any(config.get(option) for option in row.own_levels or ()):
            config, own = config | dict.fromkeys(row.own_levels or ()), copy.deepcopy(scheduler)
        _refuse(name, config, row.refused)
        for option, values in _READ.items():
            if config.get(option, values[0]) not in values:
                raise ValueError(f"scheduler: {name} with {option}={config[option]!r} is not supported")
        options = {key: config[key] for key in _TAKEN if config.get(key) is not None}
        options["set_alpha_to_one"] = config.get("set_alpha_to_one", config.get("final_sigmas_type") != "sigma_min")
        return Reading(scheduler.alphas_cumprod, options, own)
    if isinstance(config, Mapping) and row.flow:
        _refuse(name, config, row.refused)
        options = {"prediction_type": "flow", "num_train_timesteps": config.get("num_train_timesteps", 1000)}
        return Reading(None, options, copy.deepcopy(scheduler))
    raise TypeError(f"scheduler must have alphas_cumprod or be a {default_row(flow=True).name}, got {name}")


def own_steps(scheduler: Any, count: int) -> FlowSteps:
    """The timesteps (S,) and the noise levels (S+1,) float64 that the scheduler itself takes for `count` steps."""
    scheduler = _set_to(scheduler, count)
    sigmas = scheduler.sigmas.detach().to("cpu", torch.float64)
    if not bool((sigmas[1:] <= sigmas[:-1]).all()) or sigmas[-1] < 0:
        raise ValueError("scheduler.sigmas must descend to no less than 0")
    return FlowSteps(scheduler.timesteps.detach().cpu(), sigmas)


def _set_to(scheduler: Any, count: int) -> Any:
    """The scheduler, if it is set to `count` timesteps, else a copy that is."""
    if len(scheduler.timesteps) == count and len(scheduler.sigmas) == count + 1:
        return scheduler
    scheduler = copy.deepcopy(scheduler)
    try:
        scheduler.set_timesteps(count)
    except ValueError as error:
        raise ValueError(
            f"num_inference_steps={count}: the scheduler cannot be set to it ({error}); call its set_timesteps with "
            "all that it needs, such as mu, before from_diffusers"
        ) from error
    return scheduler


def own_options(scheduler: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the scheduler itself takes: `from_config` also keeps the options of the one whose config it was."""
    inits = [vars(kind)["__init__"] for kind in type(scheduler).__mro__ if "__init__" in vars(kind)]
    own = {name for init in inits for name in inspect.signature(init).parameters}
    return {name: value for name, value in config.items() if name in own}


def _refuse(name: str, config: Mapping[str, Any], options: Sequence[str]) -> None:
    for option in options:
        if config.get(option):
            raise ValueError(
                f"scheduler: {name} with {option}={config[option]!r} is not supported; "
                f"give a {default_row(flow=False).name} or {default_row(flow=True).name} without it"
            )
