"""The options of a `NoiseSchedule`: which of them several constructors take, and what they may be."""

from __future__ import annotations

import inspect
import math
from typing import Any, TypedDict

from torch import Tensor

from ..support.checks import check_choice, to_float, to_int
from .output import PREDICTION_TYPES
from .schedulers import PROCESSES
from .step_table import check_order
from .timesteps import TIMESTEP_SPACINGS


class ScheduleOptions(TypedDict, total=False):
    """The options of a variance preserving `NoiseSchedule`, which its constructors hand on to it."""

    prediction_type: str
    timestep_spacing: str
    steps_offset: int
    set_alpha_to_one: bool
    clip_sample: bool
    clip_sample_range: float
    thresholding: bool
    dynamic_thresholding_ratio: float
    sample_max_value: float
    process: str


def name_options(schedule: type, *constructors: str) -> None:
    """Let `inspect.signature` and `help` of the constructors name the options, with the defaults of the class."""
    names = ScheduleOptions.__annotations__
    options = [value for name, value in inspect.signature(schedule).parameters.items() if name in names]
    for constructor in constructors:
        function = vars(schedule)[constructor].__func__
        signature = inspect.signature(function)
        own = [value for value in signature.parameters.values() if value.kind is not value.VAR_KEYWORD]
        function.__signature__ = signature.replace(parameters=own + options)


def check_options(schedule: Any, *, own_levels: bool) -> None:
    """Refuse options of a `NoiseSchedule` out of range, and those that do not go together. own_levels: has it any."""
    check_choice("prediction_type", schedule.prediction_type, PREDICTION_TYPES)
    check_choice("timestep_spacing", schedule.timestep_spacing, TIMESTEP_SPACINGS)
    check_choice("process", schedule.process, PROCESSES)
    if to_int("steps_offset", schedule.steps_offset) < 0:
        raise ValueError(f"steps_offset must be >= 0, got {schedule.steps_offset}")
    for name in ("clip_sample_range", "sample_max_value", "dynamic_thresholding_ratio", "shift"):
        if not 0 < to_float(name, getattr(schedule, name)) < math.inf:
            raise ValueError(f"{name} must be finite and > 0, got {getattr(schedule, name)}")
    if schedule.dynamic_thresholding_ratio > 1:
        raise ValueError(f"dynamic_thresholding_ratio must be <= 1, got {schedule.dynamic_thresholding_ratio}")
    total = to_int("num_train_timesteps", schedule.num_train_timesteps)
    if schedule.prediction_type == "flow":
        if schedule.alphas_cumprod is not None:
            raise ValueError("alphas_cumprod must be None for prediction_type='flow'")
        if schedule.clip_sample or schedule.thresholding:
            raise ValueError("clip_sample and thresholding are not defined for prediction_type='flow'")
        if schedule.process != "ddim":
            raise ValueError(f"process={schedule.process!r} is not defined for prediction_type='flow'")
        if total < 1:
            raise ValueError(f"num_train_timesteps must be >= 1, got {total}")
        if schedule.timestep_spacing == "log_snr":
            raise ValueError("timestep_spacing='log_snr' is not defined for prediction_type='flow'")
        return
    if schedule.shift != 1:
        raise ValueError(
            f"shift belongs to prediction_type='flow', got {schedule.shift} with {schedule.prediction_type!r}"
        )
    if own_levels and schedule.timestep_spacing == "log_snr":
        raise ValueError("timestep_spacing='log_snr' needs the noise levels of training, not the scheduler's own")


def check_total(total: int, alphas_cumprod: Tensor) -> None:
    """T, as far as it is said, is that of the table."""
    if total not in (0, len(alphas_cumprod)):
        raise ValueError(f"num_train_timesteps is {total}, alphas_cumprod has {len(alphas_cumprod)} entries")


def checked_eta(eta: float | None, process: str, order: int) -> float:
    """The eta of a chain of this process and order, which must go together; 1 stands for the noise of DDPM."""
    if process != "ddim":
        if eta is not None and to_float("eta", eta) != 1:
            raise ValueError(
                f"eta must be None or 1 with process={process!r}, whose steps draw their own noise, got {eta}; for the "
                "DDIM chain take schedule.as_ddim()"
            )
        check_order(order)
        if order != 1:
            raise ValueError(f"order must be 1 with process={process!r}, got {order}")
        return 1.0
    eta = 0.0 if eta is None else to_float("eta", eta)
    if not 0 <= eta < math.inf:
        raise ValueError(f"eta must be finite and >= 0, got {eta}")
    check_order(order)
    if order == 2 and eta not in (0, 1):
        raise ValueError(f"eta must be 0 or 1 with order=2, got {eta}")
    return eta
