"""Train the two shipped models from data inside scikit-learn: no download, one CPU core, about an hour each.

    python examples/train.py digits --minutes 60 --out deqkern/models/digits
    python examples/train.py photos --minutes 60 --batch 40 --out deqkern/models/photos

The shipped weights took several runs on a busy machine, each from the last with `--resume`; `training.json` beside
them lists the runs. The first run of `photos` still predicted epsilon.

`digits`: the 1797 handwritten digits, enlarged to 16x16 (bilinear), one channel in [-1, 1].
`photos`: 32x32 RGB patches of the two photographs, halved and quartered in size first, in [-1, 1].
`digits` predicts epsilon. `photos` predicts v: at high noise an error in epsilon is 157 times larger in the clean
image, and a model this small then gets the mean colour of a patch wrong.
The folder written is an ordinary diffusers `UNet2DModel` folder with its scheduler's config beside it.
"""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from diffusers import DDIMScheduler, UNet2DModel
from sklearn.datasets import load_digits, load_sample_images

PREDICTION = {"digits": "epsilon", "photos": "v_prediction"}
CONFIGS = {
    "digits": dict(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
        norm_num_groups=16,
    ),
    "photos": dict(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
        norm_num_groups=16,
    ),
}


def digit_batch(generator: torch.Generator, batch: int) -> torch.Tensor:  # (batch, 1, 16, 16)
    images = torch.as_tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, size=(16, 16), mode="bilinear")
    return images[torch.randint(len(images), (batch,), generator=generator)]


def photo_batch(generator: torch.Generator, batch: int) -> torch.Tensor:  # (batch, 3, 32, 32)
    photos = []
    for image in load_sample_images().images:
        pixels = torch.as_tensor(image.copy(), dtype=torch.float32).permute(2, 0, 1)[None] / 127.5 - 1
        photos += [F.avg_pool2d(pixels, 2)[0], F.avg_pool2d(pixels, 4)[0]]
    patches = []
    for _ in range(batch):
        photo = photos[int(torch.randint(len(photos), (), generator=generator))]
        top = int(torch.randint(photo.shape[1] - 31, (), generator=generator))
        left = int(torch.randint(photo.shape[2] - 31, (), generator=generator))
        patch = photo[:, top : top + 32, left : left + 32]
        patches.append(patch.flip(-1) if torch.rand((), generator=generator) < 0.5 else patch)
    return torch.stack(patches)


BATCHES = {"digits": digit_batch, "photos": photo_batch}


def main(
    name: Annotated[str, typer.Argument(help="digits or photos")],
    out: Annotated[Path, typer.Option(help="folder to write")],
    minutes: Annotated[float, typer.Option(help="training time; the learning rate decays over it")] = 35.0,
    batch: Annotated[int, typer.Option(help="batch size")] = 64,
    learning_rate: Annotated[float, typer.Option(help="peak learning rate")] = 1e-3,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 1,
    seed: Annotated[int, typer.Option(help="random seed")] = 0,
    resume: Annotated[Path | None, typer.Option(help="folder to start from")] = None,
) -> None:
    """Train one model and write it to OUT."""
    if name not in CONFIGS:
        raise typer.BadParameter(f"name must be one of {sorted(CONFIGS)}, got {name!r}")
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False, prediction_type=PREDICTION[name])
    model = UNet2DModel.from_pretrained(resume) if resume else UNet2DModel(**CONFIGS[name])
    model.train().to(memory_format=torch.channels_last)
    history = json.loads((resume / "training.json").read_text()) if resume else []
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=1e-3)
    pool = torch.cat([BATCHES[name](generator, 256) for _ in range(32)])  # (8192, C, H, W)

    started, step, loss_mean = time.monotonic(), 0, 1.0
    while (progress := (time.monotonic() - started) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / 100) * (1 - progress) ** 0.7
        clean = pool[torch.randint(len(pool), (batch,), generator=generator)]
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(1000, (batch,), generator=generator)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        target = noise if PREDICTION[name] == "epsilon" else scheduler.get_velocity(clean, noise, timesteps)
        loss = F.mse_loss(model(noisy.to(memory_format=torch.channels_last), timesteps).sample, target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            for kept, new in zip(average.parameters(), model.parameters(), strict=True):
                kept.lerp_(new, 1 - decay)
        loss_mean += (loss.item() - loss_mean) / min(step + 1, 200)
        step += 1
        if step % 100 == 0:
            print(f"{name} step {step} loss {loss_mean:.4f} progress {progress:.1%}", flush=True)

    average.to(memory_format=torch.contiguous_format).save_pretrained(out)
    scheduler.save_pretrained(out)
    record = dict(steps=step, batch=batch, minutes=minutes, loss=round(loss_mean, 5), seed=seed)
    (out / "training.json").write_text(json.dumps([*history, record], indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
