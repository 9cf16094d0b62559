"""Pipelines of tiny random networks: in parallel as step by step."""

from __future__ import annotations

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
    PIPELINES,
    STEPS,
    WIDTH,
    check_both,
    check_exact,
    diffusers,
    noise,
    pieces,
    quiet,
    random,
    refused,
    result,
    second_order,
    sharpened,
)
from torch import Tensor

import deqkern
from deqkern import models
from deqkern.integrations.diffusers import parallel
from deqkern.integrations.diffusers.loops import LOOPS


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


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_the_pipeline_of_ddpm(variance: str, clip: bool) -> None:
    pipe, call = pieces("ddim", clip)
    scheduler = diffusers.DDPMScheduler(variance_type=variance, clip_sample=clip, prediction_type="v_prediction")
    check_both(diffusers.DDPMPipeline(pipe.unet, scheduler), call)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", ["sd", "img2img", "inpaint", "xl", "xl_img2img"])
def test_the_ddpm_scheduler(name: str, guided: bool) -> None:
    pipe, call = pieces(name, guided)
    for options in (
        {"variance_type": "fixed_large", "timestep_spacing": "trailing"},
        {"clip_sample": True, "thresholding": True, "sample_max_value": 2.0},
        {},
    ):
        pipe.scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config, **options)
        check_exact(pipe, call)
    check_both(pipe, call)


def test_the_next_image_of_a_generator_is_that_of_the_sequential_loop() -> None:
    """DDPM draws no noise at timestep 0."""
    pipe, call = pieces("ddim", False)
    pipe = quiet(diffusers.DDPMPipeline(pipe.unet, diffusers.DDPMScheduler()))

    def two() -> Tensor:
        generator = torch.Generator().manual_seed(5)
        return torch.cat([torch.as_tensor(pipe(**call, generator=generator).images) for _ in range(2)])

    expected = two()
    with parallel(pipe, rtol=0.0):
        assert float(relative_error(two(), expected).max()) <= 1e-5


@pytest.mark.parametrize("kind", ["DDPMScheduler", "DPMSolverMultistepScheduler"])
def test_timesteps_of_the_users_own(kind: str) -> None:
    pipe, call = pieces("sd", True)
    pipe.scheduler = getattr(diffusers, kind).from_config(pipe.scheduler.config)
    check_exact(pipe, call | {"timesteps": [900, 500, 300, 100]})
    check_exact(pipe, call)


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
