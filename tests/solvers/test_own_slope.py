"""A slope of the user's own as the slope of a `Solver`: constant ones, and ones that learn."""

from __future__ import annotations

from typing import Any

import problems
import pytest
import torch
from asserts import relative_error
from torch import Tensor

import deqkern
from deqkern import NoiseSchedule, gradients, ops, slopes, solvers

SCHEDULE, SHAPE, STEPS = NoiseSchedule.linear(), (1, 8, 8), 30


class Wiener:
    """The Wiener filter of Gaussian data: what `Gaussian(0.02)` is."""

    adapts = False

    def initial(self, table: Any, basis: Any) -> Tensor:
        kappa = table.sigma**2 / (0.02 * table.alpha**2 + table.sigma**2)
        return kappa[:, None].expand(-1, len(basis.bands) - 1)


class Momentum:
    """Secants of the moments of all iterations, each with half the weight of the one after it."""

    adapts, measures_at_once = True, True

    def __init__(self) -> None:
        self.calls: list[tuple[torch.Size, torch.Size]] = []

    def initial(self, table: Any, basis: Any) -> Tensor:
        self.sums: Any = 0.0
        self.calls.clear()
        return slopes.Gaussian().initial(table, basis)

    def refine(self, slope: Tensor, moments: Tensor, low: Tensor, high: Tensor) -> None:
        self.calls.append((slope.shape, moments.shape))
        self.sums = moments + 0.5 * self.sums
        cross, square = self.sums.unbind(-1)
        secant = (cross / square).clamp(low[:, None, None], high[:, None, None])
        slope.copy_(torch.where(square > 0, secant, slope))


class Again(Momentum):
    """What `Secant` does, of another class."""

    def refine(self, slope: Tensor, moments: Tensor, low: Tensor, high: Tensor) -> None:
        self.calls.append((slope.shape, moments.shape))
        ops.secant_slope(moments, low, high, 1e-2, slope)


class Late(Again):
    measures_at_once = False


def test_a_constant_slope_is_used_as_those_of_deqkern() -> None:
    model = problems.Gaussian(SCHEDULE, torch.zeros(64), torch.full((64,), 0.02))
    noise = torch.randn(2, *SHAPE)
    one, other = (
        deqkern.sample(model, noise, SCHEDULE, STEPS, solver=solvers.Solver(slope=slope), rtol=1e-3)
        for slope in (Wiener(), slopes.Gaussian(0.02))
    )
    assert one.iterations == other.iterations == 1 and torch.equal(one.value, other.value)
    mixed = solvers.Solver(slope=Wiener(), history_size=3, beta=0.9)
    found = deqkern.sample(model, noise, SCHEDULE, STEPS, solver=mixed, rtol=0)
    assert relative_error(found.value, problems.chain(model, noise, SCHEDULE, STEPS)).max() <= 1e-5


@pytest.mark.parametrize(("slope", "like"), [(Again(), slopes.Secant()), (Late(), slopes.Secant(slopes.Gaussian()))])
def test_a_learning_slope_is_refined_as_those_of_deqkern(slope: Again, like: slopes.Secant) -> None:
    model = problems.mixture(SCHEDULE, SHAPE, torch.Generator().manual_seed(3))
    for window in (None, 0.5):
        noise = torch.randn(2, *SHAPE)
        mine, theirs = (
            deqkern.sample(model, noise, SCHEDULE, STEPS, solver=solvers.Solver(slope=each, window=window), rtol=1e-3)
            for each in (slope, like)
        )
        assert torch.equal(mine.value, theirs.value) and torch.equal(mine.nfe, theirs.nfe)
        assert len(slope.calls) == mine.iterations - (not slope.measures_at_once)
        assert set(slope.calls) == {((STEPS, 2, 8), (STEPS, 2, 8, 2))}


@pytest.mark.parametrize("slope", [Wiener(), Momentum()], ids=lambda slope: type(slope).__name__)
@pytest.mark.parametrize("options", [{}, {"window": 0.5}, {"thinning": 0.3}], ids=str)
def test_sampling_inversion_and_gradients_converge(slope: Any, options: dict[str, Any]) -> None:
    model = problems.mixture(SCHEDULE, SHAPE, torch.Generator().manual_seed(3))
    solver = solvers.Solver(slope=slope, **options)
    noise = torch.randn(2, *SHAPE, requires_grad=True)
    gradient = gradients.Implicit(solver=solvers.Solver(slope=slope), rtol=1e-5)
    found = deqkern.sample(model, noise, SCHEDULE, STEPS, solver=solver, rtol=1e-4, gradient=gradient)
    expected = problems.chain(model, noise, SCHEDULE, STEPS)
    assert found.converged.all() and relative_error(found.value.detach(), expected.detach()).max() <= 3e-4
    (mine,) = torch.autograd.grad(found.value.sum(), noise)
    (wanted,) = torch.autograd.grad(expected.sum(), noise)
    assert relative_error(mine, wanted).max() <= 1e-2
    back = deqkern.invert(model, found.value.detach(), SCHEDULE, STEPS, solver=solver, sigma_min=0.08)
    again = problems.chain(model, back.value, SCHEDULE, STEPS, sigma_min=0.08)
    assert back.converged.all() and relative_error(again, found.value.detach()).max() <= 1e-2


def test_a_slope_starts_the_secants() -> None:
    model = problems.Gaussian(SCHEDULE, torch.zeros(64), torch.full((64,), 0.02))
    noise = torch.randn(2, *SHAPE)
    solver = solvers.Solver(slope=slopes.Secant(start=Wiener()))
    assert deqkern.sample(model, noise, SCHEDULE, STEPS, solver=solver, rtol=1e-3).iterations == 1


def with_attributes(**attributes: Any) -> Any:
    return type("Mine", (), attributes)()


@pytest.mark.parametrize(
    ("slope", "words"),
    [
        (3, "slope must be one of deqkern.slopes or an object like them, got int, which has no adapts and no initial$"),
        (with_attributes(adapts=False), "got Mine, which has no initial$"),
        (with_attributes(initial=lambda *given: 0), "got Mine, which has no adapts$"),
        (
            with_attributes(adapts=True, initial=lambda *given: 0),
            "got Mine, which has no measures_at_once and no refine$",
        ),
        (with_attributes(adapts=1, initial=lambda *given: 0, measures_at_once=True, refine=print), "must be a bool"),
        (with_attributes(adapts=False, initial=3), "slope.initial must be a method, got 3"),
        (slopes.Gaussian, "slope must be an object, got the class Gaussian"),
    ],
)
def test_what_is_no_slope_is_refused_with_what_it_lacks(slope: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        solvers.Solver(slope=slope)


@pytest.mark.parametrize("options", [{"history_size": 2}, {"beta": 0.5}])
def test_a_learning_slope_goes_with_no_mixing(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="needs a slope that does not adapt"):
        solvers.Solver(slope=Momentum(), **options)


@pytest.mark.parametrize(
    ("shrinkage", "error", "words"),
    [
        (torch.zeros(STEPS, 1), ValueError, r"must return shape \(30, 8\), one row per step, got \(30, 1\)"),
        (torch.zeros(STEPS + 1, 8), ValueError, r"must return shape \(30, 8\), one row per step, got \(31, 8\)"),
        (torch.full((STEPS, 8), torch.nan), ValueError, "returns must be finite"),
        (
            torch.zeros(STEPS, 8, dtype=torch.int64),
            TypeError,
            "must return a tensor of floating-point .* got torch.int",
        ),
        (None, TypeError, "must return a tensor of floating-point numbers, got NoneType"),
    ],
)
@pytest.mark.parametrize("as_start", [False, True])
def test_initial_shrinkages_are_checked(as_start: bool, shrinkage: Any, error: type[Exception], words: str) -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("the model was called")

    slope = with_attributes(adapts=False, initial=lambda self, table, basis: shrinkage)
    solver = solvers.Solver(slope=slopes.Secant(start=slope) if as_start else slope)
    with pytest.raises(error, match=f"initial of the slope Mine {words}"):
        deqkern.sample(model, torch.randn(2, *SHAPE), SCHEDULE, STEPS, solver=solver)


def test_a_fixed_point_has_no_slope_to_choose() -> None:
    with pytest.raises(ValueError, match="solver of a fixed point must have the slope Frozen"):
        deqkern.fixed_point(torch.cos, torch.zeros(1, 1), solver=solvers.Solver(slope=Wiener()))
