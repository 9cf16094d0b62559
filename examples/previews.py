"""Draw what a joint solve has after each iteration, beside the result of the sequential chain.

    python examples/previews.py --model photos --seed 2 --out previews.png

Each column is the sample as the solve would give it if it stopped there; the last one took S sequential calls. Half a
minute on one CPU core.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

import deqkern
from deqkern import models, plots, solvers


def main(
    model: Annotated[str, typer.Option(help="digits or photos")] = "photos",
    steps: Annotated[int, typer.Option(help="S")] = 50,
    batch: Annotated[int, typer.Option(help="samples, a row each")] = 4,
    seed: Annotated[int, typer.Option(help="random seed")] = 2,
    out: Annotated[Path, typer.Option(help="the picture to write")] = Path("previews.png"),
) -> None:
    """Solve jointly, keep the previews, solve step by step, draw both."""
    loaded = models.load(model)
    noise = torch.randn(batch, *loaded.shape, generator=torch.Generator().manual_seed(seed))
    columns: dict[str, Tensor] = {}

    def keep(iteration: int, preview: Tensor, error: Tensor) -> None:
        columns[str(iteration)] = preview.clone()

    solution = deqkern.sample(loaded.model, noise, loaded.schedule, steps, callback=keep)
    sequential = deqkern.sample(loaded.model, noise, loaded.schedule, steps, solver=solvers.sequential())
    columns[f"{steps} calls"] = sequential.value
    title = f"After 1 .. {solution.iterations} parallel iterations, and after {steps} sequential calls"
    plots.save_comparison(out, columns, title, smallest=96, columns=1)
    print(f"{solution.message}\n{out}")


if __name__ == "__main__":
    typer.run(main)
