"""The pipe's scheduler while its loop is solved: a copy that hands what the loop asks of it to the run."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...chain.schedule import NoiseSchedule, StepTable
from ...chain.schedulers import SchedulerRow


class StepCall(NamedTuple):
    """What a loop gives `scheduler.step`, of its arguments."""

    output: Tensor
    sample: Tensor
    return_dict: bool


class SchedulerProxy:
    """Stands in the place of `original`, with its class, its config and its signatures.

    Args:
        original: The pipe's own scheduler, which stays what it is.
        row: What is known of its kind.
        set_timesteps: What the loop calls in place of its `set_timesteps`.
        step: What the loop calls in place of its `step`.
    """

    def __init__(
        self, original: Any, row: SchedulerRow, set_timesteps: Callable[..., Any], step: Callable[..., Any]
    ) -> None:
        self.row = row
        self.plain = copy.copy(original)  # set_timesteps assigns: the original keeps its own
        self.posed = copy.copy(original)
        self.posed._deqkern_original = original
        self.posed.set_timesteps = _posing_as(self.plain.set_timesteps, set_timesteps)
        self.posed.step = _posing_as(self.plain.step, step)
        self.schedule: NoiseSchedule | None = None  # as the scheduler is set

    def set_timesteps(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the scheduler's; the timesteps (S,). Raises ValueError where they are not those of its chain."""
        self.plain.set_timesteps(*args, **kwargs)
        values = self.plain.timesteps
        self.schedule = NoiseSchedule.from_diffusers(self.plain)
        if not torch.equal(self.table().timesteps, values.cpu()):
            raise ValueError(
                f"num_inference_steps={self.plain.num_inference_steps}: the scheduler's timesteps, {values.tolist()}, "
                "are not those of its chain; take another number of steps"
            )
        vars(self.posed).update(vars(self.plain))
        return values

    def table(self, eta: float | None = None) -> StepTable:
        """The chain that the scheduler is set to."""
        assert self.schedule is not None
        return self.schedule.steps(len(self.plain.timesteps), eta=eta, order=self.row.order_of(self.plain))

    def eta_of(self, call: Mapping[str, Any]) -> float:
        """The eta of the chain, where `call` holds the arguments of the pipeline."""
        noise = self.row.noise_of(self.plain)
        return float(call.get("eta") or 0.0) if noise.eta is None else noise.eta

    def step_noise(self, first: Tensor, generator: Any, span: range) -> Tensor:
        """The noise (S, B, *shape) of the steps `span`, drawn in the order of the loop, for latents like `first`."""
        from diffusers.utils.torch_utils import randn_tensor

        noise = self.row.noise_of(self.plain)
        dtype = noise.dtype or first.dtype
        drawn = [noise.at_zero or bool(t > 0) for t in self.plain.timesteps[span.start : span.stop]]
        none = torch.zeros(first.shape, dtype=dtype, device=first.device)
        return torch.stack(
            [randn_tensor(first.shape, generator, first.device, dtype=dtype) if draws else none for draws in drawn]
        )

    def step_call(self, *args: Any, **kwargs: Any) -> StepCall:
        """What these arguments of `step` are."""
        call = inspect.signature(self.plain.step).bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        return StepCall(given["model_output"], given["sample"], given["return_dict"])


def original_of(scheduler: Any) -> Any:
    """The scheduler itself, or the one in whose place it stands."""
    return getattr(scheduler, "_deqkern_original", scheduler)


def is_posed(scheduler: Any) -> bool:
    """Whether it stands in the place of another one."""
    return hasattr(scheduler, "_deqkern_original")


def _posing_as(method: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with the signature of `method`: pipelines look at it to see what a scheduler takes."""
    return functools.update_wrapper(functools.partial(function), method)
