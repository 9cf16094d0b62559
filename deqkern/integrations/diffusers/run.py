"""`parallel`: the sampling loop of an unmodified pipeline, solved for all its steps at once.

The pipeline keeps its loop, its guidance and its decoding. What it calls once per step changes: the denoiser is
evaluated at the states of all steps in one batch, and `scheduler.step` does one iteration of the solver.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ...checks import check_options, check_solver
from ...network import kwargs_of
from ...replication import Replicated
from ...schedule import NoiseSchedule, StepTable
from ...solve import Solution, Solve
from ...solvers import Solver, default
from ...trajectory import start
from .loops import (
    MULTISTEP_SCHEDULER,
    check_pair,
    check_scheduler,
    denoiser_of,
    draws_noise,
    rule_name,
    spread_over,
)

# Arguments of a pipeline call that make its loop another one.
_REFUSED = ("use_clipped_model_output", "skip_guidance_layers")
_RESIDUALS = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
    "block_controlnet_hidden_states",
)


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
    in a callback stops early. On leaving, also by an exception, the pipe is what it was before.

    pipe: one of `DENOISERS`, or a subclass with the same loop, with a DDIMScheduler, a DPMSolverMultistepScheduler of
        order 2 (dpmsolver++ or sde-dpmsolver++, midpoint) or, for Stable Diffusion 3, a
        FlowMatchEulerDiscreteScheduler. Inpainting needs a UNet of 9 channels.
    rtol, solver: as in `deqkern.sample`, but no "auto". max_batch: rows in one call of the denoiser; guidance takes two
        per state.
    devices: several evaluate the denoiser at the same time, each its share of the rows, as `deqkern.replicated` does;
        its own alone if None.
    eta and generator of the call are kept to: step noise is drawn in the order of the sequential loop.

    Yields an object whose `solution` is the `Solution` of the last finished call; `nfe` counts states, guided or not.

    Raises ValueError or TypeError for an argument that does not fit or a pipeline that is not supported, and, from the
    call, ValueError for what cannot run in parallel: T2I and ControlNet residuals, Stable Diffusion 3's IP-adapters
    and skipped layers, `use_clipped_model_output`, callbacks that change latents or conditioning.
    """
    denoiser = denoiser_of(pipe)
    scheduler = getattr(pipe.scheduler, "_deqkern_original", pipe.scheduler)  # of a context inside a context
    check_scheduler(scheduler)
    check_pair(pipe, scheduler)
    solver = default() if solver is None else solver
    check_solver("solver", solver)
    check_options(rtol, None, max_batch)
    spread = None if devices is None else spread_over(denoiser, devices)
    run = ParallelRun(pipe, denoiser, scheduler, rtol, solver, max_batch, spread)
    before, kind = pipe.scheduler, type(pipe)
    handles = [
        denoiser.register_forward_pre_hook(run._before_denoiser, with_kwargs=True),
        denoiser.register_forward_hook(run._after_denoiser),
    ]
    vars(pipe)["scheduler"] = run._scheduler  # past the pipe's __setattr__, which would write it into the config
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    pipe.__class__ = type(kind.__name__, (kind,), names | {"__call__": run._watched(kind.__call__)})
    try:
        yield run
    finally:
        pipe.__class__ = kind
        vars(pipe)["scheduler"] = before
        for handle in handles:
            handle.remove()


class ParallelRun:
    """The pipeline calls inside one `parallel` context. solution: of the last call that ended, None before."""

    solution: Solution | None = None

    def __init__(
        self,
        pipe: Any,
        denoiser: torch.nn.Module,
        scheduler: Any,
        rtol: float,
        solver: Solver,
        max_batch: int | None,
        spread: Replicated | None,
    ) -> None:
        self._pipe, self._rtol, self._solver, self._max_batch, self._spread = pipe, rtol, solver, max_batch, spread
        self._denoiser = denoiser
        config: Any = denoiser.config
        self._channels = min(int(config.in_channels), int(config.out_channels))  # less conditioning, less learned sigma
        self._names = list(inspect.signature(getattr(denoiser, "_orig_mod", denoiser).__class__.forward).parameters)[1:]
        self._plain = copy.copy(scheduler)  # set_timesteps assigns: the original keeps its own
        self._scheduler = copy.copy(scheduler)
        self._scheduler._deqkern_original = scheduler
        self._scheduler.set_timesteps = _posing_as(self._plain.set_timesteps, self._set_timesteps)
        self._scheduler.step = _posing_as(self._plain.step, self._step)
        self._turn = "nobody"  # whom the loop calls next: "denoiser", "scheduler", or "nobody" outside of it
        self._inside = False  # the denoiser is called by the hook itself
        self._outputs: list[Tensor] = []  # of all parts of a call but the last
        self._join: Callable[[Any], Tensor] | None = None  # the last output to those of its rows on other devices
        self._call: Mapping[str, Any] = {}  # the arguments of the pipeline call
        self._solve: Solve | None = None

    def __deepcopy__(self, memo: Any) -> ParallelRun:
        return self  # the hooks of a copied denoiser are those of this run, and do nothing

    def _passes(self, module: torch.nn.Module) -> bool:
        """Whether this call of a denoiser is not the loop's."""
        return self._inside or self._turn == "nobody" or module is not self._denoiser

    # The call, and its loop: timesteps, then for each of them the denoiser and the scheduler's step.

    def _watched(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call` of the pipeline, looked at on the way: eta must be known before its loop tells the scheduler."""

        @functools.wraps(call)
        def watched(pipe: Any, *args: Any, **kwargs: Any) -> Any:
            given = inspect.signature(call).bind(pipe, *args, **kwargs)
            given.apply_defaults()
            for name in _REFUSED:
                if given.arguments.get(name):
                    raise ValueError(f"{name} is not supported inside parallel(); leave it out")
            self._call = given.arguments
            return call(pipe, *args, **kwargs)

        return watched

    def _set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        self._plain.set_timesteps(*args, **kwargs)
        values = self._plain.timesteps
        self._schedule = NoiseSchedule.from_diffusers(self._plain)
        table = self._table()
        if not torch.equal(table.timesteps, values.cpu()):
            raise ValueError(
                f"num_inference_steps={self._plain.num_inference_steps}: the scheduler's timesteps, {values.tolist()}, "
                "are not those of its chain; take another number of steps, and leave out timesteps= of your own"
            )
        vars(self._scheduler).update(vars(self._plain))
        self._scheduler.timesteps = _Timesteps.of(values, self, range(len(values)))
        self._turn, self._solve = "nobody", None

    def _table(self, eta: float = 0.0) -> StepTable:
        count, order = int(self._plain.num_inference_steps), 2 if rule_name(self._plain) == MULTISTEP_SCHEDULER else 1
        return self._schedule.steps(count, eta=eta, order=order)

    def _iterations(self, values: Tensor, span: range) -> Iterator[Tensor]:
        """The timesteps `values` of the steps `span`, but no more of them than the solve has iterations."""
        self._solve, self._span, self._outputs = None, span, []
        try:
            for t in values.unbind():
                if self._converged:
                    break
                self._turn = "denoiser"
                yield t
        finally:
            self._turn = "nobody"
        self._finish()

    @property
    def _converged(self) -> bool:
        return self._solve is not None and not self._solve.open

    def _finish(self) -> None:
        if self._solve is not None:
            self.solution, self._solve = self._solve.solution(self._first.dtype), None

    def _before_denoiser(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]] | None:
        """Call the module at the selected states, ordered (copy of guidance, state); the last part is left to it."""
        if self._passes(module):
            return None
        rest = dict(zip(self._names, args, strict=False)) | kwargs
        x = rest.pop(self._names[0])
        del rest["timestep"]
        self._check_call(rest)
        if self._solve is None:
            self._begin(x, rest)
        else:
            self._check_unchanged(x, rest)
        assert self._solve is not None
        self._solve.select()
        trajectory, batch, copies = self._solve.trajectory, self._batch, self._copies
        rows = trajectory.rows.repeat(copies)  # (N,) of all copies
        index = torch.arange(copies, device=x.device).repeat_interleave(trajectory.selected) * batch + rows % batch
        states = trajectory.images(trajectory.rows).to(x.dtype)
        states = states.repeat(copies, *[1] * (states.ndim - 1))
        if x.shape[1] > self._channels:
            states = torch.cat([states, x[index, self._channels :]], dim=1)
        timesteps = trajectory.table.timesteps.to(x.device)[rows // batch]
        calls = [
            kwargs_of(rest, index[part], len(x)) | {self._names[0]: states[part], "timestep": timesteps[part]}
            for part in torch.arange(len(rows), device=x.device).split(self._max_batch or len(rows))
        ]
        self._turn, self._inside = "scheduler", True
        try:
            if self._spread is None:
                self._outputs = [module(**call)[0] for call in calls[:-1]]
                return (), calls[-1]
            self._outputs = [self._spread(**call) for call in calls[:-1]]
            _, call, self._join = self._spread.begin(**calls[-1])
            return (), call
        finally:
            self._inside = False

    def _after_denoiser(self, module: torch.nn.Module, args: Any, output: Any) -> Any:
        if self._passes(module) or not (self._outputs or self._join):
            return None
        joined = torch.cat([*self._outputs, output[0] if self._join is None else self._join(output)])
        self._outputs, self._join = [], None
        return (joined,) if isinstance(output, tuple) else type(output)(sample=joined)

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        """One iteration. The state that the pipeline goes on with is the present estimate of the chain's end."""
        if self._turn != "scheduler" or self._solve is None:
            raise ValueError("pipe: its loop calls scheduler.step without the denoiser; it cannot run in parallel")
        call = inspect.signature(self._plain.step).bind(*args, **kwargs)
        call.apply_defaults()
        output, sample = call.arguments["model_output"], call.arguments["sample"]
        solve, trajectory = self._solve, self._solve.trajectory
        rows, outputs = trajectory.rows, solve.iteration.outputs(solve.count)
        output = output[: len(rows)]  # DiT gives the guided output twice
        if trajectory.table.converts:
            output = trajectory.table.effective_output(trajectory.images(rows), output, rows // self._batch)
        trajectory.basis.forward(output.to(outputs.dtype).contiguous(), outputs.flatten(0, 1), rows)
        solve.iteration.update(solve.count)
        solve.settle()
        self._preview = solve.value(sample.dtype)
        self._turn = "nobody"
        value = torch.cat([self._preview] * (len(sample) // self._batch))
        if not call.arguments["return_dict"]:
            return value, value
        from diffusers.schedulers.scheduling_utils import SchedulerOutput

        return SchedulerOutput(prev_sample=value)

    # The solve behind it.

    def _begin(self, x: Tensor, rest: Mapping[str, Any]) -> None:
        """Start at the denoiser's first input x (N, channels, ..) and its other arguments.

        All step noise is drawn here: the loop draws nothing between this and its own first step.
        """
        from diffusers.utils.torch_utils import randn_tensor

        guided = getattr(self._pipe, "do_classifier_free_guidance", None)
        if guided is None:  # DiTPipeline, and DDIMPipeline, which has none
            guided = self._call.get("guidance_scale", 1.0) > 1
        self._given, self._copies = self._conditioning(x, rest), 2 if guided else 1
        self._batch = len(x) // self._copies
        self._first = x[: self._batch, : self._channels].clone()
        self._preview, noise = self._first, None
        eta, dtype = 0.0, x.dtype
        if "eta" in inspect.signature(self._plain.step).parameters:
            eta = float(self._call.get("eta") or 0.0)
        elif draws_noise(self._plain):
            eta, dtype = 1.0, torch.float32  # in which that scheduler draws
        if eta:
            shape, generator = self._first.shape, self._call.get("generator")
            noise = torch.stack([randn_tensor(shape, generator, x.device, dtype) for _ in self._span])
        table = self._table(eta).part(self._span)
        trajectory = start(_Denoiser(), self._first, table, self._solver, step_noise=noise)
        self._solve = Solve(trajectory, self._solver, rtol=self._rtol)

    def _conditioning(self, x: Tensor, rest: Mapping[str, Any]) -> list[Tensor]:
        """All tensors that the denoiser is given beside the state and the timestep."""
        leaves = [x[:, self._channels :], *tree_leaves(dict(rest))]
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def _check_call(self, rest: Mapping[str, Any]) -> None:
        if self._turn != "denoiser":
            raise ValueError(
                "pipe calls its denoiser more than once per step, which cannot run in parallel: a hook or an option of "
                "the call must be left out"
            )
        for name in _RESIDUALS:
            if rest.get(name) is not None:
                raise ValueError(
                    f"pipe gives its denoiser {name}, which belong to one timestep (ControlNet, T2I adapters); "
                    "call it outside of parallel()"
                )
        if "ip_adapter_image_embeds" in (rest.get("joint_attention_kwargs") or {}):
            raise ValueError(
                "ip_adapter_image: this IP-adapter depends on the timestep; leave it out inside parallel(), or call "
                "pipe outside of it"
            )

    def _check_unchanged(self, x: Tensor, rest: Mapping[str, Any]) -> None:
        given = self._conditioning(x, rest)
        pairs = zip(given, self._given, strict=False)
        if len(given) != len(self._given) or any(a is not b and not torch.equal(a, b) for a, b in pairs):
            raise ValueError(
                "callback_on_step_end changed the conditioning or the guidance: inside parallel() every step is solved "
                "at once, and all need the same"
            )
        if not torch.equal(x[: self._batch, : self._channels], self._preview):
            raise ValueError(
                "callback_on_step_end, or the pipe's own loop, changed latents between two steps; inside parallel() "
                "they are previews, to look at only"
            )


class _Denoiser:
    """In the place of the map, which the pipeline evaluates itself."""

    what = "pipe's denoiser returned"

    def __call__(self, states: Tensor, steps: Tensor, samples: Tensor) -> Tensor:
        raise NotImplementedError


class _Timesteps(Tensor):
    """Timesteps of a scheduler whose iteration ends when the solve has converged; so do slices of them."""

    run: ParallelRun
    span: range  # which steps of the scheduler's they are
    # whatever is computed from them is a plain tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def of(values: Tensor, run: ParallelRun, span: range) -> _Timesteps:
        timesteps = values.as_subclass(_Timesteps)
        timesteps.run, timesteps.span = run, span
        return timesteps

    def __getitem__(self, index: Any) -> Tensor:
        values = super().__getitem__(index)
        return _Timesteps.of(values, self.run, self.span[index]) if isinstance(index, slice) else values

    def __iter__(self) -> Iterator[Tensor]:
        return self.run._iterations(self.as_subclass(Tensor), self.span)


def _posing_as(method: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with the signature of `method`: pipelines look at it to see what a scheduler takes."""
    return functools.update_wrapper(functools.partial(function), method)
