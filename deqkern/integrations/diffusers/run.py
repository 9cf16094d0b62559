"""What happens inside of `parallel`.

The pipeline keeps its loop, its guidance and its decoding. What it calls once per step changes: the denoiser is
evaluated at the states of all steps in one batch, and `scheduler.step` does one iteration of the solver.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ...chain.schedule import NoiseSchedule, StepTable
from ...engine.loop import Solve, begin
from ...engine.solution import Solution
from ...engine.trajectory import Traits
from ...network.model import kwargs_of
from ...network.replication import Replicated
from ...solvers.presets import Solver
from ...support.eager import uncompiled
from ...support.tensors import split_rows
from .checks import (
    FLOW_SCHEDULER,
    MULTISTEP_SCHEDULER,
    check_denoiser_call,
    check_no_cache,
    check_pipeline_call,
    check_steps,
    draws_noise,
    rule_name,
    settings_of,
)
from .loops import Loop, Packing
from .timesteps import Timesteps

_CALLS = (
    "pipe calls its denoiser more often at some steps than at others, which cannot run in parallel: all steps are "
    "solved at once; a hook, or an option of the call, must be left out"
)


class ParallelRun:
    """The pipeline calls inside one `parallel` context. solution: of the last call that ended, None before."""

    solution: Solution | None = None

    def __init__(
        self,
        pipe: Any,
        loop: Loop,
        denoiser: Any,
        scheduler: Any,
        rtol: float,
        solver: Solver,
        max_batch: int | None,
        spread: Replicated | None,
    ) -> None:
        self._pipe, self._rtol, self._solver, self._max_batch, self._spread = pipe, rtol, solver, max_batch, spread
        self._loop, self._denoiser = loop, denoiser
        config = denoiser.config
        channels = config.get("out_channels") or config.in_channels
        self._channels = min(int(config.in_channels), int(channels))  # less conditioning, less learned sigma
        self._names = list(inspect.signature(getattr(denoiser, "_orig_mod", denoiser).__class__.forward).parameters)[1:]
        self._plain = copy.copy(scheduler)  # set_timesteps assigns: the original keeps its own
        self._scheduler = copy.copy(scheduler)
        self._scheduler._deqkern_original = scheduler
        self._scheduler.set_timesteps = _posing_as(self._plain.set_timesteps, self._set_timesteps)
        self._scheduler.step = _posing_as(self._plain.step, self._step)
        self._running = False  # in the loop
        self._looping = False  # between a timestep of the loop and the step of the scheduler
        self._calls = 0  # of the denoiser since the last timestep
        self._given: list[list[Any]] = []  # what each of them is given, in the first turn
        self._packing: Packing | None = None
        self._preview = torch.empty(0)  # (B, channels or tokens, ..), the latents that the loop has
        self._inside = False  # the denoiser is called by the hook itself
        self._outputs: list[Tensor] = []  # of all parts of a call but the last
        self._join: Callable[[Any], Tensor] | None = None  # the last output to those of its rows on other devices
        self._call: Mapping[str, Any] | None = None  # the arguments of the pipeline call that goes on
        self._solve: Solve | None = None

    def __deepcopy__(self, memo: Any) -> ParallelRun:
        return self  # the hooks of a copied denoiser are those of this run, and do nothing

    def _leave(self) -> None:
        """Let go of all but the solution."""
        self._pipe = self._denoiser = self._spread = self._call = self._solve = self._join = None
        self._given, self._outputs, self._preview = [], [], torch.empty(0)

    def _passes(self, module: torch.nn.Module) -> bool:
        """Whether this call of a denoiser is not the loop's."""
        return self._inside or not self._looping or module is not self._denoiser

    # The call, and its loop: timesteps, then for each of them the denoiser and the scheduler's step.

    def _watched(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call` of the pipeline, looked at on the way: eta must be known before its loop tells the scheduler."""

        @functools.wraps(call)
        def watched(pipe: Any, *args: Any, **kwargs: Any) -> Any:
            given = inspect.signature(call).bind(pipe, *args, **kwargs)
            given.apply_defaults()
            check_pipeline_call(given.arguments)
            scheduler = vars(pipe)["scheduler"]
            if not hasattr(scheduler, "_deqkern_original"):
                raise ValueError("pipe.scheduler was set inside parallel(); set it before")
            if scheduler is self._scheduler:  # and not that of a context inside this one
                self._call, self.solution = given.arguments, None
            try:
                return call(pipe, *args, **kwargs)
            finally:
                self._call = None

        return watched

    def _set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        if self._call is None:
            raise ValueError("pipe.scheduler belongs to the pipe inside parallel(): no other can use it meanwhile")
        self._plain.set_timesteps(*args, **kwargs)
        values = self._plain.timesteps
        check_steps(self._pipe, len(values))
        self._schedule = NoiseSchedule.from_diffusers(self._plain)
        table = self._table()
        if not torch.equal(table.timesteps, values.cpu()):
            raise ValueError(
                f"num_inference_steps={self._plain.num_inference_steps}: the scheduler's timesteps, {values.tolist()}, "
                "are not those of its chain; take another number of steps, and leave out timesteps= of your own"
            )
        vars(self._scheduler).update(vars(self._plain))
        self._scheduler.timesteps = Timesteps.of(values, self._iterations, range(len(values)))
        self._looping, self._solve = False, None

    def _table(self, eta: float = 0.0) -> StepTable:
        count, order = int(self._plain.num_inference_steps), 2 if rule_name(self._plain) == MULTISTEP_SCHEDULER else 1
        return self._schedule.steps(count, eta=eta, order=order)

    def _iterations(self, values: Tensor, span: range) -> Iterator[Tensor]:
        """The timesteps `values` of the steps `span`, but no more of them than the solve has iterations.

        While the loop goes through them, whoever else does gets all of them.
        """
        if self._running:
            yield from values.unbind()
            return
        self._running, self._solve, self._span, self._outputs = True, None, span, []
        try:
            for t in values.unbind():
                if self._converged:
                    break
                self._looping, self._calls, self._t = True, 0, t
                yield t
        finally:
            self._running = self._looping = False
        self._finish()

    @property
    def _converged(self) -> bool:
        return self._solve is not None and not self._solve.open

    def _finish(self) -> None:
        if self._solve is not None:
            self.solution, self._solve = self._solve.solution(self._preview.dtype), None

    @uncompiled
    def _before_denoiser(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]] | None:
        """Call the module at the selected states, ordered (copy of guidance, state); the last part is left to it."""
        if self._passes(module):
            return None
        given = dict(zip(self._names, args, strict=False)) | kwargs
        x = given.pop(self._names[0])
        t = given.pop("timestep")
        check_denoiser_call(given)
        if self._solve is None:
            self._begin(x, given)
        self._check_conditioning(x, given)
        self._check_latents(x)
        self._check_timestep(t, x.dtype)
        assert self._solve is not None
        self._calls += 1
        at, rows = self._rows(x, given)
        *parts, last = split_rows(rows, self._max_batch)
        self._inside = True
        try:
            if self._spread is None:
                self._outputs = [module(**at(part))[0] for part in parts]
                return (), at(last)
            spread = self._spread
            *spreads, own = [[((), at(part[share])) for share in spread.shares(len(part))] for part in (*parts, last)]
            self._outputs = [spread.evaluate(call) for call in spreads]
            (_, call), self._join = spread.begin(own)
            return (), call
        finally:
            self._inside = False

    def _rows(self, x: Tensor, given: Mapping[str, Any]) -> tuple[Callable[[Tensor], dict[str, Any]], Tensor]:
        """The denoiser's arguments at some of the selected rows, x first; and all of those (N,)."""
        assert self._solve is not None
        rows, batch, copies = self._solve.ask(), self._batch, self._copies
        copy = torch.arange(copies, device=x.device)[:, None]
        index = (copy * batch + rows.samples).flatten()  # (N,) of all copies
        states = self._packed(rows.states)
        states = states.repeat(copies, *[1] * (states.ndim - 1))
        if x.shape[1] > self._own:
            states = torch.cat([states, x[index, self._own :]], dim=1)
        timesteps = rows.timesteps.repeat(copies)
        timesteps = self._loop.timestep(timesteps, x.dtype, self._denoiser.config)
        shared = {name: given[name] for name in self._loop.shared}
        shared = {name: value[:1] if isinstance(value, list) else value for name, value in shared.items()}
        names = (self._names[0], "timestep")

        def at(part: Tensor) -> dict[str, Any]:
            own = dict(zip(names, (states[part], timesteps[part]), strict=True))
            return own | kwargs_of(given, index[part], len(x)) | shared

        return at, torch.arange(len(index), device=x.device)

    @uncompiled
    def _after_denoiser(self, module: torch.nn.Module, args: Any, output: Any) -> Any:
        if self._passes(module) or not (self._outputs or self._join):
            return None
        joined = torch.cat([*self._outputs, output[0] if self._join is None else self._join(output)])
        self._outputs, self._join = [], None
        return (joined,) if isinstance(output, tuple) else type(output)(sample=joined)

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        """One iteration. The state that the pipeline goes on with is the present estimate of the chain's end."""
        if not self._looping or self._solve is None or not self._calls:
            raise ValueError("pipe: its loop calls scheduler.step without the denoiser; it cannot run in parallel")
        if self._calls != len(self._given):
            raise ValueError(_CALLS)
        call = inspect.signature(self._plain.step).bind(*args, **kwargs)
        call.apply_defaults()
        output, sample = call.arguments["model_output"], call.arguments["sample"]
        solve = self._solve
        if not solve.count and sample.dtype != self._preview.dtype:  # the denoiser was given them rounded
            solve.refine_first(self._unpacked(sample[: self._batch]))
        dtype = self._dtype_of(output, sample)
        solve.tell(self._unpacked(output[: len(solve.ask())]))  # DiT gives the guided output twice
        self._preview = self._packed(solve.value(dtype))
        self._looping = False
        value = torch.cat([self._preview] * (len(sample) // self._batch))
        if not call.arguments["return_dict"]:
            return value, value
        from diffusers.schedulers.scheduling_utils import SchedulerOutput

        return SchedulerOutput(prev_sample=value)

    def _dtype_of(self, output: Tensor, sample: Tensor) -> torch.dtype:
        """Of the state that the scheduler's own step gives."""
        if rule_name(self._plain) == FLOW_SCHEDULER:
            return output.dtype
        return torch.promote_types(output.dtype, sample.dtype)

    def _packed(self, images: Tensor) -> Tensor:
        return images if self._packing is None else self._packing.pack(images)

    def _unpacked(self, latents: Tensor) -> Tensor:
        return latents if self._packing is None else self._packing.unpack(latents)

    # The solve behind it.

    def _begin(self, x: Tensor, given: Mapping[str, Any]) -> None:
        """Start at the denoiser's first input x (N, channels or tokens, ..) and its other arguments.

        All step noise is drawn here: the loop draws nothing between this and its own first step.
        """
        from diffusers.utils.torch_utils import randn_tensor

        check_no_cache(self._denoiser)
        self._copies, self._given = 2 if self._loop.doubled and self._guided else 1, []
        self._batch, self._packing = len(x) // self._copies, self._loop.packing(given)
        if self._packing is not None:
            self._own = self._packing.h * self._packing.w
        else:
            self._own = x.shape[1] if x.ndim == 3 else self._channels
        self._preview, noise = x[: self._batch, : self._own].clone(), None
        first = self._unpacked(self._preview)
        eta, dtype = 0.0, x.dtype
        if "eta" in inspect.signature(self._plain.step).parameters:
            eta = float(self._arguments.get("eta") or 0.0)
        elif draws_noise(self._plain):
            eta, dtype = 1.0, torch.float32  # in which that scheduler draws
        if eta:
            generator = self._arguments.get("generator")
            noise = torch.stack([randn_tensor(first.shape, generator, x.device, dtype) for _ in self._span])
        table = self._table(eta).part(self._span)
        traits = Traits(x.dtype, torch.finfo(x.dtype).eps, "pipe's denoiser returned")
        self._solve = begin(first, table, self._solver, traits, rtol=self._rtol, step_noise=noise)

    @property
    def _guided(self) -> bool:
        known = getattr(self._pipe, "do_classifier_free_guidance", None)  # for others it is a variable of the loop
        return bool(self._arguments.get("guidance_scale", 1.0) > 1 if known is None else known)

    @property
    def _arguments(self) -> Mapping[str, Any]:
        return self._call or {}

    def _check_timestep(self, t: Tensor, dtype: torch.dtype) -> None:
        seen = t.float()
        expected = self._loop.timestep(self._t, dtype, self._denoiser.config).float()
        if not bool(torch.isclose(seen, expected, rtol=1e-2).all()):  # it may be rounded otherwise
            raise ValueError(
                f"pipe gives its denoiser the timestep {float(seen.flatten()[0]):g}, not {float(expected):g}: its "
                "loop is not the one that parallel() knows"
            )

    def _check_latents(self, x: Tensor) -> None:
        if _same(x[:, : self._own], torch.cat([self._preview.to(x.dtype)] * self._copies)):
            return
        if self._calls:
            raise ValueError(
                "pipe calls its denoiser at other latents than those of the step, which cannot run in parallel; a "
                "hook, or an option of the call, must be left out"
            )
        raise ValueError(
            "callback_on_step_end, or the pipe's own loop, changed latents between two steps; inside parallel() "
            "they are previews, to look at only"
        )

    def _check_conditioning(self, x: Tensor, given: Mapping[str, Any]) -> None:
        """What one call is given beside the state and the timestep must be the same in every turn of the loop."""
        leaves = [x[:, self._own :], *tree_leaves(dict(given)), *settings_of(self._pipe, self._denoiser)]
        leaves += [leaf._version for leaf in leaves[1:] if isinstance(leaf, Tensor) and not leaf.is_inference()]
        assert self._solve is not None
        if not self._solve.count:
            self._given.append(leaves)
            return
        if self._calls >= len(self._given):
            raise ValueError(_CALLS)
        before = self._given[self._calls]
        if len(leaves) != len(before) or not all(map(_same, leaves, before)):
            raise ValueError(
                "callback_on_step_end changed the conditioning or the guidance: inside parallel() every step is solved "
                "at once, and all need the same"
            )


def _posing_as(method: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with the signature of `method`: pipelines look at it to see what a scheduler takes."""
    return functools.update_wrapper(functools.partial(function), method)


def _same(a: Any, b: Any) -> bool:
    """Whether two arguments are equal, NaN or not; of what is no tensor and not plain, whether they are of one type."""
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and (a.numel() == 0 or bool(((a == b) | (a.isnan() & b.isnan())).all()))
    return type(a) is type(b) and (not isinstance(a, bool | int | float | str) or a == b)
