"""Folders of tiny models and profiles, as users have them on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from deqkern import SlopeProfile


def save_tiny_model(folder: Path, channels: int = 1, size: int = 8) -> Any:
    """Write a UNet2DModel folder with random weights and its scheduler; gives the model."""
    diffusers = pytest.importorskip("diffusers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = diffusers.UNet2DModel(
            sample_size=size,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=(8,),
            layers_per_block=1,
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            norm_num_groups=4,
            attention_head_dim=4,
        )
    model.save_pretrained(folder)
    diffusers.DDIMScheduler(clip_sample=False).save_pretrained(folder)
    return model.eval()


def save_tiny_profile(folder: Path, channels: int = 1, size: int = 8) -> None:
    shape = (channels, size, size)
    from deqkern.solvers.basis import Basis

    bands = len(Basis.spectral(shape, torch.device("cpu")).bands) - 1
    shrinkage = torch.linspace(0.8, 0.2, 5, dtype=torch.float64)[:, None].expand(-1, bands)
    SlopeProfile(torch.linspace(-8, 8, 5, dtype=torch.float64), shrinkage, shape).save(folder / "profile.safetensors")
