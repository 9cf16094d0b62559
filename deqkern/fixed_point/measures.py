"""Measures of a map around its fixed points."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..engine.solution import ConvergenceWarning, Solution
from ..engine.trajectory import normal
from ..solvers.presets import Solver, anderson
from ..support.checks import check_callable, check_count, check_generator, check_number
from .solve import Function, LinearizedMap, check_options, solved
from .state import Flattening, State


def jacobian_regularization(
    f: Function, z: State, samples: int = 1, generator: torch.Generator | None = None
) -> Tensor:
    """Hutchinson's estimate of |J|_F^2 / (B D), a penalty that keeps f contracting, with J = df/dz at z.

    Differentiable by what f depends on, but not by z.

    Args:
        f: As in `fixed_point`.
        z: As z0 of `fixed_point`: the place.
        samples: Normal vectors to average over, one VJP each.
        generator: They are drawn from it.

    Returns:
        () fp32, or fp64 if z is.

    Raises:
        ValueError: If an argument is out of range, or f returns another shape.
        TypeError: If an argument is of another type.

    Example:
        >>> weight = (0.1 * torch.randn(8, 8)).requires_grad_()
        >>> z = torch.randn(4, 8)
        >>> penalty = deqkern.jacobian_regularization(lambda z: torch.tanh(z @ weight), z)
        >>> penalty.backward()
        >>> weight.grad.shape
        torch.Size([8, 8])

    Reference:
        Bai, Koltun, Kolter: Stabilizing equilibrium models by Jacobian regularization, arXiv 2106.14342, eq. 4.
    """
    flattening = _check_around(f, z, "samples", samples, generator)
    linear = LinearizedMap(f, flattening, flattening.rows(z))
    total, graph = linear.z.new_zeros(()), torch.is_grad_enabled()
    for _ in range(samples):
        total = total + linear.transposed(normal(linear.z, generator), create_graph=graph).square().mean()
    return total / samples


def spectral_radius(f: Function, z: State, iterations: int = 20, generator: torch.Generator | None = None) -> Tensor:
    """The largest modulus of an eigenvalue of df/dz at z, estimated by power iteration on the transposed Jacobian.

    The mean growth over the later half of the iterations, which complex pairs do not upset. It is an estimate: too
    small where the start hardly meets the eigenvector or the eigenvalues lie close, too large where a far from normal
    Jacobian still grows. Samples must not depend on each other in f. Below 1, plain iteration converges from nearby.
    No gradient.

    Args:
        f: As in `fixed_point`.
        z: As z0 of `fixed_point`: the place.
        iterations: Of power iteration, one VJP each.
        generator: The start is drawn from it.

    Returns:
        (B,) fp32, or fp64 if z is.

    Raises:
        ValueError: If an argument is out of range, or f returns another shape.
        TypeError: If an argument is of another type.

    Example:
        >>> radius = deqkern.spectral_radius(lambda z: 0.5 * z, torch.ones(2, 3))
        >>> [round(value, 3) for value in radius.tolist()]
        [0.5, 0.5]
    """
    flattening = _check_around(f, z, "iterations", iterations, generator)
    linear = LinearizedMap(f, flattening, flattening.rows(z))
    v, tiny = normal(linear.z, generator), torch.finfo(flattening.dtype).tiny
    logs = []
    for _ in range(iterations):
        v = linear.transposed(v / v.norm(dim=1, keepdim=True).clamp_min(tiny))
        logs.append(v.norm(dim=1).log())
    return torch.stack(logs[iterations // 2 :]).mean(0).exp()


def _check_around(f: Function, z: State, name: str, count: int, generator: torch.Generator | None) -> Flattening:
    check_callable("f", f)
    check_count(name, count)
    check_generator(generator)
    return Flattening.of(z, "z")


@dataclass(frozen=True, eq=False)
class PathIndependence:
    """Whether a fixed point depends on where its solve starts: what `path_independence` returns.

    Attributes:
        solutions: One `Solution` per start.
        converged: (B,) bool, from every start.
        distance: (B,) fp64, the largest |z - z'| / max(|z|, |z'|) of two solutions.
        alignment: (B,) fp64, the smallest cosine of two solutions: the asymptotic alignment of arXiv 2211.09961.
        path_independent: (B,) bool, converged and `distance` within the tolerance.

    Example:
        >>> measured = deqkern.path_independence(torch.cos, torch.zeros(2, 3))
        >>> len(measured.solutions), measured.path_independent.tolist()
        (3, [True, True])
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
    """Solve z = f(z) from several starts and compare the solutions of each sample.

    Agreement from few starts is no proof. One `ConvergenceWarning` if a sample did not converge from every start.

    Args:
        f: As in `fixed_point`.
        starts: A list of two starts or more; or one state as an example (a tensor or tuple), for zeros, a standard
            normal from `generator`, and, if B > 1, for each sample the solution from zeros of the one before it in the
            batch.
        solver: As in `fixed_point`.
        rtol: As in `fixed_point`.
        max_iterations: As in `fixed_point`.
        tolerance: The largest `distance` of equal solutions.
        generator: See starts.

    Returns:
        A `PathIndependence`.

    Raises:
        ValueError: If an argument is out of range, or f returns another shape, NaN or infinity.
        TypeError: If an argument is of another type.

    Example:
        A map with a fixed point near 1 and one near -1.

        >>> starts = [torch.ones(1, 2), -torch.ones(1, 2)]
        >>> measured = deqkern.path_independence(lambda z: torch.tanh(3 * z), starts)
        >>> measured.path_independent.tolist(), round(float(measured.distance), 2)
        ([False], 2.0)

    Reference:
        Anil et al.: Path independent equilibrium models can better exploit test-time computation, arXiv 2211.09961.
    """
    solver = anderson() if solver is None else solver
    check_options(f, solver, rtol, max_iterations)
    check_generator(generator)
    check_number("tolerance", tolerance)
    if not 0 < tolerance < math.inf:
        raise ValueError(f"tolerance must be finite and > 0, got {tolerance!r}")
    listed = isinstance(starts, list)
    if listed and len(starts) < 2:
        raise ValueError(f"starts must be a list of at least two starts, or an example, got a list of {len(starts)}")
    flattenings = [Flattening.of(start, "starts") for start in (starts if listed else [starts])]
    flattening = flattenings[0]
    if any(other != flattening for other in flattenings):
        raise ValueError("starts must have the same shapes and dtypes, on one device")

    def run(first: Tensor) -> Solution:
        return solved(f, flattening, first, solver=solver, rtol=rtol, max_iterations=max_iterations)

    if listed:
        found = [run(flattening.rows(start)) for start in starts]
    else:
        example = flattening.rows(starts)
        found = [run(torch.zeros_like(example)), run(normal(example, generator))]
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
        solutions=tuple(flattening.solution(solution, solution.value) for solution in found),
        converged=converged,
        distance=distance,
        alignment=alignment,
        path_independent=converged & (distance <= tolerance),
    )
