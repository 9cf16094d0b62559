"""Gradients through a solved chain, for its first state, its step noise, `model_kwargs` and the model's parameters.

With lam[S] = dL/dx[S] and J[i] = d out[i] / d x[i], an explicit chain has lam[i] = (a[i] + b[i] J[i]^T) lam[i+1] and
dL/dtheta = sum_i b[i] (d out[i] / d theta)^T lam[i+1]. For implicit ones see `StepTable.transposed`. The model is
called again where its Jacobian is needed: nothing but the states is kept from the solve.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..chain.step_table import StepTable, check_order
from ..engine.loop import begin, run
from ..engine.solution import Solution, warn_unless_converged
from ..engine.trajectory import Traits
from ..network.model import Network
from ..ops._dispatch import requested_backends, use_backend
from ..problem import Problem
from ..solvers.presets import Solver, check_solver, default
from ..support.checks import check_callback, check_count, check_number, check_rtol
from ..support.eager import uncompiled
from ..support.tensors import split_rows
from .recurrences import Walk, adjoint_walk, exact_walk


@dataclass(frozen=True)
class Exact:
    """Step by step from the end, one vector-Jacobian product (VJP) of B rows each: S of them, the memory of one."""


@dataclass(frozen=True)
class Implicit:
    """The transposed chain solved for all steps at once, by the engine of `sample`: one batched VJP per iteration.

    The implicit function theorem at the solution (arXiv 1909.01377). One more batched VJP gives the
    gradients of `model_kwargs` and parameters.
    solver: `deqkern.solvers.default(window=None)` if None. rtol: relative error of the gradient of the first state;
        that of the solve if None. max_iterations: S if None, at least 40 for an inversion.
    callback: called with the `Solution` of the transposed chain.
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


@dataclass(frozen=True)
class Phantom:
    """What `steps` damped iterations from the solution would let through: a truncated Neumann series.

    The iteration is x <- (1 - tau) x + tau h(x) with the DDIM sum h, which freezes epsilon (arXiv 2111.05177).
    Costs steps - 1 batched VJPs for the first state, one more for the rest. With one step no derivative of the model
    takes part in the gradient of the noise, which is tau prod(alpha_next / alpha) dL/dx[S] at eta = 0.
    """

    steps: int = 5
    tau: float = 1.0

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        check_number("tau", self.tau)
        if not 0 < self.tau <= 1:
            raise ValueError(f"tau must lie in (0, 1], got {self.tau}")


@dataclass(frozen=True)
class Adjoint:
    """AdjointDEIS (arXiv 2405.15020): the continuous adjoint equation by an exponential integrator, step by step.

    With P = alpha lam, half the log-SNR l = log(alpha/sigma) and the integrand V = alpha J_eps^T P,
    dP/dl = (1 + eta^2) e^-l V. order 1 holds V at the cleaner end of a step; order 2 extrapolates it linearly from
    the last two (2M). It approximates the gradient of the continuous process, not of the S-step chain. The first step
    taken, one with an end without noise or without signal, one between equal levels and one over which sigma / alpha
    grows by more than half, is the exact one. S VJPs of B rows. Raises ValueError for a schedule that clips.
    """

    order: int = 2

    def __post_init__(self) -> None:
        check_order(self.order)


Gradient = Exact | Implicit | Phantom | Adjoint

# "residual" is what DEQ-DDIM's code computes with its own settings (arXiv 2210.12867).
NAMED: dict[str, Gradient] = {
    "exact": Exact(),
    "implicit": Implicit(),
    "phantom": Phantom(),
    "residual": Phantom(steps=1, tau=0.1),
    "adjoint": Adjoint(),
}

# Iterations at most on an implicit chain, which may take more than it has steps.
IMPLICIT_LIMIT = 40


def named(gradient: str | Gradient | None, names: Sequence[str] = tuple(NAMED)) -> Gradient | None:
    """The gradient of that name, among `names`; an object of one of their kinds is returned as it is."""
    if gradient is None:
        return None
    kinds = tuple(type(NAMED[name]) for name in names)
    if isinstance(gradient, str) and gradient in names:
        return NAMED[gradient]
    if isinstance(gradient, kinds):
        return gradient
    classes = ", ".join(dict.fromkeys(kind.__name__ for kind in kinds))
    raise ValueError(
        f"gradient must be None, one of {', '.join(map(repr, names))} or a deqkern.gradients object ({classes}), "
        f"got {gradient!r}"
    )


def check_clipping(gradient: Gradient | None, table: StepTable) -> None:
    """Refuse an `Adjoint` of a table that clips: it knows the model's own output, and not the clipped x0."""
    if isinstance(gradient, Adjoint) and table.clips:
        raise ValueError("schedule clips or thresholds x0: gradient='adjoint' needs one that does not")


def attached(solution: Solution, problem: Problem, gradient: Gradient) -> Solution:
    """`solution` with a gradient at its value; as it is where nothing requires one, or under torch.no_grad().

    Differentiating twice raises RuntimeError.
    """
    network, first = problem.network, problem.first
    if not torch.is_grad_enabled() or network is None:
        return solution
    pullback = Pullback(network, gradient, problem.rtol, problem.max_batch)
    chain = (solution.trajectory, first, problem.step_noise)
    value = _Attached.apply(pullback, solution.value, *chain, *network.inputs(first))
    return replace(solution, value=value)


class Once(torch.autograd.Function):
    """`value`, from which no second derivative reaches the `sources`.

    torch's once_differentiable lets a wrong one through, zero, where the first cotangent requires no gradient.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, *sources: Tensor | None) -> Tensor:
        return value.detach()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[None, ...]:
        raise RuntimeError("the gradient of a solve cannot be differentiated again")


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        pullback: Pullback,
        value: Tensor,
        states: Tensor,
        first: Tensor,
        step_noise: Tensor | None,
        *inputs: Tensor,
    ) -> Tensor:
        ctx.pullback, ctx.backends = pullback, requested_backends()
        # saved, so that torch notices if they change in place before the gradient is taken
        ctx.save_for_backward(states, first, step_noise, *inputs)
        return value.detach()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        states, first, step_noise, *inputs = ctx.saved_tensors
        wanted = ctx.needs_input_grad[5:]
        with torch.no_grad(), use_backend(*ctx.backends):
            found = ctx.pullback(
                states,
                cotangent.detach().to(states.dtype),
                [value for value, want in zip(inputs, wanted, strict=True) if want],
                ctx.needs_input_grad[4],
            )
            sums = iter(found.inputs)
            pulled = [found.first, found.step_noise, *(next(sums) if want else None for want in wanted)]
        if torch.is_grad_enabled():  # create_graph
            pulled = [value if value is None else Once.apply(value, first, step_noise, *inputs) for value in pulled]
        return None, None, None, *pulled


@dataclass
class Pulled:
    """The gradients of a chain: by its first state (B, *shape), its step noise (S, B, *shape) and other inputs.

    inputs: None for one that the model does not use.
    products: VJPs per sample that it took, but for the one more per step by `inputs`.
    """

    first: Tensor
    step_noise: Tensor | None
    inputs: list[Tensor | None]
    products: Tensor  # (B,) int64


class Pullback:
    """Pulls a cotangent back from the end of a solved chain to all that it depends on."""

    def __init__(self, network: Network, gradient: Gradient, rtol: float, max_batch: int | None) -> None:
        self.network, self.gradient, self.rtol, self.max_batch = network, gradient, rtol, max_batch

    @uncompiled
    def __call__(
        self,
        states: Tensor,  # (S+1, B, *shape), the solution
        cotangent: Tensor,  # (B, *shape), dL/dx[S]
        inputs: Sequence[Tensor] = (),
        with_noise: bool = False,
    ) -> Pulled:
        """The gradients by the first state, by the step noise if asked for, and by `inputs`.

        NaN all over for a cotangent that is not finite: a gradient scaler of half precision wants to see it.
        """
        if not bool(cotangent.isfinite().all()):
            lost = torch.full_like(cotangent, torch.nan)
            noise = lost.expand(len(states) - 1, *lost.shape) if with_noise else None
            none = torch.zeros(len(lost), dtype=torch.int64, device="cpu")
            return Pulled(lost, noise, [torch.full_like(value, torch.nan) for value in inputs], none)
        sums = _Sums(self.network, states, inputs, self.max_batch)
        match self.gradient:
            case Implicit():
                return self._implicit(self.gradient, sums, cotangent, with_noise)
            case Phantom():
                return self._phantom(self.gradient, sums, cotangent, with_noise)
            case Exact():
                return self._walk(sums, cotangent, with_noise, exact_walk(self.network.table))
            case Adjoint():
                return self._walk(sums, cotangent, with_noise, adjoint_walk(self.network.table, self.gradient.order))

    def _implicit(self, gradient: Implicit, sums: _Sums, cotangent: Tensor, with_noise: bool) -> Pulled:
        solver = gradient.solver or default(window=None)
        table = self.network.table.transposed()
        precision, prefix = self.network.precision, "model has a gradient with"
        solve = begin(
            cotangent,
            table,
            solver,
            Traits(precision=precision, max_batch=self.max_batch, error_prefix=prefix),
            rtol=self.rtol if gradient.rtol is None else gradient.rtol,
            max_iterations=gradient.max_iterations or max(len(table.a), IMPLICIT_LIMIT),
            noisy=False,
        )
        found = run(solve, _Transposed(sums))
        if gradient.callback is not None:
            gradient.callback(found)
        warn_unless_converged(found, "gradient: ")
        return self._collect(sums, found.trajectory, with_noise, found.nfe)

    def _phantom(self, gradient: Phantom, sums: _Sums, cotangent: Tensor, with_noise: bool) -> Pulled:
        table, product = self.network.table.transposed(), _Transposed(sums)
        steps, batch = len(table.a), len(cotangent)
        rows = torch.arange(steps * batch, device=cotangent.device)
        a, b, frozen = (v.tolist() for v in (table.a, table.b, table.slope_0))

        def swept(first: Tensor, last: Tensor | None) -> Tensor:
            """The chain from `first` whose J is frozen, but for what J^T does to `last` (S+1, B, *shape)."""
            chain = [first]
            if last is not None:
                argument = last[1:] if table.implicit else last[:-1]
                through = torch.empty_like(argument)
                for part in split_rows(rows, self.max_batch):
                    through.flatten(0, 1)[part] = product(argument.flatten(0, 1)[part], part // batch, part % batch)
            for j in range(steps):
                rest = 0.0 if last is None else b[j] * (through[j] - frozen[j] * argument[j])
                if table.implicit:
                    chain.append((a[j] * chain[-1] + rest) / (1 - b[j] * frozen[j]))
                else:
                    chain.append((a[j] + b[j] * frozen[j]) * chain[-1] + rest)
            return torch.stack(chain)

        chain = gradient.tau * swept(cotangent, None)
        for _ in range(gradient.steps - 1):
            chain = torch.lerp(chain, swept(cotangent, chain), gradient.tau)
        return self._collect(sums, chain, with_noise, torch.full((batch,), (gradient.steps - 1) * steps, device="cpu"))

    def _collect(self, sums: _Sums, chain: Tensor, with_noise: bool, products: Tensor) -> Pulled:
        """What the solved transposed chain (S+1, B, *shape) says."""
        table, (steps, batch) = self.network.table, (len(chain) - 1, chain.shape[1])
        if sums.inputs:
            rows = torch.arange(steps * batch, device=chain.device)
            weight = table.b.to(chain)[:, None].expand(-1, batch).flatten()  # of row i * B + b
            for part in split_rows(rows, self.max_batch):
                own = part // batch
                place = (steps - 1 - own + int(table.implicit)) * batch + part % batch
                cotangents = weight[part].view(-1, *[1] * (chain.ndim - 2)) * chain.flatten(0, 1)[place]
                sums.add(cotangents, own, part % batch, 1.0)
        first = chain[-1] * float(table.a[0]) if table.implicit else chain[-1]
        noise = None
        if with_noise:
            noise = chain[:-1].flip(0) * table.n.to(chain).view(-1, *[1] * (chain.ndim - 1))
        return Pulled(first, noise, sums.total(), products)

    def _walk(self, sums: _Sums, cotangent: Tensor, with_noise: bool, walk: Walk) -> Pulled:
        """lam[i] = keep[i] lam[i+1] + now[i] v + before[i] (the v before), v = of_lam[i] lam[i+1] + of_product[i] p,

        p = J^T (lam[i+1] + lag[i] lam[i+2]) with the J of the model at the state place[i].
        """
        table, lam, last = self.network.table, cotangent, torch.zeros_like(cotangent)
        lam_before = last
        steps, samples = len(table.a), torch.arange(len(cotangent), device=cotangent.device)
        noise = cotangent.new_empty(steps, *cotangent.shape) if with_noise else None
        for i in reversed(range(steps)):
            if noise is not None:
                noise[i] = float(table.n[i]) * lam
            own = torch.full_like(samples, walk.place[i])
            pushed = lam + walk.lag[i] * lam_before if walk.lag[i] else lam
            through = torch.empty_like(lam)
            for part in split_rows(samples, self.max_batch):
                through[part] = sums.add(pushed[part], own[part], samples[part], walk.weight[i])
            v = walk.of_lam[i] * lam + walk.of_product[i] * through
            lam_before = lam
            lam, last = walk.keep[i] * lam + walk.now[i] * v + walk.before[i] * last, v
        return Pulled(lam, noise, sums.total(), torch.full((len(lam),), steps, device="cpu"))


class _Sums:
    """VJPs at the states of a chain, and what they add up to for `inputs`: in fp32 at least."""

    def __init__(self, network: Network, states: Tensor, inputs: Sequence[Tensor], max_batch: int | None) -> None:
        self.network, self.states, self.inputs = network, states, inputs
        self.sums: list[Tensor | None] = [None] * len(inputs)

    def vjp(
        self, cotangents: Tensor, own: Tensor, samples: Tensor, inputs: Sequence[Tensor] = ()
    ) -> tuple[Tensor, list[Tensor | None]]:
        """J^T cotangents (N, *shape) of the chain's own steps (N,), by the states and by `inputs`."""
        states = self.states[own + int(self.network.table.implicit), samples]
        return self.network.vjp(states, cotangents, own, samples, inputs)

    def add(self, cotangents: Tensor, own: Tensor, samples: Tensor, weight: float) -> Tensor:
        """`vjp` by the states; `weight` times that by the inputs is added."""
        through, found = self.vjp(cotangents, own, samples, self.inputs)
        for place, value in enumerate(found):
            if value is not None:
                total = self.sums[place]
                self.sums[place] = (torch.zeros_like(value) if total is None else total).add_(value, alpha=weight)
        return through

    def total(self) -> list[Tensor | None]:
        """The sums, in the dtypes of the inputs."""
        sums = zip(self.sums, self.inputs, strict=True)
        return [None if total is None else total.to(value.dtype) for total, value in sums]


class _Transposed:
    """The map of the transposed chain."""

    def __init__(self, sums: _Sums) -> None:
        self.sums, self.last = sums, len(sums.states) - 2

    def __call__(self, states: Tensor, steps: Tensor, samples: Tensor) -> Tensor:
        return self.sums.vjp(states, self.last - steps, samples)[0]
