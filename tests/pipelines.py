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
