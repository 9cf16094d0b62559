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
from .engine.loop import solve
from .engine.solution import Callback, Solution, relative_error, warn_unless_converged
from .engine.trajectory import start
from .gradients.methods import check_table, named
from .gradients.pullback import Gradient, Pullback
from .network.model import Model, Network, arguments_of
from .optimization import Optimize, optimize
from .problem import check_arguments, check_cuda_graph
from .solvers.presets import Solver, default, sequential
from .solvers.slopes import Secant
from .support.checks import check_not_empty

METHODS = ("joint", "stepwise", "naive", "optimize")
# Iterations of the joint solve, and of one step of the stepwise one, after which a sample is given up.
JOINT_LIMIT, STEP_LIMIT = 40, 20
OPTIMIZER_STEPS = 100
# Values of a sample that are larger are not what a model was trained on.
LARGEST_VALUE = 16.0
# Ratio of noise to signal at the clean end of the chain.
SIGMA_MIN = 0.08


def invert(
    model: Model,
    sample: Tensor,  # (B, *shape)
    schedule: NoiseSchedule,
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

    x[S] is known, and every step is solved for its start: x[i] = (x[i+1] - b[i] out(x[i])) / a[i]. `value` of the
    result is x[0], `trajectory` the chain as `sample` would run it.

    model, schedule, num_inference_steps, model_kwargs, max_batch: as in `sample`, and they must be the same when the
        noise is turned back into a sample. So must `sigma_min`. cuda_graph: as in `sample`; of the joint solve.
    sample: (B, *shape) fp32, bf16, fp16 or fp64, as the noise of `sample`.
    method: "joint" solves all steps at once, like `sample`; what it leaves unconverged goes on stepwise. "stepwise"
        solves one step after the other by a fixed point each: fewest evaluations, most sequential calls. "naive" takes
        out(x[i+1]) for out(x[i]), without iterating (arXiv 2010.02502, section 4.3): fast, and wrong by percents.
        "optimize", or an `Optimize`, looks for the noise whose sample has the smallest loss, by default the squared
        distance to `sample`; the result holds the best noise, its `history` the losses (evaluations, B), its `nfe`
        counts vector-Jacobian products too. It works for schedules that clip as well.
    solver: of the joint solve, and of those in the search; `deqkern.solvers.default(window=None)` if None. With a
        window, fewer evaluations in more calls.
    rtol: relative 2-norm of the error that is left in each state, as estimated; if None 1e-4, in the search 1e-2.
    max_iterations: at most so many, of all steps together; if None 40 (joint; with a window, for each that the steps
        fill) or 20 per step (stepwise). Of the search, steps of the optimizer, 100 if None.
    sigma_min: the chain ends at this noise-to-signal ratio, where the sample is taken to be, instead of the schedule's
        own end: the last steps to sigma = 0 lose what inversion would need. None keeps the schedule's end.
    gradient: None, "implicit", "phantom", "residual", or an `Implicit` or `Phantom` of `deqkern.gradients`: makes
        `value` differentiable by the sample, tensors in `model_kwargs` and parameters; with "joint" or "stepwise".
    round_trip: also run the chain forward from `value`, step by step (S more calls): `Solution.round_trip`. It includes
        the rounding of a `value` in half precision; `trajectory[0]` is the noise before that.
    callback: called with (iteration, noise_estimate (B, *shape), error_estimate (B,)) after each iteration; the
        estimate is NaN if naive.

    Raises ValueError or TypeError for an argument that does not fit, and for a schedule that clips or thresholds: what
    is cut off cannot be found again. Warns if a value of the sample is larger than 16. A sample that does not converge
    is reported in the `Solution` and by one `ConvergenceWarning`.
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
    solver = default(window=None) if solver is None else solver
    check_arguments(model, "sample", sample, schedule, solver, rtol, max_iterations, model_kwargs, max_batch, callback)
    check_cuda_graph(cuda_graph, model, sample, solver)
    if pulled is not None or round_trip or isinstance(method, Optimize):
        check_not_empty("sample", sample)
    largest = float(sample.detach().abs().amax()) if sample.numel() else 0.0
    if largest > LARGEST_VALUE:
        warnings.warn(
            f"sample has values up to {largest:.3g}: models expect data of about unit size, such as pixels in -1 .. 1",
            stacklevel=2,
        )
    kwargs = arguments_of(model, model_kwargs)
    if isinstance(method, Optimize):
        limit = max_iterations or OPTIMIZER_STEPS
        found = optimize(
            *(model, sample.detach(), schedule, num_inference_steps, method, solver, rtol, limit),
            *(sigma_min, kwargs, max_batch, callback),
        )
    else:
        table = schedule.steps(num_inference_steps, sigma_min=sigma_min).reversed()
        check_table(pulled, table)
        with torch.no_grad():
            found = _undo(
                *(model, sample, table, method, solver, rtol, max_iterations),
                *(kwargs, max_batch, cuda_graph, callback),
            )
        if pulled is not None:
            network = Network(model, table, kwargs, sample)
            value = Pullback(network, pulled, rtol, max_batch).attach(found.value, found.trajectory, sample)
            found = replace(found, value=value)
        found = replace(found, trajectory=found.trajectory.flip(0), residual_history=found.residual_history.flip(1))
    if round_trip:
        again = sampling.sample(
            model,
            found.value,
            schedule,
            num_inference_steps,
            solver=sequential(),
            rtol=0.0,
            model_kwargs=kwargs,
            max_batch=max_batch,
            sigma_min=sigma_min,
        ).value
        found = replace(found, round_trip=relative_error(again, sample.detach()))
    if method != "naive":
        warn_unless_converged(found)
    return found


def _undo(
    model: Model,
    sample: Tensor,  # (B, *shape)
    table: StepTable,  # reversed
    method: str,
    solver: Solver,
    rtol: float,
    max_iterations: int | None,
    model_kwargs: Mapping[str, Any],
    max_batch: int | None,
    cuda_graph: bool,
    callback: Callback | None,
) -> Solution:
    """The chain from the sample to its noise, in that order."""

    def run(chosen: Tensor, table: StepTable, solver: Solver, limit: int, **options: Any) -> Solution:
        """Solve for the samples `chosen` (n,)."""
        of_all = _Chosen(Network(model, table, model_kwargs, sample), chosen)
        trajectory = start(of_all, sample[chosen], table, solver, max_batch=max_batch)
        return solve(trajectory, solver, max_iterations=limit, dtype=sample.dtype, **options)

    every, steps = torch.arange(len(sample), device=sample.device), len(table.a)
    if method == "naive":  # the same coefficients, as if the steps were explicit
        follow = callback and _without_estimate(callback)
        found = run(every, replace(table, implicit=False), sequential(), steps, rtol=0.0, callback=follow)
        unknown, history, residuals = (
            torch.full_like(v, torch.nan) for v in (found.error_estimate, found.history, found.residual_history)
        )
        message = f"naive inversion in {steps} steps: its error is not known"
        return replace(
            found,
            converged=unknown > 0,
            error_estimate=unknown,
            residual=unknown,
            history=history,
            residual_history=residuals,
            message=message,
        )
    if method == "stepwise":
        limit, patience = (STEP_LIMIT * steps, STEP_LIMIT) if max_iterations is None else (max_iterations, None)
        return run(every, table, stepwise(), limit, patience=patience, rtol=rtol, callback=callback)
    limit = max_iterations or JOINT_LIMIT * math.ceil(steps / solver.width(steps))
    found = run(every, table, solver, limit, rtol=rtol, callback=callback, cuda_graph=cuda_graph)
    left = (~found.converged).nonzero().flatten()
    if len(left) and max_iterations is None:
        follow = callback and _continued(callback, found, left)
        options = {"patience": STEP_LIMIT, "rtol": rtol, "callback": follow}
        found = _merge(found, run(left, table, stepwise(), STEP_LIMIT * steps, **options), left)
    return found


class _Chosen:
    """The network of a batch, for the samples `chosen` (n,) of it."""

    def __init__(self, network: Network, chosen: Tensor) -> None:
        self.network, self.chosen, self.what, self.dtype = network, chosen, network.what, network.dtype

    @property
    def precision(self) -> float:
        return self.network.precision

    def __call__(self, states: Tensor, steps: Tensor, samples: Tensor) -> Tensor:
        return self.network(states, steps, self.chosen[samples])


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
        message=f"{joint.message}; {len(left)} of the samples went on step by step: {again.message}",
    )
