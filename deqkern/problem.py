"""One validated problem: a chain, the state of it that is known, and how it is to be solved.

The arguments of `sample`, `invert`, `plan` and the integrations are checked here, before the model is called: each
rule once, with a message that names the argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .chain.schedule import NoiseSchedule
from .chain.schedulers import check_own_steps
from .chain.step_table import StepTable
from .engine.loop import Solve, begin, run
from .engine.solution import Callback, Solution
from .engine.trajectory import Traits
from .gradients.pullback import Gradient, Pullback
from .network.model import Model, Network, arguments_of
from .network.replication import is_replicated
from .solvers.presets import Solver, check_solver
from .support.checks import (
    DTYPES,
    check_callable,
    check_callback,
    check_count,
    check_dtype,
    check_finite,
    check_generator,
    check_rtol,
    is_int,
)


@dataclass(frozen=True, eq=False)
class Problem:
    """A chain of S steps, one state of which is known, and how the others are to be found.

    Made by `of_chain`, which checks what it is given.

    Attributes:
        table: The steps of the chain, from the state that is known.
        first: (B, *shape), that state.
        network: The model along the chain; None where the caller evaluates it.
        dtype: Of the states that the model is called at.

    """

    table: StepTable
    first: Tensor
    network: Network | None
    dtype: torch.dtype
    solver: Solver
    rtol: float
    max_iterations: int | None = None
    max_batch: int | None = None
    step_noise: Tensor | None = None  # (S, B, *shape)
    generator: torch.Generator | None = None
    guess: Tensor | None = None  # (S+1, B, *shape)
    cuda_graph: bool = False
    callback: Callback | None = None

    @classmethod
    @torch.inference_mode(False)  # where no table and no network could be differentiated
    def of_chain(
        cls,
        model: Model | None,
        first: Tensor,  # (B, *shape)
        make_table: Callable[[], StepTable],
        *,
        name: str,
        solver: Solver,
        rtol: float,
        draws_noise: bool = False,
        max_iterations: int | None = None,
        max_batch: int | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        step_noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        guess: Tensor | None = None,
        cuda_graph: bool = False,
        callback: Callback | None = None,
        by_caller: bool = False,
        check: Callable[[StepTable], None] | None = None,
    ) -> Problem:
        """Check the arguments, which are those of `sample` unless said, and build the problem.

        by_caller: the caller evaluates the model, which is None. first: the state that is known; `name` is what the
        user calls it.
        make_table: called once the other arguments are known to fit. draws_noise: whether its steps do.
        check: looks at the table before the tensors whose size depends on it are checked.

        Raises TypeError or ValueError for an argument that does not fit; the message names it.
        """
        if not by_caller:
            check_callable("model", model)
        check_state(name, first, solver, model_kwargs)
        check_options(rtol, max_iterations, max_batch)
        check_callback(callback)
        check_cuda_graph(cuda_graph, model, first, solver)
        table = make_table()
        if check is not None:
            check(table)
        check_step_noise(step_noise, generator, first, steps=len(table.a), draws_noise=draws_noise)
        check_guess(guess, first, len(table.a))
        network = None if model is None else Network(model, table, arguments_of(model, model_kwargs), first)
        return cls(
            table=table,
            first=first,
            network=network,
            dtype=first.dtype if network is None else network.dtype,
            solver=solver,
            rtol=rtol,
            max_iterations=max_iterations,
            max_batch=max_batch,
            step_noise=step_noise,
            generator=generator,
            guess=guess,
            cuda_graph=cuda_graph,
            callback=callback,
        )

    @torch.no_grad()
    def begin(self) -> Solve:
        """The solve, whose rows the caller evaluates."""
        precision = torch.finfo(self.dtype).eps if self.network is None else self.network.precision
        return begin(
            self.first,
            self.table,
            self.solver,
            Traits(dtype=self.dtype, precision=precision, max_batch=self.max_batch),
            rtol=self.rtol,
            max_iterations=self.max_iterations,
            cuda_graph=self.cuda_graph,
            guess=self.guess,
            step_noise=self.step_noise,
            generator=self.generator,
        )

    @torch.no_grad()
    def solve(self) -> Solution:
        """Evaluate the network until the solve is over."""
        assert self.network is not None
        return run(self.begin(), self.network, self.callback)

    def differentiable(self, solution: Solution, gradient: Gradient) -> Solution:
        """The `solution` of this problem, with a gradient at its value by the method `gradient`."""
        assert self.network is not None
        pullback = Pullback(self.network, gradient, self.rtol, self.max_batch)
        value = pullback.attach(solution.value, solution.trajectory, self.first, self.step_noise)
        return replace(solution, value=value)


def check_schedule(schedule: NoiseSchedule | Any) -> NoiseSchedule:
    """A `NoiseSchedule`, or that of a scheduler of diffusers whose own steps it has."""
    if isinstance(schedule, NoiseSchedule):
        return schedule
    wanted = "schedule must be a NoiseSchedule or a scheduler of diffusers"
    if isinstance(schedule, type):
        raise TypeError(f"{wanted}, got the class {schedule.__name__}: make one, {schedule.__name__}(..)")
    if not callable(getattr(schedule, "set_timesteps", None)) or not isinstance(
        getattr(schedule, "config", None), Mapping
    ):
        raise TypeError(f"{wanted}, got {type(schedule).__name__}")
    check_own_steps(schedule, "schedule")
    try:
        return NoiseSchedule.from_diffusers(schedule)
    except (TypeError, ValueError) as error:
        raise type(error)(f"schedule: {error}") from error


def check_state(name: str, first: Tensor, solver: Solver, model_kwargs: Mapping[str, Any] | None) -> None:
    """The known state of a chain (B, *shape), the argument `name`, and what goes with it."""
    if model_kwargs is not None and not isinstance(model_kwargs, Mapping):
        raise TypeError(f"model_kwargs must be a mapping, got {type(model_kwargs).__name__}")
    if not isinstance(first, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(first).__name__}")
    check_dtype(name, first)
    if first.ndim < 2 or math.prod(first.shape[1:]) == 0:
        raise ValueError(f"{name} must have shape (B, *shape) with a non-empty sample shape, got {tuple(first.shape)}")
    check_solver("solver", solver)
    check_finite(name, first)


def check_options(rtol: float, max_iterations: int | None, max_batch: int | None) -> None:
    """Refuse a tolerance or a limit that means nothing."""
    check_rtol(rtol)
    check_count("max_iterations", max_iterations, optional=True)
    check_count("max_batch", max_batch, optional=True)


def check_cuda_graph(cuda_graph: bool, model: Model | None, noise: Tensor, solver: Solver) -> None:
    """Refuse `cuda_graph` where nothing can be captured."""
    if not isinstance(cuda_graph, bool):
        raise TypeError(f"cuda_graph must be a bool, got {type(cuda_graph).__name__}")
    if cuda_graph and not noise.is_cuda:
        raise ValueError(f"cuda_graph=True needs noise on a CUDA device, got {noise.device}")
    if cuda_graph and is_replicated(model):
        raise ValueError("cuda_graph=True needs a model on one device: a graph cannot span several")
    if cuda_graph and is_int(solver.window):
        raise ValueError(
            "cuda_graph=True needs a solver whose window is None or a share of the steps: a graph evaluates all rows"
        )


def check_auto(max_iterations: int | None, cuda_graph: bool, steps: int) -> None:
    """Refuse with solver="auto" what one of the solvers that it may choose cannot do."""
    if max_iterations is not None and max_iterations < steps:
        raise ValueError(
            f"max_iterations must be None or at least {steps} with solver='auto', which may choose the sequential "
            f"chain of {steps} iterations, got {max_iterations}"
        )
    if cuda_graph:
        raise ValueError(
            "cuda_graph=True needs a solver whose window is None or a share of the steps; solver='auto' may choose "
            "another"
        )


def check_guess(guess: Tensor | None, noise: Tensor, steps: int) -> None:
    """Finite states (S+1, B, *shape) where the noise (B, *shape) is."""
    if guess is None:
        return
    _check_states("guess", guess)
    _check_fits("guess", guess, steps + 1, noise)
    check_finite("guess", guess[1:])


def check_step_noise(
    step_noise: Tensor | None, generator: torch.Generator | None, noise: Tensor, *, steps: int, draws_noise: bool
) -> None:
    """Where steps draw noise at all: (S, B, *shape) where the noise (B, *shape) is, or a generator of it."""
    check_generator(generator)
    if step_noise is None:
        return
    _check_states("step_noise", step_noise)
    if not draws_noise:
        raise ValueError("step_noise needs eta > 0: with eta = 0 no step draws noise")
    _check_fits("step_noise", step_noise, steps, noise)
    check_finite("step_noise", step_noise)


def _check_states(name: str, value: Any) -> None:
    if not isinstance(value, Tensor) or value.dtype not in DTYPES:
        raise TypeError(f"{name} must be an fp32, bf16, fp16 or fp64 tensor")


def _check_fits(name: str, value: Tensor, count: int, noise: Tensor) -> None:
    if value.shape != (count, *noise.shape):
        raise ValueError(f"{name} must have shape {(count, *noise.shape)}, got {tuple(value.shape)}")
    if value.device != noise.device:
        raise ValueError(f"{name} is on {value.device}, noise on {noise.device}")
