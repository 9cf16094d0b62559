"""What is known of diffusers' schedulers: one table, `SCHEDULERS`. diffusers is not imported.

A row says which chain a scheduler steps along, with which options it does, and how its steps draw noise. It is read by
`NoiseSchedule.from_diffusers` (in `reading.py`), by `deqkern.integrations.diffusers.parallel`, and by all that either
refuses. A new scheduler is a row here and, if its chain is new, the coefficients in `StepTable.build`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

Values = Mapping[str, tuple[Any, ...]]  # option -> what it may be

# The chains of `NoiseSchedule.process`: DDIM's, and DDPM's with either variance of arXiv 2006.11239, section 3.2.
PROCESSES = ("ddim", "ddpm", "ddpm_large")


@dataclass(frozen=True)
class Noise:
    """How the steps of a scheduler draw noise.

    eta: the `eta` of their chain; None where each call of the pipeline gives it.
    dtype: in which it is drawn; None for that of the states.
    at_zero: whether a step from timestep 0 draws it as well.
    """

    eta: float | None = 0.0
    dtype: torch.dtype | None = None
    at_zero: bool = True


@dataclass(frozen=True)
class SchedulerRow:
    """A scheduler of diffusers whose steps are those of a chain of `NoiseSchedule.steps`.

    name: of its class; a subclass counts as well.
    flow: whether it is one of flow matching; else it is variance preserving.
    order: of its chain, or the name of its option that says so.
    processes: the `process` of its chain, by the value of its `variance_type`; empty for DDIM's.
    accepted: options that must have one of these values, for its steps to be the chain's.
    refused: options that replace its noise levels by others which are not read.
    own_levels: options by which it steps on noise levels of its own, which are read as they stand; None: always.
    reads_given: whether timesteps or sigmas that the user gave its `set_timesteps` are read.
    noise: how its steps draw noise; a mapping by the value of its `algorithm_type`.
    result: the dtype of the state after a step, "output" for that of the model's output, or "wider" for the wider one
        of that and the state's.
    invertible: whether its chain can be run backwards by `deqkern.integrations.diffusers.invert`.
    """

    name: str
    flow: bool = False
    order: int | str = 1
    processes: Mapping[str, str] = field(default_factory=dict)
    accepted: Values = field(default_factory=dict)
    refused: tuple[str, ...] = ()
    own_levels: tuple[str, ...] | None = ()
    reads_given: bool = False
    noise: Noise | Mapping[str, Noise] = Noise()
    result: str = "wider"
    invertible: bool = False

    def order_of(self, scheduler: Any) -> int:
        """The order of the chain of `scheduler`, as it is set."""
        return int(scheduler.config[self.order]) if isinstance(self.order, str) else self.order

    def noise_of(self, scheduler: Any) -> Noise:
        """How the steps of `scheduler`, as it is set, draw noise."""
        if isinstance(self.noise, Noise):
            return self.noise
        return self.noise.get(scheduler.config.get("algorithm_type"), Noise())

    def result_dtype(self, output: torch.dtype, state: torch.dtype) -> torch.dtype:
        """The dtype of the state after a step."""
        return output if self.result == "output" else torch.promote_types(output, state)

    def unsolved_option(self, config: Mapping[str, Any]) -> str | None:
        """Which option makes the steps of such a scheduler other than the chain's, in words, if one does."""
        for option, values in self.accepted.items():
            if config.get(option, values[0]) not in values:
                allowed = " or ".join(map(repr, values))
                return f"a {self.name} with {option}={config[option]!r}; deqkern solves {option}={allowed}"
        return None


# Options that replace the noise levels of training.
OTHER_LEVELS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
# An option that makes a variance preserving scheduler one of flow matching, whose shift is `flow_shift` then.
FLOW_OPTION = "use_flow_sigmas"
# What no scheduler that steps on the noise levels of training is read with.
_REFUSED = (*OTHER_LEVELS, FLOW_OPTION, "original_inference_steps")
# What a DDPMScheduler calls its variance. The logarithms say the same: they are what is exponentiated (of
# fixed_large_log diffusers' own step takes the root of a negative number).
_VARIANCES = {
    "fixed_small": "ddpm",
    "fixed_small_log": "ddpm",
    "fixed_large": "ddpm_large",
    "fixed_large_log": "ddpm_large",
}
_DDPM = SchedulerRow(
    "DDPMScheduler",
    processes=_VARIANCES,
    accepted={"variance_type": tuple(_VARIANCES)},
    refused=_REFUSED,
    reads_given=True,
    noise=Noise(eta=1.0, at_zero=False),
)

SCHEDULERS = (
    SchedulerRow("DDIMScheduler", refused=_REFUSED, noise=Noise(eta=None), invertible=True),
    _DDPM,
    replace(_DDPM, name="DDPMParallelScheduler"),
    SchedulerRow(
        "DPMSolverMultistepScheduler",
        order="solver_order",
        accepted={
            "solver_order": (2,),
            "solver_type": ("midpoint",),
            "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
        },
        refused=_REFUSED,
        own_levels=OTHER_LEVELS,
        reads_given=True,
        noise={"dpmsolver++": Noise(), "sde-dpmsolver++": Noise(eta=1.0, dtype=torch.float32)},
    ),
    SchedulerRow(
        "FlowMatchEulerDiscreteScheduler",
        flow=True,
        refused=("invert_sigmas", "stochastic_sampling"),
        own_levels=None,
        reads_given=True,
        result="output",
    ),
)
# Any other one that has the noise levels of training: they are read, its steps are not.
OTHER = SchedulerRow("", refused=_REFUSED)
# In place of which schedulers one of the table comes nearest, other than `default_row`.
_NEAREST = {
    "DPMSolverMultistepScheduler": (
        "UniPCMultistepScheduler", "DEISMultistepScheduler", "DPMSolverSinglestepScheduler", "DPMSolverSDEScheduler",
        "PNDMScheduler", "IPNDMScheduler", "LMSDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler",
    ),
    "DDPMScheduler": (
        "EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "UnCLIPScheduler", "RePaintScheduler",
    ),
}  # fmt: skip
# Those of models that were distilled to a few steps.
_FEW_STEPS = (
    "LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler", "SCMScheduler", "CMStochasticIterativeScheduler",
    "FlowMapEulerDiscreteScheduler",
)  # fmt: skip


def default_row(flow: bool) -> SchedulerRow:
    """The scheduler to use in place of another one."""
    return next(row for row in SCHEDULERS if row.flow == flow)


def row_of(scheduler: Any) -> SchedulerRow:
    """The row of the scheduler's class, or of one that it is derived from; `OTHER` if there is none."""
    kinds = {kind.__name__ for kind in type(scheduler).__mro__}
    return next((row for row in SCHEDULERS if row.name in kinds), OTHER)


def nearest_row(scheduler: Any, flow: bool | None = None, noise: bool = True) -> SchedulerRow:
    """The scheduler to use in place of this one, of flow matching or not, and whose steps may draw noise or not."""
    config, kind = getattr(scheduler, "config", None) or {}, type(scheduler).__name__
    name = next((near for near, others in _NEAREST.items() if kind in others), None)
    if flow is None:
        flow = name is None and ("FlowMatch" in kind or getattr(scheduler, "alphas_cumprod", None) is None)
    if flow or config.get(FLOW_OPTION):
        return default_row(flow=True)
    row = next((row for row in SCHEDULERS if row.name == name), default_row(flow=False))
    return row if noise or not row.noise_of(scheduler).eta else default_row(flow=False)


def in_place_of(scheduler: Any, row: SchedulerRow, name: str) -> str:
    """The expression that makes a scheduler of `row` of this one, which the user calls `name`."""
    config = getattr(scheduler, "config", None) or {}
    if row.flow and config.get(FLOW_OPTION):  # its shift has another name
        return f"{row.name}(shift={config.get('flow_shift', 1.0)})"
    if row.flow and getattr(scheduler, "alphas_cumprod", None) is not None:
        return f"{row.name}()"
    kept = {option: values[0] for option, values in row.accepted.items() if option == row.order}
    other = [f", {option}={value!r}" for option, value in kept.items() if config.get(option, value) != value]
    if isinstance(row.order, int) and not row.flow and "clip_sample" not in config:  # it clips where it is not told
        other.append(", clip_sample=False")
    return f"{row.name}.from_config({name}.config{''.join(other)})"


def few_steps(scheduler: Any) -> str | None:
    """That there is nothing to gain, in words, with a scheduler of models that take a few steps."""
    names = [kind.__name__ for kind in type(scheduler).__mro__ if kind.__name__ in _FEW_STEPS]
    if not names:
        return None
    return (
        f"a {type(scheduler).__name__}, for models that were distilled to a few steps (1 to 8): there is nothing "
        "to gain from solving so few at once; sample with it one step after the other"
    )


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


def own_options(scheduler: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the scheduler itself takes: `from_config` also keeps the options of the one whose config it was."""
    inits = [vars(kind)["__init__"] for kind in type(scheduler).__mro__ if "__init__" in vars(kind)]
    own = {name for init in inits for name in inspect.signature(init).parameters}
    return {name: value for name, value in config.items() if name in own}


def check_own_steps(scheduler: Any, name: str, advice: str | None = None) -> SchedulerRow:
    """The row of a scheduler, which the user calls `name`, whose own steps are a chain of `NoiseSchedule.steps`.

    Raises ValueError for any other, with the nearest one that works, or the `advice`.
    """
    row, few = row_by_step(scheduler), few_steps(scheduler)
    if few is not None:
        raise ValueError(f"{name} is {few}")
    if row is None or own_options(scheduler, scheduler.config).get(FLOW_OPTION):
        if advice is None:
            use = in_place_of(scheduler, nearest_row(scheduler), name)
            advice = f"take {use}, or NoiseSchedule.from_diffusers({name}) for the DDIM chain of its noise levels"
        raise ValueError(
            f"{name} is a {type(scheduler).__name__}, whose steps are not the chain that is solved; {advice}"
        )
    changed = replaced_methods(scheduler, row)
    if changed:
        raise ValueError(f"{name} is a {row.name} with {', '.join(changed)} of its own; what is solved is diffusers'")
    unsolved = row.unsolved_option(own_options(scheduler, scheduler.config))
    if unsolved is not None:
        raise ValueError(f"{name} is {unsolved}")
    return row
