"""AdjointDEIS: its order, where it takes exact steps, and how near to the exact gradient it comes."""

from __future__ import annotations

import math

import pytest
import torch
from asserts import relative_error
from problems import adjoint_error
from tiny import SEQUENTIAL, SHAPE, STEPS, Tiny, leaf
from torch import Tensor

import deqkern
from deqkern import NoiseSchedule
from deqkern.gradients import Adjoint, Exact
from deqkern.gradients.recurrences import adjoint_recurrence


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("order", [1, 2])
def test_the_order_of_the_adjoint(order: int, eta: float) -> None:
    """Against the closed form for a Gaussian, by the noise."""
    counts = (64, 128, 256, 512)
    errors = [float(adjoint_error(order, eta, steps, total=8192, batch=2).max()) for steps in counts]
    slopes = [math.log2(errors[k] / errors[k + 1]) for k in range(len(counts) - 1)]
    assert abs(slopes[-1] - order) <= 0.2, (errors, slopes)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(
    "schedule",
    [
        NoiseSchedule.cosine(timestep_spacing="trailing"),
        NoiseSchedule.linear(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"),
        NoiseSchedule.flow(),
    ],
    ids=["cosine", "zero snr", "flow"],
)
def test_the_adjoint_keeps_its_direction_where_steps_are_long_in_log_snr(schedule: NoiseSchedule, order: int) -> None:
    """At the noisy end of these, alpha doubles from step to step however many there are. Gaussian data."""
    variance, steps = torch.linspace(0.1, 2, 5, dtype=torch.float64), 50
    table = schedule.steps(steps)
    levels = {float(t): (a, s) for t, a, s in zip(table.timesteps, table.alpha, table.sigma, strict=True)}

    def model(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = torch.tensor([levels[float(value)] for value in t], dtype=torch.float64)[:, :, None].unbind(1)
        total = alpha**2 * variance + sigma**2
        x0, eps = alpha * variance / total * x, sigma / total * x
        u, w = {"epsilon": (0, 1), "v_prediction": (-sigma, alpha), "flow": (-1, 1)}[schedule.prediction_type]
        return u * x0 + w * eps

    found = []
    for gradient in (Exact(), Adjoint(order)):
        noise = torch.zeros(1, 5, dtype=torch.float64, requires_grad=True)
        value = deqkern.sample(model, noise, schedule, steps, gradient=gradient, **SEQUENTIAL).value
        found += torch.autograd.grad(value.sum(), noise)
    exact, adjoint = found
    assert relative_error(adjoint, exact).max() <= 0.7
    assert torch.nn.functional.cosine_similarity(adjoint, exact).min() >= 0.98


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_adjoint_where_levels_are_equal_or_have_no_signal_or_no_noise(eta: float, order: int) -> None:
    noise, found = leaf(2, *SHAPE), list[Tensor]()
    for level in ([0.9, 0.5, 0.2, 0.0], [0.9, 0.5, 0.5, 0.2, 0.0]):
        abar, count = torch.tensor([1.0, *level], dtype=torch.float64), len(level) + 1
        schedule = NoiseSchedule(abar, prediction_type="v_prediction")
        z = torch.zeros(count, *noise.shape, dtype=torch.float64) if eta else None
        value = deqkern.sample(
            lambda x, t: 0.3 * x.sin(), noise, schedule, count, eta=eta, step_noise=z, gradient=Adjoint(order), rtol=0.0
        ).value
        found += torch.autograd.grad(value.sum(), noise)
    assert all(one.isfinite().all() and one.any() for one in found)
    if order == 1:
        assert relative_error(found[1], found[0]).max() <= 1e-10
    table = schedule.steps(count, eta=eta)
    equal = int((table.alpha == table.alpha_next).nonzero()[0])
    assert adjoint_recurrence(table, order).previous[equal - 1] == 0, "the step after begins anew"


def test_the_adjoint_of_order_2_is_near_the_exact_gradient() -> None:
    """By the noise, the condition and the parameters, for a chain of many steps through a smooth model."""
    model, condition = Tiny(), leaf(1, 6)
    with torch.no_grad():
        for parameter in model.last.parameters():
            parameter.mul_(0.1)
    found: dict[str, list[Tensor]] = {}
    noise = leaf(1, *SHAPE)
    for name, gradient in {"exact": Exact(), "1": Adjoint(1), "2": Adjoint(2)}.items():
        value = deqkern.sample(
            model, noise, NoiseSchedule.linear(), 100, gradient=gradient, sigma_min=0.08,
            model_kwargs={"condition": condition}, **SEQUENTIAL,
        ).value  # fmt: skip
        found[name] = list(torch.autograd.grad(value.sum(), [noise, condition, *model.parameters()]))
    for exact, first, second in zip(*found.values(), strict=True):
        errors = [float((other - exact).norm() / exact.norm()) for other in (first, second)]
        assert errors[0] <= 0.3 and errors[1] <= 0.1 and errors[1] <= errors[0] / 2, errors


def test_the_adjoint_needs_a_schedule_that_does_not_clip() -> None:
    with pytest.raises(ValueError, match="schedule clips or thresholds"):
        deqkern.sample(
            Tiny(), torch.zeros(1, *SHAPE), NoiseSchedule.linear(clip_sample=True), STEPS, gradient="adjoint"
        )
