"""What cannot run in parallel is refused, by name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from asserts import relative_error
from pipelines import (
    check_exact,
    ddim,
    diffusers,
    noise,
    picture,
    pieces,
    quiet,
    refused,
    result,
    second_order,
)
from torch import Tensor

from deqkern.chain.schedulers import row_by_step
from deqkern.integrations.diffusers import parallel


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver_order": 3}, "solver_order=3.*solves solver_order=2"),
        ({"solver_type": "heun"}, "solver_type='heun'"),
        ({"kind": "dpmsolver", "final_sigmas_type": "sigma_min"}, "algorithm_type='dpmsolver'"),
    ],
)
def test_other_multistep_schedulers_are_refused(options: dict[str, Any], message: str) -> None:
    pipe, _ = pieces("sd", False)
    second_order(pipe, **options)
    refused(pipe, message)


def test_pipelines_that_do_not_go_with_the_multistep_scheduler_are_refused() -> None:
    for name, loop in (("dit", "DiTPipeline"), ("sd3", "StableDiffusion3Pipeline")):
        pipe, _ = pieces(name, False)
        pipe.scheduler = diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")
        refused(pipe, f"to which {loop} gives no generator")
    pipe, _ = pieces("ddim", False)
    second_order(pipe)
    refused(pipe, "does not take the eta that DDIMPipeline gives it")


def test_a_subclass_with_the_same_loop_is_as_good() -> None:
    class Mine(diffusers.StableDiffusionPipeline):  # type: ignore[name-defined, misc]
        pass

    class Other(diffusers.StableDiffusionPipeline):  # type: ignore[name-defined, misc]
        def __call__(self) -> None:
            raise NotImplementedError

    Other.__call__.__qualname__ = "StableDiffusionPipeline.__call__"  # as where it had the same name
    pipe, call = pieces("sd", False)
    expected = result(pipe, call)
    with parallel(Mine(**pipe.components), rtol=0.0):
        pass
    mine = Mine(**pipe.components)
    with parallel(mine, rtol=0.0):
        assert float(relative_error(result(mine, call), expected).max()) <= 1e-5
    with pytest.raises(ValueError, match=r"loop of Other .* deqkern\.sample"), parallel(Other(**pipe.components)):
        pass


def test_schedulers_with_other_rules_are_refused() -> None:
    pipe, _ = pieces("sd", False)
    nearest = {
        "DPMSolverSinglestepScheduler": "DPMSolverMultistepScheduler", "EulerDiscreteScheduler": "DDIMScheduler",
        "EulerAncestralDiscreteScheduler": "DDPMScheduler", "PNDMScheduler": "DPMSolverMultistepScheduler",
    }  # fmt: skip
    for name, use in nearest.items():
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
        refused(pipe, rf"is a {name}, .* {use}\.from_config\(pipe\.scheduler\.config\)")
    for name in ("LCMScheduler", "TCDScheduler"):
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
        refused(pipe, f"is a {name}, .*nothing to gain")
    pipe.scheduler = diffusers.DDPMScheduler(variance_type="learned_range")
    refused(pipe, "is a DDPMScheduler with variance_type='learned_range'")
    pipe, _ = pieces("sd3", False)
    pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    refused(pipe, r"set pipe\.scheduler = FlowMatchEulerDiscreteScheduler\.from_config")
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    refused(pipe, "stochastic_sampling")


def test_pipelines_with_other_loops_are_refused() -> None:
    pipe, _ = pieces("sd", False)
    control = diffusers.ControlNetModel.from_unet(pipe.unet)
    refused(diffusers.StableDiffusionControlNetPipeline(**pipe.components, controlnet=control), "one timestep")
    adapter = diffusers.T2IAdapter(channels=[8, 16], num_res_blocks=1, downscale_factor=1)
    parts = {key: value for key, value in pipe.components.items() if key != "image_encoder"}
    refused(diffusers.StableDiffusionAdapterPipeline(**parts, adapter=adapter), "one timestep")
    inpainting = diffusers.StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False)
    refused(inpainting, "9 channels")
    consistency = diffusers.ConsistencyModelPipeline(pipe.unet, pipe.scheduler)
    refused(consistency, "loop of ConsistencyModelPipeline is not known")
    refused(object(), "pipe must be a diffusers pipeline", error=TypeError)


def test_what_changes_between_steps_is_refused() -> None:
    pipe, call = pieces("sd", True)

    def returning(**change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        def change_them(pipe: Any, i: int, t: Tensor, given: dict[str, Any]) -> dict[str, Any]:
            return {name: function(given[name]) for name, function in change.items()}

        return call | {
            "callback_on_step_end": change_them, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
        }  # fmt: skip

    refused(pipe, "previews, to look at only", returning(latents=lambda x: x * 1.01))
    refused(pipe, "changed the conditioning", returning(prompt_embeds=lambda x: x * 1.01))
    with parallel(pipe):
        result(pipe, returning(latents=lambda x: x, prompt_embeds=lambda x: x.clone()))

    def without_guidance(pipe: Any, i: int, t: Tensor, given: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 1.0
        return {"prompt_embeds": given["prompt_embeds"][2:]}

    refused(pipe, "or the guidance", returning() | {"callback_on_step_end": without_guidance})
    ddim_only, call = pieces("ddim", True)
    refused(ddim_only, "use_clipped_model_output", call | {"use_clipped_model_output": True})
    with parallel(ddim_only):
        result(ddim_only, call | {"use_clipped_model_output": False})


def test_denoisers_that_depend_on_more_than_their_timestep_are_refused() -> None:
    pipe, call = pieces("sd3", True)
    skipping = call | {"skip_guidance_layers": [0], "skip_layer_guidance_start": -1, "skip_layer_guidance_stop": 1.0}
    refused(pipe, "skip_guidance_layers", skipping)
    refused(pipe, "skip_guidance_layers", skipping | {"skip_guidance_layers": []})
    refused(pipe, "ip_adapter_image", call | {"joint_attention_kwargs": {"ip_adapter_image_embeds": noise()}})

    pipe, call = pieces("sd", False)
    for place in ("down_block_additional_residuals", "mid_block_additional_residual",
                  "down_intrablock_additional_residuals", "block_controlnet_hidden_states"):  # fmt: skip
        handle = pipe.unet.register_forward_pre_hook(
            lambda module, args, given, place=place: (args, given | {place: torch.zeros(1)}), with_kwargs=True
        )
        refused(pipe, rf"{place}.*T2I adapters", call)
        handle.remove()

    def twice(module: Any, args: Any, given: dict[str, Any], output: Any) -> None:
        handle.remove()
        module(**given)

    with pytest.raises(ValueError, match="other latents than those of the step"), parallel(pipe):
        handle = pipe.unet.register_forward_hook(twice, with_kwargs=True)
        result(pipe, call)


def test_nan_names_the_timesteps() -> None:
    pipe, call = pieces("sd", True)
    with torch.no_grad():
        pipe.unet.conv_out.weight.fill_(torch.nan)
    refused(pipe, r"pipe's denoiser returned NaN or infinity at iteration 1, timesteps \[", call)


def test_wrong_arguments() -> None:
    pipe, call = pieces("ddim", False)
    refused(pipe, "rtol must be finite and >= 0", rtol=-1.0)
    refused(pipe, "max_batch must be None or an int >= 1", max_batch=0)
    refused(pipe, "solver must be a Solver", solver="default", error=TypeError)
    refused(pipe, "devices must hold the model's own, cpu, got meta", devices=["meta"])
    refused(pipe, "num_inference_steps", call | {"num_inference_steps": 1001})
    pipe.scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    with parallel(pipe, rtol=0.0):  # a spacing that its chain reproduces
        result(pipe, call)


def test_settings_that_a_callback_changes_are_refused() -> None:
    pipe, call = pieces("sd", True)

    def guidance(name: str, pipe: Any, i: int, t: Tensor, given: dict[str, Any]) -> dict[str, Any]:
        setattr(pipe, name, 2.0)
        return given

    def in_place(pipe: Any, i: int, t: Tensor, given: dict[str, Any]) -> dict[str, Any]:
        given["prompt_embeds"].mul_(0.5)
        return given

    for name in ("_guidance_scale", "_guidance_rescale"):
        change = {"callback_on_step_end": functools.partial(guidance, name)}
        refused(pipe, "changed the conditioning or the guidance", call | change)
    more = {"callback_on_step_end": in_place, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    refused(pipe, "changed the conditioning or the guidance", call | more)
    cutoff = diffusers.callbacks.SDCFGCutoffCallback(cutoff_step_ratio=0.4)
    refused(pipe, "callback_on_step_end changes the pipeline at a step", call | {"callback_on_step_end": cutoff})


def test_schedulers_with_rules_of_their_own_are_refused() -> None:
    class Mine(diffusers.DDIMScheduler):
        def _get_variance(self, timestep: Any, prev_timestep: Any) -> Any:
            return 0.5 * super()._get_variance(timestep, prev_timestep)

    class Documented(diffusers.DDIMScheduler):
        """With nothing changed."""

    pipe, call = pieces("sd", False)
    pipe.scheduler = Mine.from_config(pipe.scheduler.config)
    refused(pipe, "DDIMScheduler with _get_variance of its own")
    pipe.scheduler = Documented.from_config(pipe.scheduler.config)
    check_exact(pipe, call)
    pipe.scheduler.step = functools.partial(pipe.scheduler.step, eta=1.0)
    refused(pipe, "DDIMScheduler with step of its own")


def test_a_scheduler_set_inside_is_refused_and_not_left_in_the_config() -> None:
    pipe, call = pieces("sd", False)
    before, config = pipe.scheduler, dict(pipe.config)
    with parallel(pipe):
        pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(pipe.scheduler.config)
        with pytest.raises(ValueError, match=r"pipe\.scheduler was set inside"):
            result(pipe, call)
    assert pipe.scheduler is before and dict(pipe.config) == config


def test_another_pipe_of_the_same_parts_is_refused() -> None:
    pipe, call = pieces("sd", False)
    with parallel(pipe) as run:
        other = quiet(diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False))
        with pytest.raises(ValueError, match="belongs to the pipe inside"):
            other(**call | {"image": picture(), "strength": 1.0, "num_inference_steps": 4})
        result(pipe, call)
    assert run.solution is not None


def test_hooks_that_replace_forward_cannot_be_copied() -> None:
    pipe, call = pieces("sd", False)
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    check_exact(pipe, call)
    refused(pipe, "forward was replaced", devices=["cpu", "cpu"])


@pytest.mark.parametrize(
    "name",
    [
        "PNDMScheduler", "LMSDiscreteScheduler", "HeunDiscreteScheduler", "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler", "DPMSolverSinglestepScheduler", "KDPM2DiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler", "IPNDMScheduler",
    ],
)  # fmt: skip
def test_the_scheduler_that_is_advised_works(name: str) -> None:
    for kind, options in (("sd", {"solver_order": 3}), ("dit", {}), ("sd3", {"use_flow_sigmas": True}), ("sd3", {})):
        pipe, call = pieces(kind, False)
        other = getattr(diffusers, name)
        known = inspect.signature(other).parameters
        pipe.scheduler = other.from_config(
            ddim().config, **{key: value for key, value in options.items() if key in known}
        )
        if row_by_step(pipe.scheduler) is not None:
            continue
        with pytest.raises(ValueError, match=f"is a {name}, ") as refusal, parallel(pipe):
            pass
        advice = str(refusal.value).rpartition("set pipe.scheduler = ")[2]
        use = advice.partition(".")[0].partition("(")[0]
        pipe.scheduler = eval(advice, {"pipe": pipe, use: getattr(diffusers, use)})
        check_exact(pipe, call)
