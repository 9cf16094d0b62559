"""Measure the slope profile of a model folder and write it beside the weights, where `models.load` finds it.

python examples/calibrate.py deqkern/models/digits
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

import deqkern
from deqkern import models


def main(
    folder: Annotated[Path, typer.Argument(help="a UNet2DModel folder with its scheduler's config")],
    steps: Annotated[int, typer.Option(help="S")] = 50,
    samples: Annotated[int, typer.Option(help="samples per eta")] = 2,
    seed: Annotated[int, typer.Option(help="random seed")] = 0,
) -> None:
    """Calibrate and save FOLDER/profile.safetensors."""
    loaded = models.load(folder)
    generator = torch.Generator().manual_seed(seed)
    profile = deqkern.calibrate(
        loaded.model, loaded.shape, loaded.schedule, steps, samples=samples, generator=generator
    )
    profile.save(folder / "profile.safetensors")
    print(f"{folder / 'profile.safetensors'}: {len(profile.log_snr)} levels, {profile.shrinkage.shape[1]} bands")


if __name__ == "__main__":
    typer.run(main)
