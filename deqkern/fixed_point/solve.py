"""Fixed points z = f(z) of any map: one implicit step of the engine, with gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..chain.step_table import StepTable
from ..engine.host import Ints
from ..engine.loop import solve
from ..engine.solution import Solution, warn_unless_converged
from ..engine.trajectory import Map, Trajectory
from ..gradients.methods import Implicit, Once, Phantom, named
from ..network.model import leaves, pull
from ..ops._dispatch import requested_backends, use_backend
from ..solvers.basis import Basis
from ..solvers.presets import Solver, anderson, check_solver
from ..solvers.slopes import Frozen
from ..support.checks import check_callable, check_callback, check_count, check_rtol
from ..support.eager import uncompiled
from .state import Layout, State

Function = Callable[[Any], Any]  # a state to one of the same shapes

_ONE, _ZERO = torch.ones(1, dtype=torch.float64, device="cpu"), torch.zeros(1, dtype=torch.float64, device="cpu")
_STEP = StepTable(  # x[1] = f(x[1])
    timesteps=torch.zeros(1, dtype=torch.int64, device="cpu"),
    alpha=_ONE,
    sigma=_ONE,
    alpha_next=_ONE,
    sigma_next=_ONE,
    a=_ZERO,
    b=_ONE,
    c=_ZERO,
    n=_ZERO,
    slope_0=_ZERO,
    slope_1=_ZERO,
    implicit=True,
)
_TRANSPOSED = _STEP.transposed()  # x[1] = x[0] + J^T x[1]


def fixed_point(
    f: Function,
    z0: State,
    *,
    solver: Solver | None = None,
    rtol: float = 1e-4,
    max_iterations: int = 50,
    gradient: str | Implicit | Phantom | None = "implicit",
    callback: Callable[[int, Any, Tensor], None] | None = None,
) -> Solution:
    """Solve z = f(z), each sample to its own tolerance: a deep equilibrium model (arXiv 1909.01377) and the like.

    f: called with the whole batch each time, in the dtypes of z0, and returns the same shapes; its closure may hold
        tensors of the batch. A sample that has converged is not updated any more. f must be one fixed map while it is
        solved: no fresh dropout masks, no noise.
    z0: the first guess, a tensor (B, *shape) fp32, bf16, fp16 or fp64, or a tuple or list of such that share B. States
        are kept and mixed in fp32 (fp64 if one of z0 is).
    solver: `deqkern.solvers.anderson()` if None. `picard()` is plain iteration; what has another slope than `Frozen()`,
        or a window, is refused.
    rtol: relative 2-norm of the error of each sample, as estimated; of all parts of a tuple together. 0 goes on until
        the residual is rounding. In half precision a sample has also converged when its residual is below one eps.
    gradient: None, "implicit" (arXiv 1909.01377), "phantom" (arXiv 2111.05177), or `deqkern.gradients.Implicit` or
        `Phantom`: makes `value` differentiable, once and not twice, by whatever f depends on. Its None for solver, rtol
        and max_iterations means those of this solve. f is called once more, and its graph kept. z0 gets no gradient:
        the solution does not depend on it. Under torch.no_grad() there is none, and no further call.
    callback: called with (iteration, z as z0, error_estimate (B,)) after each iteration.

    `value` of the result is z, as z0; `trajectory` (2, B, *shape) is z0 and z, (2, B, D) for a tuple, side by side.
    `nfe` counts every sample in every call, `nfe_history` without the one for the gradient. A sample whose residual
    grows a thousandfold goes on from z0 with plain iteration. One that does not converge is reported in the `Solution`
    and by one `ConvergenceWarning`. Raises ValueError or TypeError for an argument that does not fit, or if f returns
    other shapes or NaN.
    """
    solver = anderson() if solver is None else solver
    method = check_options(f, solver, rtol, max_iterations, gradient)
    check_callback(callback)
    layout = Layout.of(z0, "z0")
    found = solved(f, layout, layout.rows(z0), solver, rtol, max_iterations, callback)
    warn_unless_converged(found)
    rows = found.value  # (B, D)
    if method is not None and torch.is_grad_enabled():
        linear = Linearized(f, layout, rows)
        found = replace(found, nfe=found.nfe + 1)
        if linear.depends():
            rows = _Attached.apply(_Cotangent(linear, method, solver, rtol, max_iterations), rows, linear.out)
    return layout.solution(found, rows)


def check_options(
    f: Function, solver: Solver, rtol: float, max_iterations: int, gradient: str | Implicit | Phantom | None = None
) -> Implicit | Phantom | None:
    """Refuse what `fixed_point` cannot do; the gradient that `gradient` names."""
    check_callable("f", f)
    _check_plain("solver", solver)
    check_rtol(rtol)
    check_count("max_iterations", max_iterations)
    method = named(gradient, ("implicit", "phantom"))
    assert method is None or isinstance(method, Implicit | Phantom)
    if isinstance(method, Implicit) and method.solver is not None:
        _check_plain("gradient.solver", method.solver)
    return method


def _check_plain(name: str, solver: Solver) -> None:
    check_solver(name, solver)
    if not isinstance(solver.slope, Frozen) or solver.slope.shrinkage != 0:
        raise ValueError(f"{name} of a fixed point must have the slope Frozen(), got {solver.slope}")
    if solver.window is not None:
        raise ValueError(f"{name} of a fixed point must have no window, got {solver.window}")


class _Step(Trajectory):
    """One implicit step x[1] = a x[0] + f(x[1]). The map is called on the whole batch, also where it has converged."""

    def __init__(self, map: Map, table: StepTable, first: Tensor, rounding: float) -> None:
        self.rounding = rounding
        basis = Basis.identity(tuple(first.shape[1:]), first.device)
        super().__init__(map, table, basis, torch.stack([first, first]), None)
        self.scale.fill_(torch.inf)

    def settled(self, rtol: float) -> Tensor:
        # a small residual alone says nothing of the error where f hardly contracts
        return torch.full_like(self.table.b, self.rounding)

    def where(self, steps: Tensor) -> str:
        return ""

    def select(self, rows: Ints) -> None:
        super().select(rows)
        self._counts = torch.ones_like(self.nfe)  # the map sees all of the batch

    def evaluate(self, out: Tensor) -> None:
        samples = torch.arange(self.batch, device=out.device)
        out[0] = self.map(self.x[1], torch.zeros_like(samples), samples)


class _Called:
    """f as the map of `_STEP`."""

    what, dtype, precision = "f returned", None, 0.0

    def __init__(self, f: Function, layout: Layout) -> None:
        self.f, self.layout = f, layout

    def __call__(self, states: Tensor, steps: Tensor, samples: Tensor) -> Tensor:
        return self.layout.output(self.f(self.layout.state(states)))


def solved(
    f: Function,
    layout: Layout,
    first: Tensor,  # (B, D)
    solver: Solver,
    rtol: float,
    max_iterations: int,
    callback: Callable[[int, Any, Tensor], None] | None = None,
) -> Solution:
    """The solution in rows: `value` (B, D), `trajectory` (2, B, D)."""
    follow = None
    if callback is not None:
        told = callback

        def follow(iteration: int, rows: Tensor, estimate: Tensor) -> None:
            told(iteration, layout.state(rows), estimate)

    with torch.no_grad():
        return solve(
            _Step(_Called(f, layout), _STEP, first, layout.rounding),
            solver,
            rtol=rtol,
            max_iterations=max_iterations,
            callback=follow,
            dtype=layout.dtype,
        )


class Linearized:
    """f around one state, under autograd, and its transposed Jacobian as the map of `_TRANSPOSED`."""

    what, dtype, precision = "f has a gradient with", None, 0.0

    def __init__(self, f: Function, layout: Layout, rows: Tensor) -> None:
        self.layout = layout
        with torch.inference_mode(False), torch.enable_grad():  # in inference mode the output would depend on nothing
            self.z = rows.detach().clone().requires_grad_()
            self.out = layout.output(f(layout.state(self.z)))  # (B, D)

    def depends(self) -> bool:
        """Whether anything but z requires the gradient of f."""
        return any(value is not self.z for value in leaves(self.out))

    def pull(self, v: Tensor, create_graph: bool = False) -> Tensor:
        """J^T v (B, D)."""
        return pull(self.out, self.z, v, retain_graph=True, create_graph=create_graph)[0]

    def __call__(self, states: Tensor, steps: Tensor, samples: Tensor) -> Tensor:
        return self.pull(states)


@dataclass(frozen=True)
class _Cotangent:
    """From L = dL/dz to v, what f's own graph must be given: v = L + J^T v, or a part of its Neumann series."""

    linear: Linearized
    gradient: Implicit | Phantom
    solver: Solver
    rtol: float
    max_iterations: int

    @uncompiled
    def __call__(self, cotangent: Tensor) -> Tensor:  # (B, D)
        if not bool(cotangent.isfinite().all()):
            return torch.full_like(cotangent, torch.nan)  # for a gradient scaler to see
        if isinstance(self.gradient, Phantom):
            v = self.gradient.tau * cotangent
            for _ in range(self.gradient.steps - 1):
                v = torch.lerp(v, self.linear.pull(v) + cotangent, self.gradient.tau)
            return v
        gradient = self.gradient
        found = solve(
            _Step(self.linear, _TRANSPOSED, cotangent, self.linear.layout.rounding),
            gradient.solver or self.solver,
            rtol=self.rtol if gradient.rtol is None else gradient.rtol,
            max_iterations=gradient.max_iterations or self.max_iterations,
            dtype=cotangent.dtype,
        )
        if gradient.callback is not None:
            gradient.callback(found)
        warn_unless_converged(found, "gradient: ")
        return found.value


class _Attached(torch.autograd.Function):
    """`value` on the graph of `out`, through a `_Cotangent`."""

    @staticmethod
    def forward(ctx: Any, cotangent: _Cotangent, value: Tensor, out: Tensor) -> Tensor:
        ctx.cotangent, ctx.backends = cotangent, requested_backends()
        return value.detach()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[None, None, Tensor]:
        with torch.no_grad(), use_backend(*ctx.backends):
            v = ctx.cotangent(cotangent)
        if torch.is_grad_enabled():  # create_graph: v depends on all that f does, and has no derivative here
            v = Once.apply(v, ctx.cotangent.linear.out)
        return None, None, v
