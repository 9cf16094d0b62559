"""Edit handwritten digits through their noise: go from one to another, and make up a half that is hidden.

    python examples/edit_digits.py --out edit.png

The digits are scikit-learn's. Left: both ends are inverted, their noises interpolated spherically, the frames sampled.
Right: the lower half is hidden, and `Optimize` looks for noise whose sample agrees with the upper half; other noise to
start from gives another lower half. A minute or two on one CPU core.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from sklearn.datasets import load_digits
from torch import Tensor

import deqkern
from deqkern import models, plots
from deqkern.interpolation import slerp

SIGMA_MIN = 0.08
PAIRS = ((3, 8), (0, 6), (4, 9))  # of the first ten digits of the data, which are 0 to 9


def upper_half(value: Tensor, digit: Tensor) -> Tensor:  # (B, 1, 16, 16) twice -> (B,)
    """Squared distance, as far as the digit is seen."""
    return (value - digit)[..., :8, :].square().flatten(1).sum(1)


def main(
    out: Annotated[Path, typer.Option(help="the picture to write")] = Path("edit.png"),
    steps: Annotated[int, typer.Option(help="S")] = 25,
    frames: Annotated[int, typer.Option(help="from one digit to the other, with both")] = 5,
    starts: Annotated[int, typer.Option(help="lower halves per digit")] = 3,
    evaluations: Annotated[int, typer.Option(help="steps of the optimizer")] = 40,
    seed: Annotated[int, typer.Option(help="random seed")] = 0,
) -> None:
    """Edit the digits, say how well it went, draw it."""
    loaded = models.load("digits")
    images = torch.as_tensor(load_digits().images[:10], dtype=torch.float32)[:, None] / 8 - 1
    digits = F.interpolate(images, size=(16, 16), mode="bilinear")  # as the model was trained
    first, second = (digits[[pair[end] for pair in PAIRS]] for end in (0, 1))

    ends = torch.cat([first, second])
    inverted = deqkern.invert(loaded.model, ends, loaded.schedule, steps, sigma_min=SIGMA_MIN)
    t = torch.linspace(0, 1, frames)
    noise = slerp(*inverted.value.chunk(2), t).flatten(0, 1)  # (frames * pairs, 1, 16, 16)
    between = deqkern.sample(loaded.model, noise, loaded.schedule, steps, sigma_min=SIGMA_MIN)
    print(f"inverted: {inverted.message}\nsampled: {between.message}")

    method = deqkern.Optimize(loss=upper_half, generator=torch.Generator().manual_seed(seed))
    seen = first.repeat(starts, 1, 1, 1)
    completed = deqkern.invert(
        loaded.model, seen, loaded.schedule, steps, method=method, sigma_min=SIGMA_MIN, max_iterations=evaluations
    )
    print(f"made up: {completed.message}")

    hidden = first.clone()
    hidden[..., 8:, :] = 0
    panels = {f"t = {float(t[i]):g}": frame for i, frame in enumerate(between.value.chunk(frames))}
    made = {f"made up {i + 1}": half for i, half in enumerate(completed.trajectory[-1].chunk(starts))}
    panels = {"A": first, **panels, "B": second, " ": torch.ones_like(first), "seen": hidden, **made}
    plots.save_comparison(out, panels, "From A to B through their noise, and lower halves", smallest=112, columns=1)
    print(f"written: {out}")


if __name__ == "__main__":
    typer.run(main)
