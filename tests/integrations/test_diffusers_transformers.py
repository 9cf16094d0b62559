"""Pipelines of tiny random transformers: several calls per step, packed latents, videos."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import PIL.Image
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
    packed,
    picture,
    prompts,
    random,
    refused,
    result,
    second_order,
    seeded,
    sharpened,
    unet,
    vae,
)
from torch import Tensor

import deqkern
from deqkern.integrations.diffusers import loops, parallel, run

# (B, 3, H, W), not square: 24 tokens where latents are packed, as many as an unguided call has rows
PICTURE = random(2, 3, 8, 12, seed=4).clamp(-1, 1) / 2 + 0.5
SMALL = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}


def flow(**options: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**options)


def dynamic() -> Any:
    return flow(use_dynamic_shifting=True, base_image_seq_len=16, max_image_seq_len=64)


def mask() -> Tensor:
    """The second prompt is shorter."""
    return torch.tensor([[1] * TOKENS, [1] * (TOKENS - 2) + [0, 0]])


def arguments(guided: bool, scale: str = "guidance_scale", size: int = 1, tokens: int = TOKENS, **more: Any) -> Any:
    """A call for latents of 8 x 12; tensors of `more` are conditioning. scale: what guidance is called."""
    given = {"prompt_embeds": random(2, tokens, WIDTH, seed=1)}
    given |= {name: value for name, value in more.items() if isinstance(value, Tensor)}
    if guided:
        given |= {f"negative_{name}": value.flip(0).clone() for name, value in given.items()}
    given |= {scale: 4.0 if guided else 1.0, "num_inference_steps": STEPS, "output_type": "latent"}
    return given | {"height": 8 * size, "width": 12 * size} | {k: v for k, v in more.items() if k not in given}


def flux(guided: bool, kind: str = "FluxPipeline", **more: Any) -> Any:
    network = diffusers.FluxTransformer2DModel(
        in_channels=16, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, guidance_embeds=True,
        axes_dims_rope=(2, 2, 4), **SMALL,
    )  # fmt: skip
    pipe = getattr(diffusers, kind)(
        scheduler=dynamic(), vae=vae(), text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
        transformer=sharpened(network),
    )  # fmt: skip
    pooled = random(2, WIDTH, seed=5)
    # two tokens of text: as many as samples
    return pipe, arguments(guided, "true_cfg_scale", tokens=2, pooled_prompt_embeds=pooled) | more


def flux_img2img(guided: bool) -> Any:
    return flux(guided, "FluxImg2ImgPipeline", image=PICTURE, strength=0.6)


def flux_kontext(guided: bool) -> Any:
    """With the latents of another image to look at."""
    return flux(guided, "FluxKontextPipeline", image=random(2, 4, 4, 6, seed=6), max_area=96)


def chroma(guided: bool) -> Any:
    network = diffusers.ChromaTransformer2DModel(
        in_channels=16, joint_attention_dim=WIDTH, axes_dims_rope=(2, 2, 4), approximator_num_channels=8,
        approximator_hidden_dim=16, approximator_layers=1, **SMALL,
    )  # fmt: skip
    pipe = diffusers.ChromaPipeline(
        scheduler=flow(), vae=vae(), text_encoder=None, tokenizer=None, transformer=sharpened(network)
    )
    return pipe, arguments(guided, prompt_attention_mask=mask().float())


def flux2(guided: bool, kind: str = "Flux2Pipeline") -> Any:
    network = diffusers.Flux2Transformer2DModel(
        in_channels=16, joint_attention_dim=WIDTH, axes_dims_rope=(2, 2, 2, 2), timestep_guidance_channels=16,
        guidance_embeds=kind == "Flux2Pipeline", **SMALL,
    )  # fmt: skip
    decoder = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        norm_num_groups=4, latent_channels=4, sample_size=8, layers_per_block=1,
    )  # fmt: skip
    pipe = getattr(diffusers, kind)(
        scheduler=dynamic(), vae=decoder.eval(), text_encoder=None, tokenizer=None, transformer=sharpened(network)
    )
    call = arguments(guided)
    if kind == "Flux2Pipeline":  # its guidance is embedded
        call.pop("negative_prompt_embeds", None)
    return pipe, call | {"output_type": "pt"}


def flux2_klein(guided: bool) -> Any:
    return flux2(guided, "Flux2KleinPipeline")


def qwen(guided: bool, kind: str = "QwenImagePipeline") -> Any:
    network = diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    pipe = getattr(diffusers, kind)(
        scheduler=dynamic(), vae=None, text_encoder=None, tokenizer=None, transformer=sharpened(network)
    )
    return pipe, arguments(guided, "true_cfg_scale", 8, prompt_embeds_mask=mask())


def qwen_img2img(guided: bool) -> Any:
    pipe, call = qwen(guided, "QwenImageImg2ImgPipeline")
    encoder = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1], num_res_blocks=1, temperal_downsample=[], latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )  # fmt: skip
    return type(pipe)(**pipe.components | {"vae": encoder.eval()}), call | {
        "image": PICTURE, "strength": 0.6, "height": 8, "width": 12,
    }  # fmt: skip


def pixart(guided: bool, kind: str = "PixArtAlphaPipeline") -> Any:
    network = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=16, sample_size=8, patch_size=2, caption_channels=WIDTH, use_additional_conditions=False,
    )  # fmt: skip
    pipe = getattr(diffusers, kind)(
        tokenizer=None, text_encoder=None, vae=None, transformer=sharpened(network), scheduler=ddim()
    )
    more: Any = {"use_resolution_binning": False, "negative_prompt": None}
    return pipe, arguments(guided, size=8, prompt_attention_mask=mask(), **more)


def pixart_sigma(guided: bool) -> Any:
    return pixart(guided, "PixArtSigmaPipeline")


def hunyuan_dit(guided: bool) -> Any:
    network = diffusers.HunyuanDiT2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, patch_size=2, sample_size=8, hidden_size=16,
        num_layers=2, cross_attention_dim=WIDTH, cross_attention_dim_t5=WIDTH, pooled_projection_dim=16,
        text_len=TOKENS, text_len_t5=TOKENS, mlp_ratio=2.0,
    )  # fmt: skip
    pipe = diffusers.HunyuanDiTPipeline(
        vae=None, text_encoder=None, tokenizer=None, transformer=sharpened(network), safety_checker=None,
        scheduler=ddim(prediction_type="v_prediction"), feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    text = {"prompt_attention_mask": mask(), "prompt_embeds_2": random(2, TOKENS, WIDTH, seed=5)}
    call = arguments(guided, size=8, prompt_attention_mask_2=mask(), use_resolution_binning=False, **text)
    return pipe, call | {"guidance_rescale": 0.7 if guided else 0.0}


def sana(guided: bool) -> Any:
    network = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=WIDTH,
        sample_size=8, timestep_scale=0.5,
    )  # fmt: skip
    pipe = diffusers.SanaPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=sharpened(network), scheduler=flow(shift=3.0)
    )
    more: Any = {"use_resolution_binning": False, "negative_prompt": None}
    return pipe, arguments(guided, size=32, prompt_attention_mask=mask(), **more)


def aura_flow(guided: bool) -> Any:
    network = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=WIDTH, caption_projection_dim=16, out_channels=4,
        pos_embed_max_size=64,
    )  # fmt: skip
    pipe = diffusers.AuraFlowPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=sharpened(network), scheduler=flow(shift=1.7)
    )
    more: Any = {"negative_prompt": None}
    return pipe, arguments(guided, size=8, prompt_attention_mask=mask(), **more)


def cogview4(guided: bool) -> Any:
    network = diffusers.CogView4Transformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        text_embed_dim=WIDTH, time_embed_dim=8, condition_dim=4, pos_embed_max_size=16, sample_size=8,
        rope_axes_dim=(16, 16),
    )  # fmt: skip
    scheduler = flow(use_dynamic_shifting=True, time_shift_type="linear")
    pipe = diffusers.CogView4Pipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=sharpened(network), scheduler=scheduler
    )
    return pipe, arguments(guided, size=8)


def lumina2(guided: bool) -> Any:
    network = diffusers.Lumina2Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=16, num_layers=1, num_refiner_layers=1,
        num_attention_heads=2, num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 2, 2), axes_lens=(30, 30, 30),
        cap_feat_dim=WIDTH,
    )  # fmt: skip
    pipe = diffusers.Lumina2Pipeline(
        transformer=sharpened(network), scheduler=flow(shift=6.0), vae=None, text_encoder=None, tokenizer=None
    )
    return pipe, arguments(guided, size=8, prompt_attention_mask=mask())


def wan(guided: bool, kind: str = "WanPipeline", channels: int = 4, **more: Any) -> Any:
    network = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=channels, out_channels=4, text_dim=WIDTH,
        freq_dim=16, ffn_dim=32, num_layers=2,
    )  # fmt: skip
    parts = {"tokenizer": None, "text_encoder": None, "vae": None} | more
    pipe = getattr(diffusers, kind)(scheduler=flow(shift=3.0), transformer=sharpened(network), **parts)
    return pipe, arguments(guided) | {"height": 32, "width": 48, "num_frames": 5}


def wan_image(guided: bool) -> Any:
    encoder = diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    pipe, call = wan(guided, "WanImageToVideoPipeline", 12, vae=encoder.eval())
    return pipe, call | {"image": PICTURE[:1].repeat(1, 1, 4, 4)}


def hunyuan_video(guided: bool) -> Any:
    network = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, text_embed_dim=WIDTH, pooled_projection_dim=WIDTH,
        rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    pipe = diffusers.HunyuanVideoPipeline(
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, vae=None,
        transformer=sharpened(network), scheduler=flow(shift=7.0),
    )  # fmt: skip
    text = {"prompt_attention_mask": mask(), "pooled_prompt_embeds": random(2, WIDTH, seed=5)}
    return pipe, arguments(guided, "true_cfg_scale", **text) | {"height": 32, "width": 48, "num_frames": 5}


def ltx(guided: bool) -> Any:
    network = diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=2, caption_channels=WIDTH,
    )  # fmt: skip
    pipe = diffusers.LTXPipeline(
        scheduler=dynamic(), vae=None, text_encoder=None, tokenizer=None, transformer=sharpened(network)
    )
    call = arguments(guided, prompt_attention_mask=mask().float())
    return pipe, call | {"height": 64, "width": 96, "num_frames": 9}


def kolors(guided: bool, kind: str = "KolorsPipeline", **more: Any) -> Any:
    try:
        import sentencepiece  # noqa: F401
    except ImportError:  # only its tokenizer needs it
        stub: Any = types.ModuleType("sentencepiece")
        stub.SentencePieceProcessor = object
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "sentencepiece", stub)
            importlib.import_module("diffusers.pipelines.kolors.pipeline_kolors")
    from diffusers.pipelines.kolors import pipeline_kolors, pipeline_kolors_img2img

    network = unet(
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=WIDTH + 24
    )
    module = pipeline_kolors_img2img if more else pipeline_kolors
    pipe = getattr(module, kind)(vae=vae(), text_encoder=None, tokenizer=None, unet=network, scheduler=ddim())
    call = prompts(guided, pooled_prompt_embeds=random(2, WIDTH, seed=5)) | more
    return pipe, call if more else call | {"latents": noise()}


def kolors_img2img(guided: bool) -> Any:
    pipe, call = kolors(guided, "KolorsImg2ImgPipeline", image=picture(), strength=0.6)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    encoded = tuple(call.get(name) for name in names)
    pipe.encode_prompt = lambda **given: encoded  # its own loses pooled embeddings that are given
    return pipe, call


PIPELINES: dict[str, Callable[[bool], Any]] = {
    "flux": flux, "flux_img2img": flux_img2img, "flux_kontext": flux_kontext, "chroma": chroma, "flux2": flux2,
    "flux2_klein": flux2_klein, "qwen": qwen, "qwen_img2img": qwen_img2img, "pixart": pixart,
    "pixart_sigma": pixart_sigma, "hunyuan_dit": hunyuan_dit, "sana": sana, "aura_flow": aura_flow,
    "cogview4": cogview4, "lumina2": lumina2, "wan": wan, "wan_image": wan_image, "hunyuan_video": hunyuan_video,
    "ltx": ltx, "kolors": kolors, "kolors_img2img": kolors_img2img,
}  # fmt: skip


def pieces(name: str, guided: bool) -> tuple[Any, dict[str, Any]]:
    return seeded(PIPELINES[name], guided)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", PIPELINES)
def test_parallel_is_sequential(name: str, guided: bool) -> None:
    check_both(*pieces(name, guided))


@pytest.mark.parametrize("name", PIPELINES)
def test_guidance_reaches_the_result(name: str) -> None:
    """So that comparing guided results compares guidance."""
    results = [result(*pieces(name, guided)) for guided in (False, True)]
    assert float(relative_error(*results).min()) > 1e-3


@pytest.mark.parametrize(
    ("name", "kind"),
    [*[(name, "dpmsolver++") for name in ("pixart", "pixart_sigma", "hunyuan_dit", "kolors")],
     *[(name, "sde-dpmsolver++") for name in ("pixart", "kolors_img2img")]],
)  # fmt: skip
def test_the_multistep_scheduler(name: str, kind: str) -> None:
    pipe, call = pieces(name, True)
    call |= {"num_inference_steps": 16}
    second_order(pipe, kind)
    check_both(pipe, call)


def test_the_noise_of_every_step() -> None:
    pipe, call = pieces("pixart", True)
    check_exact(pipe, call | {"eta": 1.0})


@pytest.mark.parametrize("name", ["flux", "qwen"])
def test_the_solver_sees_packed_latents_as_images(name: str) -> None:
    """As many iterations, and the same states, as a solve of the network around which latents are packed by hand."""
    pipe, call = pieces(name, False)
    latents = random(2, 4, 8, 12, seed=3)
    calls: list[dict[str, Any]] = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, args, given: calls.append(given), with_kwargs=True
    )
    expected = result(pipe, call, latents=packed(pipe, latents))
    handle.remove()
    with parallel(pipe, rtol=1e-3) as run:
        actual = result(pipe, call, latents=packed(pipe, latents))
    per_row = {"encoder_hidden_states", "encoder_hidden_states_mask", "pooled_projections", "guidance"}
    rest = {key: value for key, value in calls[0].items() if key not in ("hidden_states", "timestep")}
    conditioning = {key: value for key, value in rest.items() if key in per_row and value is not None}
    fixed = {key: value for key, value in rest.items() if key not in conditioning}
    pixels = 1 if name == "flux" else 8

    def model(x: Tensor, t: Tensor, **given: Tensor) -> Tensor:
        out = pipe.transformer(hidden_states=packed(pipe, x), timestep=t / 1000, **given, **fixed)[0]
        return pipe._unpack_latents(out, 8 * pixels, 12 * pixels, pixels).view(x.shape)

    schedule = deqkern.NoiseSchedule.from_diffusers(pipe.scheduler)
    with torch.no_grad():
        same = deqkern.sample(model, latents, schedule, STEPS, rtol=1e-3, model_kwargs=conditioning)
    assert run.solution is not None and run.solution.iterations == same.iterations
    assert torch.equal(run.solution.trajectory[0], same.trajectory[0])
    assert float(relative_error(run.solution.value, same.value).max()) <= 1e-5
    assert float(relative_error(actual, expected).max()) <= 2e-3


@pytest.mark.parametrize(
    ("name", "max_batch"), [("flux", None), ("flux_kontext", 5), ("qwen", 5), ("wan", None), ("hunyuan_dit", None)]
)
def test_several_devices_share_every_call(name: str, max_batch: int | None) -> None:
    """Position ids stay whole, though there are as many as rows or samples."""
    pipe, call = pieces(name, True)
    expected = result(pipe, call)
    rows: list[int] = []
    handle = pipe.transformer.register_forward_hook(
        lambda module, args, out: rows.append(len(out[0]))
    )  # the copies' too
    with parallel(pipe, rtol=0.0, max_batch=max_batch, devices=["cpu", "cpu", "cpu"]) as run:
        actual = result(pipe, call)
    handle.remove()
    assert float(relative_error(actual, expected).max()) <= 1e-5
    doubled = 2 if name == "hunyuan_dit" else 1
    assert run.solution is not None and sum(rows) == 2 * int(run.solution.nfe.sum())
    assert max(rows) == -(-(max_batch or 2 * doubled * AT_ONCE) // 3)


def test_flow_matching_with_its_own_sigmas() -> None:
    pipe, call = pieces("flux", True)
    solution = check_exact(pipe, call | {"num_inference_steps": 5, "sigmas": [1.0, 0.8, 0.7, 0.3, 0.1]})
    assert len(solution.trajectory) == 6
    pipe.scheduler = flow(shift=2.0, use_karras_sigmas=True)
    check_exact(pipe, call)


@pytest.mark.parametrize("name", ["flux2", "flux2_klein"])
def test_images_to_look_at(name: str) -> None:
    pipe, call = pieces(name, True)
    call |= {"num_inference_steps": 6}  # the least image that it takes has a thousand tokens
    without = result(pipe, call)
    call |= {"image": [PIL.Image.linear_gradient("L").resize((64, 64)).convert("RGB")]}
    assert float(relative_error(result(pipe, call), without).max()) > 1e-3
    check_exact(pipe, call)


def test_several_images_per_prompt() -> None:
    for name in ("qwen", "sana"):
        pipe, call = pieces(name, True)
        assert check_exact(pipe, call | {"num_images_per_prompt": 2}).value.shape == (4, 4, 8, 12)


def test_one_image() -> None:
    for name in ("flux", "qwen"):
        pipe, call = pieces(name, True)
        check_exact(pipe, {key: value[:1] if isinstance(value, Tensor) else value for key, value in call.items()})


def test_one_row_or_column_of_tokens() -> None:
    for side in ("height", "width"):
        pipe, call = pieces("flux", True)
        check_exact(pipe, call | {side: 2})


@pytest.mark.parametrize("name", ["flux", "qwen", "sana", "wan", "lumina2"])
def test_half_precision(name: str) -> None:
    pipe, call = pieces(name, True)
    call = {
        key: value.bfloat16() if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in call.items()
    }
    pipe.to(torch.bfloat16)
    seen: list[Tensor] = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["timestep"]), with_kwargs=True
    )
    expected = result(pipe, call)
    given = torch.stack([t[0] for t in seen])
    seen.clear()
    with parallel(pipe, rtol=0.0) as run:
        actual = result(pipe, call)
    handle.remove()
    assert seen[0].dtype == given.dtype and bool(torch.isin(given, torch.cat(seen)).all())
    assert actual.dtype == expected.dtype
    assert run.solution is not None and run.solution.trajectory.dtype == torch.float32
    assert float(relative_error(actual.float(), expected.float()).max()) <= 0.1


def test_latents_that_are_wider_than_the_network_start_as_they_are() -> None:
    pipe, call = pieces("wan", True)
    pipe.to(torch.bfloat16)
    latents = random(2, 4, 2, 4, 6, seed=3)
    with parallel(pipe, rtol=1e-2) as run:
        result(pipe, call, latents=latents)
    assert run.solution is not None and torch.equal(run.solution.trajectory[0], latents)


def changing(**change: Any) -> dict[str, Any]:
    def change_them(pipe: Any, i: int, t: Tensor, given: dict[str, Any]) -> dict[str, Any]:
        return {name: function(given[name]) for name, function in change.items()}

    return {"callback_on_step_end": change_them, "callback_on_step_end_tensor_inputs": list(change)}


def test_what_changes_between_steps_is_refused() -> None:
    pipe, call = pieces("flux", True)
    refused(pipe, "previews, to look at only", call | changing(latents=lambda x: x * 1.01))
    refused(pipe, "changed the conditioning", call | changing(prompt_embeds=lambda x: x * 1.01))
    with parallel(pipe):
        result(pipe, call | changing(latents=lambda x: x.clone(), prompt_embeds=lambda x: x.clone()))
    pipe, call = pieces("wan", True)
    refused(pipe, "changed the conditioning", call | changing(negative_prompt_embeds=lambda x: x * 1.01))


def test_previews_are_packed_as_the_loop_has_its_latents() -> None:
    pipe, call = pieces("flux", True)
    previews: list[Tensor] = []
    look = changing(latents=lambda x: previews.append(x.clone()) or x)
    with parallel(pipe, rtol=1e-3) as run:
        actual = result(pipe, call, **look)
    assert run.solution is not None and len(previews) == run.solution.iterations
    errors = [float(relative_error(preview, actual).max()) for preview in previews]
    assert errors[0] > 1e-2 and errors[-2] < errors[0] / 3 and errors[-1] == 0


def test_the_number_of_calls_must_be_that_of_the_first_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it changes by another way than the guidance scale, which is refused for itself."""
    pipe, call = pieces("wan", True)

    def without_guidance(pipe: Any, i: int, t: Tensor, given: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 1.0
        return {}

    refused(pipe, "changed the conditioning or the guidance", call | {"callback_on_step_end": without_guidance})
    monkeypatch.setattr(run, "settings_of", lambda pipe, denoiser: [])
    refused(pipe, "more often at some steps than at others", call | {"callback_on_step_end": without_guidance})

    def with_guidance(pipe: Any, i: int, t: Tensor, given: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 4.0
        return {}

    both = call | {"guidance_scale": 1.0, "callback_on_step_end": with_guidance}
    pipe.encode_prompt = lambda **given: (call["prompt_embeds"], call["negative_prompt_embeds"])
    refused(pipe, "more often at some steps than at others", both)
    pipe, call = pieces("lumina2", True)
    refused(pipe, "cfg_trunc_ratio is not supported", call | {"cfg_trunc_ratio": 0.5})


def test_a_cache_is_refused() -> None:
    pipe, call = pieces("flux", True)
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    refused(pipe, r"a cache.*disable_cache\(\)")
    pipe.transformer.disable_cache()
    with pytest.raises(ValueError, match="a cache"), parallel(pipe):
        pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
        result(pipe, call)
    pipe, _ = pieces("flux", True)
    diffusers.hooks.apply_first_block_cache(pipe.transformer, diffusers.FirstBlockCacheConfig(threshold=0.1))
    refused(pipe, "a cache")


def test_wan_of_two_stages_is_refused() -> None:
    two = wan(False)[0].transformer
    refused(wan(False, transformer_2=two, boundary_ratio=0.9)[0], "two denoisers.*boundary_ratio")
    refused(wan(False, expand_timesteps=True)[0], "expand_timesteps")
    pipe, _ = wan(False)
    pipe.transformer = None  # the second alone
    refused(pipe, "two denoisers")


def test_wan_for_two_frames_is_refused() -> None:
    pipe, _ = pieces("wan_image", False)
    pipe.transformer.register_to_config(pos_embed_seq_len=514)
    refused(pipe, "for a first and a last frame")


def test_one_step() -> None:
    """Of which one pipeline takes the second output, x0 of its scheduler."""
    pipe, call = pieces("pixart", False)
    refused(pipe, "num_inference_steps=1: PixArtAlphaPipeline", call | {"num_inference_steps": 1})
    check_exact(pipe, call | {"num_inference_steps": 2})
    pipe, call = pieces("pixart_sigma", False)
    check_exact(pipe, call | {"num_inference_steps": 1})


def test_schedulers_with_other_rules_are_refused() -> None:
    pipe, _ = pieces("wan", False)
    pipe.scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    refused(pipe, r"set pipe\.scheduler = FlowMatchEulerDiscreteScheduler\(shift=5\.0\)")
    pipe, _ = pieces("sana", False)
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    refused(pipe, r"FlowMatchEulerDiscreteScheduler\(shift=3\.0\)")
    pipe, _ = pieces("wan", False)
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")
    refused(pipe, "to which WanPipeline gives no generator")


def test_a_loop_that_is_not_as_the_table_says_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, call = pieces("flux", False)
    entry = loops.LOOPS["FluxPipeline"]
    monkeypatch.setitem(loops.LOOPS, "FluxPipeline", replace(entry, timestep=lambda t, dtype, config: t))
    refused(pipe, "gives its denoiser the timestep 1, not 1000", call)
    monkeypatch.setitem(loops.LOOPS, "FluxPipeline", entry)
    pipe._prepare_latent_image_ids = lambda *args: torch.zeros(24, 3)
    refused(pipe, "positions of its 24 latent tokens are not those of an image", call)


def test_nan_names_the_timesteps() -> None:
    pipe, call = pieces("flux", True)
    with torch.no_grad():
        pipe.transformer.proj_out.weight.fill_(torch.nan)
    refused(pipe, r"pipe's denoiser returned NaN or infinity at iteration 1, timesteps \[", call)
    pipe, call = pieces("flux", True)
    call |= {"latents": torch.full((2, 24, 16), torch.nan)}
    refused(pipe, r"pipe's denoiser returned NaN or infinity at iteration 1, timesteps \[", call)
