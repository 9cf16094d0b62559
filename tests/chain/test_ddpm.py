"""`process="ddpm"`: the chain of diffusers' DDPMScheduler, against its own loop."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from asserts import relative_error
from torch import Tensor

import deqkern
from deqkern import NoiseSchedule, gradients, solvers

SHAPE = (3, 8, 8)
PREDICTIONS = ("epsilon", "v_prediction", "sample")
VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large")
CLIPPING: dict[str, dict[str, Any]] = {
    "nothing": {"clip_sample": False},
    "clipped": {"clip_sample": True, "clip_sample_range": 0.8},
    "thresholded": {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9},
}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}


def ddpm(**options: Any) -> Any:
    return pytest.importorskip("diffusers").DDPMScheduler(**options)


def wave(x: Tensor, t: Tensor) -> Tensor:
    """Something smooth that every output may be."""
    return 0.9 * torch.sin(x * (1 + t.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1)) / 1000))


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_scheduler(scheduler: Any, model: Any, noise: Tensor) -> Tensor:
    """diffusers' own loop."""
    x, generator = noise, seeded()
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), t, x, generator=generator).prev_sample
    return x


@pytest.mark.parametrize("clipping", CLIPPING)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_exact_mode_equals_the_scheduler(prediction_type: str, clipping: str) -> None:
    noise = torch.randn(2, *SHAPE, generator=seeded(0))
    for variance, spacing in itertools.product(VARIANCES, ("leading", "linspace", "trailing")):
        for steps in (1, 7, 20, 50):
            scheduler = ddpm(
                prediction_type=prediction_type, variance_type=variance, timestep_spacing=spacing,
                steps_offset=int(spacing == "leading"), **CLIPPING[clipping],
            )  # fmt: skip
            schedule = NoiseSchedule.from_diffusers(scheduler)
            scheduler.set_timesteps(steps)
            assert torch.equal(schedule.steps(steps).timesteps, scheduler.timesteps)
            found = deqkern.sample(wave, noise, schedule, steps, rtol=0, generator=seeded())
            assert relative_error(found.value, by_scheduler(scheduler, wave, noise)).max() <= 1e-5


@pytest.mark.parametrize(
    "options",
    [
        COSINE,
        COSINE | {"variance_type": "fixed_large"},
        COSINE | {"clip_sample": False, "prediction_type": "v_prediction"},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
        {"trained_betas": (1e-4 + 0.02 * torch.linspace(0, 1, 100) ** 1.5).tolist(), "num_train_timesteps": 100},
    ],
)
def test_as_many_steps_as_trained(options: dict[str, Any]) -> None:
    """Where the scheduler's own rounding of beta shows most."""
    scheduler, noise = ddpm(**options), torch.randn(2, *SHAPE, generator=seeded(0))
    steps = scheduler.config.num_train_timesteps
    solver = solvers.default(window=100)
    found = deqkern.sample(wave, noise, scheduler, steps, rtol=0, generator=seeded(), solver=solver)
    assert relative_error(found.value, by_scheduler(scheduler, wave, noise)).max() <= 1e-5


def test_the_full_loop_of_diffusers_own_tests() -> None:
    """Its sum and mean, for its model and its sample."""

    def model(x: Tensor, t: Tensor) -> Tensor:
        t = t.to(x.dtype).view(-1, 1, 1, 1)
        return x * t / (t + 1)

    sample = (torch.arange(768.0).reshape(3, 8, 8, 4) / 768).permute(3, 0, 1, 2)
    found = deqkern.sample(model, sample, ddpm(), 1000, rtol=0, generator=seeded(0)).value
    assert abs(float(found.abs().sum()) - 258.9606) < 1e-2 and abs(float(found.abs().mean()) - 0.3372) < 1e-3


def test_without_clipping_it_is_ddim_at_eta_1() -> None:
    ancestral = NoiseSchedule.linear(process="ddpm")
    table, ddim = ancestral.steps(20), replace(ancestral, process="ddim").steps(20, eta=1.0)
    for name in ("a", "b", "n", "alpha_next", "sigma_next"):
        torch.testing.assert_close(getattr(table, name), getattr(ddim, name), rtol=1e-4, atol=1e-9)
    assert not table.converts and table.process == "ddpm"


def test_with_clipping_eps_follows_the_clipped_x0() -> None:
    """DDIMScheduler has it as `use_clipped_model_output`."""
    scheduler = pytest.importorskip("diffusers").DDIMScheduler()
    noise, z = torch.randn(2, *SHAPE, generator=seeded(0)), torch.randn(20, 2, *SHAPE, generator=seeded())
    scheduler.set_timesteps(20)
    x = noise
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(wave(x, t), t, x, eta=1.0, use_clipped_model_output=True, variance_noise=z[i]).prev_sample
    schedule = NoiseSchedule.linear(clip_sample=True, process="ddpm")
    found = deqkern.sample(wave, noise, schedule, 20, step_noise=z, rtol=0).value
    assert relative_error(found, x).max() <= 1e-5
    other = deqkern.sample(wave, noise, replace(schedule, process="ddim"), 20, eta=1.0, step_noise=z, rtol=0).value
    assert relative_error(other, x).min() > 1e-2


def test_every_solver_finds_it() -> None:
    scheduler, noise = ddpm(**COSINE), torch.randn(2, *SHAPE, generator=seeded(0))
    scheduler.set_timesteps(30)
    expected = by_scheduler(scheduler, wave, noise)
    for solver in (None, solvers.parataa(), solvers.picard(), solvers.deq_ddim(), solvers.sequential()):
        found = deqkern.sample(wave, noise, scheduler, 30, rtol=0, generator=seeded(), solver=solver)
        assert found.converged.all() and relative_error(found.value, expected).max() <= 1e-5
    near = deqkern.sample(wave, noise, scheduler, 30, rtol=1e-3, generator=seeded())
    assert near.iterations < 20 and relative_error(near.value, expected).max() <= 3e-3


def test_timesteps_of_the_users_own() -> None:
    scheduler, noise = ddpm(variance_type="fixed_large"), torch.randn(2, *SHAPE, generator=seeded(0))
    scheduler.set_timesteps(timesteps=[999, 700, 650, 100, 20])
    schedule = NoiseSchedule.from_diffusers(scheduler)
    found = deqkern.sample(wave, noise, schedule, 5, rtol=0, generator=seeded())
    assert relative_error(found.value, by_scheduler(scheduler, wave, noise)).max() <= 1e-5
    with pytest.raises(ValueError, match=r"num_inference_steps must be 5, .* DDPMScheduler was given, got 50"):
        deqkern.sample(wave, noise, schedule)


def test_the_logarithm_of_the_large_variance_is_the_large_variance() -> None:
    """The step of diffusers takes the root of it, which is NaN."""
    logarithm = NoiseSchedule.from_diffusers(ddpm(variance_type="fixed_large_log"))
    large = NoiseSchedule.from_diffusers(ddpm(variance_type="fixed_large"))
    assert logarithm.process == large.process == "ddpm_large"
    assert torch.equal(logarithm.steps(10).n, large.steps(10).n)


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_a_learned_variance_is_refused(variance: str) -> None:
    with pytest.raises(ValueError, match=f"variance_type='{variance}'; deqkern solves variance_type='fixed_small'"):
        NoiseSchedule.from_diffusers(ddpm(variance_type=variance))


def test_what_does_not_go_with_it_is_refused() -> None:
    schedule, noise = NoiseSchedule.linear(process="ddpm"), torch.randn(2, *SHAPE)
    for eta in (0.0, 0.5):
        with pytest.raises(ValueError, match=rf"eta must be None or 1 with process='ddpm'.*got {eta}.*as_ddim"):
            schedule.steps(10, eta=eta)
    assert torch.equal(schedule.steps(10, eta=1.0).n, schedule.steps(10).n)
    with pytest.raises(ValueError, match="order must be 1 with process='ddpm', got 2"):
        schedule.steps(10, order=2)
    with pytest.raises(ValueError, match="process must be one of ddim, ddpm, ddpm_large, got 'ancestral'"):
        NoiseSchedule.linear(process="ancestral")
    with pytest.raises(ValueError, match="process='ddpm' is not defined for prediction_type='flow'"):
        replace(NoiseSchedule.flow(), process="ddpm")
    for method in ("joint", "stepwise", "naive", "optimize"):
        with pytest.raises(ValueError, match=r"draw noise, which cannot be undone: .*schedule\.as_ddim\(\)"):
            deqkern.invert(wave, noise, schedule, 10, method=method)
    found = deqkern.invert(wave, 0.1 * noise, schedule.as_ddim(), 10, round_trip=True)
    assert found.round_trip is not None and float(found.round_trip.max()) < 1e-2


def test_sigma_min_ends_it_early() -> None:
    table = NoiseSchedule.linear(process="ddpm", clip_sample=True).steps(10, sigma_min=0.1)
    assert 0.1 <= float(table.sigma_next[-1] / table.alpha_next[-1]) < 0.12 and bool((table.n > 0).all())


@pytest.mark.parametrize("method", ["exact", "implicit"])
@pytest.mark.parametrize("clipping", CLIPPING)
def test_gradients(clipping: str, method: str) -> None:
    scheduler = ddpm(variance_type="fixed_large", prediction_type="v_prediction", **CLIPPING[clipping])
    scheduler.set_timesteps(12)
    noise = torch.randn(2, *SHAPE, generator=seeded(0))
    first, same = noise.clone().requires_grad_(), noise.clone().requires_grad_()
    (expected,) = torch.autograd.grad(by_scheduler(scheduler, wave, first).sin().sum(), first)
    gradient = gradients.Implicit(rtol=1e-6) if method == "implicit" else method
    found = deqkern.sample(wave, same, scheduler, 12, rtol=0, generator=seeded(), gradient=gradient)
    (actual,) = torch.autograd.grad(found.value.sin().sum(), same)
    assert relative_error(actual, expected).max() <= 1e-4


def test_gradients_that_know_another_process_are_refused() -> None:
    noise = torch.randn(2, *SHAPE).requires_grad_()
    with pytest.raises(ValueError, match="process='ddpm_large' draws more noise"):
        deqkern.sample(wave, noise, NoiseSchedule.linear(process="ddpm_large"), 10, gradient="adjoint")
    with pytest.raises(ValueError, match="clips or thresholds x0: gradient='adjoint'"):
        deqkern.sample(wave, noise, NoiseSchedule.linear(process="ddpm", clip_sample=True), 10, gradient="adjoint")
    deqkern.sample(wave, noise, NoiseSchedule.linear(process="ddpm"), 10, gradient="adjoint").value.sum().backward()


def test_a_profile_of_it() -> None:
    schedule = NoiseSchedule.linear(process="ddpm", clip_sample=True)
    profile = deqkern.calibrate(wave, SHAPE, schedule, 10, samples=1)
    noise = torch.randn(2, *SHAPE)
    found = deqkern.sample(wave, noise, schedule, 20, solver=solvers.default(profile=profile), generator=seeded())
    assert found.converged.all()
    assert deqkern.plan(wave, noise, schedule, 20, repeats=1).solver
