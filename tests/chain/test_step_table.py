"""The algebra of step tables."""

from __future__ import annotations

import math

import pytest
import torch
from schedules import (
    CASES,
    PREDICTIONS,
    chain_step,
    make,
)

from deqkern.chain.schedule import NoiseSchedule, StepTable


def every_table() -> list[StepTable]:
    tables = [NoiseSchedule.flow(shift).steps(count) for shift in (1.0, 3.0) for count in (1, 25)]
    for kind, spacing, prediction, zero_snr in CASES:
        if prediction == "epsilon" and zero_snr:
            continue
        for clip, eta, to_one in ((False, 0.0, True), (True, 1.0, False)):
            schedule = make(
                kind, timestep_spacing=spacing, prediction_type=prediction, rescale_betas_zero_snr=zero_snr,
                clip_sample=clip, set_alpha_to_one=to_one,
            )  # fmt: skip
            tables += [schedule.steps(count, eta) for count in (1, 25)]
    return tables


def test_every_table_is_finite_and_float64() -> None:
    for table in every_table():
        for name in ("alpha", "sigma", "alpha_next", "sigma_next", "a", "b", "n", "slope_0", "slope_1", "u", "w"):
            value = getattr(table, name)
            assert value.dtype == torch.float64 and value.device.type == "cpu", name
            assert value.shape == (table.num_inference_steps,) and value.isfinite().all(), name
        assert table.log_snr.isfinite().all() and (table.log_snr.diff() >= 0).all()


def test_slopes_are_the_derivatives_of_a_frozen_epsilon_and_a_frozen_x0() -> None:
    """The whole step's derivative is alpha_next / alpha with epsilon frozen and direction / sigma with x0 frozen."""
    for table in every_table():
        inner = table.alpha > 0
        total_0, total_1 = table.a + table.b * table.slope_0, table.a + table.b * table.slope_1
        torch.testing.assert_close(total_0[inner], (table.alpha_next / table.alpha)[inner], rtol=1e-9, atol=0)
        torch.testing.assert_close(total_1[inner], (table.direction / table.sigma)[inner], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction", [*PREDICTIONS, "flow"])
def test_shrinkage_is_the_slope_of_the_best_denoiser_of_gaussian_data(prediction: str) -> None:
    """For data with variance P the output E[out | x] is linear in x, with the slope of the table."""
    flow = prediction == "flow"
    table = (NoiseSchedule.flow() if flow else NoiseSchedule.linear(prediction_type=prediction)).steps(30)
    alpha, sigma = table.alpha, table.sigma
    for variance in (0.01, 0.25, 4.0):
        x0 = alpha * variance / (alpha**2 * variance + sigma**2)
        eps = (1 - alpha * x0) / sigma
        kappa = table.shrinkage(variance)
        slope = table.slope_0 * (1 - kappa) + table.slope_1 * kappa
        start = int(flow)  # where alpha = 0 there is no slope_0
        torch.testing.assert_close(slope[start:], (table.u * x0 + table.w * eps)[start:], rtol=1e-9, atol=1e-12)
    assert (table.shrinkage(0.0) == 1).all()
    assert (table.shrinkage(1e30)[start:] < 1e-20).all()
    assert ((table.shrinkage(0.25) > 0) & (table.shrinkage(0.25) <= 1)).all()


@pytest.mark.parametrize("variance", [-1.0, math.nan, math.inf])
def test_shrinkage_refuses(variance: float) -> None:
    with pytest.raises(ValueError, match="variance"):
        NoiseSchedule.linear().steps(4).shrinkage(variance)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_step_keeps_the_marginals(prediction: str, eta: float) -> None:
    """From x = alpha x0 + sigma eps and the true output, a step gives alpha' x0 + direction eps + n z."""
    table = NoiseSchedule.cosine(prediction_type=prediction, timestep_spacing="trailing").steps(20, eta)
    torch.testing.assert_close(table.a * table.alpha + table.b * table.u, table.alpha_next, rtol=0, atol=1e-10)
    noise = (table.a * table.sigma + table.b * table.w) ** 2 + table.n**2
    torch.testing.assert_close(noise, table.sigma_next**2, rtol=0, atol=1e-9)


def test_zero_terminal_snr_is_finite() -> None:
    for prediction in ("v_prediction", "sample"):
        schedule = NoiseSchedule.linear(
            rescale_betas_zero_snr=True, prediction_type=prediction, timestep_spacing="trailing"
        )
        table = schedule.steps(10, eta=1 + 1e-13)  # rounding
        assert (
            table.direction[0] == 0
            and table.alpha[0] == 0
            and table.slope_0[0] == table.slope_1[0]
            and table.log_snr[0] == -32
        )
        assert table.a[0].abs() < 1e-7  # at eta = 1 the first step forgets its state


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_last_timestep_without_noise(prediction: str, clip: bool) -> None:
    """At abar = 1 DDIMScheduler divides 0 by 0; here the step hands the sample on."""
    alphas_cumprod = torch.linspace(1, 0.01, 100, dtype=torch.float64)
    table = NoiseSchedule(alphas_cumprod, prediction_type=prediction, clip_sample=clip).steps(10, eta=0.5)
    assert table.slope_0[-1] == table.slope_1[-1] and table.log_snr[-1] == 32 and table.n[-1] == 0
    assert all(getattr(table, name).isfinite().all() for name in ("a", "b", "n", "slope_0", "slope_1"))
    assert table.shrinkage(0.25)[-1] < 1e-20
    x = 2 * torch.rand(1, 5) - 1
    out = x if prediction == "sample" else torch.zeros(1, 5)
    assert torch.allclose(chain_step(table, 9, x, out, x), x)
    if clip:
        assert torch.allclose(chain_step(table, 9, 3 * x, 3 * out, x), (3 * x).clamp(-1, 1))
