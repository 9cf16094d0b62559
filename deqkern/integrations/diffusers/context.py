"""`parallel`: an unmodified pipeline whose sampling loop is solved for all its steps at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ...network.replication import replicated
from ...problem import check_options
from ...solvers.presets import Solver, check_solver, default
from .checks import check_pair, check_scheduler, denoiser_of, loop_of
from .run import ParallelRun
from .scheduler import original_of


@contextmanager
def parallel(
    pipe: Any,
    rtol: float = 1e-2,
    solver: Solver | None = None,
    max_batch: int | None = None,
    devices: Sequence[torch.device | str | int] | None = None,
) -> Iterator[ParallelRun]:
    """Inside the context `pipe(...)` samples all its steps at once; everything else about it stays as it is.

    The loop of the pipeline runs once per iteration, so its progress bar counts iterations and its callback gets the
    current estimate of the result in `latents`. Both end when the solve has converged to `rtol`; rtol = 0 gives the
    sequential result exactly, up to rounding and the effect of the batch size on the network. `pipe._interrupt = True`
    in a callback stops early. eta and generator of the call are kept to: step noise is drawn in the order of the
    sequential loop. On leaving, also by an exception, the pipe is what it was before.

    Args:
        pipe: One of those in docs/diffusers.md, or a subclass with the same loop, with a DDIMScheduler, a
            DDPMScheduler whose variance is not learned, a DPMSolverMultistepScheduler of order 2 (dpmsolver++ or
            sde-dpmsolver++, midpoint) or, for models of flow matching, a FlowMatchEulerDiscreteScheduler. Inpainting
            needs a UNet of 9 channels.
        rtol: As in `deqkern.sample`.
        solver: As in `deqkern.sample`, but no "auto".
        max_batch: Rows in one call of the denoiser; guidance takes two per state, or a second call.
        devices: Several evaluate the denoiser at the same time, each its share of the rows, as `deqkern.replicated`
            does; its own alone if None.

    Yields:
        An object whose `solution` is the `Solution` of the last finished call; `nfe` counts states, guided or not, and
        latents that the pipeline packs into tokens are images (C, H, W).

    Raises:
        ValueError: For an argument that does not fit or a pipeline that is not supported, and, from the call, for what
            cannot run in parallel: T2I and ControlNet residuals, caches in the denoiser, IP-adapters of transformers,
            layers or guidance left out at some steps, `use_clipped_model_output`, callbacks that change latents or
            conditioning.
        TypeError: For an argument of another type, and for what is no pipeline.

    Example:
        >>> import diffusers
        >>> from deqkern import models
        >>> from deqkern.integrations.diffusers import parallel
        >>> scheduler = diffusers.DDIMScheduler(clip_sample=False)
        >>> pipe = diffusers.DDIMPipeline(models.load("digits").model, scheduler)
        >>> pipe.set_progress_bar_config(disable=True)
        >>> with parallel(pipe) as run:
        ...     images = pipe(batch_size=2, num_inference_steps=20).images
        >>> len(images), run.solution.iterations < 20
        (2, True)
    """
    loop, denoiser = loop_of(pipe), denoiser_of(pipe)
    scheduler = original_of(pipe.scheduler)  # of a context inside a context
    row = check_scheduler(pipe, scheduler)
    check_pair(pipe, scheduler, row)
    solver = default() if solver is None else solver
    check_solver("solver", solver)
    check_options(rtol, None, max_batch)
    spread = None if devices is None else replicated(denoiser, devices)
    run = ParallelRun(
        pipe, loop, denoiser, scheduler=scheduler, row=row, rtol=rtol, solver=solver, max_batch=max_batch, spread=spread
    )
    before, config, kind = pipe.scheduler, vars(pipe)["_internal_dict"], type(pipe)
    vars(pipe)["scheduler"] = run._scheduler.posed  # past the pipe's __setattr__, which would write it into the config
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    pipe.__class__ = type(kind.__name__, (kind,), names | {"__call__": run._watched(kind.__call__)})
    try:
        yield run
    finally:
        pipe.__class__ = kind
        vars(pipe)["scheduler"], vars(pipe)["_internal_dict"] = before, config
        run._leave()
