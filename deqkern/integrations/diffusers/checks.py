"""Which pipelines and schedulers are refused, and why."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from ...chain.schedule import NoiseSchedule
from ...chain.schedulers import (
    Noise,
    SchedulerRow,
    check_own_steps,
    default_row,
    defining_class,
    in_place_of,
    nearest_row,
)
from .loops import LOOPS, Loop

# What the config of a pipeline says where each step has its own denoiser or, in one, each token its own timestep.
TWO_STAGES = ("boundary_ratio", "expand_timesteps")

# Arguments of a pipeline call that make its loop another one, unless they are one of these.
_REFUSED = {
    "use_clipped_model_output": (None, False),
    "skip_guidance_layers": (None,),  # without layers the loop calls its denoiser once more all the same
    "cfg_trunc_ratio": (1.0,),  # of the steps with guidance
}
# What a pipeline holds of its call, and its loop reads at every step.
_GUIDANCE = ("_guidance_scale", "_guidance_rescale")
# Arguments of a denoiser that belong to one timestep.
_RESIDUALS = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
    "block_controlnet_hidden_states",
)


def loop_name(pipe: Any) -> str | None:
    return defining_class(pipe, "__call__")


def loop_of(pipe: Any) -> Loop:
    name = type(pipe).__name__
    if not hasattr(pipe, "scheduler"):
        raise TypeError(f"pipe must be a diffusers pipeline, got {name}")
    loop = LOOPS.get(loop_name(pipe) or "")
    if loop is None:
        for extra in ("controlnet", "adapter"):
            if getattr(pipe, extra, None) is not None:
                raise ValueError(
                    f"pipe: the residuals of its {extra} belong to one timestep, {name} cannot run in parallel; "
                    "use it outside of parallel()"
                )
        raise ValueError(
            f"pipe: the loop of {name} is not known to work in parallel. Supported are {', '.join(LOOPS)} and "
            "subclasses that keep their loop; for others call deqkern.sample with their denoiser"
        )
    return loop


def denoiser_of(pipe: Any) -> Any:
    name, denoiser = type(pipe).__name__, getattr(pipe, loop_of(pipe).denoiser)
    if denoiser is None or any(pipe.config.get(option) for option in TWO_STAGES):
        raise ValueError(
            f"pipe: {name} with two denoisers, or a timestep of its own for each token ({', '.join(TWO_STAGES)}), "
            "cannot run in parallel; models of one stage can"
        )
    check_no_cache(denoiser)
    if denoiser.config.get("pos_embed_seq_len"):
        raise ValueError(f"pipe: {name} for a first and a last frame cannot run in parallel; models of the first can")
    if "Inpaint" in (loop_name(pipe) or "") and denoiser.config.in_channels == denoiser.config.out_channels:
        raise ValueError(
            f"pipe: with a UNet of {denoiser.config.in_channels} channels {name} mixes the image into the state at "
            "every step, which cannot run in parallel; use a UNet made for inpainting, with 9 channels"
        )
    return denoiser


def check_no_cache(denoiser: Any) -> None:
    registries = (getattr(module, "_diffusers_hook", None) for module in denoiser.modules())
    hooks = (hook for registry in registries if registry is not None for hook in registry.hooks.values())
    if getattr(denoiser, "is_cache_enabled", False) or any(getattr(hook, "_is_stateful", False) for hook in hooks):
        raise ValueError(
            "pipe: its denoiser goes on from what it computed at earlier timesteps (a cache), but here it is called at "
            "all at once; turn the cache off, with disable_cache()"
        )


def check_pipeline_call(given: Mapping[str, Any]) -> None:
    """Of the arguments of a pipeline."""
    from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

    if isinstance(given.get("callback_on_step_end"), MultiPipelineCallbacks | PipelineCallback):
        raise ValueError(
            "callback_on_step_end changes the pipeline at a step, but inside parallel() every step is solved at once"
        )
    for name, allowed in _REFUSED.items():
        if name in given and given[name] not in allowed:
            raise ValueError(f"{name} is not supported inside parallel(); leave it out")


def check_steps(pipe: Any, count: int) -> None:
    if count == 1 and loop_name(pipe) == "PixArtAlphaPipeline":
        raise ValueError(
            "num_inference_steps=1: PixArtAlphaPipeline takes another output then; there is one step to do"
        )


def settings_of(pipe: Any, denoiser: Any) -> list[Any]:
    """What a callback could change beside the arguments of the denoiser: guidance, and the scales of IP-adapters."""
    processors = getattr(denoiser, "attn_processors", {}).values()
    scales = [str(processor.scale) for processor in processors if hasattr(processor, "scale")]
    return [getattr(pipe, name, None) for name in _GUIDANCE] + scales


def check_denoiser_call(given: Mapping[str, Any]) -> None:
    """Of the arguments that a loop gives its denoiser."""
    for name in _RESIDUALS:
        if given.get(name) is not None:
            raise ValueError(
                f"pipe gives its denoiser {name}, which belong to one timestep (ControlNet, T2I adapters); "
                "call it outside of parallel()"
            )
    if "ip_adapter_image_embeds" in (given.get("joint_attention_kwargs") or {}):
        raise ValueError(
            "ip_adapter_image: IP-adapters of transformers, some of which depend on the timestep, are not "
            "supported; leave it out inside parallel(), or call pipe outside of it"
        )


def check_scheduler(pipe: Any, scheduler: Any) -> SchedulerRow:
    """The row of the scheduler of `pipe`, whose steps must be a chain."""
    row = check_own_steps(scheduler, "pipe.scheduler", advice=advice(pipe, scheduler))
    NoiseSchedule.from_diffusers(scheduler)
    return row


def check_pair(pipe: Any, scheduler: Any, row: SchedulerRow) -> None:
    """Whether the loop of the pipeline gives the scheduler's steps what they take."""
    loop, name, noise = loop_of(pipe), loop_name(pipe), row.noise_of(scheduler)
    if loop.eta and noise.eta is not None:
        raise ValueError(
            f"pipe.scheduler is a {row.name}, whose step does not take the eta that {name} gives it; use a "
            f"{default_row(flow=False).name}, or deqkern.sample(..., order={row.order_of(scheduler)})"
        )
    if noise.eta and not loop.generator:
        how, silent = f"is a {row.name}", "a scheduler whose steps draw no noise"
        if not isinstance(row.noise, Noise):
            how = f"is of algorithm_type={scheduler.config['algorithm_type']!r}"
            silent = " or ".join(repr(kind) for kind, other in row.noise.items() if not other.eta)
        raise ValueError(f"pipe.scheduler {how}, to which {name} gives no generator; use {silent}")


def advice(pipe: Any, scheduler: Any) -> str:
    """Which scheduler to set in place of one whose steps are not those of a chain."""
    loop = LOOPS.get(loop_name(pipe) or "")
    wanted = inspect.signature(type(pipe).__init__).parameters.get("scheduler")
    flow = True if wanted is not None and "FlowMatch" in str(wanted.annotation) else None
    row = nearest_row(scheduler, flow, noise=loop is not None and loop.generator)
    if loop is not None and loop.eta:
        row = default_row(flow=False)
    return f"set pipe.scheduler = {in_place_of(scheduler, row, 'pipe.scheduler')}"
