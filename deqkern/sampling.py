"""`sample`: the sampling chain of a diffusion model, solved for all its steps at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from .chain.schedule import NoiseSchedule
from .engine.loop import solve
from .engine.solution import Callback, Solution, warn_unless_converged
from .engine.trajectory import start
from .gradients.methods import check_table, named
from .gradients.pullback import Gradient, Pullback
from .network.model import Model, Network, arguments_of
from .planning import planned
from .problem import check_arguments, check_auto, check_cuda_graph, check_guess, check_step_noise
from .solvers.presets import Solver, default
from .support.checks import check_not_empty


def sample(
    model: Model,
    noise: Tensor,  # (B, *shape)
    schedule: NoiseSchedule,
    num_inference_steps: int = 50,
    *,
    eta: float = 0.0,
    order: int = 1,
    solver: Solver | Literal["auto"] | None = None,
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
    to rounding and the effect of the batch size on the model. All states are evaluated in one batch per iteration
    (arXiv 2210.12867).

    model: `model(x, t, **model_kwargs)` with x (N, *shape), t (N,), N up to S * B, returns a tensor like x, or an
        object with `.sample`. Called in the `dtype` that a module has, or that of its first parameter of 16 bits or
        more; a plain function in the dtype of `noise`. The
        memory of x is used again after the call: a model that keeps x must copy it.
    noise: (B, *shape) fp32, bf16 or fp16: the chain's noisy end, standard normal for most schedules. Any layout. With
        fp64 the states are fp64 too, and the ops run as plain torch.
    schedule: see `NoiseSchedule`. eta: 0 is DDIM, 1 is DDPM-like (arXiv 2010.02502, eq. 16).
    order: 1 is DDIM; 2 is DPM-Solver++ 2M (arXiv 2211.01095), whose S steps come closer to the ODE's solution; with
        eta = 1 its SDE variant. Timesteps as in `NoiseSchedule.steps`.
    solver: `deqkern.solvers.default()` if None, with a `guess` all steps at once. "auto" measures the model first,
        as `deqkern.plan` does, and takes the solver and the `max_batch` of that plan, which is `Solution.plan`: the
        sequential chain where parallel does not pay. Every call measures again, which may cost as much as three
        solves: in a loop, keep the plan of one and pass its `solver` and `max_batch`. The calls that measure do not
        count in `nfe`.
    rtol: relative 2-norm of the error of each clean sample. A model in half precision or under autocast ends at its own
        rounding if that is more, unless rtol is 0.
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
        evaluations more, since the rows of a graph stay until half of them have settled. Needs a GPU, and a window that
        is None or a share of the steps, whose rows a graph evaluates all the same.
    gradient: None, "exact", "implicit", "phantom", "residual", "adjoint", or an object of `deqkern.gradients`: makes
        `value` differentiable by the noise, `step_noise`, tensors in `model_kwargs` and the model's parameters; once,
        not twice. The gradient is the chain's at the states found, so a small `rtol` matters for it. With order = 2
        only "exact".
    callback: called with (iteration, x0_estimate (B, *shape), error_estimate (B,)) after each iteration.

    Raises ValueError or TypeError, before the model is called, for an argument that does not fit; ValueError if the
    model returns another shape, or NaN. A sample that does not converge is reported in the `Solution` and by one
    `ConvergenceWarning`.
    """
    auto = isinstance(solver, str) and solver == "auto"
    chosen: Any = solver
    if solver is None or auto:  # where a guess tells something of all states, none of them waits
        chosen = default() if guess is None else default(window=None)
    check_arguments(model, "noise", noise, schedule, chosen, rtol, max_iterations, model_kwargs, max_batch, callback)
    check_cuda_graph(cuda_graph, model, noise, chosen)
    method = named(gradient)
    if method is not None:
        check_not_empty("noise", noise)
    table = schedule.steps(num_inference_steps, eta=eta, sigma_min=sigma_min, order=order)
    check_table(method, table)
    check_step_noise(step_noise, generator, noise, len(table.a), eta)
    check_guess(guess, noise, len(table.a))
    arguments, found = arguments_of(model, model_kwargs), None
    if auto:
        check_auto(max_iterations, cuda_graph, len(table.a))
        found = planned(Network(model, table, arguments, noise), "noise", noise, eta, rtol, max_batch)
        chosen, max_batch = found.solver, found.max_batch
    network = Network(model, table, arguments, noise)
    with torch.no_grad():
        trajectory = start(
            network,
            noise,
            table,
            chosen,
            guess=guess,
            step_noise=step_noise,
            generator=generator,
            max_batch=max_batch,
        )
        solution = solve(
            trajectory,
            chosen,
            rtol=rtol,
            max_iterations=max_iterations,
            callback=callback,
            dtype=noise.dtype,
            cuda_graph=cuda_graph,
        )
    solution = replace(solution, plan=found)
    warn_unless_converged(solution)
    if method is not None:
        pullback = Pullback(network, method, rtol, max_batch)
        value = pullback.attach(solution.value, solution.trajectory, noise, step_noise)
        solution = replace(solution, value=value)
    return solution
