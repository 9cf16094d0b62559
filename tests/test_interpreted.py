"""Whole solves on the Triton kernels, which Triton interprets where there is no GPU: what the C++ kernels give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import HAS_CUDA
from problems import gaussian, mixture

import deqkern
from deqkern import NoiseSchedule, ops, solvers
from deqkern.solvers.presets import Solver

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(HAS_CUDA, reason="the kernels run on the GPU: tests/test_gpu.py")

SCHEDULE, STEPS = NoiseSchedule.linear(), 5


def solved(triton: bool, shape: tuple[int, ...] = (1, 3, 4), steps: int = STEPS, **options: Any) -> deqkern.Solution:
    """Two samples, so that windows differ."""
    model = mixture(SCHEDULE, shape, torch.Generator().manual_seed(2))
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(3))
    with ops.use_backend(*(("triton", "reference") if triton else ("cpu",))):
        return deqkern.sample(model, noise, SCHEDULE, steps, rtol=1e-4, **options)


def assert_same(found: deqkern.Solution, expected: deqkern.Solution) -> None:
    assert found.iterations == expected.iterations > 1
    assert torch.equal(found.nfe_history, expected.nfe_history)
    torch.testing.assert_close(found.trajectory, expected.trajectory, rtol=1e-5, atol=1e-5)
    rounding = 16 * torch.finfo(torch.float32).eps  # what a residual comes to rest at, relative to its state
    assert_close = torch.testing.assert_close
    assert_close(found.residual_history, expected.residual_history, rtol=1e-2, atol=rounding, equal_nan=True)


@pytest.mark.parametrize(
    ("solver", "options"),
    [
        (solvers.default(), {}),
        (solvers.default(), {"shape": (3, 2, 2), "order": 2, "eta": 1.0}),
        (solvers.default(), {"shape": (5,), "eta": 1.0}),
        (solvers.default(window=None, thinning=1.0), {"steps": 8}),  # to every second step
        (solvers.parataa(), {}),
        (solvers.deq_ddim(), {}),
        (solvers.picard(window=3), {}),
    ],
    ids=lambda value: value.name if isinstance(value, Solver) else " ".join(map(str, value)),
)
def test_samples(solver: Solver, options: dict[str, Any]) -> None:
    found, expected = (
        solved(triton, solver=solver, generator=torch.Generator().manual_seed(1), **options) for triton in (True, False)
    )
    assert_same(found, expected)


def test_inverses_and_gradients() -> None:
    shape, results = (1, 3, 4), []
    model = gaussian(SCHEDULE, shape, torch.Generator().manual_seed(2))
    for names in (("triton", "reference"), ("cpu",)):
        sample = torch.rand(1, *shape, generator=torch.Generator().manual_seed(3)).requires_grad_()
        with ops.use_backend(*names):
            solution = deqkern.invert(model, sample, SCHEDULE, 4, rtol=1e-4, gradient="implicit")
            (grad,) = torch.autograd.grad(solution.value.square().sum(), sample)
        results.append((solution, grad))
    (found, grad), (expected, expected_grad) = results
    assert_same(found, expected)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-5)
