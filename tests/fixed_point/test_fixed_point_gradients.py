"""Gradients of `fixed_point` against autograd through its iteration."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from cells import BATCH, SIZE, SOLVERS, WIDE, Cell, leaf
from torch import Tensor

import deqkern
from deqkern import solvers
from deqkern.gradients import Implicit, Phantom
from deqkern.solvers import Solver


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("solver", SOLVERS[:2], ids=lambda solver: solver.name)
def test_implicit_is_autograd_through_the_iteration(solver: Solver, frozen: bool) -> None:
    """In eval mode too, and by an injected input alone."""
    cell, x = Cell().eval().requires_grad_(not frozen), leaf(BATCH, 3)
    z = torch.zeros(BATCH, SIZE, dtype=WIDE)
    solution = deqkern.fixed_point(lambda z: cell(z, x), z, solver=solver, rtol=1e-13, max_iterations=200)
    for _ in range(200):
        z = cell(z, x)
    inputs, cotangent = [x, *(p for p in cell.parameters() if p.requires_grad)], torch.randn_like(z)
    torch.testing.assert_close(solution.value, z, rtol=1e-11, atol=1e-11)
    wanted = torch.autograd.grad(z, inputs, cotangent)
    for found, expected in zip(torch.autograd.grad(solution.value, inputs, cotangent), wanted, strict=True):
        assert (found - expected).norm() <= 1e-10 * expected.norm()


def test_gradcheck() -> None:
    """By a parameter, an injected input, and what a closure makes of a leaf before; of both parts of a tuple."""
    gradient = Implicit(rtol=1e-13)

    def value(weight: Tensor, x: Tensor, early: Tensor) -> tuple[Tensor, ...]:
        held = early.exp()

        def f(state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            u, v = state
            return torch.tanh(v @ weight + x), 0.4 * torch.sin(u.view(2, 4)[:, :3]) * held

        z0 = torch.zeros(2, 2, 2, dtype=WIDE), torch.zeros(2, 3, dtype=WIDE)
        found = deqkern.fixed_point(
            lambda state: (lambda u, v: (u.view(2, 2, 2), v))(*f(state)), z0, rtol=1e-13, gradient=gradient
        )
        return tuple(found.value)

    weight = (0.5 * torch.randn(3, 4, dtype=WIDE)).requires_grad_()
    assert torch.autograd.gradcheck(value, (weight, leaf(2, 4), leaf(3)))


@pytest.mark.parametrize(("steps", "tau"), [(1, 1.0), (1, 0.3), (3, 1.0), (6, 0.6)])
def test_phantom_is_what_damped_iterations_let_through(steps: int, tau: float) -> None:
    cell, x = Cell(), leaf(BATCH, 3)
    solution = deqkern.fixed_point(
        lambda z: cell(z, x), torch.zeros(BATCH, SIZE, dtype=WIDE), rtol=1e-14, gradient=Phantom(steps, tau)
    )
    z = solution.value.detach()
    for _ in range(steps):
        z = (1 - tau) * z + tau * cell(z, x)
    inputs, cotangent = [x, *cell.parameters()], torch.randn_like(z)
    wanted = torch.autograd.grad(z, inputs, cotangent)
    for found, expected in zip(torch.autograd.grad(solution.value, inputs, cotangent), wanted, strict=True):
        assert (found - expected).norm() <= 1e-11 * expected.norm()


def test_the_gradient_of_half_precision() -> None:
    wide, x = Cell(torch.float32), torch.randn(BATCH, 3)
    narrow = Cell(torch.bfloat16)
    narrow.load_state_dict(wide.state_dict())
    for cell in (wide, narrow):
        dtype = cell.weight.dtype
        z0 = torch.zeros(BATCH, SIZE, dtype=dtype)
        with warnings.catch_warnings(action="error"):
            deqkern.fixed_point(lambda z: cell(z, x.to(dtype)), z0).value.float().square().sum().backward()  # noqa: B023
    assert narrow.weight.grad is not None and wide.weight.grad is not None
    assert (narrow.weight.grad.float() - wide.weight.grad).norm() <= 0.1 * wide.weight.grad.norm()


def test_no_graph_and_no_further_call_where_none_is_wanted() -> None:
    cell, x, calls = Cell(), torch.randn(BATCH, 3, dtype=WIDE), []
    z0 = torch.zeros(BATCH, SIZE, dtype=WIDE, requires_grad=True)

    def f(z: Tensor) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return cell(z, x)

    plain = deqkern.fixed_point(f, z0, gradient=None)
    assert not plain.value.requires_grad and calls == [False] * plain.iterations
    for mode in (torch.no_grad, torch.inference_mode):
        calls.clear()
        with mode():
            found = deqkern.fixed_point(f, z0)
        assert not found.value.requires_grad and calls == [False] * found.iterations
    calls.clear()
    cell.requires_grad_(False)
    found = deqkern.fixed_point(f, z0)
    assert not found.value.requires_grad, "z0 requires grad, but the solution does not depend on it"
    assert calls == [False] * found.iterations + [True] and found.nfe.tolist() == [len(calls)] * BATCH
    assert torch.equal(found.value, plain.value)
    cell.requires_grad_(True)
    attached = deqkern.fixed_point(f, z0).value
    assert torch.equal(attached, plain.value)
    assert torch.autograd.grad(attached.sum(), [cell.weight, z0], allow_unused=True)[1] is None


@pytest.mark.parametrize("gradient", ["implicit", "phantom"])
@pytest.mark.parametrize("power", [1, 2])
def test_differentiating_twice_raises(power: int, gradient: str) -> None:
    """Also where the first cotangent does not depend on anything, and by autograd.grad."""
    cell, x = Cell(), leaf(BATCH, 3)
    value = deqkern.fixed_point(lambda z: cell(z, x), torch.zeros(BATCH, SIZE, dtype=WIDE), gradient=gradient).value
    once = torch.autograd.grad((value**power).sum(), [cell.weight, x], create_graph=True)
    for first in once:
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            torch.autograd.grad(first.sum(), cell.weight, retain_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        once[0].square().sum().backward()


def test_parameters_changed_in_place_raise() -> None:
    cell, x = Cell(), torch.randn(BATCH, 3, dtype=WIDE)
    value = deqkern.fixed_point(lambda z: cell(z, x), torch.zeros(BATCH, SIZE, dtype=WIDE)).value
    with torch.no_grad():
        cell.weight.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()


def test_a_gradient_has_a_solver_and_a_tolerance_of_its_own() -> None:
    cell, x, z0 = Cell(), torch.randn(BATCH, 3, dtype=WIDE), torch.zeros(BATCH, SIZE, dtype=WIDE)
    counts = []
    for options in ({"rtol": 1e-2}, {}, {"solver": solvers.picard()}):
        seen: list[deqkern.Solution] = []
        gradient = Implicit(callback=seen.append, **options)
        solution = deqkern.fixed_point(lambda z: cell(z, x), z0, rtol=1e-10, max_iterations=200, gradient=gradient)
        solution.value.sum().backward()
        counts.append(seen[0].iterations)
    assert counts[0] < counts[1] < counts[2], counts


def test_a_gradient_that_does_not_converge_warns() -> None:
    cell, x, seen = Cell(), torch.randn(BATCH, 3, dtype=WIDE), []
    gradient = Implicit(solver=solvers.picard(), rtol=1e-9, max_iterations=2, callback=seen.append)
    z0 = torch.zeros(BATCH, SIZE, dtype=WIDE)
    value = deqkern.fixed_point(lambda z: cell(z, x), z0, gradient=gradient).value
    with pytest.warns(deqkern.ConvergenceWarning, match="gradient: 0 of 4 samples"):
        value.sum().backward()
    assert [solution.iterations for solution in seen] == [2]


def test_a_cotangent_that_overflowed_gives_nan() -> None:
    cell, x = Cell(), torch.randn(BATCH, 3, dtype=WIDE)
    value = deqkern.fixed_point(lambda z: cell(z, x), torch.zeros(BATCH, SIZE, dtype=WIDE)).value
    (found,) = torch.autograd.grad(value, cell.weight, torch.full_like(value, math.inf))
    assert found.isnan().any()
