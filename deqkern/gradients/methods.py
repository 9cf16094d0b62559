"""Gradients through a solved chain, for its first state, its step noise, `model_kwargs` and the model's parameters.

One class per method. Its `pull_back` does the work, on a `LinearizedChain`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..chain.step_table import StepTable, check_order
from ..engine.solution import Solution
from ..solvers.presets import Solver, check_solver
from ..support.checks import check_callback, check_count, check_number, check_rtol
from .linearized import LinearizedChain, Pulled
from .pullback import Gradient
from .recurrences import adjoint_recurrence, exact_recurrence


@dataclass(frozen=True)
class Exact:
    """Step by step from the end, one vector-Jacobian product (VJP) of B rows each: S of them, the memory of one.

    Example:
        >>> noise = torch.randn(2, 4, requires_grad=True)
        >>> schedule = deqkern.NoiseSchedule.linear()
        >>> model = lambda x, t: 0.1 * x.tanh()
        >>> solution = deqkern.sample(model, noise, schedule, 10, gradient=deqkern.gradients.Exact())
        >>> solution.value.sum().backward()
        >>> noise.grad.shape
        torch.Size([2, 4])
    """

    def pull_back(self, chain: LinearizedChain, cotangent: Tensor) -> Pulled:
        """See `Gradient`."""
        return exact_recurrence(chain.table).pull_back(chain, cotangent)


@dataclass(frozen=True)
class Implicit:
    """The transposed chain solved for all steps at once, by the engine of `sample`: one batched VJP per iteration.

    The implicit function theorem at the solution. One more batched VJP gives the gradients of `model_kwargs` and
    parameters. A gradient that does not converge raises one `ConvergenceWarning`.

    Args:
        solver: `deqkern.solvers.default(window=None)` if None; of a fixed point, that of its solve.
        rtol: Relative error of the gradient of the first state; that of the solve if None.
        max_iterations: If None S, and at least 40; of a fixed point, that of its solve.
        callback: Called with the `Solution` of the transposed chain.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument is of another type.

    Example:
        >>> noise = torch.randn(2, 4, requires_grad=True)
        >>> schedule = deqkern.NoiseSchedule.linear()
        >>> solves = []
        >>> gradient = deqkern.gradients.Implicit(rtol=1e-4, callback=solves.append)
        >>> model = lambda x, t: 0.1 * x.tanh()
        >>> solution = deqkern.sample(model, noise, schedule, 10, gradient=gradient)
        >>> solution.value.sum().backward()
        >>> solves[0].converged.tolist()
        [True, True]

    Reference:
        Bai, Kolter, Koltun: Deep equilibrium models, arXiv 1909.01377.
    """

    solver: Solver | None = None
    rtol: float | None = None
    max_iterations: int | None = None
    callback: Callable[[Solution], None] | None = None

    def __post_init__(self) -> None:
        if self.solver is not None:
            check_solver("solver", self.solver)
        if self.rtol is not None:
            check_rtol(self.rtol)
        check_count("max_iterations", self.max_iterations, optional=True)
        check_callback(self.callback)

    def check(self, table: StepTable) -> None:
        """Refuse a chain of order 2."""
        _check_first_order(self, table)

    def pull_back(self, chain: LinearizedChain, cotangent: Tensor) -> Pulled:
        """See `Gradient`."""
        solution = chain.solve_transposed(
            cotangent,
            solver=self.solver,
            rtol=self.rtol,
            max_iterations=self.max_iterations,
            callback=self.callback,
        )
        return chain.collect(solution.trajectory, vjps=solution.nfe)


@dataclass(frozen=True)
class Phantom:
    """What `steps` damped iterations from the solution would let through: a truncated Neumann series.

    The iteration is x <- (1 - tau) x + tau h(x) with the DDIM sum h, which freezes epsilon. Costs steps - 1 batched
    VJPs for the first state, one more for the rest. With one step no derivative of the model takes part in the
    gradient of the noise, which is tau prod(alpha_next / alpha) dL/dx[S] at eta = 0.

    Args:
        steps: Iterations, at least 1.
        tau: Damping in (0, 1].

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If tau is not a number.

    Example:
        >>> noise = torch.randn(2, 4, requires_grad=True)
        >>> schedule = deqkern.NoiseSchedule.linear()
        >>> gradient = deqkern.gradients.Phantom(steps=2, tau=0.5)
        >>> solution = deqkern.sample(lambda x, t: 0.1 * x, noise, schedule, 10, gradient=gradient)
        >>> solution.value.sum().backward()
        >>> noise.grad.shape
        torch.Size([2, 4])

    Reference:
        Geng, Zhang, Bai, Wang, Lin: On training implicit models, arXiv 2111.05177.
    """

    steps: int = 5
    tau: float = 1.0

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        check_number("tau", self.tau)
        if not 0 < self.tau <= 1:
            raise ValueError(f"tau must lie in (0, 1], got {self.tau}")

    def check(self, table: StepTable) -> None:
        """Refuse a chain of order 2."""
        _check_first_order(self, table)

    def pull_back(self, chain: LinearizedChain, cotangent: Tensor) -> Pulled:
        """See `Gradient`."""
        table, implicit = chain.transposed, chain.transposed.implicit
        a, b, frozen = (v.tolist() for v in (table.a, table.b, table.slope_0))

        def swept(last: Tensor | None) -> Tensor:
            """The transposed chain whose J is frozen, but for what J^T does to its states `last` (S+1, B, *shape)."""
            states = [cotangent]
            if last is not None:
                argument = last[1:] if implicit else last[:-1]
                through = chain.transposed_vjps(argument)
            for j in range(chain.steps):
                rest = 0.0 if last is None else b[j] * (through[j] - frozen[j] * argument[j])
                if implicit:
                    states.append((a[j] * states[-1] + rest) / (1 - b[j] * frozen[j]))
                else:
                    states.append((a[j] + b[j] * frozen[j]) * states[-1] + rest)
            return torch.stack(states)

        states = self.tau * swept(None)
        for _ in range(self.steps - 1):
            states = torch.lerp(states, swept(states), self.tau)
        return chain.collect(states, vjps=(self.steps - 1) * chain.steps)


@dataclass(frozen=True)
class Adjoint:
    """AdjointDEIS: the continuous adjoint equation by an exponential integrator, step by step, with S VJPs of B rows.

    With P = alpha lam, half the log-SNR l = log(alpha/sigma) and the integrand V = alpha J_eps^T P,
    dP/dl = (1 + eta^2) e^-l V. It approximates the gradient of the continuous process, not of the S-step chain. The
    first step taken, one with an end without noise or without signal, one between equal levels and one over which
    sigma / alpha grows by more than half, is the exact one. A schedule that clips is refused.

    Args:
        order: 1 holds V at the cleaner end of a step; 2 extrapolates it linearly from the last two (2M).

    Raises:
        ValueError: If order is neither 1 nor 2.

    Example:
        >>> noise = torch.randn(2, 4, requires_grad=True)
        >>> schedule = deqkern.NoiseSchedule.linear()
        >>> gradient = deqkern.gradients.Adjoint(order=2)
        >>> solution = deqkern.sample(lambda x, t: 0.1 * x, noise, schedule, 10, gradient=gradient)
        >>> solution.value.sum().backward()
        >>> noise.grad.shape
        torch.Size([2, 4])

    Reference:
        Blasingame, Liu: AdjointDEIS, arXiv 2405.15020.
    """

    order: int = 2

    def __post_init__(self) -> None:
        check_order(self.order)

    def check(self, table: StepTable) -> None:
        """Refuse a chain of order 2, and one that clips: this knows the model's own output, and not the clipped x0."""
        _check_first_order(self, table)
        if table.clips:
            raise ValueError("schedule clips or thresholds x0: gradient='adjoint' needs one that does not")
        if table.process == "ddpm_large":
            raise ValueError(
                "process='ddpm_large' draws more noise than the process that gradient='adjoint' integrates: take "
                "'exact' or 'implicit', or process='ddpm'"
            )

    def pull_back(self, chain: LinearizedChain, cotangent: Tensor) -> Pulled:
        """See `Gradient`."""
        return adjoint_recurrence(chain.table, self.order).pull_back(chain, cotangent)


# "residual" is what DEQ-DDIM's code computes with its own settings (arXiv 2210.12867).
NAMED: dict[str, Gradient] = {
    "exact": Exact(),
    "implicit": Implicit(),
    "phantom": Phantom(),
    "residual": Phantom(steps=1, tau=0.1),
    "adjoint": Adjoint(),
}


def named(gradient: str | Gradient | None, names: Sequence[str] = tuple(NAMED)) -> Gradient | None:
    """The gradient of that name, among `names`.

    An object is returned as it is: one of their classes, or one that has a `pull_back` and is of no class of NAMED.
    """
    if gradient is None:
        return None
    kinds = tuple(type(NAMED[name]) for name in names)
    if isinstance(gradient, str):
        if gradient in names:
            return NAMED[gradient]
    elif isinstance(gradient, kinds) or _is_own(gradient):
        return gradient
    classes = ", ".join(dict.fromkeys(kind.__name__ for kind in kinds))
    raise ValueError(
        f"gradient must be None, one of {', '.join(map(repr, names))}, a deqkern.gradients object ({classes}) or an "
        f"object with pull_back(chain, cotangent), got {gradient!r}"
    )


def _is_own(gradient: Any) -> bool:
    """Whether it is an object, and no class, of a method that deqkern does not have itself."""
    foreign = not isinstance(gradient, (type, *map(type, NAMED.values())))
    return foreign and callable(getattr(gradient, "pull_back", None))


def check_table(gradient: Gradient | None, table: StepTable) -> None:
    """Ask the gradient whether it can go back through the chain `table`. Raises ValueError if it says no."""
    check = getattr(gradient, "check", None)
    if check is not None:
        check(table)


def _check_first_order(gradient: Gradient, table: StepTable) -> None:
    if table.order != 1:
        raise ValueError(f"gradient must be None or 'exact' with order=2, got {gradient!r}")
