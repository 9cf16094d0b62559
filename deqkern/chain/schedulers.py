"""What a diffusers scheduler says of itself."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

# options that replace the noise levels of training, which DDIM steps on
OTHER_LEVELS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")


def is_a(scheduler: Any, name: str) -> bool:
    return any(kind.__name__ == name for kind in type(scheduler).__mro__)


def own_options(scheduler: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the scheduler itself takes: `from_config` also keeps the options of the one whose config it was."""
    inits = [vars(kind)["__init__"] for kind in type(scheduler).__mro__ if "__init__" in vars(kind)]
    own = {name for init in inits for name in inspect.signature(init).parameters}
    return {name: value for name, value in config.items() if name in own}


def variance_preserving_options(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    refuse_options(name, config, (*OTHER_LEVELS, "use_flow_sigmas", "original_inference_steps"))
    if config.get("timestep_type", "discrete") != "discrete":
        raise ValueError(f"scheduler: {name} with timestep_type={config['timestep_type']!r} is not supported")
    if config.get("lambda_min_clipped", -math.inf) > -math.inf:
        raise ValueError(f"scheduler: {name} with lambda_min_clipped={config['lambda_min_clipped']!r} is not supported")
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in ("epsilon", "v_prediction", "sample"):
        raise ValueError(f"scheduler: {name} with prediction_type={prediction_type!r} is not supported")
    options = {"prediction_type": prediction_type, "num_train_timesteps": config.get("num_train_timesteps", 0)}
    options["set_alpha_to_one"] = config.get("set_alpha_to_one", config.get("final_sigmas_type") != "sigma_min")
    names = (
        "timestep_spacing", "steps_offset", "clip_sample", "clip_sample_range", "thresholding",
        "dynamic_thresholding_ratio", "sample_max_value",
    )  # fmt: skip
    return options | {key: config[key] for key in names if config.get(key) is not None}


def refuse_options(name: str, config: Mapping[str, Any], options: Sequence[str]) -> None:
    for option in options:
        if config.get(option):
            raise ValueError(
                f"scheduler: {name} with {option}={config[option]!r} is not supported; "
                "give a DDIMScheduler or FlowMatchEulerDiscreteScheduler without it"
            )


def scheduler_at(scheduler: Any, count: int) -> Any:
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
