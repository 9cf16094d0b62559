"""Trained models: the shipped ones by name, any other diffusers `UNet2DModel` by its folder. Nothing is downloaded."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..chain.schedule import NoiseSchedule
from ..solvers.slopes import SlopeProfile
from ..support.checks import is_int

__all__ = ["SHIPPED", "Pretrained", "load"]

SHIPPED = ("digits", "photos")

_FOLDER = Path(__file__).parent
_NEEDS_DIFFUSERS = "loading a model needs diffusers: pip install 'deqkern[demo]'"


@dataclass(frozen=True, eq=False)
class Pretrained:
    """A model and all that `deqkern.sample` needs to know of it.

    Attributes:
        model: In evaluation mode, on the CPU.
        schedule: Its noise schedule.
        shape: Of one sample, (C, H, W).
        profile: Its measured slopes, where known.
        name: That it was loaded by, or of its folder.

    Example:
        >>> import torch, deqkern
        >>> digits = deqkern.models.load("digits")
        >>> noise = torch.randn(2, *digits.shape)
        >>> deqkern.sample(digits.model, noise, digits.schedule, 20).value.shape
        torch.Size([2, 1, 16, 16])
    """

    model: torch.nn.Module
    schedule: NoiseSchedule
    shape: tuple[int, int, int]
    profile: SlopeProfile | None
    name: str


def load(name_or_path: str | PathLike[str]) -> Pretrained:
    """A shipped model ("digits", "photos") or one from a folder, from local files only.

    Args:
        name_or_path: A name, or a diffusers `UNet2DModel` folder with `scheduler_config.json` beside its `config.json`,
            or that of an unconditional pipeline, with `unet/` and `scheduler/`. A `profile.safetensors` beside
            `config.json` is the model's `SlopeProfile`.

    Returns:
        The model, its schedule, shape and profile.

    Raises:
        ValueError: For an unknown name or a folder that holds something else.
        ImportError: Without diffusers.

    Example:
        >>> from deqkern import models
        >>> digits = models.load("digits")
        >>> digits.shape, digits.schedule.num_train_timesteps
        ((1, 16, 16), 1000)
    """
    folder = _find(name_or_path)
    unet, scheduler = (folder / "unet", folder / "scheduler") if (folder / "unet").is_dir() else (folder, folder)
    unet_config = _read(unet / "config.json", name_or_path)
    scheduler_config = _read(scheduler / "scheduler_config.json", name_or_path)
    kind = unet_config.get("_class_name")
    if kind != "UNet2DModel":
        raise ValueError(f"name_or_path must hold a UNet2DModel, {unet / 'config.json'} describes {kind}")
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(_NEEDS_DIFFUSERS) from error
    scheduler_class = getattr(diffusers, str(scheduler_config.get("_class_name")), None)
    if scheduler_class is None:
        raise ValueError(f"name_or_path: diffusers has no scheduler {scheduler_config.get('_class_name')!r}")
    try:
        schedule = NoiseSchedule.from_diffusers(scheduler_class.from_config(scheduler_config))
    except (AttributeError, ImportError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"name_or_path: {scheduler / 'scheduler_config.json'} cannot be used: {error}") from error
    shape = _sample_shape(unet_config, unet)
    try:
        model = diffusers.UNet2DModel.from_pretrained(unet, local_files_only=True, low_cpu_mem_usage=False)
    except (OSError, RuntimeError, TypeError, ValueError, SafetensorError) as error:
        raise ValueError(f"name_or_path: the weights in {unet} cannot be read: {error}") from error
    return Pretrained(
        model=model.eval().requires_grad_(False),
        schedule=schedule,
        shape=shape,
        profile=_read_profile(unet / "profile.safetensors"),
        name=str(name_or_path) if name_or_path in SHIPPED else folder.resolve().name,
    )


def _find(name_or_path: str | PathLike[str]) -> Path:
    if name_or_path in SHIPPED:
        folder = _FOLDER / str(name_or_path)
        if not folder.is_dir():
            raise ValueError(f"name_or_path: this installation lacks the model {name_or_path!r}, no folder {folder}")
        return folder
    folder = Path(name_or_path)
    if not os.path.isdir(folder):  # False, and no error, for what the system does not take for a path
        raise ValueError(f"name_or_path must be one of {', '.join(SHIPPED)} or a folder, got {str(name_or_path)!r}")
    return folder


def _read(path: Path, name_or_path: str | PathLike[str]) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"name_or_path: {str(name_or_path)!r} has no {path}") from None
    except OSError as error:
        raise ValueError(f"name_or_path: {path} cannot be read: {error}") from error
    except ValueError as error:
        raise ValueError(f"name_or_path: {path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"name_or_path: {path} does not hold a JSON object")
    return config


def _read_profile(path: Path) -> SlopeProfile | None:
    if not path.is_file():
        return None
    try:
        return SlopeProfile.load(path)
    except ValueError as error:
        raise ValueError(f"name_or_path: {error}") from error


def _sample_shape(config: dict[str, Any], unet: Path) -> tuple[int, int, int]:
    size = config.get("sample_size")
    height, width = size if isinstance(size, list) and len(size) == 2 else (size, size)
    if not is_int(height) or not is_int(width) or min(height, width) < 1:
        raise ValueError(f"name_or_path: {unet / 'config.json'} has no sample_size of one or two ints, but {size!r}")
    channels = config.get("in_channels", 3)
    if not is_int(channels) or channels < 1:
        raise ValueError(f"name_or_path: {unet / 'config.json'} has in_channels {channels!r}")
    return channels, height, width
