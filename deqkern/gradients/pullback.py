"""From the cotangent of a chain's last state to the gradients of all that the state depends on.

With lam[S] = dL/dx[S] and J[i] = d out[i] / d x[i], an explicit chain has lam[i] = (a[i] + b[i] J[i]^T) lam[i+1] and
dL/dtheta = sum_i b[i] (d out[i] / d theta)^T lam[i+1]. For implicit ones see `StepTable.transposed`. The model is
called again where its Jacobian is needed: nothing but the states is kept from the solve.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from ..chain.step_table import StepTable
from ..engine.loop import solve
from ..engine.solution import Solution, warn_unless_converged
from ..engine.trajectory import Map, calls, start
from ..network.model import Network
from ..solvers.presets import Solver, default
from ..support.eager import uncompiled
from .autograd import attach

# Iterations at most on an implicit chain, which may take more than it has steps.
IMPLICIT_LIMIT = 40


class DifferentiableMap(Protocol):
    """What the chain is linear in, with its VJPs: a `Network`, or the map of a fixed point."""

    @property
    def table(self) -> StepTable:
        """The chain."""

    @property
    def precision(self) -> float:
        """The eps of the arithmetic behind it."""

    def vjp(
        self, states: Tensor, cotangents: Tensor, steps: Tensor, samples: Tensor, inputs: Sequence[Tensor]
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        """J^T cotangents (N, *shape) at states (N, *shape) of steps and samples (N,), and the same by `inputs`."""


@dataclass
class Pulled:
    """The gradients of a chain, which the method `pull_back` of a gradient returns: see `LinearizedChain.pulled`.

    Attributes:
        first: (B, *shape), by the first state.
        step_noise: (S, B, *shape), by the step noise, or None.
        inputs: By each of `LinearizedChain.inputs`; None for one that the model does not use.
        vjps: (B,) int64 on the CPU, the VJPs per sample that it took, but for the one more per step by `inputs`.
    """

    first: Tensor
    step_noise: Tensor | None
    inputs: list[Tensor | None]
    vjps: Tensor


class Gradient(Protocol):
    """What `gradient=` takes: any object with a method `pull_back`.

    The classes of `deqkern.gradients` are of this kind, and so may be one of your own. It may also have a method
    `check(table)`, which raises ValueError for a `StepTable` that it cannot go back through; it is called before the
    model is.

    Example:
        Straight through: as if the output of the model did not depend on its input.

        >>> class StraightThrough:
        ...     def pull_back(self, chain, cotangent):
        ...         return chain.pulled(cotangent * float(chain.table.a.prod()))
        >>> noise = torch.randn(1, 4, requires_grad=True)
        >>> schedule = deqkern.NoiseSchedule.linear()
        >>> model = lambda x, t: 0.1 * x
        >>> solution = deqkern.sample(model, noise, schedule, 10, gradient=StraightThrough())
        >>> solution.value.sum().backward()
        >>> noise.grad.shape
        torch.Size([1, 4])
    """

    def pull_back(self, chain: LinearizedChain, cotangent: Tensor) -> Pulled:
        """From dL/dx[S] (B, *shape), which is finite, to the gradients of what the chain depends on."""


class LinearizedChain:
    """A solved chain and the VJPs of the model at its states: what `pull_back` of a gradient is given.

    A fixed point is a chain of one implicit step (a = 0, b = 1), whose only input is the output of f.

    Attributes:
        table: The `StepTable` with the coefficients a, b, n (S,), float64 on the CPU:
            x[i+1] = a[i] x[i] + b[i] out(x[i]) + n[i] z[i], and out(x[i+1]) where `table.implicit`.
        states: (S+1, B, *shape), the solution, in the order in which the chain runs.
        inputs: The tensors besides the states whose gradients are asked for: conditions and parameters.
        rtol: The tolerance of the solve.
        max_batch: Rows in one call of the model, or None.
        with_noise: Whether the gradient of the step noise is asked for.
    """

    def __init__(
        self,
        network: DifferentiableMap,
        states: Tensor,
        inputs: Sequence[Tensor] = (),
        *,
        rtol: float,
        max_batch: int | None = None,
        with_noise: bool = False,
    ) -> None:
        self.network, self.table = network, network.table
        self.states, self.inputs, self.with_noise = states, inputs, with_noise
        self.rtol, self.max_batch = rtol, max_batch
        self._sums: list[Tensor | None] = [None] * len(inputs)  # in fp32 at least

    @property
    def steps(self) -> int:
        """S."""
        return len(self.states) - 1

    @property
    def batch(self) -> int:
        """B."""
        return self.states.shape[1]

    def vjp(self, step: int, cotangent: Tensor, weight: float | None = None) -> Tensor:
        """J^T of the model, called for `step` at the state x[step] (x[step+1] if implicit), times a cotangent.

        Args:
            step: 0 .. S-1.
            cotangent: (B, *shape).
            weight: Adds so many times the same VJP by `inputs` to their gradients, as long as it is not None.

        Returns:
            (B, *shape).
        """
        samples = torch.arange(self.batch, device=cotangent.device)
        steps, by_states = torch.full_like(samples, step), torch.empty_like(cotangent)
        for part in calls(samples, self.max_batch):
            arguments = (cotangent[part], steps[part], samples[part])
            by_states[part] = self.vjp_rows(*arguments) if weight is None else self._add(*arguments, weight=weight)
        return by_states

    def vjp_rows(self, cotangents: Tensor, steps: Tensor, samples: Tensor) -> Tensor:
        """J^T cotangents (N, *shape) of the steps (N,) and samples (N,), in one call of the model."""
        return self.network.vjp(self._at(steps, samples), cotangents, steps, samples, ())[0]

    def pulled(self, first: Tensor, step_noise: Tensor | None = None, vjps: int | Tensor = 0) -> Pulled:
        """The result of `pull_back`, with the gradients of the inputs that `vjp` summed up, in their dtypes.

        Args:
            first: (B, *shape), dL/dx[0].
            step_noise: (S, B, *shape), where `with_noise` asks for it.
            vjps: VJPs per sample that it took, one number or (B,); they count as evaluations of a search.
        """
        sums = zip(self._sums, self.inputs, strict=True)
        inputs = [None if total is None else total.to(value.dtype) for total, value in sums]
        counts = vjps if isinstance(vjps, Tensor) else torch.full((self.batch,), vjps, device="cpu")
        return Pulled(first, step_noise, inputs, counts)

    @cached_property
    def transposed(self) -> StepTable:
        """The chain of the gradient, which starts from dL/dx[S]. Raises ValueError for a chain of order 2."""
        return self.table.transposed()

    def transposed_vjps(self, cotangents: Tensor) -> Tensor:
        """J^T of all steps of the transposed chain at once, of cotangents (S, B, *shape)."""
        rows = torch.arange(self.steps * self.batch, device=cotangents.device)
        transposed, by_states = TransposedMap(self), torch.empty_like(cotangents)
        for part in calls(rows, self.max_batch):
            steps, samples = part // self.batch, part % self.batch
            by_states.flatten(0, 1)[part] = transposed(cotangents.flatten(0, 1)[part], steps, samples)
        return by_states

    def solve_transposed(
        self,
        cotangent: Tensor,
        *,
        solver: Solver | None = None,
        rtol: float | None = None,
        max_iterations: int | None = None,
        callback: Callable[[Solution], None] | None = None,
    ) -> Solution:
        """The transposed chain solved for all steps at once; `trajectory` (S+1, B, *shape) starts from `cotangent`.

        `callback` is called with the solution. Warns if a sample did not converge.
        """
        rtol = self.rtol if rtol is None else rtol
        solution = self._solve(cotangent, solver, rtol, max_iterations=max_iterations)
        if callback is not None:
            callback(solution)
        warn_unless_converged(solution, "gradient: ")
        return solution

    def _solve(self, cotangent: Tensor, solver: Solver | None, rtol: float, max_iterations: int | None) -> Solution:
        return solve_chain(
            TransposedMap(self),
            cotangent,
            self.transposed,
            solver=default(window=None) if solver is None else solver,
            rtol=rtol,
            max_iterations=max_iterations or max(self.steps, IMPLICIT_LIMIT),
            max_batch=self.max_batch,
        )

    def collect(self, cotangents: Tensor, vjps: int | Tensor = 0) -> Pulled:
        """The result of `pull_back` from the states of the transposed chain, `cotangents` (S+1, B, *shape)."""
        table, steps, batch = self.table, self.steps, self.batch
        shape = [1] * (cotangents.ndim - 2)
        if self.inputs:
            rows = torch.arange(steps * batch, device=cotangents.device)
            weights = table.b.to(cotangents)[:, None].expand(-1, batch).flatten()  # of row i * B + b
            for part in calls(rows, self.max_batch):
                own, samples = part // batch, part % batch
                place = (steps - 1 - own + int(table.implicit)) * batch + samples
                weighted = weights[part].view(-1, *shape) * cotangents.flatten(0, 1)[place]
                self._add(weighted, own, samples, weight=1.0)
        first = cotangents[-1] * float(table.a[0]) if table.implicit else cotangents[-1]
        noise = None
        if self.with_noise:
            noise = cotangents[:-1].flip(0) * table.n.to(cotangents).view(-1, 1, *shape)
        return self.pulled(first, noise, vjps)

    def _add(self, cotangents: Tensor, steps: Tensor, samples: Tensor, *, weight: float) -> Tensor:
        """`vjp_rows`; `weight` times the same by the inputs is added to their sums."""
        arguments = (self._at(steps, samples), cotangents, steps, samples)
        by_states, by_inputs = self.network.vjp(*arguments, self.inputs)
        for place, value in enumerate(by_inputs):
            if value is not None:
                total = self._sums[place]
                self._sums[place] = (torch.zeros_like(value) if total is None else total).add_(value, alpha=weight)
        return by_states

    def _at(self, steps: Tensor, samples: Tensor) -> Tensor:
        return self.states[steps + int(self.table.implicit), samples]


class TransposedMap:
    """J^T of the steps of the transposed chain, as a map of the engine."""

    what, dtype = "model has a gradient with", None

    def __init__(self, chain: LinearizedChain) -> None:
        self.chain, self._last = chain, chain.steps - 1

    @property
    def precision(self) -> float:
        return self.chain.network.precision

    def __call__(self, states: Tensor, steps: Tensor, samples: Tensor) -> Tensor:
        return self.chain.vjp_rows(states, self._last - steps, samples)


def solve_chain(
    map: Map,
    first: Tensor,
    table: StepTable,
    *,
    solver: Solver,
    rtol: float,
    max_iterations: int,
    max_batch: int | None,
) -> Solution:
    """The engine, for the chain of a gradient, which may grow from step to step."""
    trajectory = start(map, first, table, solver, max_batch=max_batch, noisy=False)
    trajectory.scale.fill_(torch.inf)
    return solve(trajectory, solver, rtol=rtol, max_iterations=max_iterations, dtype=first.dtype)


@uncompiled
def pull_back(gradient: Gradient, chain: LinearizedChain, cotangent: Tensor) -> Pulled:
    """The gradients of `chain` from dL/dx[S] (B, *shape), by the method `gradient`.

    NaN all over for a cotangent that is not finite: a gradient scaler of half precision wants to see it.
    """
    if not bool(cotangent.isfinite().all()):
        lost = torch.full_like(cotangent, torch.nan)
        noise = lost.expand(chain.steps, *lost.shape) if chain.with_noise else None
        none = torch.zeros(chain.batch, dtype=torch.int64, device="cpu")
        return Pulled(lost, noise, [torch.full_like(value, torch.nan) for value in chain.inputs], none)
    pulled: Any = gradient.pull_back(chain, cotangent)
    if not isinstance(pulled, Pulled):
        name = type(gradient).__name__
        raise TypeError(f"pull_back of {name} must return what chain.pulled(...) makes, got {type(pulled).__name__}")
    return pulled


class Pullback:
    """Pulls a cotangent back from the end of a solved chain to all that it depends on."""

    def __init__(self, network: Network, gradient: Gradient, rtol: float, max_batch: int | None) -> None:
        self.network, self.gradient, self.rtol, self.max_batch = network, gradient, rtol, max_batch

    def __call__(
        self,
        states: Tensor,  # (S+1, B, *shape), the solution
        cotangent: Tensor,  # (B, *shape), dL/dx[S]
        inputs: Sequence[Tensor] = (),
        with_noise: bool = False,
    ) -> Pulled:
        """The gradients by the first state, by the step noise if asked for, and by `inputs`."""
        options: dict[str, Any] = {"rtol": self.rtol, "max_batch": self.max_batch, "with_noise": with_noise}
        return pull_back(self.gradient, LinearizedChain(self.network, states, inputs, **options), cotangent)

    def attach(self, value: Tensor, states: Tensor, first: Tensor, step_noise: Tensor | None = None) -> Tensor:
        """The `value` (B, *shape) of a solve, whose states (S+1, B, *shape) are those of the chain, with a gradient.

        By `first` (B, *shape), the step noise (S, B, *shape), conditions and parameters. As it is where none of them
        requires one, or under torch.no_grad(). Differentiating twice raises RuntimeError.
        """
        if not torch.is_grad_enabled():
            return value

        def gradients(sources: Sequence[Any], cotangent: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
            states, _, _, *inputs = sources
            asked = [value for value, want in zip(inputs, wanted[3:], strict=True) if want]
            pulled = self(states, cotangent.to(states.dtype), asked, with_noise=wanted[2])
            sums = iter(pulled.inputs)
            return [None, pulled.first, pulled.step_noise, *(next(sums) if want else None for want in wanted[3:])]

        return attach(value, [states, first, step_noise, *self.network.inputs(first)], gradients)
