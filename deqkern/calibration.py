"""`calibrate`: measure a model's slopes once, so that every later solve starts from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .chain.schedule import NoiseSchedule
from .network.model import Model
from .problem import check_schedule
from .sampling import sample
from .solvers.presets import Solver
from .solvers.slopes import Secant, SlopeProfile
from .support.checks import check_count, check_generator


@dataclass(frozen=True)
class _Recorder(Secant):
    """A secant slope that also sums up its measurements, each iteration and sample with the same weight per step."""

    sums: list[Tensor] = field(default_factory=list)  # one (S, K, 2) per iteration

    def refine(self, slope: Tensor, moments: Tensor, low: Tensor, high: Tensor) -> None:
        total = moments[..., 1].sum(-1)[..., None, None]  # (S, B, 1, 1)
        self.sums.append(torch.where(total > 0, moments / total, 0.0).sum(1))
        super().refine(slope, moments, low, high)


def calibrate(
    model: Model,
    shape: tuple[int, ...],
    schedule: NoiseSchedule | Any,
    num_inference_steps: int = 50,
    *,
    samples: int = 2,
    etas: tuple[float | None, ...] | None = None,
    rtol: float = 1e-3,
    generator: torch.Generator | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    model_kwargs: Mapping[str, Any] | None = None,
    max_batch: int | None = None,
) -> SlopeProfile:
    """Measure the slopes of `model` once, so that later solves start from them: `solvers.default(profile=...)`.

    It costs about 8 * num_inference_steps model evaluations per sample and eta.

    Args:
        model: As in `sample`.
        shape: Of one sample, without the batch.
        schedule: As in `sample`.
        num_inference_steps: S of the solves. A profile serves any other S as well.
        samples: Solves for each eta.
        etas: Of the solves; None stands for that of the schedule. By default (0.0, 1.0) for DDIM, else (None,).
        rtol: As in `sample`.
        generator: All noise is drawn from it.
        device: Of the noise; that of torch's default if None.
        dtype: Of the noise. A plain function that does not take fp32 needs another one.
        model_kwargs: As in `sample`.
        max_batch: As in `sample`.

    Returns:
        The shrinkages per noise level and frequency band, averaged over all solves.

    Raises:
        ValueError: `samples` is below 1 or `etas` is empty, and as `sample` does.
        TypeError: As `sample` does.

    Example:
        >>> schedule = deqkern.NoiseSchedule.linear()
        >>> profile = deqkern.calibrate(lambda x, t: 0.1 * x, (1, 8, 8), schedule, 10)
        >>> solver = deqkern.solvers.default(profile=profile)
        >>> solution = deqkern.sample(lambda x, t: 0.1 * x, torch.randn(2, 1, 8, 8), schedule, 20, solver=solver)
        >>> solution.converged.tolist()
        [True, True]

    """
    check_count("samples", samples)
    check_generator(generator)
    schedule = check_schedule(schedule)
    if etas is None:
        etas = (None,) if schedule.prediction_type == "flow" or schedule.process != "ddim" else (0.0, 1.0)
    if not etas:
        raise ValueError("etas must name at least one eta")
    recorder = _Recorder()
    for eta in etas:
        noise = torch.randn(samples, *shape, generator=generator, device=generator.device if generator else device)
        sample(
            model,
            noise.to(device, dtype),
            schedule,
            num_inference_steps,
            eta=eta,
            solver=Solver(slope=recorder, name="calibrate"),
            rtol=rtol,
            generator=generator,
            model_kwargs=model_kwargs,
            max_batch=max_batch,
        )
    table = schedule.steps(num_inference_steps)
    cross, square = torch.stack(recorder.sums).sum(0).cpu().unbind(-1)  # (S, K)
    low, width = table.slope_0[:, None], (table.slope_1 - table.slope_0)[:, None]
    shrinkage = ((cross / square - low) / width).clamp(0, 1)
    measured = width[:, 0] != 0  # a step whose two slopes agree has no shrinkage
    return SlopeProfile(table.log_snr[measured], shrinkage[measured], tuple(shape))
