"""`sample`: the sampling chain of a diffusion model, solved for all its steps at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import gradients
from .gradients import Gradient
from .network import Model, Network, arguments_of
from .schedule import NoiseSchedule
from .solve import Callback, Solution, solve, warn_unless_converged
from .solvers import Solver, default
from .trajectory import start

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def sample(
    model: Model,
    noise: Tensor,  # (B, *shape)
    schedule: NoiseSchedule,
    num_inference_steps: int = 50,
    *,
    eta: float = 0.0,
    order: int = 1,
    solver: Solver | None = None,
    rtol: float = 1e-2,
    max_iterations: int | None = None,
    step_noise: Tensor | None = None,  # (S, B, *shape)
    generator: torch.Generator | None = None,
    guess: Tensor | None = None,  # (S+1, B, *shape)
    model_kwargs: Mapping[str, Any] | None = None,
    max_batch: int | None = None,
    sigma_min: float | None = None,
    cuda_graph: bool = False,
    gradient: str | Gradient | None = None,
    callback: Callback | None = None,
) -> Solution:
    """Sample from a diffusion model: the chain of `num_inference_steps` = S steps as one fixed point.

    The result is the chain's own, to a relative error of about `rtol`; rtol = 0 gives the sequential chain exactly, up
    to the effect of the batch size on the model. All states are evaluated in one batch per iteration
    (arXiv 2210.12867).

    model: `model(x, t, **model_kwargs)` with x (N, *shape), t (N,), N up to S * B, returns a tensor like x, or an
        object with `.sample`. Called in the dtype of its first parameter; a plain function in the dtype of `noise`.
    noise: (B, *shape) fp32, bf16 or fp16: the chain's noisy end, standard normal for most schedules. Any layout. With
        fp64 the states are fp64 too, and the ops run as plain torch.
    schedule: see `NoiseSchedule`. eta: 0 is DDIM, 1 is DDPM-like (arXiv 2010.02502, eq. 16).
    order: 1 is DDIM; 2 is DPM-Solver++ 2M (arXiv 2211.01095), whose S steps come closer to the ODE's solution; with
        eta = 1 its SDE variant. Timesteps as in `NoiseSchedule.steps`.
    solver: `deqkern.solvers.default()` if None. rtol: relative 2-norm of the error of each clean sample.
    max_iterations: at most so many; S if None, which is always enough.
    step_noise: (S, B, *shape), the noise of each step, eta > 0 only; else drawn from `generator` in the order of the
        sequential chain.
    guess: the states to start from, such as the `trajectory` of a solve with nearly the same noise; its first one is
        not looked at. The solver's own guess if None.
    model_kwargs: tensors in it whose first dimension is B are repeated for every step. Those that a `guided` model
        holds are added.
    max_batch: rows in one model call, to limit memory; the result does not depend on it.
    sigma_min: end the chain at this noise-to-signal ratio instead of the schedule's own end.
    cuda_graph: launch the iterations as CUDA graphs, for a model whose kernels are short; the same result, and some
        evaluations more, since the rows of a graph stay until half of them have settled. Needs a GPU and no window.
    gradient: None, "exact", "implicit", "phantom", "residual", "adjoint", or an object of `deqkern.gradients`: makes
        `value` differentiable by the noise, `step_noise`, tensors in `model_kwargs` and the model's parameters; once,
        not twice. The gradient is the chain's at the states found, so a small `rtol` matters for it. With order = 2
        only "exact".
    callback: called with (iteration, x0_estimate (B, *shape), error_estimate (B,)) after each iteration.

    Raises ValueError or TypeError, before the model is called, for an argument that does not fit; ValueError if the
    model returns another shape, or NaN. A sample that does not converge is reported in the `Solution` and by one
    `ConvergenceWarning`.
    """
    solver = default() if solver is None else solver
    check_arguments(model, "noise", noise, schedule, solver, rtol, max_iterations, model_kwargs, max_batch, callback)
    check_cuda_graph(cuda_graph, noise, solver)
    method = gradients.named(gradient)
    table = schedule.steps(num_inference_steps, eta=eta, sigma_min=sigma_min, order=order)
    if order == 2 and not isinstance(method, gradients.Exact | None):
        raise ValueError(f"gradient must be None or 'exact' with order=2, got {gradient!r}")
    if isinstance(method, gradients.Adjoint) and table.clips:
        raise ValueError("schedule clips or thresholds x0: gradient='adjoint' needs one that does not")
    _check_step_noise(step_noise, generator, noise, len(table.a), eta)
    _check_guess(guess, noise, len(table.a))
    network = Network(model, table, arguments_of(model, model_kwargs), noise)
    with torch.no_grad():
        trajectory = start(
            network,
            noise,
            table,
            solver,
            guess=guess,
            step_noise=step_noise,
            generator=generator,
            max_batch=max_batch,
        )
        solution = solve(
            trajectory,
            solver,
            rtol=rtol,
            max_iterations=max_iterations,
            callback=callback,
            dtype=noise.dtype,
            cuda_graph=cuda_graph,
        )
    warn_unless_converged(solution)
    if method is not None:
        value = gradients.attach(
            solution.value, network, solution.trajectory, noise, step_noise, method, rtol, max_batch
        )
        solution = replace(solution, value=value)
    return solution


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
    callback: Callback | None,
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
    if not callable(model):
        raise TypeError(f"model must be callable, got {type(model).__name__}")
    if model_kwargs is not None and not isinstance(model_kwargs, Mapping):
        raise TypeError(f"model_kwargs must be a mapping, got {type(model_kwargs).__name__}")
    if not isinstance(first, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(first).__name__}")
    if first.dtype not in _DTYPES:
        raise TypeError(f"{name} must be fp32, bf16, fp16 or fp64, got {first.dtype}")
    if first.ndim < 2 or math.prod(first.shape[1:]) == 0:
        raise ValueError(f"{name} must have shape (B, *shape) with a non-empty sample shape, got {tuple(first.shape)}")
    if not isinstance(solver, Solver):
        raise TypeError(f"solver must be a Solver, got {type(solver).__name__}")
    if not bool(first.isfinite().all()):
        raise ValueError(f"{name} must be finite")
    check_options(rtol, max_iterations, max_batch)
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be callable, got {type(callback).__name__}")


def check_options(rtol: float, max_iterations: int | None, max_batch: int | None) -> None:
    """Refuse what no solve can stop at or keep to."""
    if not isinstance(rtol, (int, float)):
        raise TypeError(f"rtol must be a number, got {type(rtol).__name__}")
    if not 0 <= rtol < math.inf:
        raise ValueError(f"rtol must be finite and >= 0, got {rtol}")
    for option, value in (("max_iterations", max_iterations), ("max_batch", max_batch)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{option} must be None or an int >= 1, got {value!r}")


def check_cuda_graph(cuda_graph: bool, noise: Tensor, solver: Solver) -> None:
    """Refuse `cuda_graph` where nothing can be captured."""
    if not isinstance(cuda_graph, bool):
        raise TypeError(f"cuda_graph must be a bool, got {type(cuda_graph).__name__}")
    if cuda_graph and not noise.is_cuda:
        raise ValueError(f"cuda_graph=True needs noise on a CUDA device, got {noise.device}")
    if cuda_graph and solver.window is not None:
        raise ValueError("cuda_graph=True needs a solver without a window: the rows of a graph do not move")


def _check_guess(guess: Tensor | None, noise: Tensor, steps: int) -> None:
    if guess is None:
        return
    if not isinstance(guess, Tensor) or guess.dtype not in _DTYPES:
        raise TypeError("guess must be an fp32, bf16, fp16 or fp64 tensor")
    if guess.shape != (steps + 1, *noise.shape):
        raise ValueError(f"guess must have shape {(steps + 1, *noise.shape)}, got {tuple(guess.shape)}")
    if guess.device != noise.device:
        raise ValueError(f"guess is on {guess.device}, noise on {noise.device}")
    if not bool(guess.isfinite().all()):
        raise ValueError("guess must be finite")


def _check_step_noise(
    step_noise: Tensor | None, generator: torch.Generator | None, noise: Tensor, steps: int, eta: float
) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    if step_noise is None:
        return
    if not isinstance(step_noise, Tensor) or step_noise.dtype not in _DTYPES:
        raise TypeError("step_noise must be an fp32, bf16, fp16 or fp64 tensor")
    if eta == 0:
        raise ValueError("step_noise needs eta > 0: with eta = 0 no step draws noise")
    if step_noise.shape != (steps, *noise.shape):
        raise ValueError(f"step_noise must have shape {(steps, *noise.shape)}, got {tuple(step_noise.shape)}")
    if step_noise.device != noise.device:
        raise ValueError(f"step_noise is on {step_noise.device}, noise on {noise.device}")
