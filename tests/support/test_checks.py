"""Numbers in arguments may be NumPy's, and give what Python's own do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import deqkern
from deqkern import NoiseSchedule, gradients, slopes, solvers
from deqkern.integrations.edm import edm_sampler
from deqkern.solvers.slopes import Slope
from deqkern.support.checks import check_number, is_int

NOISE = torch.randn(2, 1, 4, 4)
Int, Float = Callable[[Any], Any], Callable[[Any], Any]


def model(x: Tensor, t: Tensor) -> Tensor:
    return 0.3 * torch.tanh(x + t.view(-1, 1, 1, 1) / 1000)


def sample(**options: Any) -> Tensor:
    given = {"num_inference_steps": 12, "rtol": 0.0, "generator": torch.Generator().manual_seed(3)} | options
    return deqkern.sample(model, NOISE, given.pop("schedule", NoiseSchedule.linear()), **given).value.detach()


def slope(made: Slope) -> solvers.Solver:
    return solvers.Solver(made)


CASES: dict[str, Callable[[Int, Float], Any]] = {
    "sample": lambda i, f: sample(
        num_inference_steps=i(12), eta=f(1), order=i(1), rtol=f(0.125), max_iterations=i(9), max_batch=i(8)
    ),
    "order": lambda i, f: sample(order=i(2), sigma_min=f(0.125)),
    "schedule": lambda i, f: sample(schedule=NoiseSchedule.linear(f(0.125), f(0.25), i(100), steps_offset=i(1))),
    "flow": lambda i, f: sample(schedule=NoiseSchedule.flow(shift=f(3))),
    "history": lambda i, f: sample(
        max_iterations=3,
        solver=solvers.Solver(slopes.Frozen(f(0.5)), history_size=i(3), ridge=f(0.125), beta=f(0.5)),
    ),
    "share": lambda i, f: sample(solver=solvers.default(window=f(0.5), thinning=f(0.25))),
    "window": lambda i, f: sample(solver=solvers.default(window=i(5))),
    "secant": lambda i, f: sample(solver=slope(slopes.Secant(prior_weight=f(1))), max_iterations=4),
    "gaussian": lambda i, f: sample(solver=slope(slopes.Gaussian(f(2))), max_iterations=4),
    "invert": lambda i, f: (
        deqkern.invert(model, NOISE, NoiseSchedule.linear(), i(12), rtol=f(0.125), max_iterations=i(20)).value
    ),
    "optimize": lambda i, f: (
        deqkern.invert(
            model,
            NOISE,
            NoiseSchedule.linear(),
            4,
            method=deqkern.Optimize(noise=NOISE, stop=f(100)),
            max_iterations=i(2),
        ).value
    ),
    "fixed point": lambda i, f: deqkern.fixed_point(torch.cos, NOISE, rtol=f(0.125), max_iterations=i(20)).value,
    "phantom": lambda i, f: gradient(gradients.Phantom(i(3), f(0.5))),
    "implicit": lambda i, f: gradient(gradients.Implicit(rtol=f(0.125), max_iterations=i(20))),
    "adjoint": lambda i, f: gradient(gradients.Adjoint(i(1))),
    "edm": lambda i, f: edm_sampler(
        lambda x, sigma, labels: 0.5 * x, NOISE, num_steps=i(6), sigma_min=f(0.125), sigma_max=f(8), rho=f(7)
    ),
}


def gradient(kind: gradients.Gradient) -> Tensor:
    noise = NOISE.clone().requires_grad_()
    deqkern.sample(model, noise, NoiseSchedule.linear(), 6, gradient=kind, max_batch=4).value.sum().backward()
    assert noise.grad is not None
    return noise.grad


@pytest.mark.filterwarnings("ignore::deqkern.ConvergenceWarning")
@pytest.mark.parametrize("case", list(CASES))
def test_numbers_of_numpy(case: str) -> None:
    torch.testing.assert_close(CASES[case](np.int64, np.float32), CASES[case](int, float), rtol=0, atol=0)


@pytest.mark.parametrize("value", [True, np.True_, "1", None, [1], 1 + 0j, np.ones(2)])
def test_what_is_no_number(value: Any) -> None:
    assert not is_int(value)
    with pytest.raises(TypeError, match="rho must be a number, got"):
        check_number("rho", value)
    assert not is_int(1.0) and not is_int(np.float64(1))
