"""The measures of a map around its fixed points."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cells import BATCH, SIZE, WIDE, Cell
from torch import Tensor

import deqkern
from deqkern import solvers


def test_jacobian_regularization_is_the_frobenius_norm() -> None:
    cell, x = Cell(), torch.randn(BATCH, 3, dtype=WIDE)
    z = torch.randn(BATCH, SIZE, dtype=WIDE)
    bend = 1 - cell(z, x).square()  # J = diag(bend) weight^T
    exact = (bend[:, :, None] * cell.weight.T).square().sum() / z.numel()
    wanted = torch.autograd.grad(exact, list(cell.parameters()))
    generator = torch.Generator().manual_seed(0)
    found = deqkern.jacobian_regularization(lambda z: cell(z, x), z, samples=2000, generator=generator)
    assert (found - exact).abs() <= 0.03 * exact
    for grad, expected in zip(torch.autograd.grad(found, list(cell.parameters())), wanted, strict=True):
        assert (grad - expected).norm() <= 0.1 * expected.norm()
    again = z.clone().requires_grad_()
    once = deqkern.jacobian_regularization(lambda z: cell(z, x), again, generator=generator.manual_seed(1))
    assert torch.autograd.grad(once, [cell.weight, again], allow_unused=True)[1] is None, "z is a place"
    with torch.no_grad():
        plain = deqkern.jacobian_regularization(lambda z: cell(z, x), z, 1, generator.manual_seed(1))
    assert not plain.requires_grad and torch.equal(plain, once)


def test_jacobian_regularization_of_a_tuple_in_half_precision() -> None:
    z = (torch.randn(2, 3).bfloat16(), torch.randn(2, 5, 1).bfloat16())
    found = deqkern.jacobian_regularization(lambda state: (0.5 * state[0], 2 * state[1]), z, samples=2000)
    assert abs(float(found) - (3 * 0.25 + 5 * 4) / 8) <= 0.1 and found.dtype is torch.float32


def test_spectral_radius_is_that_of_the_eigenvalues() -> None:
    matrices = torch.randn(8, SIZE, SIZE, dtype=WIDE)
    matrices[1] = torch.block_diag(*[torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=WIDE)] * 3)  # complex pairs only
    matrices[2] = 0
    matrices[3] *= 1e-6
    matrices[4] = torch.block_diag(
        *[torch.tensor([[0.0, 4.0], [-0.25, 0.0]], dtype=WIDE)] * 3
    )  # grows every other time
    expected = torch.linalg.eigvals(matrices).abs().amax(-1)
    generator = torch.Generator().manual_seed(0)
    found = deqkern.spectral_radius(
        lambda z: torch.einsum("bij,bj->bi", matrices, z), torch.randn(8, SIZE, dtype=WIDE), 400, generator
    )
    assert found.shape == (8,) and not found.requires_grad and found[2] == 0
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)


def test_spectral_radius_forgets_how_the_iteration_began() -> None:
    """J = 0.1 + N, N^2 = 0, |N| = 100: |J^T^k v| = k 0.1^(k - 1) 100 from the first of 20 iterations on."""
    matrix = torch.tensor([[0.1, 0.0], [100.0, 0.1]], dtype=WIDE)
    with torch.no_grad():
        found = deqkern.spectral_radius(lambda z: z @ matrix, torch.ones(1, 2, dtype=WIDE))
    assert abs(float(found) - 0.1 * 2**0.1) <= 1e-3


def test_the_measures_in_inference_mode_are_the_same() -> None:
    cell, x, z = Cell(), torch.randn(BATCH, 3, dtype=WIDE), torch.randn(BATCH, SIZE, dtype=WIDE)
    for measure in (deqkern.jacobian_regularization, deqkern.spectral_radius):
        seed = torch.Generator().manual_seed(0)
        expected = measure(lambda z: cell(z, x), z, 5, seed).detach()
        with torch.inference_mode():
            found = measure(lambda z: cell(z, x), z.clone(), 5, seed.manual_seed(0))
            assert torch.equal(found, expected) and (found > 0).all()


def test_a_contraction_is_path_independent_and_a_bistable_map_is_not() -> None:
    x = torch.randn(BATCH, 3, dtype=WIDE)
    cell, example = Cell().requires_grad_(False), torch.zeros(BATCH, SIZE, dtype=WIDE)
    found = deqkern.path_independence(lambda z: cell(z, x), example)
    assert len(found.solutions) == 3 and found.converged.all() and found.path_independent.all()
    assert (found.distance <= 1e-3).all() and (found.alignment >= 1 - 1e-5).all()
    mixed = found.solutions[2].trajectory[0]
    torch.testing.assert_close(mixed, found.solutions[0].value.roll(1, 0), rtol=0, atol=0)

    def both(z: Tensor) -> Tensor:  # the first sample has two roots, the others one
        gain = torch.tensor([3.0, 0.5, 0.5, 0.5], dtype=WIDE)[:, None]
        return torch.tanh(gain * z) + torch.tensor([0.0, 1.0, 1.0, 1.0], dtype=WIDE)[:, None]

    starts = [torch.ones(BATCH, 2, dtype=WIDE), -torch.ones(BATCH, 2, dtype=WIDE)]
    found = deqkern.path_independence(both, starts)
    assert found.converged.all() and found.path_independent.tolist() == [False, True, True, True]
    torch.testing.assert_close(found.distance[0], torch.tensor(2.0, dtype=WIDE), rtol=1e-3, atol=0)
    torch.testing.assert_close(found.alignment[0], torch.tensor(-1.0, dtype=WIDE), rtol=1e-3, atol=0)


def test_path_independence_compares_all_pairs() -> None:
    """Of the identity every start is a solution; the first and the last are the furthest from each other."""
    places = torch.tensor([[[3.0, 0.0], [0.0, 0.0], [1.0, 0.0]], [[0.0, 4.0], [0.0, 0.0], [0.0, 0.0]]])
    last = torch.tensor([[-6.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    for starts in ([*places, last], [last, *places.flip(0)]):
        found = deqkern.path_independence(lambda z: z, starts)
        assert found.converged.all() and found.path_independent.tolist() == [False, True, False]
        assert found.distance.tolist() == [1.5, 0.0, 1.0] and found.alignment.tolist() == [-1.0, 1.0, 0.0]
    near = deqkern.path_independence(lambda z: z, [torch.ones(2, 1), torch.tensor([[1.005], [1.02]])])
    assert near.path_independent.tolist() == [True, False]


@pytest.mark.parametrize("first", [0.0, 1.0])
def test_path_independence_needs_all_starts_to_converge(first: float) -> None:
    starts = [torch.full((1, 2), first), torch.ones(1, 2)]
    with pytest.warns(deqkern.ConvergenceWarning, match="0 of 1 samples converged from all 2 starts"):
        found = deqkern.path_independence(lambda z: 1.001 * z, starts, solver=solvers.picard(), max_iterations=2)
    assert [bool(solution.converged) for solution in found.solutions] == [first == 0, False]
    assert not found.converged.any() and not found.path_independent.any()


def test_path_independence_warns_once_and_takes_tuples_and_one_sample() -> None:
    with pytest.warns(deqkern.ConvergenceWarning, match="0 of 1 samples converged from all 2 starts") as caught:
        found = deqkern.path_independence(
            lambda state: (-state[0] + 1, 0.5 * state[1] + 1), (torch.zeros(1, 2), torch.zeros(1)),
            solver=solvers.picard(), max_iterations=5,
        )  # fmt: skip
    assert len(caught) == 1 and caught[0].filename == __file__ and not found.path_independent.any()
    assert isinstance(found.solutions[0].value, tuple)
    assert found.distance.dtype is found.alignment.dtype is WIDE


def cell(z: Tensor) -> Tensor:
    raise AssertionError("f was called")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: deqkern.jacobian_regularization(cell, torch.zeros(2, 3), samples=0), "samples must be an int >= 1"),
        (lambda: deqkern.spectral_radius(cell, torch.zeros(2, 3), iterations=0), "iterations must be an int >= 1"),
        (lambda: deqkern.spectral_radius(cell, torch.zeros(0, 3)), "z must have shape"),
        (lambda: deqkern.path_independence(cell, [torch.zeros(2, 3)]), "starts must be a list of at least two"),
        (lambda: deqkern.path_independence(cell, torch.zeros(2, 0)), "starts must have shape"),
        (lambda: deqkern.path_independence(cell, [torch.zeros(2, 3), torch.zeros(2, 4)]), "starts must have the same"),
        (
            lambda: deqkern.path_independence(cell, [torch.zeros(2, 3), torch.zeros(2, 3, dtype=WIDE)]),
            "starts must have the same",
        ),
        (lambda: deqkern.path_independence(cell, torch.zeros(2, 3), tolerance=0.0), "tolerance must be finite"),
        (lambda: deqkern.path_independence(cell, torch.zeros(2, 3), tolerance=math.inf), "tolerance must be finite"),
        (lambda: deqkern.path_independence(cell, torch.zeros(2, 3), solver=solvers.default()), "solver of a fixed"),
        (lambda: deqkern.spectral_radius(3, torch.zeros(2, 3)), "f must be callable"),  # type: ignore[arg-type]
        (lambda: deqkern.path_independence(cell, torch.zeros(2, 3), tolerance=True), "tolerance must be a number"),
    ],
)
def test_bad_arguments_of_the_measures(call: Any, words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        call()
