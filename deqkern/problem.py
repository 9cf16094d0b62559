"""What the public functions refuse in their arguments: each rule once, with the message that names the argument."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .chain.schedule import NoiseSchedule
from .network.model import Model
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


def check_arguments(
    model: Model,
    name: str,
    first: Tensor,
    schedule: NoiseSchedule,
    solver: Solver,
    rtol: float,
    max_iterations: int | None,
    model_kwargs: Mapping[str, Any] | None,
    max_batch: int | None,
    callback: Callable[..., Any] | None,
) -> None:
    """What `sample` and `invert` share; `name` is the argument that holds the chain's known state `first`."""
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule must be a NoiseSchedule, got {type(schedule).__name__}")
    check_chain(model, name, first, solver, rtol, max_iterations, model_kwargs, max_batch, callback)


def check_chain(
    model: Model,
    name: str,
    first: Tensor,
    solver: Solver,
    rtol: float,
    max_iterations: int | None,
    model_kwargs: Mapping[str, Any] | None,
    max_batch: int | None,
    callback: Callable[..., Any] | None,
) -> None:
    """The same for a chain that is given by its table."""
    check_callable("model", model)
    if model_kwargs is not None and not isinstance(model_kwargs, Mapping):
        raise TypeError(f"model_kwargs must be a mapping, got {type(model_kwargs).__name__}")
    if not isinstance(first, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(first).__name__}")
    check_dtype(name, first)
    if first.ndim < 2 or math.prod(first.shape[1:]) == 0:
        raise ValueError(f"{name} must have shape (B, *shape) with a non-empty sample shape, got {tuple(first.shape)}")
    check_solver("solver", solver)
    check_finite(name, first)
    check_options(rtol, max_iterations, max_batch)
    check_callback(callback)


def check_options(rtol: float, max_iterations: int | None, max_batch: int | None) -> None:
    """Refuse what no solve can stop at or keep to."""
    check_rtol(rtol)
    check_count("max_iterations", max_iterations, optional=True)
    check_count("max_batch", max_batch, optional=True)


def check_cuda_graph(cuda_graph: bool, model: Model, noise: Tensor, solver: Solver) -> None:
    """Refuse `cuda_graph` where nothing can be captured."""
    if not isinstance(cuda_graph, bool):
        raise TypeError(f"cuda_graph must be a bool, got {type(cuda_graph).__name__}")
    if cuda_graph and not noise.is_cuda:
        raise ValueError(f"cuda_graph=True needs noise on a CUDA device, got {noise.device}")
    if cuda_graph and is_replicated(model):
        raise ValueError("cuda_graph=True needs a model on one device: a graph cannot span several")
    if cuda_graph and is_int(solver.window):
        raise ValueError("cuda_graph=True needs a solver without a window of so many steps: a graph evaluates all")


def check_auto(max_iterations: int | None, cuda_graph: bool, steps: int) -> None:
    """Refuse with solver="auto" what one of the solvers that it may choose cannot keep to."""
    if max_iterations is not None and max_iterations < steps:
        raise ValueError(
            f"max_iterations must be None or at least {steps} with solver='auto', which may choose the sequential "
            f"chain of {steps} iterations, got {max_iterations}"
        )
    if cuda_graph:
        raise ValueError(
            "cuda_graph=True needs a solver without a window of so many steps; solver='auto' may choose one"
        )


def check_guess(guess: Tensor | None, noise: Tensor, steps: int) -> None:
    """Finite states (S+1, B, *shape) where the noise (B, *shape) is."""
    if guess is None:
        return
    _check_states("guess", guess)
    _check_fits("guess", guess, steps + 1, noise)
    check_finite("guess", guess[1:])


def check_step_noise(
    step_noise: Tensor | None, generator: torch.Generator | None, noise: Tensor, steps: int, eta: float
) -> None:
    """Where steps draw noise at all: (S, B, *shape) where the noise (B, *shape) is, or a generator of it."""
    check_generator(generator)
    if step_noise is None:
        return
    _check_states("step_noise", step_noise)
    if eta == 0:
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
