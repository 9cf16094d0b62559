"""The options of a variance preserving schedule, which several constructors take."""

from __future__ import annotations

import inspect
from typing import TypedDict


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


def name_options(schedule: type, *constructors: str) -> None:
    """Let `inspect.signature` and `help` of the constructors name the options, with the defaults of the class."""
    names = ScheduleOptions.__annotations__
    options = [value for name, value in inspect.signature(schedule).parameters.items() if name in names]
    for constructor in constructors:
        function = vars(schedule)[constructor].__func__
        signature = inspect.signature(function)
        own = [value for value in signature.parameters.values() if value.kind is not value.VAR_KEYWORD]
        function.__signature__ = signature.replace(parameters=own + options)
