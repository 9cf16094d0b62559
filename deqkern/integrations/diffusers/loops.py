"""What `parallel` must know of each pipeline's loop: `LOOPS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

# The timesteps that a denoiser is given, of the scheduler's t, the dtype of the latents and the denoiser's config.
Timestep = Callable[[Tensor, torch.dtype, Mapping[str, Any]], Tensor]


def _as_it_is(t: Tensor, dtype: torch.dtype, config: Mapping[str, Any]) -> Tensor:
    return t


def _rounded(t: Tensor, dtype: torch.dtype, config: Mapping[str, Any]) -> Tensor:
    return t.to(dtype)


def _rounded_thousandth(t: Tensor, dtype: torch.dtype, config: Mapping[str, Any]) -> Tensor:
    return t.to(dtype) / 1000


def _thousandth(t: Tensor, dtype: torch.dtype, config: Mapping[str, Any]) -> Tensor:
    return (t / 1000).to(dtype)


def _scaled(t: Tensor, dtype: torch.dtype, config: Mapping[str, Any]) -> Tensor:
    return t * config["timestep_scale"]


def _reversed(t: Tensor, dtype: torch.dtype, config: Mapping[str, Any]) -> Tensor:
    return 1 - t / 1000


@dataclass(frozen=True)
class Packing:
    """Latents (N, C, h p, w p) as tokens (N, h w, C p p): a pure permutation, row by row of patches of p x p."""

    h: int
    w: int
    p: int

    def pack(self, images: Tensor) -> Tensor:
        cut = images.unflatten(-1, (self.w, self.p)).unflatten(-3, (self.h, self.p))  # (N, C, h, p, w, p)
        return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def unpack(self, tokens: Tensor) -> Tensor:
        cut = tokens.unflatten(2, (-1, self.p, self.p)).unflatten(1, (self.h, self.w))  # (N, h, w, C, p, p)
        return cut.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


@dataclass(frozen=True)
class LatentFormat:
    """How a denoiser is given the latents of a loop.

    batch: B, samples. copies: how often it is given each, for guidance.
    own: channels of its input that are latents, or tokens of them; others are conditioning.
    packing: of latents that are tokens.
    """

    batch: int
    copies: int
    own: int
    packing: Packing | None

    def pack(self, images: Tensor) -> Tensor:
        """Latents (N, C, H, W) as the loop has them."""
        return images if self.packing is None else self.packing.pack(images)

    def unpack(self, latents: Tensor) -> Tensor:
        """Latents of the loop as images."""
        return latents if self.packing is None else self.packing.unpack(latents)


def _grid_of_ids(given: Mapping[str, Any]) -> tuple[int, int]:
    """h and w, of the positions (k, row, column, ..) of all tokens; k is 0 for those of the latents."""
    ids = given["img_ids"]
    ids = ids[0] if ids.ndim == 3 else ids
    own = ids[ids[:, 0] == 0, 1:3]
    w = int((own[:, 0] == 0).sum())
    h = len(own) // max(w, 1)
    expected = torch.cartesian_prod(torch.arange(h), torch.arange(w)).to(ids)  # rounded as they are
    if not torch.equal(own, expected):
        raise ValueError(f"pipe: the positions of its {len(own)} latent tokens are not those of an image")
    return h, w


def _grid_of_shapes(given: Mapping[str, Any]) -> tuple[int, int]:
    shapes = given["img_shapes"][0]  # of the first sample: (frames, h, w), or a list, of the latents first
    _, h, w = shapes[0] if isinstance(shapes, list) else shapes
    return h, w


@dataclass(frozen=True)
class Loop:
    """A loop that leaves its state to the scheduler, and conditions every step alike.

    denoiser: the attribute that holds it.
    doubled: guidance is one call at twice the batch, if it is on. Else it is calls of its own, or embedded.
    generator: `scheduler.step` is given the generator of the call. eta: it is always given an eta.
    timestep: what the denoiser is given for the scheduler's timesteps.
    grid: h and w of packed latents, of the arguments of a call of the denoiser. patch: p, see `Packing`.
    shared: arguments of the denoiser that have no row per sample; of a list, the first entry stands for all samples.
    """

    denoiser: str = "transformer"
    doubled: bool = True
    generator: bool = False
    eta: bool = False
    timestep: Timestep = _as_it_is
    grid: Callable[[Mapping[str, Any]], tuple[int, int]] | None = None
    patch: int = 2
    shared: tuple[str, ...] = ()

    def latents(self, x: Tensor, given: Mapping[str, Any], config: Mapping[str, Any], copies: int) -> LatentFormat:
        """How x (N, channels or tokens, ..) holds latents: the denoiser's input, its other arguments and its config."""
        packing = None if self.grid is None else Packing(*self.grid(given), self.patch)
        if packing is not None:
            own = packing.h * packing.w
        elif x.ndim == 3:
            own = x.shape[1]
        else:  # less conditioning, less learned sigma
            own = min(int(config["in_channels"]), int(config.get("out_channels") or config["in_channels"]))
        return LatentFormat(len(x) // copies, copies, own, packing=packing)


_UNET = Loop("unet", generator=True)
_FLUX = Loop(doubled=False, timestep=_rounded_thousandth, grid=_grid_of_ids, shared=("img_ids", "txt_ids"))
_QWEN = Loop(doubled=False, timestep=_rounded_thousandth, grid=_grid_of_shapes, shared=("img_shapes",))

# The pipelines that can run in parallel. A subclass that keeps the loop is as good.
LOOPS = {
    "DDIMPipeline": replace(_UNET, eta=True),
    "DDPMPipeline": _UNET,
    "DiTPipeline": Loop(),
    "StableDiffusionPipeline": _UNET,
    "StableDiffusionImg2ImgPipeline": _UNET,
    "StableDiffusionInpaintPipeline": _UNET,
    "StableDiffusionXLPipeline": _UNET,
    "StableDiffusionXLImg2ImgPipeline": _UNET,
    "StableDiffusionXLInpaintPipeline": _UNET,
    "KolorsPipeline": _UNET,
    "KolorsImg2ImgPipeline": _UNET,
    "StableDiffusion3Pipeline": Loop(),
    "StableDiffusion3Img2ImgPipeline": Loop(),
    "PixArtAlphaPipeline": Loop(generator=True),
    "PixArtSigmaPipeline": Loop(generator=True),
    "HunyuanDiTPipeline": Loop(generator=True, timestep=_rounded, shared=("image_rotary_emb",)),
    "SanaPipeline": Loop(generator=True, timestep=_scaled),
    "FluxPipeline": _FLUX,
    "FluxImg2ImgPipeline": _FLUX,
    "FluxKontextPipeline": _FLUX,
    "ChromaPipeline": _FLUX,
    "Flux2Pipeline": replace(_FLUX, patch=1),
    "Flux2KleinPipeline": replace(_FLUX, patch=1),
    "QwenImagePipeline": _QWEN,
    "QwenImageImg2ImgPipeline": _QWEN,
    "AuraFlowPipeline": Loop(timestep=_thousandth),
    "CogView4Pipeline": Loop(doubled=False),
    "Lumina2Pipeline": Loop(doubled=False, timestep=_reversed),
    "WanPipeline": Loop(doubled=False),
    "WanImageToVideoPipeline": Loop(doubled=False),
    "HunyuanVideoPipeline": Loop(doubled=False, timestep=_rounded),
    "LTXPipeline": Loop(),
}
