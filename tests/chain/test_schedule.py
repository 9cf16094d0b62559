"""Noise schedules and step tables, compared step by step with diffusers' sequential schedulers."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from deqkern.chain.schedule import NoiseSchedule, StepTable
from deqkern.chain.timesteps import even_in_log_snr

SPACINGS = ("leading", "linspace", "trailing")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
TRAINED_BETAS = (1e-4 + 0.02 * torch.linspace(0, 1, 100) ** 1.5).tolist()
KINDS: dict[str, dict[str, Any]] = {  # DDIMScheduler's arguments
    "linear": {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"},
    "scaled_linear": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "trained": {"trained_betas": TRAINED_BETAS, "num_train_timesteps": len(TRAINED_BETAS)},
}
CLIPPING: tuple[dict[str, Any], ...] = (
    {"clip_sample": False},
    {"clip_sample": True, "clip_sample_range": 1.0},
    {"clip_sample": True, "clip_sample_range": 0.7},
    {"clip_sample": True, "thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5},
)
# offset, alpha to one, eta, steps (999 stands for T - 1, 1000 for T), clipping
CHAINS = list(itertools.product((0, 1), (True, False), (0.0, 0.5, 1.0), (1, 7, 20, 50, 100, 999, 1000), CLIPPING))
CASES = list(itertools.product(KINDS, SPACINGS, PREDICTIONS, (False, True)))
SHAPE = (2, 3, 4, 4)


def make(kind: str, **options: Any) -> NoiseSchedule:
    if kind == "trained":
        return NoiseSchedule.from_betas(TRAINED_BETAS, **options)
    constructors = {
        "linear": NoiseSchedule.linear,
        "scaled_linear": NoiseSchedule.scaled_linear,
        "cosine": NoiseSchedule.cosine,
    }
    return constructors[kind](**options)


def ddim(kind: str, **options: Any) -> Any:
    return pytest.importorskip("diffusers").DDIMScheduler(**KINDS[kind], **options)


def chain_step(table: StepTable, i: int, x: Tensor, out: Tensor, z: Tensor) -> Tensor:
    if table.clips:
        out = table.effective_output(x, out, torch.full((len(x),), i))
    a, b, n = (v[i].to(x.dtype) for v in (table.a, table.b, table.n))
    return a * x + b * out + n * z


def relative(value: Tensor, expected: Tensor) -> float:
    return float((value.double() - expected.double()).norm() / expected.double().norm())


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


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_clipped_step_survives_a_tiny_alpha_in_fp32(spacing: str) -> None:
    """At alpha = 5e-5 epsilon's own coefficients are 2e4: the clipped step must not be computed from them."""
    table = NoiseSchedule.cosine(clip_sample=True, timestep_spacing=spacing).steps(2)
    assert table.alpha[0] < 1e-4 and table.a.abs().max() <= 1 and table.b.abs().max() <= 1
    x, out = torch.randn(SHAPE), torch.randn(SHAPE)
    x0 = ((x.double() - table.sigma[0] * out) / table.alpha[0]).clamp(-1, 1)
    expected = table.alpha_next[0] * x0 + table.direction[0] * out
    assert relative(chain_step(table, 0, x, out, torch.zeros(SHAPE)), expected) < 1e-6


def test_effective_output_takes_a_step_of_each_row_and_a_wider_or_narrower_dtype() -> None:
    table = NoiseSchedule.linear(clip_sample=True).steps(10)
    x, out, index = torch.randn(7, 5), torch.randn(7, 5), torch.tensor([9, 0, 3, 3, 1, 8, 5])
    together = table.effective_output(x, out, index)
    for row in range(7):
        assert torch.equal(
            together[row : row + 1], table.effective_output(*(v[row : row + 1] for v in (x, out, index)))
        )
    assert table.effective_output(x.double(), out.double(), index).dtype == torch.float64
    assert table.effective_output(x.bfloat16(), out.bfloat16(), index).dtype == torch.float32
    with pytest.raises(ValueError, match="converts"):
        NoiseSchedule.linear().steps(10).effective_output(x, out, index)


def test_effective_output_and_previews_on_a_device(device: torch.device) -> None:
    table = NoiseSchedule.linear(clip_sample=True).steps(10)
    arguments = torch.randn(7, 5), torch.randn(7, 5), torch.tensor([9, 0, 3, 3, 1, 8, 5])
    there = [v.to(device) for v in arguments]
    for method in (table.effective_output, table.original_sample):
        result = method(*there)
        assert result.device.type == device.type
        torch.testing.assert_close(result.cpu(), method(*arguments), rtol=1e-5, atol=1e-4)


def test_effective_output_is_a_velocity_where_nothing_is_clipped() -> None:
    table = NoiseSchedule.linear(clip_sample=True).steps(20)
    x0, eps = 2 * torch.rand(20, 3, 4, dtype=torch.float64) - 1, torch.randn(20, 3, 4, dtype=torch.float64)
    alpha, sigma = table.alpha.view(-1, 1, 1), table.sigma.view(-1, 1, 1)
    velocity = table.effective_output(alpha * x0 + sigma * eps, eps, torch.arange(20))
    torch.testing.assert_close(velocity, alpha * eps - sigma * x0, rtol=0, atol=1e-12)


def test_effective_output_of_a_velocity_is_not_rounded_again_where_nothing_is_clipped() -> None:
    """In short steps alpha_next x0 + sigma_next eps - a x cancels."""
    table = NoiseSchedule.linear(clip_sample=True, prediction_type="v_prediction").steps(100)
    x0, eps = 0.9 * (2 * torch.rand(100, 64) - 1), torch.randn(100, 64)
    alpha, sigma = table.alpha.float()[:, None], table.sigma.float()[:, None]
    velocity = alpha * eps - sigma * x0
    found = table.effective_output(alpha * x0 + sigma * eps, velocity, torch.arange(100))
    assert relative(found, velocity) < 1e-6


def test_a_step_that_stays_still_clips() -> None:
    """Spacing that ends at timestep 0 with the final alpha alphas_cumprod[0]: x_next = x, but for clipping."""
    plain, clipping = (NoiseSchedule.linear(set_alpha_to_one=False, clip_sample=c).steps(10) for c in (False, True))
    assert plain.a[-1] == 1 and plain.b[-1] == 0
    assert clipping.a[-1] == 1 and clipping.b[-1] == 1 and clipping.slope_0[-1] == clipping.slope_1[-1] == 0
    x, out, index = torch.full((1, 4), 0.5), torch.zeros(1, 4), torch.tensor([9])
    assert torch.equal(clipping.effective_output(x, out, index), torch.zeros(1, 4))
    expected = clipping.alpha[-1]  # x0 = 1 after clipping, eps = 0
    assert torch.allclose(chain_step(clipping, 9, x + 9, out, out), expected.float())


def test_dynamic_thresholding_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.quantile refuses inputs of more than 16 million elements."""
    table = NoiseSchedule.linear(prediction_type="sample", thresholding=True, sample_max_value=2.0).steps(4)
    x, out, index = torch.zeros(7, 100), torch.randn(7, 100), torch.arange(7) % 4
    whole = table.original_sample(x, out, index)
    for elements in (1, 250):
        monkeypatch.setattr("deqkern.chain.output.QUANTILE_ELEMENTS", elements)
        assert torch.equal(table.original_sample(x, out, index), whole)
    bound = torch.quantile(out[6].abs(), 0.995).clamp(1, 2)
    assert torch.equal(whole[6], out[6].clamp(-bound, bound) / bound)


# ---- flow matching


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


# ---- algebra


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


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("count", [1, 7, 50])
@pytest.mark.parametrize("sigma_min", [0.02, 0.3])
def test_sigma_min_joins_up(spacing: str, count: int, sigma_min: float) -> None:
    schedule = NoiseSchedule.linear(timestep_spacing=spacing)
    if count == 1 and spacing != "trailing":  # a single step starts at timestep 0
        with pytest.raises(ValueError, match="sigma_min"):
            schedule.steps(count, sigma_min=sigma_min)
        return
    table, plain = schedule.steps(count, sigma_min=sigma_min), schedule.steps(count)
    assert table.num_inference_steps == count and table.timesteps[0] == plain.timesteps[0]
    assert torch.equal(table.alpha_next[:-1], table.alpha[1:]) and torch.equal(table.sigma_next[:-1], table.sigma[1:])
    ratio = ((1 - schedule.alphas_cumprod) / schedule.alphas_cumprod).sqrt()
    last = int((ratio >= sigma_min).nonzero()[0])
    assert table.alpha_next[-1] == schedule.alphas_cumprod[last].sqrt()
    chain = torch.cat([table.timesteps, torch.tensor([last])])
    assert (chain.diff() < 0).all()
    even = torch.linspace(float(ratio[chain[0]].log()), float(ratio[last].log()), count + 1, dtype=torch.float64)
    level = ratio.log()
    error = (level[chain] - even).abs()
    room = torch.maximum(
        level[(chain + 1).clamp_max(999)] - level[chain], level[chain] - level[(chain - 1).clamp_min(0)]
    )
    assert (error[room < (even[0] - even[-1]) / count / 4] <= room[room < (even[0] - even[-1]) / count / 4]).all()


def test_sigma_min_at_zero_terminal_snr() -> None:
    """The first timestep has no log-SNR; the chain still begins there, and its steps lengthen smoothly."""
    schedule = NoiseSchedule.linear(
        rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing"
    )
    assert schedule.alphas_cumprod is not None and schedule.alphas_cumprod[-1] == 0
    table = schedule.steps(20, sigma_min=0.05)
    assert table.timesteps[0] == 999 and table.timesteps[1] < 999 and (table.timesteps.diff() < 0).all()
    assert table.timesteps[10] <= 900, "no pile of steps at the noise"
    assert schedule.steps(1, sigma_min=0.05).timesteps.tolist() == [999]


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "cosine"])
def test_steps_even_in_log_snr(kind: str, order: int) -> None:
    schedule = make(kind, timestep_spacing="log_snr", prediction_type="v_prediction")
    for count in (2, 3, 10, 20, 50):
        table = schedule.steps(count, order=order)
        assert (int(table.timesteps[0]), int(table.timesteps[-1])) == (999, 0)
        assert bool((table.timesteps.diff() < 0).all())
        assert torch.equal(table.alpha[1:], table.alpha_next[:-1]) and float(table.alpha_next[-1]) == 1
        level = 2 * (table.alpha / table.sigma).log()
        abar = schedule.alphas_cumprod
        widest = torch.maximum(*[(abar / (1 - abar)).log().diff().abs()[t - shift] for t, shift in _neighbours(table)])
        even = torch.linspace(float(level[0]), float(level[-1]), count, dtype=torch.float64)
        free = (table.timesteps > 2 * count) & (table.timesteps < 999 - count)  # others had to make room
        assert bool(((level - even).abs() <= widest)[free].all())
    assert schedule.steps(1).timesteps.tolist() == [999]
    assert schedule.steps(1000).timesteps.tolist() == list(range(999, -1, -1))


def _neighbours(table: StepTable) -> list[tuple[Tensor, int]]:
    """Where the differences of a schedule's levels lie on both sides of the timesteps."""
    return [(table.timesteps.clamp(1, 998), shift) for shift in (0, 1)]


def test_steps_even_in_log_snr_at_both_ends_of_a_schedule() -> None:
    clean = NoiseSchedule(torch.tensor([1.0, 0.9, 0.5, 0.1, 0.0]), prediction_type="sample", timestep_spacing="log_snr")
    assert clean.steps(5, order=1).timesteps.tolist() == [4, 3, 2, 1, 0]
    assert clean.steps(3).timesteps.tolist() == [4, 2, 0]
    held = make("linear", timestep_spacing="log_snr", set_alpha_to_one=False)
    table = held.steps(20, order=2)
    assert float(table.alpha_next[-1]) == float(held.alphas_cumprod[0].sqrt()) and bool((table.b[:-1] != 0).all())
    assert int(table.timesteps[0]) == 999 and int(table.timesteps[-1]) > 0 and float(table.b[-1]) != 0
    with pytest.raises(ValueError, match=r"num_inference_steps must be in .* without set_alpha_to_one, got 1000"):
        held.steps(1000)
    with pytest.raises(ValueError, match="timestep_spacing='log_snr' is not defined for prediction_type='flow'"):
        replace(NoiseSchedule.flow(), timestep_spacing="log_snr")
    karras = pytest.importorskip("diffusers").DPMSolverMultistepScheduler(use_karras_sigmas=True)
    with pytest.raises(ValueError, match="timestep_spacing='log_snr' needs the noise levels of training"):
        replace(NoiseSchedule.from_diffusers(karras), timestep_spacing="log_snr")
    chain = make("linear", timestep_spacing="log_snr").steps(20, sigma_min=0.1)
    assert torch.equal(chain.timesteps, make("linear", timestep_spacing="trailing").steps(20, sigma_min=0.1).timesteps)


EVEN = torch.linspace(15, -15, 7, dtype=torch.float64).sigmoid()


@pytest.mark.parametrize(
    ("abar", "chain"),
    [([1.0, *EVEN], [7, 5, 2, 0]), ([*EVEN, 0.0], [7, 5, 2, 0]), ([1.0, 0.5], [1, 0]), ([0.5, 0.0], [1, 0])],
)
def test_an_infinite_log_snr_counts_as_one_step_more(abar: list[float], chain: list[int]) -> None:
    found = even_in_log_snr(torch.tensor(abar, dtype=torch.float64), len(chain) - 1, len(abar) - 1, 0)
    assert found == chain


@pytest.mark.parametrize("count", [1, 7, 50])
def test_sigma_min_of_flow_joins_up(count: int) -> None:
    for shift in (1.0, 3.0):
        schedule = NoiseSchedule.flow(shift)
        table = schedule.steps(count, sigma_min=0.05)
        assert torch.equal(table.sigma_next[:-1], table.sigma[1:]) and table.sigma[0] == 1
        assert math.isclose(float(table.sigma_next[-1] / table.alpha_next[-1]), 0.05, rel_tol=1e-12)
        assert torch.allclose(table.timesteps.double(), 1000 * table.sigma, rtol=1e-6, atol=0)
        assert (table.b < 0).all() and table.timesteps.dtype == torch.float32
        close = schedule.steps(count, sigma_min=1e-9)
        torch.testing.assert_close(close.sigma, schedule.steps(count).sigma, rtol=0, atol=1e-6)


# ---- other schedulers of diffusers


@pytest.mark.parametrize(
    "name",
    [
        "DDPMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
        "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler",
        "LMSDiscreteScheduler", "DEISMultistepScheduler", "DDIMParallelScheduler", "CogVideoXDDIMScheduler",
    ],
)  # fmt: skip
def test_from_diffusers_takes_the_noise_schedule_of(name: str) -> None:
    scheduler = getattr(pytest.importorskip("diffusers"), name)(prediction_type="v_prediction")
    schedule = NoiseSchedule.from_diffusers(scheduler)
    config = scheduler.config
    assert torch.equal(schedule.alphas_cumprod, scheduler.alphas_cumprod.double())
    assert schedule.prediction_type == "v_prediction" and schedule.steps_offset == config.get("steps_offset", 0)
    assert schedule.timestep_spacing == config.get("timestep_spacing", "leading")
    assert schedule.clip_sample == config.get("clip_sample", False)
    assert schedule.set_alpha_to_one == config.get("set_alpha_to_one", True)
    assert schedule.steps(20).num_inference_steps == 20


def test_from_diffusers_is_ddim_with_all_its_options() -> None:
    options = {
        "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": True, "clip_sample_range": 2.5,
        "thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 3.0,
        "prediction_type": "sample", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True,
    }  # fmt: skip
    read, built = NoiseSchedule.from_diffusers(ddim("cosine", **options)), make("cosine", **options)
    assert torch.equal(read.alphas_cumprod, built.alphas_cumprod)
    del options["rescale_betas_zero_snr"]
    for name, value in options.items():
        assert getattr(read, name) == getattr(built, name) == value


def test_from_diffusers_leaves_out_what_another_scheduler_was_given() -> None:
    diffusers = pytest.importorskip("diffusers")
    first = diffusers.DDIMScheduler(set_alpha_to_one=False, clip_sample=True)
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(first.config)
    assert scheduler.config["clip_sample"] and not scheduler.config["set_alpha_to_one"]  # which it does not use
    schedule = NoiseSchedule.from_diffusers(scheduler)
    assert schedule.set_alpha_to_one and not schedule.clip_sample
    again = NoiseSchedule.from_diffusers(diffusers.DDIMScheduler.from_config(scheduler.config))
    assert not again.set_alpha_to_one and again.clip_sample


def test_from_diffusers_reads_final_sigmas_type() -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(final_sigmas_type="sigma_min")
    assert not NoiseSchedule.from_diffusers(scheduler).set_alpha_to_one


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, "use_karras_sigmas"),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous", "prediction_type": "v_prediction"}, "timestep_type"),
        ("DPMSolverSinglestepScheduler", {"use_karras_sigmas": True}, "use_karras_sigmas"),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}, "use_flow_sigmas"),
        ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction"}, "prediction_type"),
        ("LCMScheduler", {}, "original_inference_steps"),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, "stochastic_sampling"),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "invert_sigmas"),
        ("DPMSolverMultistepScheduler", {"lambda_min_clipped": -5.1}, "lambda_min_clipped"),
        ("DDIMScheduler", {"trained_betas": TRAINED_BETAS}, "num_train_timesteps"),
    ],
)
def test_from_diffusers_refuses(name: str, options: dict[str, Any], message: str) -> None:
    scheduler = getattr(pytest.importorskip("diffusers"), name)(**options)
    with pytest.raises(ValueError, match=message):
        NoiseSchedule.from_diffusers(scheduler)


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"])
def test_from_diffusers_refuses_the_kind(name: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    with pytest.raises(TypeError, match=name):
        NoiseSchedule.from_diffusers(getattr(diffusers, name)())
    with pytest.raises(TypeError, match="scheduler"):
        NoiseSchedule.from_diffusers("ddim")


# ---- errors

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
    for make in (NoiseSchedule.linear, NoiseSchedule.scaled_linear):
        with pytest.raises(TypeError, match="beta_start must be a number"):
            make("0.1")
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
