"""Noise schedules: their chains, compared step by step with diffusers' sequential schedulers, and bad arguments."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from schedules import (
    CASES,
    CHAINS,
    CLIPPING,
    KINDS,
    PREDICTIONS,
    SHAPE,
    SPACINGS,
    chain_step,
    ddim,
    make,
    relative,
)

from deqkern.chain.schedule import NoiseSchedule, StepTable


@pytest.mark.parametrize(("kind", "spacing", "prediction", "zero_snr"), CASES)
def test_steps_are_those_of_ddim(kind: str, spacing: str, prediction: str, zero_snr: bool) -> None:
    """One in 23 of the chains for each case, so that each chain meets three of them."""
    total = KINDS[kind].get("num_train_timesteps", 1000)
    compared = 0
    for offset, to_one, eta, count, clipping in CHAINS[CASES.index((kind, spacing, prediction, zero_snr)) % 23 :: 23]:
        count = total - 1 if count == 999 else min(count, total)
        options = {
            "timestep_spacing": spacing, "prediction_type": prediction, "rescale_betas_zero_snr": zero_snr,
            "steps_offset": offset, "set_alpha_to_one": to_one, **clipping,
        }  # fmt: skip
        scheduler, schedule = ddim(kind, **options), make(kind, **options)
        assert torch.equal(schedule.alphas_cumprod, scheduler.alphas_cumprod.double())
        scheduler.set_timesteps(count)
        timesteps = scheduler.timesteps[scheduler.timesteps >= 0]
        if timesteps[0] >= total:
            with pytest.raises(ValueError, match="steps_offset"):
                schedule.steps(count, eta)
        elif prediction == "epsilon" and schedule.alphas_cumprod[timesteps[0]] == 0:
            with pytest.raises(ValueError, match="zero terminal SNR"):
                schedule.steps(count, eta)
        else:
            table = schedule.steps(count, eta)
            assert table.timesteps.dtype == torch.int64 and torch.equal(table.timesteps, timesteps)
            assert table.clips == (clipping is not CLIPPING[0])
            for i in {0, 1, count // 2, count - 2, count - 1} & set(range(count)):
                _compare_step(table, scheduler, i, eta)
                compared += 1
    assert compared > 20 or (prediction == "epsilon" and zero_snr and spacing != "leading")


def _compare_step(table: StepTable, scheduler: Any, i: int, eta: float) -> None:
    """The scheduler as shipped, and its formulas in float64.

    As shipped it computes 1 - abar / abar' in float32: eta > 0 is off by up to 1.3e-4 of the state. At eta = 1 and
    alpha ~ 0 all is noise, and the square root of 1 - abar' - n^2 = 0 is a rounding: 3e-4, or NaN.
    """
    x, out, z = (torch.randn(SHAPE) for _ in range(3))
    index, t = torch.full((SHAPE[0],), i), int(table.timesteps[i])
    all_noise = eta == 1 and table.alpha[i] < 1e-4
    shipped = scheduler.alphas_cumprod, scheduler.final_alpha_cumprod
    tolerances = {torch.float32: 5e-4 if eta else 2e-6, torch.float64: 1e-7 if all_noise else 1e-12}
    for dtype, rtol in tolerances.items():
        x, out, z = x.to(dtype), out.to(dtype), z.to(dtype)
        scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = (v.to(dtype) for v in shipped)
        expected, x0 = scheduler.step(out, t, x, eta=eta, variance_noise=z, return_dict=False)
        if not all_noise or expected.isfinite().all():
            assert relative(chain_step(table, i, x, out, z), expected) < rtol, (dtype, i)
        assert relative(table.original_sample(x, out, index), x0) < 1e-5
    scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = shipped


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("total", [50, 1000])
def test_timesteps_of_every_length(spacing: str, total: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=total, timestep_spacing=spacing)
    schedule = NoiseSchedule.linear(num_train_timesteps=total, timestep_spacing=spacing)
    for count in range(1, total + 1, 1 if total < 100 else 4):
        scheduler.set_timesteps(count)
        extra = len(scheduler.timesteps) - count  # the timestep -1 that trailing spacing gives for S = 61, 103, ..
        assert extra in (0, 1) and (extra == 0 or (spacing == "trailing" and scheduler.timesteps[-1] == -1))
        assert torch.equal(schedule.steps(count).timesteps, scheduler.timesteps[:count])


def test_trailing_spacing_leaves_out_the_timestep_below_zero() -> None:
    timesteps = NoiseSchedule.linear(timestep_spacing="trailing").steps(61).timesteps
    assert len(timesteps) == 61 and timesteps[0] == 999 and timesteps[-1] == 15


@pytest.mark.parametrize("clipping", CLIPPING)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_whole_chain_is_that_of_ddim(prediction: str, clipping: dict[str, Any]) -> None:
    """Fifty fp32 steps of a smooth model, whose x0 stays near the clipping range."""
    options = {"prediction_type": prediction, "steps_offset": 1, "set_alpha_to_one": False, **clipping}
    scheduler, table = ddim("scaled_linear", **options), make("scaled_linear", **options).steps(50, eta=0.3)
    scheduler.set_timesteps(50)
    x = expected = torch.randn(SHAPE)
    for i, t in enumerate(scheduler.timesteps):
        z = torch.randn(SHAPE)
        outs = [torch.tanh(state + 0.3 * state.roll(1, -1)) for state in (x, expected)]
        expected = scheduler.step(outs[1], t, expected, eta=0.3, variance_noise=z).prev_sample
        x = chain_step(table, i, x, outs[0], z)
    assert relative(x, expected) < 2e-5


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
@pytest.mark.parametrize("count", [1, 7, 28, 100])
def test_flow_is_that_of_the_flow_match_scheduler(shift: float, count: int) -> None:
    scheduler = pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler(shift=shift)
    fresh = NoiseSchedule.from_diffusers(scheduler)
    scheduler.set_timesteps(count)
    for schedule in (NoiseSchedule.flow(shift), fresh, NoiseSchedule.from_diffusers(scheduler)):
        _compare_flow(schedule.steps(count), scheduler)


@pytest.mark.parametrize(
    "options",
    [
        {"shift": 3.0, "shift_terminal": 0.1},
        {"use_dynamic_shifting": True},
        {"use_dynamic_shifting": True, "time_shift_type": "linear", "shift_terminal": 0.02},
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
    ],
)
def test_flow_reuses_the_sigmas_of_the_scheduler(options: dict[str, Any]) -> None:
    scheduler = pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler(**options)
    mu = {"mu": 0.8} if options.get("use_dynamic_shifting") else {}
    scheduler.set_timesteps(20, **mu)
    schedule = NoiseSchedule.from_diffusers(scheduler)
    _compare_flow(schedule.steps(20), scheduler)
    scheduler.set_timesteps(12, **mu)  # has no effect on the schedule
    assert schedule.steps(20).num_inference_steps == 20
    if mu:
        with pytest.raises(ValueError, match="mu"):
            schedule.steps(12)
    else:
        _compare_flow(schedule.steps(12), scheduler)


def test_flow_takes_custom_sigmas() -> None:
    scheduler = pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=[1.0, 0.6, 0.3, 0.1], mu=1.15)
    _compare_flow(NoiseSchedule.from_diffusers(scheduler).steps(4), scheduler)


@pytest.mark.parametrize(
    ("sigmas", "sigma_min", "message"),
    [
        ([1.5, 0.5, 0.2, 0.0], None, "scheduler.sigmas must descend within 1 .. 0"),
        ([0.9, 0.5, 0.2, -0.1], None, "scheduler.sigmas must descend to no less than 0"),
        ([0.5, 0.9, 0.2, 0.0], None, "scheduler.sigmas must descend to no less than 0"),
        ([0.5, 0.3, 0.2, 0.0], 1.0, "sigma_min=1.0 is not below the noise"),
        ([0.5, 0.3, 0.2, 0.1], 0.1, "sigma_min=0.1 lies below the end"),
    ],
)
def test_flow_refuses_other_sigmas(sigmas: list[float], sigma_min: float | None, message: str) -> None:
    scheduler = pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(3)
    scheduler.sigmas = torch.tensor(sigmas)
    with pytest.raises(ValueError, match=message):
        NoiseSchedule.from_diffusers(scheduler).steps(3, sigma_min=sigma_min)


def _compare_flow(table: StepTable, scheduler: Any) -> None:
    assert table.timesteps.dtype == torch.float32 and torch.equal(table.timesteps, scheduler.timesteps)
    assert torch.equal(table.sigma.float(), scheduler.sigmas[:-1])
    assert torch.equal(table.sigma_next.float(), scheduler.sigmas[1:])
    scheduler.set_begin_index(0)
    scheduler._step_index = None
    for i, t in enumerate(scheduler.timesteps):
        x, out = torch.randn(SHAPE), torch.randn(SHAPE)
        expected = scheduler.step(out, t, x, return_dict=False)[0]
        assert relative(chain_step(table, i, x, out, torch.zeros(SHAPE)), expected) < 1e-6


def test_flow_table() -> None:
    table = NoiseSchedule.flow(shift=3.0).steps(10)
    assert torch.allclose(table.a, torch.ones(10, dtype=torch.float64), rtol=0, atol=1e-15)
    assert torch.allclose(table.b, table.sigma_next - table.sigma, rtol=0, atol=1e-15)
    assert not table.n.any() and not table.clips
    assert table.alpha[0] == 0 and table.slope_0[0] == table.slope_1[0] == 1
    assert torch.allclose(table.slope_0[1:], -1 / table.alpha[1:])
    # math: the slope of v for Gaussian data
    kappa = table.shrinkage(0.25)
    s, slope = table.sigma[1:], (table.slope_0 * (1 - kappa) + table.slope_1 * kappa)[1:]
    assert torch.allclose(slope, (s - (1 - s) * 0.25) / (s**2 + (1 - s) ** 2 * 0.25))


ABAR = torch.linspace(0.999, 0.001, 10)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prediction_type": "noise"}, ValueError, "prediction_type"),
        ({"timestep_spacing": "karras"}, ValueError, "timestep_spacing"),
        ({"steps_offset": -1}, ValueError, "steps_offset"),
        ({"steps_offset": 0.5}, TypeError, "steps_offset"),
        ({"clip_sample_range": 0.0}, ValueError, "clip_sample_range"),
        ({"sample_max_value": math.nan}, ValueError, "sample_max_value"),
        ({"dynamic_thresholding_ratio": 1.5}, ValueError, "dynamic_thresholding_ratio"),
        ({"dynamic_thresholding_ratio": "a"}, TypeError, "dynamic_thresholding_ratio"),
        ({"shift": 3.0}, ValueError, "shift"),
        ({"num_train_timesteps": 11}, ValueError, "num_train_timesteps"),
        ({"prediction_type": "flow"}, ValueError, "alphas_cumprod"),
        ({"clip_smaple": True}, TypeError, "clip_smaple"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        NoiseSchedule(ABAR, **options)


@pytest.mark.parametrize(
    "values", [[], [[0.5]], [0.5, 0.6], [1.1, 0.5], [0.5, 0.0, 0.0], [0.5, -0.1], [0.0], [0.5, math.nan]]
)
def test_bad_alphas_cumprod(values: list[Any]) -> None:
    with pytest.raises(ValueError, match="alphas_cumprod"):
        NoiseSchedule(torch.tensor(values))


def test_a_schedule_keeps_its_own_alphas_cumprod() -> None:
    given = torch.tensor([0.9, 0.5], dtype=torch.float64)
    schedule = NoiseSchedule(given)
    given.zero_()
    assert schedule.alphas_cumprod is not None and schedule.alphas_cumprod.tolist() == [0.9, 0.5]


def test_bad_constructors() -> None:
    with pytest.raises(TypeError, match="alphas_cumprod"):
        NoiseSchedule(None)
    with pytest.raises(ValueError, match="betas"):
        NoiseSchedule.from_betas([0.1, 1.2])
    with pytest.raises(ValueError, match="rescale_betas_zero_snr"):
        NoiseSchedule.from_betas([0.1], rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="beta_start"):
        NoiseSchedule.scaled_linear(-0.1)
    for constructor in (NoiseSchedule.linear, NoiseSchedule.scaled_linear):
        with pytest.raises(TypeError, match="beta_start must be a number"):
            constructor("0.1")
    with pytest.raises(ValueError, match="rescale_betas_zero_snr"):
        NoiseSchedule.from_betas([0.1, 0.0, 0.0], rescale_betas_zero_snr=True)
    for ends in ((-0.1, 0.1), (0.1, -0.1)):
        with pytest.raises(ValueError, match="beta_start and beta_end"):
            NoiseSchedule.scaled_linear(*ends)
    with pytest.raises(ValueError, match="num_train_timesteps"):
        NoiseSchedule.cosine(0)
    for shift in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="shift"):
            NoiseSchedule.flow(shift)
    for option in ("clip_sample", "thresholding"):
        with pytest.raises(ValueError, match=option):
            NoiseSchedule(None, prediction_type="flow", num_train_timesteps=10, **{option: True})
    with pytest.raises(ValueError, match="num_train_timesteps"):
        NoiseSchedule(None, prediction_type="flow")


@pytest.mark.parametrize("schedule", [NoiseSchedule.linear(), NoiseSchedule.flow()], ids=["linear", "flow"])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0,), ValueError, "num_inference_steps"),
        ((1001,), ValueError, "num_inference_steps"),
        ((10.0,), TypeError, "num_inference_steps"),
        ((True,), TypeError, "num_inference_steps"),
        ((10, -0.1), ValueError, "eta"),
        ((10, math.nan), ValueError, "eta"),
        ((10, math.inf), ValueError, "eta"),
        ((10, 3.0), ValueError, "eta"),
        ((10, "1"), TypeError, "eta"),
        ((10, 0.0, 0.0), ValueError, "sigma_min"),
        ((10, 0.0, -1.0), ValueError, "sigma_min"),
        ((10, 0.0, math.nan), ValueError, "sigma_min"),
        ((10, 0.0, "1"), TypeError, "sigma_min"),
    ],
)
def test_bad_steps(schedule: NoiseSchedule, arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        schedule.steps(*arguments)


def test_steps_that_the_schedule_has_no_room_for() -> None:
    with pytest.raises(ValueError, match="eta must be 0"):
        NoiseSchedule.flow().steps(10, eta=0.5)
    with pytest.raises(ValueError, match="steps_offset"):
        NoiseSchedule.linear(steps_offset=1).steps(1000)
    with pytest.raises(ValueError, match=r"sigma_min=200.0 is not below"):
        NoiseSchedule.linear(timestep_spacing="trailing").steps(10, sigma_min=200.0)
    with pytest.raises(ValueError, match=r"num_inference_steps=900 .* sigma_min"):
        NoiseSchedule.linear(timestep_spacing="trailing").steps(900, sigma_min=1.0)
    zero_snr = NoiseSchedule.linear(rescale_betas_zero_snr=True)
    assert zero_snr.steps(10).alpha[0] > 0  # leading spacing never comes to the timestep without signal
    with pytest.raises(ValueError, match="zero terminal SNR"):
        zero_snr.steps(1000)


@pytest.mark.parametrize("name", ["from_betas", "linear", "scaled_linear", "cosine"])
def test_constructors_show_all_their_options(name: str) -> None:
    own = inspect.signature(NoiseSchedule).parameters
    shown = inspect.signature(getattr(NoiseSchedule, name)).parameters
    assert all(value.kind is not value.VAR_KEYWORD for value in shown.values())
    options = {name: value for name, value in own.items() if value.kind is value.KEYWORD_ONLY}
    for option in ("shift", "num_train_timesteps", "_own"):  # of flow matching, of the tensor, and of diffusers
        del options[option]
    assert {name: shown[name].default for name in options} == {name: value.default for name, value in options.items()}
    with pytest.raises(TypeError, match="clip_smaple"):
        NoiseSchedule.linear(clip_smaple=True)
