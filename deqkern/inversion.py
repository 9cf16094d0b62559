"""`invert`: the noise that a diffusion model's sampling chain turns into a given sample."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import sampling
from .chain.schedule import NoiseSchedule, StepTable
from .engine.loop import begin, run
from .engine.solution import Callback, Solution, relative_error, warn_unless_converged
from .engine.trajectory import Traits
from .gradients.methods import check_table, named
from .gradients.pullback import Gradient
from .network.model import Model
from .optimization import Optimize, optimize
from .problem import Problem, check_schedule
from .solvers.presets import Solver, default, sequential
from .solvers.slopes import Secant
from .support.checks import check_not_empty

METHODS = ("joint", "stepwise", "naive", "optimize")
# Iterations of the joint solve, and of one step of the stepwise one, after which a sample is given up.
JOINT_LIMIT, STEP_LIMIT = 40, 20
# Values of a sample that are larger are not what a model was trained on.
LARGEST_VALUE = 16.0
# Ratio of noise to signal at the clean end of the chain.
SIGMA_MIN = 0.08


def invert(
    model: Model,
    sample: Tensor,  # (B, *shape)
    schedule: NoiseSchedule | Any,
    num_inference_steps: int = 50,
    *,
    method: str | Optimize = "joint",
    solver: Solver | None = None,
    rtol: float | None = None,
    max_iterations: int | None = None,
    sigma_min: float | None = SIGMA_MIN,
    model_kwargs: Mapping[str, Any] | None = None,
    max_batch: int | None = None,
    cuda_graph: bool = False,
    gradient: str | Gradient | None = None,
    round_trip: bool = False,
    callback: Callback | None = None,
) -> Solution:
    """Find the noise from which `sample(..., eta=0)` makes `sample`: the deterministic chain, solved backwards.

    x[S] is known, and every step is solved for its start: x[i] = (x[i+1] - b[i] out(x[i])) / a[i].

    Args:
        model: As in `deqkern.sample`. It, the schedule, the steps, `sigma_min` and `model_kwargs` must be the same when
            the noise is turned back into a sample.
        sample: (B, *shape) fp32, bf16, fp16 or fp64, as the noise of `deqkern.sample`.
        schedule: Of the model, as in `deqkern.sample`. One that clips or thresholds is refused, except by a search:
            what is cut off cannot be found again. One whose steps draw noise or are of order 2: take its `as_ddim()`.
        num_inference_steps: S, the steps of the chain.
        method: "joint" solves all steps at once; what it leaves unconverged continues stepwise. "stepwise" solves one
            step after the other by a fixed point each: fewest evaluations, most sequential calls. "naive" takes
            out(x[i+1]) for out(x[i]) without iterating (arXiv 2010.02502, section 4.3): fast, and wrong by percents.
            "optimize", or an `Optimize`, searches for the noise whose sample has the smallest loss, by default the
            squared distance to `sample`: the result holds the best noise, its `history` the losses (evaluations, B),
            and its `nfe` counts vector-Jacobian products too.
        solver: Of the joint solve, and of those in the search; `deqkern.solvers.default(window=None)` if None. With a
            window, fewer evaluations in more calls.
        rtol: Relative 2-norm of the error that is left in each state, as estimated; if None 1e-4, in the search 1e-2.
        max_iterations: At most this many, of all steps together. If None 40 (joint; with a window, for each window that
            the steps fill) or 20 per step (stepwise). Of the search, steps of the optimizer, 100 if None.
        sigma_min: The chain ends at this noise-to-signal ratio, where the sample is taken to be, instead of at the end
            of the schedule: the last steps to sigma = 0 lose what inversion would need. None keeps that end.
        model_kwargs: As in `deqkern.sample`.
        max_batch: As in `deqkern.sample`.
        cuda_graph: As in `deqkern.sample`; of the joint solve.
        gradient: None, "implicit", "phantom", "residual", or an `Implicit` or `Phantom` of `deqkern.gradients`: makes
            `value` differentiable by the sample, tensors in `model_kwargs` and parameters; with "joint" or "stepwise".
        round_trip: Also run the chain forward from `value`, step by step (S more calls), for `Solution.round_trip`. It
            includes the rounding of a `value` in half precision; `trajectory[0]` is the noise before that.
        callback: Called with (iteration, noise_estimate (B, *shape), error_estimate (B,)) after each iteration; the
            estimate is NaN if naive.

    Returns:
        The `Solution`: `value` is x[0], `trajectory` the chain as `deqkern.sample` would run it. A sample that did not
        converge is reported in it, and by one `ConvergenceWarning`. A sample with values above 16 gets a warning.

    Raises:
        TypeError: An argument is of another type, before the model is called.
        ValueError: An argument does not fit, before the model is called; or the model returns another shape, or NaN.

    Example:
        >>> schedule = deqkern.NoiseSchedule.linear()
        >>> model = lambda x, t: 0.5 * x
        >>> found = deqkern.invert(model, torch.randn(2, 3, 8, 8), schedule, 20, round_trip=True)
        >>> bool((found.round_trip < 1e-3).all())
        True

    Reference:
        Pokle, Geng, Kolter: Deep equilibrium approaches to diffusion models, arXiv 2210.12867.
    """
    if method == "optimize":
        method = Optimize()
    if not isinstance(method, Optimize) and method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))} or an Optimize, got {method!r}")
    if solver is not None and method in ("stepwise", "naive"):
        raise ValueError(f"solver is for method='joint' or 'optimize', got method={method!r}")
    if rtol is None:
        rtol = 1e-2 if isinstance(method, Optimize) else 1e-4
    pulled = named(gradient, ("implicit", "phantom", "residual"))
    if pulled is not None and method not in ("joint", "stepwise"):
        raise ValueError(f"gradient={gradient!r} is for method='joint' or 'stepwise', got method={method!r}")
    if cuda_graph is True and method != "joint":
        raise ValueError(f"cuda_graph=True is for method='joint', got method={method!r}")
    if not isinstance(round_trip, bool):
        raise TypeError(f"round_trip must be a bool, got {type(round_trip).__name__}")
    if isinstance(sample, Tensor) and (pulled is not None or round_trip or isinstance(method, Optimize)):
        check_not_empty("sample", sample)

    schedule = check_schedule(schedule)
    if schedule.draws_noise():
        raise ValueError(
            "schedule is of a chain whose steps draw noise, which cannot be undone: invert the DDIM chain of its noise "
            "levels, schedule.as_ddim(), and sample that"
        )

    def make_table() -> StepTable:
        table = schedule.steps(num_inference_steps, sigma_min=sigma_min)
        return table if isinstance(method, Optimize) else table.reversed()

    problem = Problem.of_chain(
        model,
        sample,
        make_table,
        name="sample",
        solver=default(window=None) if solver is None else solver,
        rtol=rtol,
        max_iterations=max_iterations,
        max_batch=max_batch,
        model_kwargs=model_kwargs,
        cuda_graph=cuda_graph,
        callback=callback,
        check=lambda table: check_table(pulled, table),
    )
    _warn_of_large_values(sample)
    if isinstance(method, Optimize):
        found = optimize(problem, method)
    else:
        found = _undo(problem, method)
        if pulled is not None:
            found = problem.differentiable(found, pulled)
        found = replace(found, trajectory=found.trajectory.flip(0), residual_history=found.residual_history.flip(1))
    if round_trip:
        again = sampling.sample(
            model,
            found.value,
            schedule,
            num_inference_steps,
            solver=sequential(),
            rtol=0.0,
            model_kwargs=model_kwargs,
            max_batch=max_batch,
            sigma_min=sigma_min,
        ).value
        found = replace(found, round_trip=relative_error(again, sample.detach()))
    if method != "naive":
        warn_unless_converged(found)
    return found


def _warn_of_large_values(sample: Tensor) -> None:
    largest = float(sample.detach().abs().amax()) if sample.numel() else 0.0
    if largest > LARGEST_VALUE:
        warnings.warn(
            f"sample has values up to {largest:.3g}: models expect data of about unit size, such as pixels in -1 .. 1",
            stacklevel=3,
        )


@torch.no_grad()
def _undo(problem: Problem, method: str) -> Solution:
    """The chain from the sample to its noise, in that order."""
    steps, limit, callback = len(problem.table.a), problem.max_iterations, problem.callback
    if method == "naive":
        return _naive(problem)
    if method == "stepwise":
        given_up = STEP_LIMIT if limit is None else None
        return _solved(problem, stepwise(), limit or STEP_LIMIT * steps, patience=given_up, callback=callback)
    most = limit or JOINT_LIMIT * math.ceil(steps / problem.solver.width(steps))
    found = _solved(problem, problem.solver, most, callback=callback, cuda_graph=problem.cuda_graph)
    left = (~found.converged).nonzero().flatten()
    if len(left) and limit is None:
        follow = callback and _continued(callback, found, left)
        again = _solved(problem, stepwise(), STEP_LIMIT * steps, patience=STEP_LIMIT, callback=follow, chosen=left)
        found = _merge(found, again, left)
    return found


def _naive(problem: Problem) -> Solution:
    """The same coefficients, as if the steps were explicit: the output at the end of a step stands for its start."""
    explicit = replace(problem, table=replace(problem.table, implicit=False), rtol=0.0)
    callback, steps = problem.callback, len(problem.table.a)
    found = _solved(explicit, sequential(), steps, callback=callback and _without_estimate(callback))
    unknown, history, residuals = (
        torch.full_like(v, torch.nan) for v in (found.error_estimate, found.history, found.residual_history)
    )
    return replace(
        found,
        converged=unknown > 0,
        error_estimate=unknown,
        residual=unknown,
        history=history,
        residual_history=residuals,
        message=f"naive inversion in {steps} steps: its error is not known",
    )


def _solved(
    problem: Problem,
    solver: Solver,
    limit: int,
    *,
    callback: Callback | None,
    patience: int | None = None,
    cuda_graph: bool = False,
    chosen: Tensor | None = None,  # (n,) int64, the samples of the batch; None for all
) -> Solution:
    """The solution of the problem by `solver` in at most `limit` iterations."""
    network = problem.network
    assert network is not None
    first = problem.first if chosen is None else problem.first[chosen]
    traits = Traits(dtype=network.dtype, precision=network.precision, max_batch=problem.max_batch)
    solve = begin(
        first,
        problem.table,
        solver,
        traits,
        rtol=problem.rtol,
        max_iterations=limit,
        patience=patience,
        cuda_graph=cuda_graph,
    )
    if chosen is None:
        return run(solve, network, callback)
    return run(solve, lambda states, steps, samples: network(states, steps, chosen[samples]), callback)


def stepwise() -> Solver:
    """One step after the other, each by a fixed point with secant slopes."""
    return Solver(slope=Secant(), window=1, name="stepwise")


def _without_estimate(callback: Callback) -> Callback:
    return lambda iteration, value, estimate: callback(iteration, value, torch.full_like(estimate, torch.nan))


def _continued(callback: Callback, joint: Solution, left: Tensor) -> Callback:
    """`callback` for the iterations on the samples `left` (n,) that come after those of `joint`."""

    def follow(iteration: int, value: Tensor, estimate: Tensor) -> None:
        values, estimates = joint.value.clone(), joint.error_estimate.clone()
        values[left], estimates[left] = value, estimate
        callback(joint.iterations + iteration, values, estimates)

    return follow


def _merge(joint: Solution, again: Solution, left: Tensor) -> Solution:
    """`joint`, in its memory, with those of the samples `left` (n,) taken from `again` that it solved further.

    The iterations of `again` came after those of `joint`.
    """
    taken = again.converged | (again.error_estimate < joint.error_estimate[left])
    better = left[taken]
    for name in ("value", "converged", "error_estimate", "residual"):
        getattr(joint, name)[better] = getattr(again, name)[taken]
    joint.trajectory[:, better] = again.trajectory[:, taken]
    joint.nfe[left.cpu()] += again.nfe
    later, later_nfe = (v[-1].repeat(len(again.history), 1) for v in (joint.history, joint.nfe_history))
    later[:, left] = again.history
    later_nfe[:, left.cpu()] += again.nfe_history
    residuals = joint.residual_history.new_full((len(later), *joint.residual_history.shape[1:]), torch.nan)
    residuals[:, :, left] = again.residual_history
    return replace(
        joint,
        iterations=joint.iterations + again.iterations,
        history=torch.cat([joint.history, later]),
        nfe_history=torch.cat([joint.nfe_history, later_nfe]),
        residual_history=torch.cat([joint.residual_history, residuals]),
        message=f"{joint.message}; {len(left)} of the samples continued step by step: {again.message}",
    )
