"""`invert(method="optimize")`: the noise whose sample has a small loss, by gradients through the chain."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .engine.solution import ConvergenceWarning, Solution
from .engine.trajectory import normal
from .gradients.methods import check_table, named
from .gradients.pullback import Gradient, Pullback
from .problem import Problem
from .support.checks import check_callable, check_finite, check_generator, check_number

OPTIMIZER_STEPS = 100
Loss = Callable[[Tensor, Tensor], Tensor]


def squared_distance(value: Tensor, sample: Tensor) -> Tensor:
    """|value - sample|^2 (B,), the objective of DEQ-DDIM (arXiv 2210.12867)."""
    return (value - sample).flatten(1).square().sum(1)


def adam(parameters: list[Tensor]) -> torch.optim.Optimizer:
    """Adam with a step of 0.2."""
    return torch.optim.Adam(parameters, lr=0.2)


@dataclass(frozen=True, eq=False)
class Optimize:
    """What `invert` minimises, and how: `invert(..., method=Optimize(...))`; "optimize" is all defaults.

    Args:
        loss: (value (B, *shape), sample (B, *shape)) -> (B,), or a scalar for the whole batch; differentiable. Masks,
            features and priors go in here. Per-sample losses let each sample keep its own best noise.
        optimizer: Makes a torch optimizer from a list of tensors; called with a closure, so that L-BFGS works too.
        gradient: As in `sample`. "residual", DEQ-DDIM's, takes no derivative of the model: not the gradient, but where
            tried the cheapest way down (docs/inversion.md).
        noise: (B, *shape), where to start; standard normal if None, drawn from `generator`.
        generator: Of that noise; torch's global one if None.
        stop: End when every loss is at most this.

    Raises:
        TypeError: An argument is of another type.
        ValueError: gradient is None, or stop is NaN.

    Example:
        >>> left = (torch.arange(8) < 4).float()
        >>> def masked(value, sample):
        ...     return ((value - sample) * left).flatten(1).square().sum(1)
        >>> search = deqkern.Optimize(loss=masked, stop=0.1)
        >>> model, schedule = lambda x, t: 0.5 * x, deqkern.NoiseSchedule.linear()
        >>> found = deqkern.invert(model, torch.randn(1, 1, 8, 8), schedule, 10, method=search, max_iterations=50)
        >>> found.history.shape[1]
        1

    Reference:
        Pokle, Geng, Kolter: Deep equilibrium approaches to diffusion models, arXiv 2210.12867, section 4.
    """

    loss: Loss = squared_distance
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] = adam
    gradient: str | Gradient = "residual"
    noise: Tensor | None = None
    generator: torch.Generator | None = None
    stop: float | None = None

    def __post_init__(self) -> None:
        for name in ("loss", "optimizer"):
            check_callable(name, getattr(self, name))
        if named(self.gradient) is None:
            raise ValueError("gradient must not be None: optimizing needs one")
        if self.noise is not None and not isinstance(self.noise, Tensor):
            raise TypeError(f"noise must be a tensor, got {type(self.noise).__name__}")
        check_generator(self.generator)
        if self.stop is not None:
            check_number("stop", self.stop)
            if math.isnan(self.stop):
                raise ValueError("stop must not be NaN")

    def first(self, sample: Tensor) -> Tensor:  # (B, *shape) fp32 or fp64
        """The noise to start from."""
        if self.noise is not None:
            if self.noise.shape != sample.shape or self.noise.device != sample.device:
                raise ValueError(
                    f"noise must have shape {tuple(sample.shape)} on {sample.device}, "
                    f"got {tuple(self.noise.shape)} on {self.noise.device}"
                )
            check_finite("noise", self.noise)
            drawn = self.noise.detach()
        else:
            drawn = normal(sample, self.generator, torch.float32)
        return drawn.to(torch.promote_types(sample.dtype, torch.float32), copy=True)


@dataclass
class _Best:
    """The best noise of each sample so far, and what its solve said."""

    loss: Tensor  # (B,) float64
    states: Tensor  # (S+1, B, *shape)
    converged: Tensor
    error_estimate: Tensor
    residual: Tensor

    def take(self, loss: Tensor, found: Solution) -> None:
        better = loss < self.loss
        self.loss = torch.where(better, loss, self.loss)
        self.states[:, better] = found.trajectory[:, better]
        for name in ("converged", "error_estimate", "residual"):
            setattr(self, name, torch.where(better, getattr(found, name), getattr(self, name)))


class _Search:
    """The closure that the optimizer calls: sample, loss, gradient."""

    def __init__(self, problem: Problem, options: Optimize) -> None:
        gradient = named(options.gradient)
        assert gradient is not None and problem.network is not None
        check_table(gradient, problem.table)
        self.problem, self.sample, self.options = problem, problem.first, options
        self.pullback = Pullback(problem.network, gradient, problem.rtol, problem.max_batch)
        self.noise = options.first(problem.first)
        self.noise.requires_grad_()
        self.last: Solution | None = None
        self.best: _Best | None = None
        self.iterations, self.nfe = 0, torch.zeros(len(problem.first), dtype=torch.int64, device="cpu")
        self.history: list[Tensor] = []
        self.nfe_history: list[Tensor] = []

    @torch.no_grad()  # Optimizer.step calls its closure with gradients
    def __call__(self) -> float:
        """The loss at the noise as it is, with the gradient left in `noise.grad`."""
        noise = self.noise.detach()
        guess = None if self.last is None else self.last.trajectory
        self.last = found = replace(self.problem, first=noise, guess=guess).solve()
        with torch.enable_grad():
            value = found.value.detach().requires_grad_()
            losses = self._losses(value)
            total = losses.sum()
            if not total.requires_grad:
                raise ValueError("loss must be differentiable: what it returned does not depend on the value")
            (cotangent,) = torch.autograd.grad(total, value)
        pulled = self.pullback(found.trajectory, cotangent)
        self.noise.grad = pulled.first
        self.iterations += found.iterations
        self.nfe += found.nfe + pulled.vjps
        each = losses.detach().double().expand(len(noise))
        self.history.append(each)
        self.nfe_history.append(self.nfe.clone())
        if self.best is None:
            self.best = _Best(
                torch.full_like(each, torch.inf),
                found.trajectory,
                found.converged,
                found.error_estimate,
                found.residual,
            )
        self.best.take(each, found)
        return float(total.detach())

    def _losses(self, value: Tensor) -> Tensor:
        losses = self.options.loss(value, self.sample.to(value.dtype))
        if not isinstance(losses, Tensor):
            raise TypeError(f"loss must return a tensor, got {type(losses).__name__}")
        if losses.shape not in ((), (len(value),)):
            raise ValueError(f"loss must return a scalar or {(len(value),)}, got shape {tuple(losses.shape)}")
        if not self.history and not bool(losses.isfinite().all()):
            raise ValueError(f"loss must be finite, got {losses.detach().tolist()}")
        return losses

    @property
    def over(self) -> bool:
        """Whether every sample has a loss of `stop`, or a loss is not finite any more."""
        if not self.history:
            return False
        assert self.best is not None
        if not bool(self.history[-1].isfinite().all()):
            return True
        return self.options.stop is not None and bool((self.best.loss <= self.options.stop).all())


@torch.inference_mode(False)  # where no loss would have a gradient
def optimize(problem: Problem, options: Optimize) -> Solution:
    """See `invert`; the chain of the problem is that of `sample`. A solve starts from the states of the one before."""
    sample = problem.first.detach().clone()  # made in inference mode, it could not be differentiated with
    limit, callback = problem.max_iterations or OPTIMIZER_STEPS, problem.callback
    problem = replace(problem, first=sample, max_iterations=None, callback=None)
    search = _Search(problem, options)
    optimizer = options.optimizer([search.noise])
    if not callable(getattr(optimizer, "step", None)):
        raise TypeError(f"optimizer must return a torch optimizer, got {type(optimizer).__name__}")
    steps = 0
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of an inexact gradient on the way
        while steps < limit and not search.over:
            optimizer.step(search)
            steps += 1
            if callback is not None:
                callback(steps, search.noise.detach().to(sample.dtype, copy=True), search.history[-1].clone())
        if not search.over:
            search()  # the last step has not been looked at
    best = search.best
    assert best is not None
    reached = best.converged if options.stop is None else best.converged & (best.loss <= options.stop)
    return Solution(
        value=best.states[0].to(sample.dtype, copy=True),
        trajectory=best.states,
        converged=reached,
        error_estimate=best.error_estimate,
        residual=best.residual,
        iterations=search.iterations,
        nfe=search.nfe,
        history=torch.stack(search.history),
        nfe_history=torch.stack(search.nfe_history),
        residual_history=best.loss.new_full((len(search.history), len(best.states) - 1, len(sample)), torch.nan),
        message=f"loss {float(best.loss.median()):.3g} (median), {float(best.loss.max()):.3g} (largest) after "
        f"{steps} steps of the optimizer; {int(reached.sum())} of {len(sample)} samples converged "
        f"(rtol {problem.rtol:g})",
    )
