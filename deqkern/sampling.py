"""`sample`: the sampling chain of a diffusion model, solved for all its steps at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from .chain.schedule import NoiseSchedule
from .chain.step_table import StepTable
from .engine.loop import Solve
from .engine.solution import Callback, Solution, warn_unless_converged
from .gradients.methods import check_table, named
from .gradients.pullback import Gradient
from .network.model import Model
from .planning import planned
from .problem import Problem, check_auto, check_schedule
from .solvers.presets import Solver, default
from .support.checks import check_not_empty


def sample(
    model: Model,
    noise: Tensor,  # (B, *shape)
    schedule: NoiseSchedule | Any,
    num_inference_steps: int = 50,
    *,
    eta: float | None = None,
    order: int | None = None,
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
    """Sample from a diffusion model: the chain of S steps as one fixed point.

    The result is the chain's own, to a relative error of about `rtol`. All states are evaluated in one batch per
    iteration, instead of one after the other.

    Args:
        model: `model(x, t, **model_kwargs)` with x (N, *shape) and t (N,), N up to S * B, returns a tensor like x, or
            an object with `.sample`. It is called in the `dtype` that a module has, or that of its first parameter of
            16 bits or more; a plain function in the dtype of `noise`. The memory of x is used again after the call: a
            model that keeps x must copy it.
        noise: (B, *shape) fp32, bf16 or fp16: the noisy end of the chain, standard normal for most schedules. Any
            layout. With fp64 the states are fp64 too, and the ops run as plain torch.
        schedule: The noise levels of the model, see `NoiseSchedule`; or the scheduler of diffusers whose chain it is,
            one that `NoiseSchedule.from_diffusers` has the steps of.
        num_inference_steps: S, the steps of the chain.
        eta: 0 is DDIM, 1 is DDPM-like (arXiv 2010.02502, eq. 16). None: that of the schedule, 0 unless it was read from
            a scheduler whose steps draw noise.
        order: 1 is DDIM. 2 is DPM-Solver++ 2M (arXiv 2211.01095), whose S steps come closer to the solution of the
            ODE; with eta = 1 its SDE variant. Timesteps as in `NoiseSchedule.steps`. None: that of the schedule, 1
            unless it was read from a DPMSolverMultistepScheduler.
        solver: `deqkern.solvers.default()` if None, with a `guess` all steps at once. "auto" measures the model first,
            as `deqkern.plan` does, and takes the solver and the `max_batch` of that plan, which is `Solution.plan`: the
            sequential chain where parallel sampling does not pay. Every call measures again, which may cost as much
            as three solves: in a loop, keep one plan and pass its `solver` and `max_batch`. The calls that measure do
            not count in `nfe`.
        rtol: Relative 2-norm of the error of each clean sample. 0 gives the sequential chain exactly, up to rounding
            and the effect of the batch size on the model. A model in half precision or under autocast ends at its own
            rounding if that is more, unless rtol is 0.
        max_iterations: At most this many; S if None, which always suffices.
        step_noise: (S, B, *shape), the noise of each step, where steps draw any; else drawn from `generator` in the
            order of the sequential chain.
        generator: Of the step noise; torch's global one if None.
        guess: (S+1, B, *shape), the states to start from, such as the `trajectory` of a solve with nearly the same
            noise; its first one is not looked at. The initial guess of the solver if None.
        model_kwargs: Further arguments of the model. Tensors in it whose first dimension is B are repeated for every
            step. Those that a `guided` model holds are added.
        max_batch: Rows in one model call, to limit memory; the result does not depend on it.
        sigma_min: End the chain at this noise-to-signal ratio instead of at the end of the schedule.
        cuda_graph: Launch the iterations as CUDA graphs, for a model whose kernels are short. The same result, and some
            evaluations more, since the rows of a graph stay until half of them have converged. Needs a GPU, and a
            window that is None or a share of the steps.
        gradient: None, "exact", "implicit", "phantom", "residual", "adjoint", or an object of `deqkern.gradients`:
            makes `value` differentiable by the noise, `step_noise`, tensors in `model_kwargs` and the parameters of the
            model; once, not twice. The gradient is that of the chain at the states found, so a small `rtol` matters for
            it. With order = 2 only "exact".
        callback: Called with (iteration, x0_estimate (B, *shape), error_estimate (B,)) after each iteration.

    Returns:
        The `Solution`. A sample that did not converge is reported in it, and by one `ConvergenceWarning`.

    Raises:
        TypeError: An argument is of another type, before the model is called.
        ValueError: An argument does not fit, before the model is called; or the model returns another shape, or NaN.

    Example:
        >>> schedule = deqkern.NoiseSchedule.linear()
        >>> model = lambda x, t: 0.5 * x
        >>> solution = deqkern.sample(model, torch.randn(2, 3, 8, 8), schedule, num_inference_steps=20)
        >>> solution.value.shape, solution.converged.tolist()
        (torch.Size([2, 3, 8, 8]), [True, True])

    Reference:
        Pokle, Geng, Kolter: Deep equilibrium approaches to diffusion models, arXiv 2210.12867.
    """
    auto, plan, method = isinstance(solver, str) and solver == "auto", None, named(gradient)
    if method is not None and isinstance(noise, Tensor):
        check_not_empty("noise", noise)

    def check(table: StepTable) -> None:
        check_table(method, table)
        if auto:
            check_auto(max_iterations, cuda_graph, len(table.a))

    # Where a guess tells something of all states, none of them waits.
    usual = default() if guess is None else default(window=None)
    schedule = check_schedule(schedule)
    problem = Problem.of_chain(
        model,
        noise,
        lambda: schedule.steps(num_inference_steps, eta=eta, sigma_min=sigma_min, order=order),
        name="noise",
        solver=usual if auto or solver is None else solver,  # type: ignore[arg-type]
        rtol=rtol,
        draws_noise=schedule.draws_noise(eta),
        max_iterations=max_iterations,
        max_batch=max_batch,
        model_kwargs=model_kwargs,
        step_noise=step_noise,
        generator=generator,
        guess=guess,
        cuda_graph=cuda_graph,
        callback=callback,
        check=check,
    )
    if auto:
        plan = planned(problem, "noise")
        problem = replace(problem, solver=plan.solver, max_batch=plan.max_batch)
    solution = replace(problem.solve(), plan=plan)
    warn_unless_converged(solution)
    return solution if method is None else problem.differentiable(solution, method)


def begin(
    noise: Tensor,  # (B, *shape)
    schedule: NoiseSchedule | Any,
    num_inference_steps: int = 50,
    *,
    eta: float | None = None,
    order: int | None = None,
    solver: Solver | None = None,
    rtol: float = 1e-2,
    max_iterations: int | None = None,
    step_noise: Tensor | None = None,  # (S, B, *shape)
    generator: torch.Generator | None = None,
    guess: Tensor | None = None,  # (S+1, B, *shape)
    max_batch: int | None = None,
    sigma_min: float | None = None,
) -> Solve:
    """Begin a solve like that of `sample` whose model you evaluate: behind a queue, in another process, by hand.

    Args:
        noise: (B, *shape) fp32, bf16, fp16 or fp64: the noisy end of the chain. The states are asked in its dtype.
        schedule: Of the model.
        num_inference_steps: S, the steps of the chain.
        eta: As in `sample`.
        order: As in `sample`.
        solver: As in `sample`, without "auto".
        rtol: As in `sample`.
        max_iterations: As in `sample`.
        step_noise: (S, B, *shape), as in `sample`.
        generator: As in `sample`.
        guess: (S+1, B, *shape), as in `sample`.
        max_batch: The rows of each part that `rows.split()` gives.
        sigma_min: As in `sample`.

    Returns:
        A `Solve`: while it is `open`, `ask()` for rows and `tell(outputs)` the model's outputs at them. Its
        `solution()` is that of `sample`, except that it gives no warning.

    Raises:
        TypeError, ValueError: An argument does not fit.

    Example:
        >>> model = lambda x, t: 0.5 * x
        >>> solve = deqkern.begin(torch.randn(2, 8), deqkern.NoiseSchedule.linear(), 20)
        >>> while solve.open:
        ...     rows = solve.ask()
        ...     solve.tell(model(rows.states, rows.timesteps))
        >>> solve.solution().converged.tolist()
        [True, True]

    """
    schedule = check_schedule(schedule)
    return Problem.of_chain(
        None,
        noise,
        lambda: schedule.steps(num_inference_steps, eta=eta, sigma_min=sigma_min, order=order),
        name="noise",
        solver=(default() if guess is None else default(window=None)) if solver is None else solver,
        rtol=rtol,
        draws_noise=schedule.draws_noise(eta),
        max_iterations=max_iterations,
        max_batch=max_batch,
        step_noise=step_noise,
        generator=generator,
        guess=guess,
        by_caller=True,
    ).begin()
