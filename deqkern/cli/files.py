"""Pictures that are read, and the noise of `deqkern invert`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import typer
from torch import Tensor

from ..engine.solution import Solution
from ..models import Pretrained
from ..support import storage
from .common import stored_model

if TYPE_CHECKING:
    import PIL.Image

_FORMAT = "deqkern.Noise.1"
_MODES = {1: "L", 3: "RGB"}


def read_pictures(paths: Sequence[Path], pretrained: Pretrained, option: str) -> Tensor:
    """Picture files as samples (B, C, H, W) of the model, in [-1, 1].

    Grey or RGB, as the model has 1 or 3 channels; what is transparent becomes white; 16 bits become 8. A picture of
    another size is resized (bilinear, its aspect ratio is not kept), and a note on stderr says so.
    """
    channels = pretrained.shape[0]
    if channels not in _MODES:
        reason = f"pictures have 1 or 3 channels, the samples of {pretrained.name!r} have {channels}"
        raise typer.BadParameter(reason, param_hint="--model")
    return torch.stack([_read(path, _MODES[channels], pretrained.shape[1:], option) for path in paths])


def _read(path: Path, mode: str, size: tuple[int, int], option: str) -> Tensor:  # -> (C, *size)
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError("reading pictures needs pillow: pip install 'deqkern[demo]'") from error
    try:
        with Image.open(path) as opened:
            picture = _converted(ImageOps.exif_transpose(opened), mode)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise typer.BadParameter(f"{path} cannot be read: {reason}", param_hint=option) from error
    height, width = size
    if picture.size != (width, height):
        typer.echo(f"{path}: resized from {picture.width}x{picture.height} to {width}x{height} pixels", err=True)
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(picture, dtype=np.float32)).view(height, width, -1)
    return pixels.permute(2, 0, 1).contiguous() / 127.5 - 1


def _converted(picture: PIL.Image.Image, mode: str) -> PIL.Image.Image:
    from PIL import Image

    if picture.mode.startswith("I;16"):  # pillow would clip at 255
        picture = Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {picture.mode}")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert(mode)


@dataclass(frozen=True)
class Noise:
    """Noise that was found for pictures, and the chain that makes them of it. sigma_min None: the schedule's end."""

    noise: Tensor  # (B, *shape)
    model: str
    steps: int
    sigma_min: float | None

    def save(self, path: Path, solution: Solution, round_trip: Tensor, images: Sequence[str]) -> None:
        """Write a safetensors file: the noise and, per image, how it was reached."""
        tensors = {
            "noise": self.noise,
            "converged": solution.converged,
            "error_estimate": solution.error_estimate,
            "residual": solution.residual,
            "round_trip": round_trip,
        }
        metadata = {
            "format": _FORMAT,
            "model": stored_model(self.model),
            "steps": str(self.steps),
            "sigma_min": str(self.sigma_min or 0),
            "images": json.dumps(list(images)),
        }
        storage.write(path, tensors, metadata)

    @classmethod
    def load(cls, path: Path, option: str) -> Noise:
        """Read a file written by `save`."""
        try:
            with storage.reading(path, "noise") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError("it was not written by deqkern invert")
                noise, sigma_min = file.get_tensor("noise"), float(metadata["sigma_min"]) or None
                if noise.numel() == 0:
                    raise ValueError("it is empty")
                return cls(noise, metadata["model"], int(metadata["steps"]), sigma_min)
        except (OSError, ValueError) as error:
            raise typer.BadParameter(str(error), param_hint=option) from error
