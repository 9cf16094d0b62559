"""Pieces of tiny random pipelines, and what the tests of `deqkern.integrations.diffusers` check with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from asserts import relative_error
from torch import Tensor

import deqkern
from deqkern.integrations.diffusers import parallel

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers", reason="the pipelines need it")

STEPS, TOKENS, WIDTH = 12, 5, 16
AT_ONCE = deqkern.solvers.default().width(STEPS)  # steps in the first call


def sharpened(network: torch.nn.Module) -> torch.nn.Module:
    """A random network with larger weights: near the usual ones it is next to linear, and converges at once."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter *= 1.6
    return network.eval()


def unet(channels: int = 4, **options: Any) -> Any:
    return sharpened(
        diffusers.UNet2DConditionModel(
            sample_size=8, in_channels=channels, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
            norm_num_groups=4, attention_head_dim=4, cross_attention_dim=WIDTH,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **options,
        )
    )  # fmt: skip


def vae(channels: int = 4) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=channels, sample_size=8, scaling_factor=0.5,
        shift_factor=0.1,
    ).eval()  # fmt: skip


def ddim(**options: Any) -> Any:
    given = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False,
             "set_alpha_to_one": False, "steps_offset": 1}  # fmt: skip
    return diffusers.DDIMScheduler(**given | options)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompts(guided: bool, **more: Tensor) -> dict[str, Any]:
    given = {"prompt_embeds": random(2, TOKENS, WIDTH, seed=1), "guidance_scale": 7.5 if guided else 1.0}
    if guided:
        given["negative_prompt_embeds"] = random(2, TOKENS, WIDTH, seed=2)
    for name, value in more.items():
        given[name] = value
        if guided:
            given[f"negative_{name}"] = value.flip(0)
    return given | {"num_inference_steps": STEPS, "output_type": "latent"}


def noise(channels: int = 4) -> Tensor:
    return random(2, channels, 8, 8, seed=3)


def picture() -> Tensor:
    return random(2, 3, 8, 8, seed=4).clamp(-1, 1) / 2 + 0.5


def seeded(make: Callable[[bool], Any], guided: bool) -> tuple[Any, dict[str, Any]]:
    """A pipeline and the arguments of a call, whose weights are the same each time."""
    torch.manual_seed(0)
    return make(guided)


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


def result(pipe: Any, call: dict[str, Any], **more: Any) -> Tensor:
    """The images, videos or latents of a call whose generator begins anew."""
    return quiet(pipe)(**call, generator=torch.Generator().manual_seed(7), **more)[0]


def packed(pipe: Any, value: Tensor) -> Tensor:
    """Latents (B, C, H, W) as the loop of `pipe` has them, by its own function."""
    if value.ndim == 4 and hasattr(pipe, "_pack_latents"):
        return pipe._pack_latents(value, *value.shape)
    return value


def check_both(pipe: Any, call: dict[str, Any]) -> None:
    expected = result(pipe, call)
    for rtol, bound in ((1e-4, 2e-3), (0.0, 1e-5)):
        with parallel(pipe, rtol=rtol) as run:
            actual = result(pipe, call)
        assert float(relative_error(actual, expected).max()) <= bound
        assert run.solution is not None and bool(run.solution.converged.all())
        assert 1 < run.solution.iterations <= call["num_inference_steps"]
        if call["output_type"] == "latent":
            assert torch.equal(packed(pipe, run.solution.value), actual)


def second_order(pipe: Any, kind: str = "dpmsolver++", **options: Any) -> None:
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config, algorithm_type=kind, **options
    )


def check_exact(pipe: Any, call: dict[str, Any]) -> deqkern.Solution:
    expected = result(pipe, call)
    with parallel(pipe, rtol=0.0, max_batch=13) as run:
        actual = result(pipe, call)
    assert float(relative_error(actual, expected).max()) <= 1e-5
    assert run.solution is not None
    return run.solution


def refused(pipe: Any, match: str, call: dict[str, Any] | None = None, error: type = ValueError, **more: Any) -> None:
    with pytest.raises(error, match=match), parallel(pipe, **more):
        assert call is not None, "it should have been refused at once"
        result(pipe, call)
