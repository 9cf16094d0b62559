"""`order=2`, DPM-Solver++ 2M: its tables, its joint solve and its gradient, against diffusers' sequential scheduler."""

from __future__ import annotations

from typing import Any

import problems
import pytest
import torch
from asserts import relative_error
from torch import Tensor

import deqkern
from deqkern import NoiseSchedule, gradients, models, solvers

SHAPE = (3, 8, 8)
SPACINGS = ("leading", "linspace", "trailing")
KINDS: dict[str, dict[str, Any]] = {  # DPMSolverMultistepScheduler's arguments
    "linear": {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"},
    "scaled_linear": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    "v_prediction": {"prediction_type": "v_prediction"},
    "sample": {"prediction_type": "sample"},
    "cosine": {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
    "zero-snr": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    "threshold": {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9},
    "sigma_min": {"final_sigmas_type": "sigma_min"},
    "karras": {"use_karras_sigmas": True, "beta_schedule": "scaled_linear"},
    "exponential": {"use_exponential_sigmas": True, "prediction_type": "v_prediction"},
    "lu": {"use_lu_lambdas": True, "final_sigmas_type": "sigma_min"},
}


def multistep(eta: float = 0.0, **options: Any) -> Any:
    kind = "sde-dpmsolver++" if eta else "dpmsolver++"
    return pytest.importorskip("diffusers").DPMSolverMultistepScheduler(algorithm_type=kind, **options)


def by_scheduler(scheduler: Any, model: Any, noise: Tensor, z: Tensor | None = None) -> Tensor:
    """The sequential chain, stepped by diffusers."""
    x = noise
    for i, t in enumerate(scheduler.timesteps):
        out = model(x, t.expand(len(x)))
        x = scheduler.step(out, t, x, variance_noise=None if z is None else z[i], return_dict=False)[0]
    return x


def wave(x: Tensor, t: Tensor) -> Tensor:
    """Something smooth that every output may be."""
    return 0.9 * torch.sin(x * (1 + t.view(-1, *[1] * (x.ndim - 1)) / 1000))


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_chain_is_that_of_the_multistep_scheduler(kind: str, spacing: str, eta: float) -> None:
    for steps in (1, 2, 3, 14, 15, 50, 100):
        scheduler = multistep(eta, timestep_spacing=spacing, steps_offset=int(spacing == "leading"), **KINDS[kind])
        scheduler.set_timesteps(steps)
        schedule = NoiseSchedule.from_diffusers(scheduler)
        assert torch.equal(schedule.steps(steps, eta=eta, order=2).timesteps, scheduler.timesteps)
        noise, z = torch.randn(2, *SHAPE, dtype=torch.float64), torch.randn(steps, 2, *SHAPE, dtype=torch.float64)
        z = z if eta else None
        expected = by_scheduler(scheduler, wave, noise, z)
        found = problems.chain(wave, noise, schedule, steps, step_noise=z, eta=eta, order=2)
        assert relative_error(found, expected).max() <= 2e-5  # diffusers keeps its sigmas in fp32


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize(
    "schedule",
    [
        NoiseSchedule.linear(timestep_spacing="linspace"),
        NoiseSchedule.linear(timestep_spacing="trailing", clip_sample=True),
        NoiseSchedule.scaled_linear(steps_offset=1, set_alpha_to_one=False),
        NoiseSchedule.linear(timestep_spacing="log_snr"),
    ],
    ids=["linspace", "clip", "offset", "log_snr"],
)
def test_exact_mode_equals_the_sequential_chain(schedule: NoiseSchedule, eta: float) -> None:
    generator = torch.Generator().manual_seed(1)
    model, noise = problems.mixture(schedule, SHAPE, generator), torch.randn(2, *SHAPE, generator=generator)
    z = torch.randn(20, 2, *SHAPE, generator=generator) if eta else None
    expected = problems.chain(model, noise, schedule, 20, step_noise=z, eta=eta, order=2)
    windowed = solvers.Solver(deqkern.slopes.Secant(), window=6)
    for solver in (None, solvers.parataa(), solvers.picard(), solvers.deq_ddim(), solvers.sequential(), windowed):
        solution = deqkern.sample(model, noise, schedule, 20, eta=eta, order=2, step_noise=z, solver=solver, rtol=0)
        assert solution.converged.all()
        assert relative_error(solution.value, expected).max() <= 1e-5


@pytest.mark.parametrize("rtol", [1e-2, 1e-3])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_error_at_the_stop_is_within_three_tolerances(eta: float, rtol: float) -> None:
    schedule, generator = NoiseSchedule.linear(timestep_spacing="linspace"), torch.Generator().manual_seed(2)
    for model in (problems.gaussian(schedule, SHAPE, generator), problems.mixture(schedule, SHAPE, generator)):
        noise, z = torch.randn(4, *SHAPE, generator=generator), torch.randn(50, 4, *SHAPE, generator=generator)
        expected = problems.chain(model, noise, schedule, 50, step_noise=z if eta else None, eta=eta, order=2)
        options: dict[str, Any] = {"eta": eta, "step_noise": z if eta else None, "rtol": rtol}
        solution = deqkern.sample(model, noise, schedule, 50, order=2, **options)
        assert solution.converged.all()
        assert relative_error(solution.value, expected).max() <= 3 * rtol


def test_flow_matching_of_second_order() -> None:
    """Against the formula of DPM-Solver++ in sigma and lambda = log((1 - sigma) / sigma)."""
    schedule, model = NoiseSchedule.flow(shift=3.0), wave
    noise, table = torch.randn(2, *SHAPE), NoiseSchedule.flow(shift=3.0).steps(20, order=2)
    sigma = torch.cat([table.sigma, table.sigma_next[-1:]])
    level = ((1 - sigma) / sigma).log()
    x, before = noise.double(), None
    for i in range(20):
        x0 = x - sigma[i] * model(x, table.timesteps[i].double().expand(2))
        bent = x0
        if before is not None and i < 19:
            bent = x0 + (x0 - before) * (level[i + 1] - level[i]) / (2 * (level[i] - level[i - 1]))
        x = sigma[i + 1] / sigma[i] * x - (1 - sigma[i + 1]) * torch.expm1(level[i] - level[i + 1]) * bent
        before = x0
    solution = deqkern.sample(model, noise, schedule, 20, order=2, rtol=0)
    assert relative_error(solution.value, x).max() <= 1e-5


def test_it_is_of_second_order() -> None:
    """Halving the steps of a Gaussian's chain divides the error by four, where DDIM's is halved."""
    schedule = NoiseSchedule.linear(num_train_timesteps=8192, beta_start=1e-4 / 8, beta_end=0.02 / 8)
    model = problems.Gaussian(schedule, torch.zeros(4), torch.tensor([0.1, 0.5, 2.0, 4.0]))
    noise, errors = torch.ones(1, 1, 2, 2, dtype=torch.float64), {}
    gaussian = _in_float64(model)
    last = schedule.steps(64, order=2, sigma_min=0.5)
    start, end = (float(last.alpha[0]), float(last.sigma[0])), (float(last.alpha_next[-1]), float(last.sigma_next[-1]))
    spread = [(alpha**2 * model.variance.double() + sigma**2).sqrt() for alpha, sigma in (start, end)]
    exact = noise * (spread[1] / spread[0]).view(1, 1, 2, 2)  # the flow of a Gaussian keeps its quantiles
    for order in (1, 2):
        for steps in (32, 64):
            found = deqkern.sample(gaussian, noise, schedule, steps, order=order, sigma_min=0.5, rtol=0).value
            errors[order, steps] = float(relative_error(found, exact).max())
    assert 1.8 <= errors[1, 32] / errors[1, 64] <= 2.2
    assert 3.3 <= errors[2, 32] / errors[2, 64] <= 4.7
    assert errors[2, 64] < errors[1, 64] / 5


def _in_float64(model: problems.Gaussian) -> Any:
    abar = model.schedule.alphas_cumprod
    assert abar is not None

    def predict(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = abar[t.long()].sqrt()[:, None], (1 - abar[t.long()]).sqrt()[:, None]
        flat, variance = x.flatten(1), model.variance.double()
        x0 = alpha * variance / (alpha**2 * variance + sigma**2) * flat
        return ((flat - alpha * x0) / sigma).view_as(x)

    return predict


@pytest.mark.parametrize("name", models.SHIPPED)
def test_a_trained_model_gives_what_its_sequential_scheduler_gives(name: str) -> None:
    loaded, steps = models.load(name), 20
    assert loaded.schedule.alphas_cumprod is not None
    scheduler = multistep(
        trained_betas=_betas(loaded.schedule), timestep_spacing="linspace",
        prediction_type=loaded.schedule.prediction_type,
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    noise = torch.randn(2, *loaded.shape, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = by_scheduler(scheduler, lambda x, t: loaded.model(x, t).sample, noise)
    schedule = NoiseSchedule.from_diffusers(scheduler)
    found = deqkern.sample(loaded.model, noise, schedule, steps, order=2, rtol=1e-4)
    assert found.converged.all() and found.iterations <= 12
    assert relative_error(found.value, expected).max() <= 2e-3
    exact = deqkern.sample(loaded.model, noise, schedule, steps, order=2, rtol=0)
    assert relative_error(exact.value, expected).max() <= 1e-5


def _betas(schedule: NoiseSchedule) -> list[float]:
    abar = schedule.alphas_cumprod
    assert abar is not None
    return (1 - torch.cat([abar[:1], abar[1:] / abar[:-1]])).tolist()


class Tiny(torch.nn.Module):
    """A small network in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(2, 6, 3, padding=1), torch.nn.Tanh(), torch.nn.Conv2d(6, 2, 3, padding=1)
        ).double()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = 0.5 * x + self.layers(x)
        return out


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("clip", [False, True])
def test_the_exact_gradient_equals_autograd(clip: bool, eta: float) -> None:
    schedule, model, steps = NoiseSchedule.linear(clip_sample=clip), Tiny(), 8
    noise = torch.randn(3, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    z = torch.randn(steps, *noise.shape, dtype=torch.float64, requires_grad=True) if eta else None
    found = deqkern.sample(
        model, noise, schedule, steps, eta=eta, order=2, step_noise=z, rtol=0, gradient="exact", max_batch=2
    ).value
    expected = problems.chain(model, noise, schedule, steps, step_noise=z, eta=eta, order=2)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    inputs, cotangent = [noise, *model.parameters(), *([] if z is None else [z])], torch.randn_like(noise)
    wanted = torch.autograd.grad(expected, inputs, cotangent)
    for one, other in zip(torch.autograd.grad(found, inputs, cotangent), wanted, strict=True):
        assert (one - other).norm() <= 1e-9 * other.norm()


@pytest.mark.parametrize("gradient", ["implicit", "phantom", "residual", "adjoint", gradients.Implicit()])
def test_other_gradients_are_refused(gradient: Any) -> None:
    model = problems.gaussian(NoiseSchedule.linear(), SHAPE, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="gradient must be None or 'exact' with order=2"):
        deqkern.sample(model, torch.randn(1, *SHAPE), NoiseSchedule.linear(), 5, order=2, gradient=gradient)
    assert not model.calls


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 3}, "order must be 1 or 2"),
        ({"order": "2"}, "order must be 1 or 2"),
        ({"order": True}, "order must be 1 or 2"),
        ({"order": 2.0}, "order must be 1 or 2"),
        ({"order": 2, "eta": 0.5}, "eta must be 0 or 1 with order=2"),
        ({"order": 2, "num_inference_steps": 1000}, "num_inference_steps is too large for order=2"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"num_inference_steps": 10} | options
    with pytest.raises(ValueError, match=message):
        NoiseSchedule.linear(timestep_spacing="linspace").steps(**arguments)


def test_the_sigmas_of_a_scheduler() -> None:
    scheduler = multistep(use_karras_sigmas=True)
    schedule = NoiseSchedule.from_diffusers(scheduler)
    scheduler.set_timesteps(12)  # of a scheduler whose copy the schedule took before
    first = schedule.steps(12)  # DDIM on them
    torch.testing.assert_close(first.sigma / first.alpha, scheduler.sigmas[:-1].double(), rtol=1e-6, atol=0)
    assert torch.equal(first.timesteps, scheduler.timesteps) and float(first.sigma_next[-1]) == 0
    with pytest.raises(ValueError, match="sigma_min needs the noise levels of training"):
        schedule.steps(12, sigma_min=0.1)


def test_tables_of_second_order_run_one_way() -> None:
    table = NoiseSchedule.linear().steps(10, order=2, sigma_min=0.1)
    for way in (table.reversed, table.transposed):
        with pytest.raises(ValueError, match="order must be 1"):
            way()


def test_a_part_begins_with_a_step_of_first_order() -> None:
    table, whole = (NoiseSchedule.linear().steps(10, order=2) for _ in range(2))
    part = table.part(range(4, 8))
    assert part.b[0] == whole.b[4] + whole.c[4] and part.c[0] == 0 and part.num_inference_steps == 4
    for name in ("b", "c"):
        assert torch.equal(getattr(part, name)[1:], getattr(whole, name)[5:8])
        assert torch.equal(getattr(table, name), getattr(whole, name)), "the part shares no memory"
