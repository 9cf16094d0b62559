"""Fixed points z = f(z) of any map: one implicit step of the engine, with gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..chain.step_table import StepTable
from ..engine.loop import Map, Solve, run
from ..engine.solution import Callback, Solution, warn_unless_converged
from ..engine.trajectory import Traits, Trajectory
from ..gradients.autograd import attach
from ..gradients.linearized import LinearizedChain, Pulled
from ..gradients.methods import Implicit, check_table, named
from ..gradients.pullback import Gradient, pull_back
from ..network.vjp import leaves, scaled_vjp
from ..solvers.basis import Basis
from ..solvers.presets import Solver, anderson, check_solver
from ..solvers.slopes import Frozen
from ..support.checks import check_callable, check_callback, check_count, check_rtol
from .state import Flattening, State

Function = Callable[[Any], Any]  # a state to one of the same shapes

_ONE, _ZERO = torch.ones(1, dtype=torch.float64, device="cpu"), torch.zeros(1, dtype=torch.float64, device="cpu")
STEP = StepTable(  # x[1] = f(x[1])
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


def fixed_point(
    f: Function,
    z0: State,
    *,
    solver: Solver | None = None,
    rtol: float = 1e-4,
    max_iterations: int = 50,
    gradient: str | Gradient | None = "implicit",
    callback: Callable[[int, Any, Tensor], None] | None = None,
) -> Solution:
    """Solve z = f(z), each sample to its own tolerance: a deep equilibrium model and the like.

    A sample whose residual grows a thousandfold continues from z0 with plain iteration. One that does not converge is
    reported in the `Solution` and by one `ConvergenceWarning`.

    Args:
        f: Called with the whole batch each time, in the dtypes of z0, and returns the same shapes; its closure may hold
            tensors of the batch. A sample that has converged is not updated any more. f must be one fixed map while it
            is solved: no fresh dropout masks, no noise.
        z0: The initial guess, a tensor (B, *shape) fp32, bf16, fp16 or fp64, or a tuple or list of such that share B.
            States are kept and mixed in fp32 (fp64 if one of z0 is).
        solver: `deqkern.solvers.anderson()` if None. `picard()` is plain iteration; what has another slope than
            `Frozen()`, or a window, is refused.
        rtol: Relative 2-norm of the error of each sample, as estimated; of all parts of a tuple together. 0 goes on
            until the residual is rounding. In half precision a sample has also converged when its residual is below one
            eps.
        max_iterations: The limit.
        gradient: None, "implicit", "phantom", `deqkern.gradients.Implicit` or `Phantom`, or an object of your own
            (`deqkern.gradients.Gradient`): makes `value` differentiable, once and not twice, by whatever f depends on.
            Its None for solver, rtol and max_iterations means those of this solve. f is called once more, and its graph
            kept. z0 gets no gradient: the solution does not depend on it. Under torch.no_grad() there is none, and no
            further call.
        callback: Called with (iteration, z as z0, error_estimate (B,)) after each iteration.

    Returns:
        A `Solution`: `value` is z, as z0; `trajectory` (2, B, *shape) is z0 and z, (2, B, D) for a tuple, side by side.
        `nfe` counts every sample in every call, `nfe_history` without the one for the gradient.

    Raises:
        ValueError: If an argument is out of range, or f returns other shapes, NaN or infinity.
        TypeError: If an argument is of another type, or f returns no tensors.

    Example:
        >>> weight = 0.1 * torch.randn(8, 8)
        >>> x = torch.randn(4, 8, requires_grad=True)
        >>> solution = deqkern.fixed_point(lambda z: torch.tanh(z @ weight + x), torch.zeros(4, 8))
        >>> solution.value.sum().backward()
        >>> solution.converged.all(), x.grad.shape
        (tensor(True), torch.Size([4, 8]))

    Reference:
        Bai, Kolter, Koltun: Deep equilibrium models, arXiv 1909.01377; Geng et al.: On training implicit models,
        arXiv 2111.05177.
    """
    solver = anderson() if solver is None else solver
    method = check_options(f, solver, rtol, max_iterations, gradient)
    check_callback(callback)
    flattening = Flattening.of(z0, "z0")
    options: dict[str, Any] = {"solver": solver, "rtol": rtol, "max_iterations": max_iterations}
    solution = solved(f, flattening, flattening.rows(z0), **options, callback=callback)
    warn_unless_converged(solution)
    rows = solution.value  # (B, D)
    if method is not None and torch.is_grad_enabled():
        linear = LinearizedMap(f, flattening, rows)
        solution = replace(solution, nfe=solution.nfe + 1)
        if linear.depends():
            rows = _attached(rows, linear, method, **options)
    return flattening.solution(solution, rows)


def _attached(
    rows: Tensor, linear: LinearizedMap, method: Gradient, *, solver: Solver, rtol: float, max_iterations: int
) -> Tensor:
    """The solution `rows` (B, D) on the graph of f's output."""

    def gradients(sources: Sequence[Any], cotangent: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
        step = _LinearizedStep(linear, solver, rtol, max_iterations=max_iterations)
        return pull_back(method, step, cotangent).inputs

    return attach(rows, [linear.out], gradients)


def check_options(
    f: Function, solver: Solver, rtol: float, max_iterations: int, gradient: str | Gradient | None = None
) -> Gradient | None:
    """Refuse what `fixed_point` cannot do; the gradient that `gradient` names."""
    check_callable("f", f)
    _check_plain("solver", solver)
    check_rtol(rtol)
    check_count("max_iterations", max_iterations)
    method = named(gradient, ("implicit", "phantom"))
    check_table(method, STEP)
    if isinstance(method, Implicit) and method.solver is not None:
        _check_plain("gradient.solver", method.solver)
    return method


def _check_plain(name: str, solver: Solver) -> None:
    check_solver(name, solver)
    if not isinstance(solver.slope, Frozen) or solver.slope.shrinkage != 0:
        raise ValueError(f"{name} of a fixed point must have the slope Frozen(), got {solver.slope}")
    if solver.window is not None:
        raise ValueError(f"{name} of a fixed point must have no window, got {solver.window}")


class _Called:
    """f as the map of `STEP`."""

    def __init__(self, f: Function, flattening: Flattening) -> None:
        self.f, self.flattening = f, flattening

    def __call__(self, states: Tensor, steps: Tensor, samples: Tensor) -> Tensor:
        return self.flattening.output(self.f(self.flattening.state(states)))


def solved(
    f: Function,
    flattening: Flattening,
    first: Tensor,  # (B, D)
    *,
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
            told(iteration, flattening.state(rows), estimate)

    traits = Traits(error_prefix="f returned", whole_batch=True, rounding=flattening.rounding)
    with torch.no_grad():
        return solve_step(
            _Called(f, flattening),
            first,
            STEP,
            traits=traits,
            solver=solver,
            rtol=rtol,
            max_iterations=max_iterations,
            callback=follow,
        )


def solve_step(
    map: Map,
    first: Tensor,  # (B, D)
    table: StepTable,
    *,
    traits: Traits,
    solver: Solver,
    rtol: float,
    max_iterations: int,
    callback: Callback | None = None,
) -> Solution:
    """The engine, for one implicit step x[1] = a x[0] + map(x[1]), for which the map sees the whole batch each time.

    Its residual has to be rounding: a small one alone says nothing of the error where the map hardly contracts.
    """
    basis = Basis.identity(tuple(first.shape[1:]), first.device)
    scale = torch.full((len(first),), torch.inf, dtype=torch.float64, device=first.device)
    trajectory = Trajectory(table, basis, torch.stack([first, first]), traits=traits, scale=scale)
    solve = Solve(trajectory, solver, rtol=rtol, max_iterations=max_iterations, dtype=first.dtype)
    return run(solve, map, callback)


class LinearizedMap:
    """f around one state, under autograd, with its transposed Jacobian J^T; as a map, that of the transposed step."""

    precision = 0.0
    table = STEP

    def __init__(self, f: Function, flattening: Flattening, rows: Tensor) -> None:
        self.flattening = flattening
        with torch.inference_mode(False), torch.enable_grad():  # in inference mode the output would depend on nothing
            self.z = rows.detach().clone().requires_grad_()
            self.out = flattening.output(f(flattening.state(self.z)))  # (B, D)

    def depends(self) -> bool:
        """Whether anything but z requires the gradient of f."""
        return any(value is not self.z for value in leaves(self.out))

    def transposed(self, v: Tensor, *, create_graph: bool = False) -> Tensor:
        """J^T v (B, D)."""
        return scaled_vjp(self.out, self.z, v, retain_graph=True, create_graph=create_graph)[0]

    def __call__(self, states: Tensor, steps: Tensor, samples: Tensor) -> Tensor:
        return self.transposed(states)

    def vjp(
        self, states: Tensor, cotangents: Tensor, steps: Tensor, samples: Tensor, inputs: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """J^T cotangents (B, D), and by the only input, the output of f itself, the cotangents."""
        return self.transposed(cotangents), [cotangents for _ in inputs]


class _LinearizedStep(LinearizedChain):
    """The chain of one implicit step whose input is f's output: the gradient of that goes to f's own graph.

    With L = dL/dz that is v = L + J^T v, or a part of its Neumann series.
    """

    def __init__(self, linear: LinearizedMap, solver: Solver, rtol: float, *, max_iterations: int) -> None:
        z = linear.z.detach()
        super().__init__(linear, z.expand(2, *z.shape), [linear.out], rtol=rtol)
        self.linear, self.solver, self.max_iterations = linear, solver, max_iterations

    def _solve(self, cotangent: Tensor, solver: Solver | None, rtol: float, max_iterations: int | None) -> Solution:
        rounding = self.linear.flattening.rounding
        return solve_step(
            self.linear,
            cotangent,
            self.transposed,
            traits=Traits(error_prefix="f has a gradient with", whole_batch=True, rounding=rounding),
            solver=solver or self.solver,
            rtol=rtol,
            max_iterations=max_iterations or self.max_iterations,
        )

    def collect(self, cotangents: Tensor, vjps: int | Tensor = 0) -> Pulled:
        self._sums = [cotangents[-1]]  # without a VJP by z, which gets no gradient
        return self.pulled(torch.zeros_like(cotangents[-1]), None, vjps)
