"""Fixed points z = f(z) of any map: one implicit step of the engine, with gradients, and measures of f around them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .gradients import Implicit, Once, Phantom, named
from .slopes import Frozen
from .solve import ConvergenceWarning, Solution, solve, warn_unless_converged
from .solvers import Solver, anderson
from .spectral import Basis
from .step_table import StepTable
from .trajectory import ROUNDINGS, Map, Trajectory

State = Any  # a tensor (B, *shape), or a tuple or list of tensors that share B
Function = Callable[[Any], Any]  # a state to one of the same shapes

# In half precision no residual need be better than this many eps of the dtype: it is rounding.
NARROW_ROUNDINGS = 1.0

_ONE, _ZERO = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
_STEP = StepTable(  # x[1] = f(x[1])
    timesteps=torch.zeros(1, dtype=torch.int64),
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
    u=_ZERO,
    w=_ONE,
    direction=_ONE,
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
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be callable, got {type(callback).__name__}")
    layout = _Layout.of(z0, "z0")
    found = _solved(f, layout, layout.rows(z0), solver, rtol, max_iterations, callback)
    warn_unless_converged(found)
    rows = found.value  # (B, D)
    if method is not None and torch.is_grad_enabled():
        linear = _Linearized(f, layout, rows)
        found = replace(found, nfe=found.nfe + 1)
        if linear.depends():
            rows = _Attached.apply(_Cotangent(linear, method, solver, rtol, max_iterations), rows, linear.out)
    return layout.solution(found, rows)


def check_options(
    f: Function, solver: Solver, rtol: float, max_iterations: int, gradient: str | Implicit | Phantom | None = None
) -> Implicit | Phantom | None:
    """Refuse what `fixed_point` cannot do; the gradient that `gradient` names."""
    if not callable(f):
        raise TypeError(f"f must be callable, got {type(f).__name__}")
    _check_solver("solver", solver)
    if not isinstance(rtol, (int, float)):
        raise TypeError(f"rtol must be a number, got {type(rtol).__name__}")
    if not 0 <= rtol < math.inf:
        raise ValueError(f"rtol must be finite and >= 0, got {rtol}")
    if not isinstance(max_iterations, int) or max_iterations < 1:
        raise ValueError(f"max_iterations must be an int >= 1, got {max_iterations!r}")
    method = named(gradient, ("implicit", "phantom"))
    assert method is None or isinstance(method, Implicit | Phantom)
    if isinstance(method, Implicit) and method.solver is not None:
        _check_solver("gradient.solver", method.solver)
    return method


def _check_solver(name: str, solver: Solver) -> None:
    if not isinstance(solver, Solver):
        raise TypeError(f"{name} must be a Solver, got {type(solver).__name__}")
    if not isinstance(solver.slope, Frozen) or solver.slope.shrinkage != 0:
        raise ValueError(f"{name} of a fixed point must have the slope Frozen(), got {solver.slope}")
    if solver.window is not None:
        raise ValueError(f"{name} of a fixed point must have no window, got {solver.window}")


@dataclass(frozen=True)
class _Layout:
    """How a state lies in rows (B, D): its parts side by side, in one dtype."""

    shapes: tuple[tuple[int, ...], ...]  # (B, *shape) of each part
    dtypes: tuple[torch.dtype, ...]
    kind: type | None  # tuple or list, None for a tensor
    device: torch.device

    @classmethod
    def of(cls, state: State, name: str) -> _Layout:
        """That of `state`, an argument called `name`, which must hold finite numbers."""
        kind = type(state) if type(state) in (tuple, list) else None
        parts = state if kind else (state,)
        if not parts:
            raise ValueError(f"{name} is an empty {type(state).__name__}")
        for part in parts:
            if not isinstance(part, Tensor):
                raise TypeError(f"{name} must be a tensor, or a tuple or list of tensors, got {type(part).__name__}")
            if part.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                raise TypeError(f"{name} must be fp32, bf16, fp16 or fp64, got {part.dtype}")
            if part.ndim < 1 or part.numel() == 0:
                raise ValueError(f"{name} must have shape (B, *shape) and not be empty, got {tuple(part.shape)}")
            if len(part) != len(parts[0]) or part.device != parts[0].device:
                raise ValueError(f"{name} must hold tensors of one batch size on one device")
            if not bool(part.isfinite().all()):
                raise ValueError(f"{name} must be finite")
        shapes, dtypes = tuple(tuple(part.shape) for part in parts), tuple(part.dtype for part in parts)
        return cls(shapes, dtypes, kind, parts[0].device)

    @property
    def dtype(self) -> torch.dtype:
        """That of rows: fp32, or fp64 if a part is."""
        return torch.float64 if torch.float64 in self.dtypes else torch.float32

    @property
    def rounding(self) -> float:
        """The relative residual that is nothing but the rounding of the narrowest part."""
        narrow = [NARROW_ROUNDINGS * torch.finfo(dtype).eps for dtype in self.dtypes if dtype.itemsize == 2]
        return max([ROUNDINGS * torch.finfo(self.dtype).eps, *narrow])

    def rows(self, state: State) -> Tensor:  # (B, D)
        """A state like the one that this was made from."""
        parts = (state,) if self.kind is None else state
        return torch.cat([part.reshape(len(part), -1).to(self.dtype) for part in parts], 1)

    def output(self, state: State) -> Tensor:  # (B, D)
        """The rows of what f returned. Raises if it is no state."""
        if self.kind is not None and (not isinstance(state, tuple | list) or len(state) != len(self.shapes)):
            raise TypeError(f"f must return a tuple or list of {len(self.shapes)} tensors, got {type(state).__name__}")
        parts = (state,) if self.kind is None else state
        for part, shape in zip(parts, self.shapes, strict=True):
            if not isinstance(part, Tensor):
                raise TypeError(f"f must return what it is given, a tensor for a tensor, got {type(part).__name__}")
            if not part.is_floating_point():
                raise TypeError(f"f must return floating-point tensors, got {part.dtype}")
            if tuple(part.shape) != shape:
                raise ValueError(f"f returned shape {tuple(part.shape)} for an input of shape {shape}")
            if part.device != self.device:
                raise ValueError(f"f returned a tensor on {part.device} for an input on {self.device}")
        return self.rows(state)

    def state(self, rows: Tensor) -> State:
        """The state whose rows are (B, D), in memory of its own."""
        widths = [math.prod(shape[1:]) for shape in self.shapes]
        parts = [
            part.reshape(shape).to(dtype, copy=True, memory_format=torch.contiguous_format)
            for part, shape, dtype in zip(rows.split(widths, 1), self.shapes, self.dtypes, strict=True)
        ]
        return parts[0] if self.kind is None else self.kind(parts)

    def solution(self, found: Solution, rows: Tensor) -> Solution:
        """`found`, of rows, with the value `rows` (B, D) as a state."""
        trajectory = found.trajectory if self.kind else found.trajectory.view(2, *self.shapes[0])
        return replace(found, value=self.state(rows), trajectory=trajectory)


class _Step(Trajectory):
    """One implicit step x[1] = a x[0] + f(x[1]). The map is called on the whole batch, also where it has converged."""

    def __init__(self, map: Map, table: StepTable, first: Tensor, rounding: float) -> None:
        self.rounding = rounding
        basis = Basis.identity(tuple(first.shape[1:]), first.device)
        super().__init__(map, table, basis, torch.stack([first, first]), None)
        self.scale.fill_(torch.inf)

    def settled(self, rtol: float) -> float:
        return self.rounding  # a small residual alone says nothing of the error where f hardly contracts

    def where(self, steps: Tensor) -> str:
        return ""

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        self._counts = torch.ones_like(self.nfe)  # the map sees all of the batch

    def evaluate(self, out: Tensor) -> None:
        samples = torch.arange(self.batch, device=out.device)
        out[0] = self.map(self.x[1], torch.zeros_like(samples), samples)


class _Called:
    """f as the map of `_STEP`."""

    what = "f returned"

    def __init__(self, f: Function, layout: _Layout) -> None:
        self.f, self.layout = f, layout

    def __call__(self, states: Tensor, steps: Tensor, samples: Tensor) -> Tensor:
        return self.layout.output(self.f(self.layout.state(states)))


def _solved(
    f: Function,
    layout: _Layout,
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
            _Step(_Called(f, layout), _STEP, first.detach(), layout.rounding),
            solver,
            rtol=rtol,
            max_iterations=max_iterations,
            callback=follow,
            dtype=layout.dtype,
        )


class _Linearized:
    """f around one state, under autograd, and its transposed Jacobian as the map of `_TRANSPOSED`."""

    what = "f has a gradient with"

    def __init__(self, f: Function, layout: _Layout, rows: Tensor) -> None:
        self.layout = layout
        with torch.enable_grad():
            self.z = rows.detach().requires_grad_()
            self.out = layout.output(f(layout.state(self.z)))  # (B, D)

    def depends(self) -> bool:
        """Whether anything but z requires the gradient of f."""
        seen, nodes = set(), [self.out.grad_fn]
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if getattr(node, "variable", self.z) is not self.z:
                return True
            nodes += [following for following, _ in node.next_functions]
        return False

    def pull(self, v: Tensor, create_graph: bool = False) -> Tensor:
        """J^T v (B, D); v is scaled to a largest entry of 1 for f, whose dtype may be narrow."""
        if not self.out.requires_grad:
            return torch.zeros_like(v)
        scale = v.abs().amax().clamp_min(torch.finfo(v.dtype).tiny)
        (found,) = torch.autograd.grad(
            self.out,
            self.z,
            v / scale,
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )
        return found * scale

    def __call__(self, states: Tensor, steps: Tensor, samples: Tensor) -> Tensor:
        return self.pull(states)


@dataclass(frozen=True)
class _Cotangent:
    """From L = dL/dz to v, what f's own graph must be given: v = L + J^T v, or a part of its Neumann series."""

    linear: _Linearized
    gradient: Implicit | Phantom
    solver: Solver
    rtol: float
    max_iterations: int

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
        if not bool(found.converged.all()):
            warnings.warn(f"gradient: {found.message}", ConvergenceWarning, stacklevel=2)
        return found.value


class _Attached(torch.autograd.Function):
    """`value` on the graph of `out`, through a `_Cotangent`."""

    @staticmethod
    def forward(ctx: Any, cotangent: _Cotangent, value: Tensor, out: Tensor) -> Tensor:
        ctx.cotangent = cotangent
        return value.detach()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[None, None, Tensor]:
        with torch.no_grad():
            v = ctx.cotangent(cotangent.contiguous())
        if torch.is_grad_enabled():  # create_graph: v depends on all that f does, and has no derivative here
            v = Once.apply(v, ctx.cotangent.linear.out)
        return None, None, v


def jacobian_regularization(
    f: Function, z: State, samples: int = 1, generator: torch.Generator | None = None
) -> Tensor:
    """Hutchinson's estimate of |J|_F^2 / (B D), the penalty of arXiv 2106.14342 (eq. 4), with J = df/dz at z: ().

    Differentiable by what f depends on, but not by z. samples: normal vectors to average over, one VJP each; they are
    drawn from `generator`. f, z: as in `fixed_point`.
    """
    layout = _check_around(f, z, "samples", samples, generator)
    linear = _Linearized(f, layout, layout.rows(z))
    total, graph = linear.z.new_zeros(()), torch.is_grad_enabled()
    for _ in range(samples):
        total = total + linear.pull(_normal(linear.z, generator), graph).square().mean()
    return total / samples


def spectral_radius(f: Function, z: State, iterations: int = 20, generator: torch.Generator | None = None) -> Tensor:
    """The largest modulus of an eigenvalue of df/dz at z (B,), estimated by power iteration on the transposed Jacobian.

    The mean growth over the later half of the iterations, which complex pairs do not upset. It is an estimate: too
    small where the start (drawn from `generator`) hardly meets the eigenvector or the eigenvalues lie close, too large
    where a far from normal Jacobian still grows. Samples must not depend on each other in f. Below 1, plain iteration
    converges from nearby. f, z: as in `fixed_point`; no gradient.
    """
    layout = _check_around(f, z, "iterations", iterations, generator)
    linear = _Linearized(f, layout, layout.rows(z))
    v, tiny = _normal(linear.z, generator), torch.finfo(layout.dtype).tiny
    logs = []
    for _ in range(iterations):
        v = linear.pull(v / v.norm(dim=1, keepdim=True).clamp_min(tiny)).detach()
        logs.append(v.norm(dim=1).log())
    return torch.stack(logs[iterations // 2 :]).mean(0).exp()


def _check_around(f: Function, z: State, name: str, count: int, generator: torch.Generator | None) -> _Layout:
    if not callable(f):
        raise TypeError(f"f must be callable, got {type(f).__name__}")
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"{name} must be an int >= 1, got {count!r}")
    _check_generator(generator)
    return _Layout.of(z, "z")


def _check_generator(generator: torch.Generator | None) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")


def _normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    return torch.randn(like.shape, generator=generator, device=device, dtype=like.dtype).to(like.device)


@dataclass(frozen=True)
class PathIndependence:
    """Whether a fixed point depends on where its solve starts.

    solutions: one per start. converged: (B,) bool, from every start.
    distance: (B,) fp64, the largest |z - z'| / max(|z|, |z'|) of two solutions.
    alignment: (B,) fp64, the smallest cosine of two solutions: the asymptotic alignment of arXiv 2211.09961.
    path_independent: (B,) bool, converged and `distance` within the tolerance.
    """

    solutions: tuple[Solution, ...]
    converged: Tensor
    distance: Tensor
    alignment: Tensor
    path_independent: Tensor


def path_independence(
    f: Function,
    starts: State | Sequence[State],
    *,
    solver: Solver | None = None,
    rtol: float = 1e-4,
    max_iterations: int = 50,
    tolerance: float = 1e-2,
    generator: torch.Generator | None = None,
) -> PathIndependence:
    """Solve z = f(z) from several starts and compare the solutions of each sample (arXiv 2211.09961).

    starts: a list of two starts or more; or one state as an example (a tensor or tuple), for zeros, a standard normal
        from `generator`, and, if B > 1, for each sample the solution from zeros of the one before it in the batch.
    f, solver, rtol, max_iterations: as in `fixed_point`. tolerance: the largest `distance` of equal solutions.

    Agreement from few starts is no proof. One `ConvergenceWarning` if a sample did not converge from every start.
    """
    solver = anderson() if solver is None else solver
    check_options(f, solver, rtol, max_iterations)
    _check_generator(generator)
    if not isinstance(tolerance, (int, float)) or not 0 < tolerance < math.inf:
        raise ValueError(f"tolerance must be finite and > 0, got {tolerance!r}")
    listed = isinstance(starts, list)
    if listed and len(starts) < 2:
        raise ValueError(f"starts must be a list of at least two starts, or an example, got a list of {len(starts)}")
    layouts = [_Layout.of(start, "starts") for start in (starts if listed else [starts])]
    layout = layouts[0]
    if any(other != layout for other in layouts):
        raise ValueError("starts must have the same shapes and dtypes, on one device")

    def run(first: Tensor) -> Solution:
        return _solved(f, layout, first, solver, rtol, max_iterations)

    if listed:
        found = [run(layout.rows(start)) for start in starts]
    else:
        example = layout.rows(starts)
        found = [run(torch.zeros_like(example)), run(_normal(example, generator))]
        if len(example) > 1:
            found.append(run(found[0].value.roll(1, 0)))
    ends = torch.stack([solution.value for solution in found]).double()  # (starts, B, D)
    norms = ends.norm(dim=-1)
    distance, alignment = torch.zeros_like(norms[0]), torch.ones_like(norms[0])
    for i in range(len(ends)):
        for j in range(i):
            apart = (ends[i] - ends[j]).norm(dim=-1)
            distance = torch.maximum(distance, (apart / torch.maximum(norms[i], norms[j])).nan_to_num(0.0))
            cosine = (ends[i] * ends[j]).sum(-1) / (norms[i] * norms[j])
            alignment = torch.minimum(alignment, torch.where(apart == 0, 1.0, cosine.nan_to_num(0.0)))
    converged = torch.stack([solution.converged for solution in found]).all(0)
    if not bool(converged.all()):
        message = f"{int(converged.sum())} of {len(converged)} samples converged from all {len(found)} starts"
        warnings.warn(message, ConvergenceWarning, stacklevel=2)
    return PathIndependence(
        solutions=tuple(layout.solution(solution, solution.value) for solution in found),
        converged=converged,
        distance=distance,
        alignment=alignment,
        path_independent=converged & (distance <= tolerance),
    )
