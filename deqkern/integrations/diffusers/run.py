"""What happens inside of `parallel`.

The pipeline keeps its loop, its guidance and its decoding. What it calls once per step changes: the denoiser is
evaluated at the states of all steps in one batch, and `scheduler.step` does one iteration of the solver.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...chain.schedulers import SchedulerRow
from ...engine.loop import Solve, begin
from ...engine.rows import Rows
from ...engine.solution import Solution
from ...engine.trajectory import Traits
from ...network.replication import Replicated
from ...solvers.presets import Solver
from .checks import check_no_cache, check_pipeline_call, check_steps, settings_of
from .denoiser import DenoiserHook, Evaluation
from .guard import Guard
from .loops import LatentFormat, Loop
from .scheduler import SchedulerProxy, is_posed
from .timesteps import Timesteps


@dataclass
class _Solving:
    """The solve behind a loop."""

    solve: Solve
    latents: LatentFormat
    preview: Tensor  # (B, channels or tokens, ..), the latents that the loop has
    rows: Rows | None = None  # that the denoiser is evaluated at in this turn


class ParallelRun:
    """The pipeline calls inside one `parallel` context.

    Attributes:
        solution: The `Solution` of the last call that ended, None before.

    Example:
        >>> import diffusers
        >>> from deqkern import models
        >>> from deqkern.integrations.diffusers import parallel
        >>> pipe = diffusers.DDIMPipeline(models.load("digits").model, diffusers.DDIMScheduler(clip_sample=False))
        >>> with parallel(pipe) as run:
        ...     print(run.solution)
        None
    """

    solution: Solution | None = None

    def __init__(
        self,
        pipe: Any,
        loop: Loop,
        denoiser: Any,
        scheduler: Any,
        *,
        row: SchedulerRow,
        rtol: float,
        solver: Solver,
        max_batch: int | None,
        spread: Replicated | None,
    ) -> None:
        self._pipe, self._loop, self._solver, self._rtol = pipe, loop, solver, rtol
        self._guard = Guard(loop, denoiser.config, lambda: settings_of(self._pipe, denoiser))
        self._scheduler = SchedulerProxy(scheduler, row, self._set_timesteps, step=self._step)
        self._hook = DenoiserHook(
            denoiser, loop, lambda: self._looping, answer=self._evaluation, max_batch=max_batch, spread=spread
        )
        self._running = False  # in the loop
        self._looping = False  # between a timestep of the loop and the step of the scheduler
        self._span = range(0)  # the steps that the loop goes through
        self._call: Mapping[str, Any] | None = None  # the arguments of the pipeline call that goes on
        self._solving: _Solving | None = None

    def _leave(self) -> None:
        """Let go of all but the solution."""
        self._hook.remove()
        del self._pipe, self._hook, self._guard, self._scheduler
        self._call = self._solving = None

    # The call, and its loop: timesteps, then for each of them the denoiser and the scheduler's step.

    def _watched(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call` of the pipeline, looked at on the way: eta must be known before its loop tells the scheduler."""

        @functools.wraps(call)
        def watched(pipe: Any, *args: Any, **kwargs: Any) -> Any:
            given = inspect.signature(call).bind(pipe, *args, **kwargs)
            given.apply_defaults()
            check_pipeline_call(given.arguments)
            scheduler = vars(pipe)["scheduler"]
            if not is_posed(scheduler):
                raise ValueError("pipe.scheduler was set inside parallel(); set it before")
            if scheduler is self._scheduler.posed:  # and not that of a context inside this one
                self._call, self.solution = given.arguments, None
            try:
                return call(pipe, *args, **kwargs)
            finally:
                self._call = None

        return watched

    def _set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        if self._call is None:
            raise ValueError("pipe.scheduler belongs to the pipe inside parallel(): no other can use it meanwhile")
        values = self._scheduler.set_timesteps(*args, **kwargs)
        check_steps(self._pipe, len(values))
        self._scheduler.posed.timesteps = Timesteps.of(values, self._iterations, range(len(values)))
        self._looping, self._solving = False, None

    def _iterations(self, values: Tensor, span: range) -> Iterator[Tensor]:
        """The timesteps `values` of the steps `span`, but no more of them than the solve has iterations.

        While the loop goes through them, whoever else does gets all of them.
        """
        if self._running:
            yield from values.unbind()
            return
        self._running, self._solving, self._span = True, None, span
        try:
            for t in values.unbind():
                if self._is_over:
                    break
                self._looping = True
                self._guard.begin_turn(t)
                yield t
        finally:
            self._running = self._looping = False
        self._finish()

    @property
    def _is_over(self) -> bool:
        return self._solving is not None and not self._solving.solve.open

    def _finish(self) -> None:
        if self._solving is not None:
            self.solution, self._solving = self._solving.solve.solution(self._solving.preview.dtype), None

    def _evaluation(self, x: Tensor, t: Tensor, given: Mapping[str, Any]) -> Evaluation:
        """The states of all steps, for a call of the denoiser at the state x (N, ..) and the timestep t."""
        if self._solving is None:
            self._solving = self._begin(x, given)
        now = self._solving
        first = not now.solve.count
        self._guard.check_call(x, t, given, latents=now.latents, preview=now.preview, first=first)
        if now.rows is None:
            now.rows = now.solve.ask()
        states = now.latents.pack(now.rows.states)
        return Evaluation(states, now.rows.timesteps, samples=now.rows.samples, latents=now.latents)

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        """One iteration. The state that the pipeline goes on with is the present estimate of the chain's end."""
        now = self._solving
        if not self._looping or now is None or now.rows is None:
            raise ValueError("pipe: its loop calls scheduler.step without the denoiser; it cannot run in parallel")
        self._guard.check_turn()
        output, sample, return_dict = self._scheduler.step_call(*args, **kwargs)
        if not now.solve.count and sample.dtype != now.preview.dtype:  # the denoiser was given them rounded
            now.solve.correct_first(now.latents.unpack(sample[: now.latents.batch]))
        now.solve.tell(now.latents.unpack(output[: len(now.rows)]))  # DiT gives the guided output twice
        dtype = self._scheduler.row.result_dtype(output.dtype, sample.dtype)
        now.preview, now.rows = now.latents.pack(now.solve.value(dtype)), None
        self._looping = False
        value = torch.cat([now.preview] * (len(sample) // now.latents.batch))
        if not return_dict:
            return value, value
        from diffusers.schedulers.scheduling_utils import SchedulerOutput

        return SchedulerOutput(prev_sample=value)

    # The solve behind it.

    def _begin(self, x: Tensor, given: Mapping[str, Any]) -> _Solving:
        """Start at the denoiser's first input x (N, channels or tokens, ..) and its other arguments.

        All step noise is drawn here: the loop draws nothing between this and its own first step.
        """
        check_no_cache(self._hook.denoiser)
        self._guard.begin()
        copies = 2 if self._loop.doubled and self._guided else 1
        latents = self._loop.latents(x, given, self._hook.denoiser.config, copies=copies)
        preview = x[: latents.batch, : latents.own].clone()
        first, noise = latents.unpack(preview), None
        eta = self._scheduler.eta_of(self._arguments)
        if eta:
            noise = self._scheduler.step_noise(first, self._arguments.get("generator"), self._span)
        table = self._scheduler.table(eta).part(self._span)
        traits = Traits(dtype=x.dtype, precision=torch.finfo(x.dtype).eps, error_prefix="pipe's denoiser returned")
        solve = begin(first, table, self._solver, traits, rtol=self._rtol, step_noise=noise)
        return _Solving(solve, latents, preview)

    @property
    def _guided(self) -> bool:
        known = getattr(self._pipe, "do_classifier_free_guidance", None)  # for others it is a variable of the loop
        return bool(self._arguments.get("guidance_scale", 1.0) > 1 if known is None else known)

    @property
    def _arguments(self) -> Mapping[str, Any]:
        return self._call or {}
