"""Flow matching end to end: train a velocity on scikit-learn's digits, sample it in parallel, invert it.

    python examples/flow_digits.py --minutes 4 --out flow.png

Rectified flow (arXiv 2209.03003): x = (1 - s) x0 + s noise, the network gives noise - x0 and is called with 1000 s.
The model is small and hardly trained; the picture shows that the parallel chain is the sequential one.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import UNet2DModel
from train import CONFIGS, digit_batch

import deqkern
from deqkern import NoiseSchedule, plots, solvers
from deqkern.engine.solution import relative_error


def train(model: torch.nn.Module, minutes: float, generator: torch.Generator) -> float:
    """Minimise |v - (noise - x0)|^2 for so long; the mean loss of the last steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    began, mean = time.monotonic(), 1.0
    while (done := (time.monotonic() - began) / (60 * minutes)) < 1:
        x0 = digit_batch(generator, 64)
        noise, s = torch.randn(x0.shape, generator=generator), torch.rand(len(x0), generator=generator)
        x = torch.lerp(x0, noise, s.view(-1, 1, 1, 1))
        loss = (model(x, 1000 * s).sample - (noise - x0)).square().mean()
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - done)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        mean += 0.02 * (loss.item() - mean)
    return mean


def main(
    out: Annotated[Path, typer.Option(help="the picture to write")] = Path("flow.png"),
    minutes: Annotated[float, typer.Option(help="training time")] = 4.0,
    steps: Annotated[int, typer.Option(help="S")] = 50,
    batch: Annotated[int, typer.Option(help="samples")] = 16,
    seed: Annotated[int, typer.Option(help="random seed")] = 0,
) -> None:
    """Train, sample, invert, draw."""
    torch.manual_seed(seed)
    generator, schedule = torch.Generator().manual_seed(seed), NoiseSchedule.flow()
    model = UNet2DModel(**CONFIGS["digits"])
    print(f"trained for {minutes:g} minutes, loss {train(model, minutes, generator):.3f}")
    model.eval().requires_grad_(False)

    noise = torch.randn(batch, 1, 16, 16, generator=generator)
    parallel = deqkern.sample(model, noise, schedule, steps)
    sequential = deqkern.sample(model, noise, schedule, steps, solver=solvers.sequential(), rtol=0.0)
    error = relative_error(parallel.value, sequential.value)
    print(f"sampled: {parallel.message}; error {float(error.median()):.0e}, at most {float(error.max()):.0e}")

    digits = digit_batch(generator, batch)
    inverted = deqkern.invert(model, digits, schedule, steps, rtol=1e-3, round_trip=True)
    again = deqkern.sample(model, inverted.value, schedule, steps, sigma_min=deqkern.inversion.SIGMA_MIN)
    assert inverted.round_trip is not None
    print(f"inverted: {inverted.message}; round trip at most {float(inverted.round_trip.max()):.0e}")
    panels = {
        f"parallel: {parallel.iterations} iterations": parallel.value,
        f"sequential: {steps}": sequential.value,
        "real digits": digits,
        "made from their noise": again.value,
    }
    plots.save_comparison(out, panels, f"Flow matching on digits, {steps} steps")
    print(f"written: {out}")


if __name__ == "__main__":
    typer.run(main)
