"""The noise from which a pipeline makes an image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from asserts import relative_error
from pipelines import (
    STEPS,
    TOKENS,
    WIDTH,
    ddim,
    diffusers,
    noise,
    picture,
    pieces,
    quiet,
    random,
    transformers,
    unet,
    vae,
)

import deqkern
from deqkern import models
from deqkern.integrations.diffusers import invert


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
