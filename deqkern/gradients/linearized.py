"""A solved chain and the VJPs of the model at its states.

With lam[S] = dL/dx[S] and J[i] = d out[i] / d x[i], an explicit chain has lam[i] = (a[i] + b[i] J[i]^T) lam[i+1] and
dL/dtheta = sum_i b[i] (d out[i] / d theta)^T lam[i+1]. For implicit ones see `StepTable.transposed`. The model is
called again where its Jacobian is needed: nothing but the states is kept from the solve.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from ..chain.step_table import StepTable
from ..engine.loop import begin, run
from ..engine.solution import Solution, warn_unless_converged
from ..engine.trajectory import Traits
from ..solvers.presets import Solver, default
from ..support.tensors import split_rows

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
            weight: Adds this multiple of the same VJP by `inputs` to their gradients, as long as it is not None.

        Returns:
            (B, *shape).
        """
        samples = torch.arange(self.batch, device=cotangent.device)
        steps, by_states = torch.full_like(samples, step), torch.empty_like(cotangent)
        for part in split_rows(samples, self.max_batch):
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
        for part in split_rows(rows, self.max_batch):
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
        precision, prefix = self.network.precision, "model has a gradient with"
        solve = begin(
            cotangent,
            self.transposed,
            default(window=None) if solver is None else solver,
            Traits(precision=precision, error_prefix=prefix, max_batch=self.max_batch),
            rtol=rtol,
            max_iterations=max_iterations or max(self.steps, IMPLICIT_LIMIT),
            noisy=False,
        )
        return run(solve, TransposedMap(self))

    def collect(self, cotangents: Tensor, vjps: int | Tensor = 0) -> Pulled:
        """The result of `pull_back` from the states of the transposed chain, `cotangents` (S+1, B, *shape)."""
        table, steps, batch = self.table, self.steps, self.batch
        shape = [1] * (cotangents.ndim - 2)
        if self.inputs:
            rows = torch.arange(steps * batch, device=cotangents.device)
            weights = table.b.to(cotangents)[:, None].expand(-1, batch).flatten()  # of row i * B + b
            for part in split_rows(rows, self.max_batch):
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

    def __init__(self, chain: LinearizedChain) -> None:
        self.chain, self._last = chain, chain.steps - 1

    def __call__(self, states: Tensor, steps: Tensor, samples: Tensor) -> Tensor:
        return self.chain.vjp_rows(states, self._last - steps, samples)
