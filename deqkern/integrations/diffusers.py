"""diffusers pipelines, unmodified: `parallel` solves their sampling loop for all steps at once, `invert` runs it back.

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

from .. import inversion
from ..checks import check_options, check_solver
from ..guidance import guided
from ..network import kwargs_of
from ..replication import Replicated, replicated
from ..schedule import NoiseSchedule, StepTable
from ..solve import Solution, Solve
from ..solvers import Solver, default
from ..trajectory import start

# The pipelines whose loop is known to leave its state to the scheduler, and what they call their denoiser. A subclass
# that keeps the loop is as good.
DENOISERS = {
    "DDIMPipeline": "unet",
    "DiTPipeline": "transformer",
    "StableDiffusionPipeline": "unet",
    "StableDiffusionImg2ImgPipeline": "unet",
    "StableDiffusionInpaintPipeline": "unet",
    "StableDiffusionXLPipeline": "unet",
    "StableDiffusionXLImg2ImgPipeline": "unet",
    "StableDiffusionXLInpaintPipeline": "unet",
    "StableDiffusion3Pipeline": "transformer",
    "StableDiffusion3Img2ImgPipeline": "transformer",
}
# The schedulers whose update rule is the chain that is solved.
MULTISTEP_SCHEDULER = "DPMSolverMultistepScheduler"
SCHEDULERS = ("DDIMScheduler", "FlowMatchEulerDiscreteScheduler", MULTISTEP_SCHEDULER)
# What the last of them must be set to: DPM-Solver++ 2M, as an ODE or an SDE.
MULTISTEP = {"solver_order": (2,), "solver_type": ("midpoint",), "algorithm_type": ("dpmsolver++", "sde-dpmsolver++")}
INVERTIBLE = ("DDIMPipeline", "StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")

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
    denoiser = _denoiser(pipe)
    scheduler = getattr(pipe.scheduler, "_deqkern_original", pipe.scheduler)  # of a context inside a context
    _check_scheduler(scheduler)
    _check_pair(pipe, scheduler)
    solver = default() if solver is None else solver
    check_solver("solver", solver)
    check_options(rtol, None, max_batch)
    spread = None if devices is None else _spread(denoiser, devices)
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
        count, order = int(self._plain.num_inference_steps), 2 if _rule(self._plain) == MULTISTEP_SCHEDULER else 1
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
        elif _draws(self._plain):
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


def invert(
    pipe: Any,
    image: Any,
    prompt: str | Sequence[str] = "",
    *,
    num_inference_steps: int = 50,
    guidance_scale: float = 1.0,
    rtol: float = 1e-4,
    method: str = "joint",
    sigma_min: float | None = None,
    max_batch: int | None = None,
    devices: Sequence[torch.device | str | int] | None = None,
) -> Solution:
    """Find the noise from which `pipe` makes `image` (eta = 0): see `deqkern.invert`.

    For Stable Diffusion `value` are latents: `pipe(prompt, latents=solution.value, num_inference_steps=...,
    guidance_scale=...)` makes the image again. `DDIMPipeline` takes no noise; `deqkern.sample(pipe.unet, ...)` does.

    pipe: one of `INVERTIBLE`, or a subclass with the same loop, with a DDIMScheduler that does not clip.
    image: as the pipelines take it: PIL, NumPy or a tensor (B, C, H, W) in 0 .. 1, or a list of them. A tensor with as
        many channels as the VAE's latents is taken for latents, scaled as the pipeline has them.
    prompt: one for all images, or one for each. Only Stable Diffusion has one. guidance_scale: as in the pipeline; > 1
        is guidance, against the empty prompt, and makes inversion harder.
    sigma_min: None is the pipeline's own chain; `deqkern.invert` says why a chain that ends early inverts better.
    max_batch: rows in one call of the UNet, but never less than one state; guidance takes two per state.
    devices: as in `parallel`.

    Raises ValueError or TypeError for an argument that does not fit.
    """
    check_options(rtol, None, max_batch)
    name = _loop(pipe)
    if name not in INVERTIBLE:
        raise ValueError(
            f"pipe must be one of {', '.join(INVERTIBLE)}, got {type(pipe).__name__}; for others call deqkern.invert"
        )
    scheduler = getattr(pipe.scheduler, "_deqkern_original", pipe.scheduler)
    if _rule(scheduler) != "DDIMScheduler":
        raise ValueError(_unknown_rule(scheduler))
    schedule, device = NoiseSchedule.from_diffusers(scheduler), pipe.unet.device
    if schedule.clip_sample or schedule.thresholding:
        raise ValueError(
            "pipe.scheduler clips x0, which cannot be undone: use DDIMScheduler.from_config(pipe.scheduler.config, "
            "clip_sample=False, thresholding=False)"
        )

    unet = pipe.unet if devices is None else _spread(pipe.unet, devices)

    def found(model: Any, sample: Tensor, rows: int, model_kwargs: dict[str, Any]) -> Solution:
        return inversion.invert(
            model,
            sample,
            schedule,
            num_inference_steps,
            method=method,
            rtol=rtol,
            sigma_min=sigma_min,
            model_kwargs=model_kwargs,
            max_batch=max_batch and max(1, max_batch // rows),
        )

    with torch.no_grad():
        if name == "DDIMPipeline":
            if prompt != "" or guidance_scale != 1:
                raise ValueError("prompt and guidance_scale are for Stable Diffusion; DDIMPipeline has no conditioning")
            return found(unet, _pixels(pipe, image).to(device), 1, {})
        latents = _latents(pipe, image)
        prompts = [prompt] * len(latents) if isinstance(prompt, str) else list(prompt)
        if len(prompts) != len(latents):
            raise ValueError(f"prompt must be one or {len(latents)}, as many as images, got {len(prompts)}")
        guides = guidance_scale > 1
        text, empty = pipe.encode_prompt(prompts, latents.device, 1, guides)
        given = {"encoder_hidden_states": text}  # (B, tokens, features)
        if not guides:
            return found(unet, latents, 1, given)
        return found(guided(unet, guidance_scale, given, {"encoder_hidden_states": empty}), latents, 2, {})


def _spread(denoiser: torch.nn.Module, devices: Sequence[torch.device | str | int]) -> Replicated:
    if hasattr(denoiser, "_hf_hook"):
        raise ValueError("devices: the denoiser of pipe is moved about by accelerate; it must stay on its device")
    return replicated(denoiser, devices)


def _pixels(pipe: Any, image: Any) -> Tensor:  # (B, C, H, W) in -1 .. 1
    from diffusers.image_processor import VaeImageProcessor

    processor = getattr(pipe, "image_processor", None) or VaeImageProcessor(vae_scale_factor=1)
    return processor.preprocess(image)


def _latents(pipe: Any, image: Any) -> Tensor:  # (B, channels, h, w) fp32, as the pipeline has them
    device, vae = pipe._execution_device, pipe.vae
    if isinstance(image, Tensor) and image.ndim == 4 and image.shape[1] == vae.config.latent_channels:
        return image.to(device, torch.float32)
    encoded = vae.encode(_pixels(pipe, image).to(device, vae.dtype)).latent_dist.mode()
    return encoded.float() * vae.config.scaling_factor


def _posing_as(method: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with the signature of `method`: pipelines look at it to see what a scheduler takes."""
    return functools.update_wrapper(functools.partial(function), method)


def _defined(owner: Any, method: str) -> str | None:
    """The class of diffusers in which the type of `owner` has its `method`."""
    function = getattr(type(owner), method, None)
    if not getattr(function, "__module__", "").startswith("diffusers."):
        return None
    return getattr(function, "__qualname__", "").rpartition(".")[0]


def _loop(pipe: Any) -> str | None:
    return _defined(pipe, "__call__")


def _rule(scheduler: Any) -> str | None:
    return _defined(scheduler, "step")


def _denoiser(pipe: Any) -> Any:
    name = type(pipe).__name__
    if not hasattr(pipe, "scheduler"):
        raise TypeError(f"pipe must be a diffusers pipeline, got {name}")
    part = DENOISERS.get(_loop(pipe) or "")
    if part is None:
        for extra in ("controlnet", "adapter"):
            if getattr(pipe, extra, None) is not None:
                raise ValueError(
                    f"pipe: the residuals of its {extra} belong to one timestep, {name} cannot run in parallel; "
                    "use it outside of parallel()"
                )
        raise ValueError(
            f"pipe: the loop of {name} is not known to work in parallel. Supported are {', '.join(DENOISERS)} and "
            "subclasses that keep their loop; for others call deqkern.sample with their denoiser"
        )
    denoiser = getattr(pipe, part)
    if "Inpaint" in (_loop(pipe) or "") and denoiser.config.in_channels == denoiser.config.out_channels:
        raise ValueError(
            f"pipe: with a UNet of {denoiser.config.in_channels} channels {name} mixes the image into the state at "
            "every step, which cannot run in parallel; use a UNet made for inpainting, with 9 channels"
        )
    return denoiser


def _draws(scheduler: Any) -> bool:
    """Whether each step draws noise without being told an eta."""
    return _rule(scheduler) == MULTISTEP_SCHEDULER and scheduler.config.algorithm_type == "sde-dpmsolver++"


def _check_scheduler(scheduler: Any) -> None:
    rule, config = _rule(scheduler), scheduler.config
    if rule not in SCHEDULERS:
        raise ValueError(_unknown_rule(scheduler))
    if rule == MULTISTEP_SCHEDULER:
        for option, values in MULTISTEP.items():
            if config[option] not in values:
                raise ValueError(
                    f"pipe.scheduler is a {rule} with {option}={config[option]!r}; parallel() solves "
                    f"{option}={' or '.join(map(repr, values))}"
                )
        if config.final_sigmas_type != "zero" and (config.euler_at_final or not config.lower_order_final):
            raise ValueError(
                f"pipe.scheduler is a {rule} whose last step parallel() does not know; leave "
                "euler_at_final and lower_order_final at their defaults"
            )
    NoiseSchedule.from_diffusers(scheduler)


def _check_pair(pipe: Any, scheduler: Any) -> None:
    loop = _loop(pipe) or ""
    if loop == "DDIMPipeline" and _rule(scheduler) == MULTISTEP_SCHEDULER:
        raise ValueError(
            f"pipe.scheduler is a {MULTISTEP_SCHEDULER}, whose step does not take the eta that DDIMPipeline gives it; "
            "use a DDIMScheduler, or deqkern.sample(..., order=2)"
        )
    if _draws(scheduler) and loop.startswith(("DiT", "StableDiffusion3")):
        raise ValueError(
            f"pipe.scheduler is of algorithm_type='sde-dpmsolver++', to which {loop} gives no generator; use "
            "'dpmsolver++'"
        )


def _unknown_rule(scheduler: Any) -> str:
    flow = "FlowMatch" in type(scheduler).__name__ or getattr(scheduler, "alphas_cumprod", None) is None
    use = SCHEDULERS[1] if flow else SCHEDULERS[0]
    return (
        f"pipe.scheduler is a {type(scheduler).__name__}, whose steps are not the chain that is solved; set "
        f"pipe.scheduler = {use}.from_config(pipe.scheduler.config)"
    )
