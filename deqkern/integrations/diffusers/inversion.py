"""The pipeline run back: the noise from which it makes a given image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import inversion
from ...chain.schedule import NoiseSchedule
from ...chain.schedulers import default_row, in_place_of, row_by_step
from ...engine.solution import Solution
from ...network.guidance import guided
from ...network.replication import replicated
from ...problem import check_options
from .checks import loop_name
from .scheduler import original_of

INVERTIBLE = ("DDIMPipeline", "StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")


def invert(
    pipe: Any,
    image: Any,
    prompt: str | Sequence[str] = "",
    *,
    num_inference_steps: int = 50,
    guidance_scale: float = 1.0,
    rtol: float = 1e-4,
    method: str = "joint",
    sigma_min: float | None = None,
    max_batch: int | None = None,
    devices: Sequence[torch.device | str | int] | None = None,
) -> Solution:
    """Find the noise from which `pipe` makes `image` (eta = 0): see `deqkern.invert`.

    Args:
        pipe: One of `INVERTIBLE`, or a subclass with the same loop, with a DDIMScheduler that does not clip.
        image: As the pipelines take it: PIL, NumPy or a tensor (B, C, H, W) in 0 .. 1, or a list of them. A tensor with
            as many channels as the VAE's latents is taken for latents, scaled as the pipeline has them.
        prompt: One for all images, or one for each. Only Stable Diffusion has one.
        num_inference_steps: S.
        guidance_scale: As in the pipeline; > 1 is guidance, against the empty prompt, and makes inversion harder.
        rtol: As in `deqkern.invert`.
        method: As in `deqkern.invert`.
        sigma_min: None is the pipeline's own chain; `deqkern.invert` says why a chain that ends early inverts better.
        max_batch: Rows in one call of the UNet, but never less than one state; guidance takes two per state.
        devices: As in `parallel`.

    Returns:
        The `Solution`. For Stable Diffusion `value` are latents: `pipe(prompt,
        latents=solution.value.to(pipe.dtype), num_inference_steps=..., guidance_scale=...)` makes the image again.
        `DDIMPipeline` takes no noise; `deqkern.sample(pipe.unet, ...)` does.

    Raises:
        ValueError: For an argument that does not fit.
        TypeError: For one of another type.

    Example:
        >>> import diffusers, torch
        >>> from deqkern import models
        >>> from deqkern.integrations.diffusers import invert
        >>> scheduler = diffusers.DDIMScheduler(clip_sample=False)
        >>> pipe = diffusers.DDIMPipeline(models.load("digits").model, scheduler)
        >>> image = torch.zeros(1, 1, 16, 16)
        >>> found = invert(pipe, image, num_inference_steps=10, sigma_min=0.1)
        >>> found.value.shape
        torch.Size([1, 1, 16, 16])
    """
    check_options(rtol, None, max_batch)
    name = loop_name(pipe)
    if name not in INVERTIBLE:
        raise ValueError(
            f"pipe must be one of {', '.join(INVERTIBLE)}, got {type(pipe).__name__}; for others call deqkern.invert"
        )
    scheduler = original_of(pipe.scheduler)
    row = row_by_step(scheduler)
    if row is None or not row.invertible:
        use = in_place_of(scheduler, default_row(flow=False), "pipe.scheduler")
        raise ValueError(
            f"pipe.scheduler is a {type(scheduler).__name__}, whose steps cannot be undone; set pipe.scheduler = {use}"
        )
    schedule, device = NoiseSchedule.from_diffusers(scheduler), pipe.unet.device
    if schedule.clip_sample or schedule.thresholding:
        raise ValueError(
            "pipe.scheduler clips x0, which cannot be undone: use DDIMScheduler.from_config(pipe.scheduler.config, "
            "clip_sample=False, thresholding=False)"
        )

    unet = pipe.unet if devices is None else replicated(pipe.unet, devices)

    def inverted(model: Any, sample: Tensor, rows: int, **model_kwargs: Tensor) -> Solution:
        return inversion.invert(
            model,
            sample,
            schedule,
            num_inference_steps=num_inference_steps,
            method=method,
            rtol=rtol,
            sigma_min=sigma_min,
            model_kwargs=model_kwargs,
            max_batch=max_batch and max(1, max_batch // rows),
        )

    with torch.no_grad():
        if name == "DDIMPipeline":
            if prompt != "" or guidance_scale != 1:
                raise ValueError("prompt and guidance_scale are for Stable Diffusion; DDIMPipeline has no conditioning")
            return inverted(unet, _pixels(pipe, image).to(device), rows=1)
        latents = _latents(pipe, image)
        prompts = [prompt] * len(latents) if isinstance(prompt, str) else list(prompt)
        if len(prompts) != len(latents):
            raise ValueError(f"prompt must be one or {len(latents)}, as many as images, got {len(prompts)}")
        guides = guidance_scale > 1
        text, empty = pipe.encode_prompt(prompts, latents.device, 1, guides)
        if not guides:
            return inverted(unet, latents, rows=1, encoder_hidden_states=text)  # (B, tokens, features)
        model = guided(
            unet, guidance_scale, cond={"encoder_hidden_states": text}, uncond={"encoder_hidden_states": empty}
        )
        return inverted(model, latents, rows=2)


def _pixels(pipe: Any, image: Any) -> Tensor:  # (B, C, H, W) in -1 .. 1
    from diffusers.image_processor import VaeImageProcessor

    processor = getattr(pipe, "image_processor", None) or VaeImageProcessor(vae_scale_factor=1)
    return processor.preprocess(image)


def _latents(pipe: Any, image: Any) -> Tensor:  # (B, channels, h, w) fp32, as the pipeline has them
    device, vae = pipe._execution_device, pipe.vae
    if isinstance(image, Tensor) and image.ndim == 4 and image.shape[1] == vae.config.latent_channels:
        return image.to(device, torch.float32)
    encoded = vae.encode(_pixels(pipe, image).to(device, vae.dtype)).latent_dist.mode()
    return encoded.float() * vae.config.scaling_factor
