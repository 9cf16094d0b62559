"""Pipelines of tiny random networks: in parallel as step by step."""

from __future__ import annotations

import functools
import gc
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from asserts import relative_error
from pipelines import (
    AT_ONCE,
    STEPS,
    TOKENS,
    WIDTH,
    check_both,
    check_exact,
    ddim,
    diffusers,
    noise,
    picture,
    prompts,
    quiet,
    random,
    refused,
    result,
    second_order,
    seeded,
    sharpened,
    transformers,
    unet,
    vae,
)
from torch import Tensor

import deqkern
from deqkern import models
from deqkern.integrations.diffusers import invert, parallel
from deqkern.integrations.diffusers.loops import LOOPS


def ddim_pipeline(guided: bool) -> tuple[Any, dict[str, Any]]:
    """It has no guidance: clipping instead."""
    network = diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1,
        norm_num_groups=4, attention_head_dim=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=guided)
    return diffusers.DDIMPipeline(sharpened(network), scheduler), {
        "batch_size": 2, "num_inference_steps": STEPS, "output_type": "pt",
    }  # fmt: skip


def stable_diffusion(guided: bool, kind: str = "StableDiffusionPipeline", channels: int = 4, **more: Any) -> Any:
    pipe = getattr(diffusers, kind)(
        vae=vae(), text_encoder=None, tokenizer=None, unet=unet(channels), scheduler=ddim(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    call = prompts(guided) | more
    if kind == "StableDiffusionPipeline":
        call |= {"latents": noise(), "guidance_rescale": 0.7 if guided else 0.0}
    return pipe, call


def img2img(guided: bool) -> Any:
    return stable_diffusion(guided, "StableDiffusionImg2ImgPipeline", image=picture(), strength=0.7)


def masked() -> dict[str, Any]:
    mask = torch.zeros(2, 1, 8, 8)
    mask[..., 4:] = 1
    return {"image": picture(), "mask_image": mask, "strength": 0.9, "height": 8, "width": 8}


def inpaint(guided: bool) -> Any:
    return stable_diffusion(guided, "StableDiffusionInpaintPipeline", 9, **masked())


def xl(guided: bool, kind: str = "StableDiffusionXLPipeline", channels: int = 4, **more: Any) -> Any:
    network = unet(
        channels,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=WIDTH + 24,
    )
    pipe = getattr(diffusers, kind)(
        vae=vae(), text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, unet=network,
        scheduler=ddim(), add_watermarker=False,
    )  # fmt: skip
    call = prompts(guided, pooled_prompt_embeds=random(2, WIDTH, seed=5)) | more
    return pipe, call if more else call | {"latents": noise()}


def xl_img2img(guided: bool) -> Any:
    return xl(guided, "StableDiffusionXLImg2ImgPipeline", image=picture(), strength=0.6)


def xl_inpaint(guided: bool) -> Any:
    return xl(guided, "StableDiffusionXLInpaintPipeline", 9, **masked())


def dit(guided: bool) -> Any:
    network = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        norm_num_groups=4,
    )  # fmt: skip
    pipe = diffusers.DiTPipeline(sharpened(network), vae(), diffusers.DDIMScheduler(clip_sample=False))
    scale = 4.0 if guided else 1.0
    return pipe, {
        "class_labels": [3, 7], "guidance_scale": scale, "num_inference_steps": STEPS, "output_type": "pt",
    }  # fmt: skip


def sd3(guided: bool, kind: str = "StableDiffusion3Pipeline", **more: Any) -> Any:
    network = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=WIDTH, caption_projection_dim=16, pooled_projection_dim=WIDTH,
        pos_embed_max_size=8,
    )  # fmt: skip
    pipe = getattr(diffusers, kind)(
        transformer=sharpened(network), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae(),
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    call = prompts(guided, pooled_prompt_embeds=random(2, WIDTH, seed=5)) | more
    return pipe, call if more else call | {"latents": noise()}


def sd3_img2img(guided: bool) -> Any:
    return sd3(guided, "StableDiffusion3Img2ImgPipeline", image=picture(), strength=0.6, height=8, width=8)


PIPELINES: dict[str, Callable[[bool], Any]] = {
    "ddim": ddim_pipeline, "sd": stable_diffusion, "img2img": img2img, "inpaint": inpaint, "xl": xl,
    "xl_img2img": xl_img2img, "xl_inpaint": xl_inpaint, "dit": dit, "sd3": sd3, "sd3_img2img": sd3_img2img,
}  # fmt: skip


def pieces(name: str, guided: bool) -> tuple[Any, dict[str, Any]]:
    return seeded(PIPELINES[name], guided)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", PIPELINES)
def test_parallel_is_sequential(name: str, guided: bool) -> None:
    check_both(*pieces(name, guided))


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *[(name, "dpmsolver++") for name in ("sd", "img2img", "inpaint", "xl", "xl_img2img", "dit")],
        *[(name, "sde-dpmsolver++") for name in ("sd", "img2img", "xl_img2img")],
    ],
)
def test_the_multistep_scheduler(name: str, kind: str, guided: bool) -> None:
    pipe, call = pieces(name, guided)
    call |= {"num_inference_steps": 16}
    second_order(pipe, kind)
    check_both(pipe, call)
    second_order(pipe, kind, final_sigmas_type="sigma_min", timestep_spacing="trailing")
    check_exact(pipe, call)
    second_order(pipe, kind, use_karras_sigmas=True)
    check_exact(pipe, call)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver_order": 3}, "solver_order=3.*solves solver_order=2"),
        ({"solver_type": "heun"}, "solver_type='heun'"),
        ({"kind": "dpmsolver", "final_sigmas_type": "sigma_min"}, "algorithm_type='dpmsolver'"),
        ({"final_sigmas_type": "sigma_min", "euler_at_final": True}, "euler_at_final"),
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


def test_guidance_that_is_not_asked_for() -> None:
    """A pipeline may have it all the same."""
    pipe, call = pieces("dit", True)
    del call["guidance_scale"]
    check_exact(pipe, call)


@pytest.mark.parametrize("generators", ["none", "one", "list"])
@pytest.mark.parametrize("name", ["ddim", "sd"])
def test_step_noise_is_drawn_as_the_sequential_loop_does(name: str, generators: str) -> None:
    pipe, call = pieces(name, False)

    def run() -> Tensor:
        torch.manual_seed(11)
        seeds = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
        generator = {"none": None, "one": seeds[0], "list": seeds}[generators]
        return quiet(pipe)(**call, eta=1.0, generator=generator).images

    expected = run()
    with parallel(pipe, rtol=0.0):
        assert float(relative_error(run(), expected).max()) <= 1e-5
    with parallel(pipe, rtol=1e-4, solver=deqkern.solvers.parataa()):
        assert float(relative_error(run(), expected).max()) <= 2e-3


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("clip", [False, True])
def test_the_trained_digits(clip: bool, eta: float) -> None:
    loaded = models.load("digits")
    config = diffusers.DDIMScheduler.load_config(Path(models.__file__).parent / "digits", local_files_only=True)
    scheduler = diffusers.DDIMScheduler.from_config(config, clip_sample=clip)
    pipe, call = diffusers.DDIMPipeline(loaded.model, scheduler), {"batch_size": 2, "output_type": "pt", "eta": eta}
    expected = result(pipe, call, num_inference_steps=20)
    with parallel(pipe, rtol=1e-3) as run:
        actual = result(pipe, call, num_inference_steps=20)
    assert float(relative_error(actual, expected).max()) <= 4e-3  # of images in 0 .. 1, mostly black
    generator = torch.Generator().manual_seed(7)
    first = torch.randn(2, *loaded.shape, generator=generator)
    schedule = deqkern.NoiseSchedule.from_diffusers(scheduler)
    same = deqkern.sample(loaded.model, first, schedule, 20, eta=eta, generator=generator, rtol=1e-3)
    assert run.solution is not None and run.solution.iterations == same.iterations
    assert float(relative_error(run.solution.value, same.value).max()) <= 1e-5


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_half_precision(name: str) -> None:
    pipe, call = pieces(name, True)
    call = {key: value.bfloat16() if isinstance(value, Tensor) else value for key, value in call.items()}
    pipe.to(torch.bfloat16)
    expected = result(pipe, call)
    with parallel(pipe, rtol=0.0) as run:
        actual = result(pipe, call)
    assert actual.dtype == expected.dtype == torch.bfloat16
    assert run.solution is not None and run.solution.trajectory.dtype == torch.float32
    assert float(relative_error(actual.float(), expected.float()).max()) <= 0.1


@pytest.mark.parametrize("order", [1, 2])
def test_parts_of_the_chain(order: int) -> None:
    """Stable Diffusion XL hands a chain on from its base to its refiner."""
    pipe, call = pieces("xl", True)
    if order == 2:
        second_order(pipe)
    base = check_exact(pipe, call | {"denoising_end": 0.6})
    pipe, call = pieces("xl_img2img", True)
    if order == 2:
        second_order(pipe)
    call = call | {"image": base.value, "denoising_start": 0.6}
    assert len(check_exact(pipe, call).trajectory) + len(base.trajectory) == STEPS + 2


def test_flow_matching_with_its_own_sigmas() -> None:
    pipe, call = pieces("sd3", True)
    check_exact(pipe, call | {"num_inference_steps": None, "sigmas": [1.0, 0.8, 0.7, 0.3, 0.1]})
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    check_exact(pipe, call)


def test_ip_adapters() -> None:
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
    from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection

    pipe, call = pieces("sd", True)
    projection = ImageProjection(image_embed_dim=6, cross_attention_dim=WIDTH, num_image_text_embeds=2)
    processors = pipe.unet.attn_processors
    for name in processors:
        if "attn2" in name:
            size = pipe.unet.get_submodule(name.removesuffix(".processor")).inner_dim
            processors[name] = IPAdapterAttnProcessor2_0(size, WIDTH, num_tokens=(2,))
    pipe.unet.set_attn_processor(processors)
    pipe.unet.encoder_hid_proj = MultiIPAdapterImageProjection([projection])
    pipe.unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    pipe.unet.eval()
    call["ip_adapter_image_embeds"] = [random(2, 1, 6, seed=9)]
    before = result(pipe, call | {"ip_adapter_image_embeds": [random(2, 1, 6, seed=10)]})
    assert float(relative_error(result(pipe, call), before).max()) > 0.1
    check_exact(pipe, call)

    def rescale(pipe: Any, i: int, t: Tensor, given: dict[str, Any]) -> dict[str, Any]:
        for processor in pipe.unet.attn_processors.values():
            if isinstance(processor, IPAdapterAttnProcessor2_0):
                processor.scale[0] = 0.5
        return given

    refused(pipe, "changed the conditioning or the guidance", call | {"callback_on_step_end": rescale})


@pytest.mark.parametrize("max_batch", [1, 5, 1000])
def test_max_batch_bounds_every_call(max_batch: int) -> None:
    pipe, call = pieces("xl", True)
    expected = result(pipe, call)
    rows: list[int] = []
    handle = pipe.unet.conv_in.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    with parallel(pipe, rtol=1e-4, max_batch=max_batch) as run:
        actual = result(pipe, call)
    handle.remove()
    assert run.solution is not None
    assert max(rows) == min(max_batch, 4 * AT_ONCE) and sum(rows) == 2 * int(run.solution.nfe.sum())
    assert float(relative_error(actual, expected).max()) <= 2e-3


@pytest.mark.parametrize("max_batch", [None, 5])
@pytest.mark.parametrize("name", ["xl", "dit", "sd3"])
def test_several_devices_share_every_call(name: str, max_batch: int | None) -> None:
    pipe, call = pieces(name, True)
    expected, denoiser = result(pipe, call), getattr(pipe, LOOPS[type(pipe).__name__].denoiser)
    rows: list[int] = []
    handle = denoiser.register_forward_hook(lambda module, args, output: rows.append(len(output[0])))  # the copies' too
    with parallel(pipe, rtol=0.0, max_batch=max_batch, devices=["cpu", "cpu", "cpu"]) as run:
        actual = result(pipe, call)
    handle.remove()
    assert float(relative_error(actual, expected).max()) <= 1e-5
    assert run.solution is not None
    assert max(rows) == math.ceil((max_batch or 4 * AT_ONCE) / 3) and sum(rows) == 2 * int(run.solution.nfe.sum())
    assert torch.equal(result(pipe, call), expected)


def test_copies_of_the_denoiser_follow_its_weights_also_between_two_calls() -> None:
    pipe, call = pieces("sd", True)
    with parallel(pipe, rtol=0.0, devices=["cpu", "cpu"]):
        before = result(pipe, call)
        with torch.no_grad():
            pipe.unet.conv_out.weight.mul_(0.5)
        after = result(pipe, call)
    expected = result(pipe, call)
    assert float(relative_error(before, expected).max()) > 0.1
    assert float(relative_error(after, expected).max()) <= 1e-5


def test_callbacks_get_previews_and_the_bar_counts_iterations(capsys: pytest.CaptureFixture[str]) -> None:
    pipe, call = pieces("sd", True)
    previews: list[Tensor] = []

    def look(pipe: Any, i: int, t: Tensor, given: dict[str, Any]) -> dict[str, Any]:
        assert i == len(previews) and type(t) is Tensor and type(given["latents"]) is Tensor
        previews.append(given["latents"].clone())
        return given

    with parallel(pipe, rtol=1e-3) as run:
        pipe.set_progress_bar_config(disable=False)
        actual = pipe(**call, callback_on_step_end=look).images
    assert run.solution is not None
    assert len(previews) == run.solution.iterations < STEPS
    assert f"{run.solution.iterations}/{STEPS}" in capsys.readouterr().err
    errors = [float(relative_error(preview, actual).max()) for preview in previews]
    assert errors[0] > 1e-2 and errors[-2] < errors[0] / 3 and errors[-1] == 0


def test_interrupt_stops_early() -> None:
    pipe, call = pieces("sd", True)

    def stop(pipe: Any, i: int, t: Tensor, given: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = i == 1
        return given

    with parallel(pipe, rtol=0.0) as run:
        actual = result(pipe, call, callback_on_step_end=stop)
    assert run.solution is not None and run.solution.iterations == 2
    assert not bool(run.solution.converged.any()) and torch.equal(run.solution.value, actual)


def test_the_pipe_is_left_as_it_was() -> None:
    pipe, call = pieces("sd", True)
    expected = result(pipe, call)

    def state() -> Any:
        scheduler = pipe.scheduler
        hooks = [*pipe.unet._forward_pre_hooks, *pipe.unet._forward_hooks, "forward" in vars(pipe.unet)]
        assert type(pipe) is diffusers.StableDiffusionPipeline
        held = dict(vars(scheduler)) | pipe.components | {"config": pipe._internal_dict, "scheduler": scheduler}
        return held, set(vars(pipe)), dict(pipe.config), hooks

    def same(a: Any, b: Any) -> None:
        assert a[1:] == b[1:] and a[0].keys() == b[0].keys() and all(a[0][key] is b[0][key] for key in a[0])

    before = state()

    def fail(*args: Any) -> dict[str, Any]:
        raise KeyError("from the callback")

    with parallel(pipe, rtol=0.0) as run:
        assert isinstance(pipe.scheduler, diffusers.DDIMScheduler)
        assert isinstance(pipe, diffusers.StableDiffusionPipeline)
        assert repr(type(pipe)) == repr(diffusers.StableDiffusionPipeline)
        assert pipe.scheduler.config == before[0]["scheduler"].config
        with pytest.raises(KeyError, match="from the callback"):
            result(pipe, call, callback_on_step_end=fail)
        assert run.solution is None
        assert float(relative_error(result(pipe, call), expected).max()) <= 1e-5  # the same context goes on
        first = run.solution
        with parallel(pipe, rtol=0.0, max_batch=7) as inner:
            assert float(relative_error(result(pipe, call), expected).max()) <= 1e-5
        assert inner.solution is not None and run.solution is first
        assert float(relative_error(result(pipe, call, eta=0.0), expected).max()) <= 1e-5
        assert run.solution is not first
    same(state(), before)
    with pytest.raises(KeyError), parallel(pipe):
        result(pipe, call, callback_on_step_end=fail)
    same(state(), before)
    assert torch.equal(result(pipe, call), expected)


def test_a_denoiser_that_is_called_outside_of_the_loop_is_itself() -> None:
    pipe, call = pieces("sd", False)
    x, t, context = noise(), torch.tensor(10), call["prompt_embeds"]
    with torch.no_grad():
        expected = pipe.unet(x, t, encoder_hidden_states=context).sample
        with parallel(pipe):
            assert torch.equal(pipe.unet(x, t, encoder_hidden_states=context).sample, expected)
            result(pipe, call)
            assert torch.equal(pipe.unet(x, t, encoder_hidden_states=context).sample, expected)


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
    names = ("DPMSolverSinglestepScheduler", "EulerDiscreteScheduler", "PNDMScheduler", "DDPMScheduler", "LCMScheduler")
    for name in names:
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
        refused(pipe, rf"is a {name}, .* DDIMScheduler\.from_config\(pipe\.scheduler\.config\)")
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
    refused(diffusers.DDPMPipeline(pipe.unet, pipe.scheduler), "loop of DDPMPipeline is not known")
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
    other, its_call = pieces("sd", False)
    second_order(other)
    refused(other, "are not those of its chain", its_call | {"timesteps": [900, 500, 300, 100]})
    pipe.scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    with parallel(pipe, rtol=0.0):  # a spacing that its chain reproduces
        result(pipe, call)


def text_to_image() -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=100, hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=TOKENS, eos_token_id=1, bos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1} | {f"{letter}</w>": 2 + i for i, letter in enumerate("abc")}
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TOKENS)
    network = unet()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter /= 1.6
    return quiet(diffusers.StableDiffusionPipeline(
        vae=vae(), text_encoder=transformers.CLIPTextModel(config).eval(), tokenizer=tokenizer, unet=network,
        scheduler=ddim(prediction_type="v_prediction"), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    ))  # fmt: skip


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize("method", ["joint", "stepwise"])
def test_inverted_latents_make_the_image_again(method: str, guidance_scale: float) -> None:
    torch.manual_seed(0)
    pipe = text_to_image()
    given = {"num_inference_steps": STEPS, "guidance_scale": guidance_scale}
    prompts = ["a b", "c"]
    call = given | {"prompt": prompts, "output_type": "latent"}
    latents = pipe(**call, latents=noise()).images
    rows, per_state = list[int](), 2 if guidance_scale > 1 else 1
    handle = pipe.unet.conv_in.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    found = invert(pipe, latents, prompts, method=method, rtol=1e-5, max_batch=8, **given)
    handle.remove()
    assert bool(found.converged.all())
    assert max(rows) == (8 if method == "joint" else 2 * per_state) and sum(rows) == per_state * int(found.nfe.sum())
    assert float(relative_error(found.value, noise()).max()) <= 1e-3
    assert float(relative_error(pipe(**call, latents=found.value).images, latents).max()) <= 1e-3


def test_invert_encodes_images() -> None:
    torch.manual_seed(0)
    pipe = text_to_image()
    image = picture()
    found = invert(pipe, image, "a", num_inference_steps=STEPS)
    with torch.no_grad():
        encoded = pipe.vae.encode(2 * image - 1).latent_dist.mode() * pipe.vae.config.scaling_factor
    assert float(relative_error(found.trajectory[-1], encoded).max()) <= 1e-5
    img2img = quiet(diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False))
    same = invert(img2img, list(image), "a", num_inference_steps=STEPS, devices=["cpu", "cpu"])
    assert float(relative_error(same.value, found.value).max()) <= 1e-5
    again = pipe("a", num_images_per_prompt=2, latents=found.value, num_inference_steps=STEPS, guidance_scale=1.0,
                 output_type="latent").images  # fmt: skip
    assert float(relative_error(again, encoded).max()) <= 1e-3


def test_invert_pixels() -> None:
    loaded = models.load("digits")
    config = diffusers.DDIMScheduler.load_config(Path(models.__file__).parent / "digits", local_files_only=True)
    pipe = diffusers.DDIMPipeline(loaded.model, diffusers.DDIMScheduler.from_config(config))
    image = deqkern.sample(loaded.model, torch.randn(1, *loaded.shape), loaded.schedule, 15, sigma_min=0.08).value
    image = image.clamp(-1, 1)
    rows: list[int] = []
    handle = pipe.unet.conv_in.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    found = invert(pipe, image / 2 + 0.5, num_inference_steps=15, sigma_min=0.08, max_batch=5)
    handle.remove()
    assert max(rows) == 5 and sum(rows) == int(found.nfe.sum())
    again = deqkern.sample(loaded.model, found.value, loaded.schedule, 15, rtol=0.0, sigma_min=0.08).value
    assert bool(found.converged.all())
    assert float(relative_error(again, image).max()) <= 1e-3


def test_invert_refuses_what_it_cannot_undo() -> None:
    pipe, _ = pieces("ddim", True)
    with pytest.raises(ValueError, match="clip_sample=False"):
        invert(pipe, random(2, 3, 8, 8).clamp(0, 1))
    pipe.scheduler = diffusers.DDIMScheduler(clip_sample=False, thresholding=True)
    with pytest.raises(ValueError, match="thresholding=False"):
        invert(pipe, random(2, 3, 8, 8).clamp(0, 1))
    pipe.scheduler = diffusers.DDIMScheduler(clip_sample=False)
    for conditioning in ({"prompt": "a"}, {"guidance_scale": 2.0}):
        with pytest.raises(ValueError, match="no conditioning"):
            invert(pipe, random(2, 3, 8, 8).clamp(0, 1), **conditioning)
    with pytest.raises(ValueError, match="pipe must be one of"):
        invert(pieces("xl", False)[0], random(2, 3, 8, 8))
    pipe = text_to_image()
    with pytest.raises(ValueError, match="prompt must be one or 2"):
        invert(pipe, noise(), ["a", "b", "c"])
    with pytest.raises(ValueError, match="max_batch must be None or an int >= 1"):
        invert(pipe, noise(), max_batch=-1)
    with pytest.raises(ValueError, match="method must be"):
        invert(pipe, noise(), method="newton")
    with pytest.raises(ValueError, match="devices must hold the model's own, cpu, got meta"):
        invert(pipe, noise(), devices=["meta"])
    pipe.scheduler = diffusers.PNDMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match=r"DDIMScheduler\.from_config"):
        invert(pipe, noise())


@pytest.mark.parametrize("look", [list, max, lambda t: [float(v) for v in t[2:]], lambda t: (t[[0, 2]], list(2 * t))])
def test_a_callback_may_go_through_the_timesteps(look: Callable[[Any], Any]) -> None:
    pipe, call = pieces("sd", True)
    expected, seen = result(pipe, call), list[Any]()

    def callback(pipe: Any, i: int, t: Tensor, given: dict[str, Any]) -> dict[str, Any]:
        seen.append(look(pipe.scheduler.timesteps))
        return given

    with parallel(pipe, rtol=0.0) as run:
        actual = result(pipe, call, callback_on_step_end=callback)
    assert float(relative_error(actual, expected).max()) <= 1e-5
    assert run.solution is not None and len(seen) == run.solution.iterations
    assert all(str(found) == str(seen[0]) for found in seen)


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


def alive(kind: type) -> int:
    gc.collect()
    return sum(isinstance(thing, kind) for thing in gc.get_objects())


def test_the_copies_follow_what_a_pipeline_is_set_to() -> None:
    pipe, call = pieces("sd", True)
    networks = alive(type(pipe.unet))
    with parallel(pipe, rtol=0.0, devices=["cpu", "cpu"]) as run:
        before = result(pipe, call)
        assert alive(type(pipe.unet)) == networks + 1
        pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
        after = result(pipe, call)
    expected = result(pipe, call)
    assert float(relative_error(before, expected).max()) > 0.05
    assert float(relative_error(after, expected).max()) <= 1e-5
    assert run.solution is not None and alive(type(pipe.unet)) == networks, "the copies are gone"


def test_hooks_that_replace_forward_cannot_be_copied() -> None:
    pipe, call = pieces("sd", False)
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    check_exact(pipe, call)
    refused(pipe, "forward was replaced", devices=["cpu", "cpu"])


@pytest.mark.parametrize("place", ["in place", "around"])
def test_a_compiled_denoiser_has_graphs_of_its_own_only(place: str) -> None:
    network = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, add_attention=False,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    pipe = diffusers.DDIMPipeline(sharpened(network), diffusers.DDIMScheduler(clip_sample=False))
    call: dict[str, Any] = {"batch_size": 2, "num_inference_steps": STEPS, "output_type": "pt"}
    expected, targets = result(pipe, call), set[str]()

    def as_it_is(graph: torch.fx.GraphModule, example: Any) -> Callable[..., Any]:
        targets.update(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    if place == "in place":
        pipe.unet.compile(backend=as_it_is, dynamic=True)
    else:
        pipe.unet = torch.compile(pipe.unet, backend=as_it_is, dynamic=True)
    with parallel(pipe, rtol=1e-4):
        actual = result(pipe, call)
    assert float(relative_error(actual, expected).max()) <= 2e-3
    assert targets and not any("deqkern" in target for target in targets)
