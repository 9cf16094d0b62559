"""What a scheduler was given, and the options that change its steps: read, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from asserts import relative_error
from torch import Tensor

import deqkern
from deqkern import NoiseSchedule

SHAPE = (3, 8, 8)
diffusers = pytest.importorskip("diffusers")


def wave(x: Tensor, t: Tensor) -> Tensor:
    return 0.9 * torch.sin(x * (1 + t.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1)) / 1000))


def multistep(**options: Any) -> Any:
    return diffusers.DPMSolverMultistepScheduler(**options)


def by_scheduler(scheduler: Any, noise: Tensor, **more: Any) -> Tensor:
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(wave(x, t), t, x, **more).prev_sample
    return x


def check_own_loop(scheduler: Any, steps: int, **more: Any) -> None:
    """Taken as it is, it is solved as it steps."""
    noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    seeds = [{name: torch.Generator().manual_seed(1) for name in more} for _ in range(2)]
    schedule = NoiseSchedule.from_diffusers(scheduler)
    assert torch.equal(schedule.steps(steps).timesteps, scheduler.timesteps)
    expected = by_scheduler(scheduler, noise, **seeds[0])
    for given in (schedule, scheduler):
        found = deqkern.sample(wave, noise, given, steps, rtol=0, **seeds[1])
        assert relative_error(found.value, expected).max() <= 1e-5
        seeds[1] = {name: torch.Generator().manual_seed(1) for name in more}


@pytest.mark.parametrize("steps", [1, 3, 14, 15, 30])
@pytest.mark.parametrize("options", [{}, {"final_sigmas_type": "sigma_min"}])
@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("euler", [True, False])
def test_how_a_multistep_chain_ends(options: dict[str, Any], lower: bool, euler: bool, steps: int) -> None:
    scheduler = multistep(lower_order_final=lower, euler_at_final=euler, timestep_spacing="trailing", **options)
    scheduler.set_timesteps(steps)
    check_own_loop(scheduler, steps)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True, "prediction_type": "v_prediction"},
        {"use_lu_lambdas": True},
        {"final_sigmas_type": "sigma_min"},
        {"prediction_type": "v_prediction", "thresholding": True},
    ],
)
def test_the_order_and_the_eta_are_those_of_the_scheduler(options: dict[str, Any]) -> None:
    for kind in ("dpmsolver++", "sde-dpmsolver++"):
        scheduler = multistep(algorithm_type=kind, **options)
        scheduler.set_timesteps(20)
        check_own_loop(scheduler, 20, **({"generator": None} if kind.startswith("sde") else {}))
    schedule = NoiseSchedule.from_diffusers(scheduler)
    assert schedule.steps(20).order == 2 and bool((schedule.steps(20).n > 0).any())
    assert schedule.steps(20, order=1, eta=0.0).order == 1, "what is said counts"
    ddim = schedule.as_ddim()
    assert ddim.steps(20).order == 1 and not bool(ddim.steps(20).n.any()) and not ddim.draws_noise()
    assert torch.equal(schedule.steps(20, order=1, eta=0.0).b, ddim.steps(20).b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver_type": "heun"}, "solver_type='heun'; deqkern solves solver_type='midpoint'"),
        ({"solver_order": 1}, "solver_order=1"),
        ({"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}, "algorithm_type='dpmsolver'"),
    ],
)
def test_rules_that_are_not_solved_are_refused_with_their_order(options: dict[str, Any], message: str) -> None:
    scheduler, noise = multistep(**options), torch.randn(2, *SHAPE)
    schedule = NoiseSchedule.from_diffusers(scheduler)
    with pytest.raises(ValueError, match=message):
        schedule.steps(10, order=2)
    with pytest.raises(ValueError, match=f"schedule is a DPMSolverMultistepScheduler with {message}"):
        deqkern.sample(wave, noise, scheduler, 10)
    if scheduler.config.solver_order == 2:
        with pytest.raises(ValueError, match=message):
            deqkern.sample(wave, noise, schedule, 10)
    assert schedule.steps(10, order=1).order == schedule.as_ddim().steps(10).order == 1  # its noise levels


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("timesteps", [[999, 900, 700, 300, 40], [500, 20, 3], list(range(999, 0, -50))])
def test_timesteps_of_the_users_own(timesteps: list[int], prediction_type: str) -> None:
    for kind in ("dpmsolver++", "sde-dpmsolver++"):
        scheduler = multistep(prediction_type=prediction_type, algorithm_type=kind)
        scheduler.set_timesteps(timesteps=timesteps)
        check_own_loop(scheduler, len(timesteps), **({"generator": None} if kind.startswith("sde") else {}))
    schedule = NoiseSchedule.from_diffusers(scheduler)
    for other in (len(timesteps) + 1, 50):
        with pytest.raises(ValueError, match=f"num_inference_steps must be {len(timesteps)}, as many"):
            schedule.steps(other)
    scheduler.set_timesteps(timesteps=[800, 100])  # of no effect on what was read before
    assert schedule.steps(len(timesteps)).timesteps.tolist() == timesteps
    scheduler.set_timesteps(20)
    assert NoiseSchedule.from_diffusers(scheduler).steps(30).num_inference_steps == 30


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverSinglestepScheduler"])
def test_timesteps_that_are_not_read_are_refused(name: str) -> None:
    scheduler = getattr(diffusers, name)()
    scheduler.set_timesteps(timesteps=[999, 900, 700, 300, 40])
    with pytest.raises(ValueError, match=f"{name} was set to timesteps or sigmas other than its own"):
        NoiseSchedule.from_diffusers(scheduler)
    scheduler.set_timesteps(10)
    assert NoiseSchedule.from_diffusers(scheduler).steps(7).num_inference_steps == 7


def test_timesteps_written_into_a_scheduler_are_refused() -> None:
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(5)
    NoiseSchedule.from_diffusers(scheduler)
    scheduler.timesteps = torch.tensor([999, 900, 700, 300, 40])
    with pytest.raises(ValueError, match="DDIMScheduler was set to timesteps"):
        NoiseSchedule.from_diffusers(scheduler)


@pytest.mark.parametrize("given", [{"sigmas": [1.0, 0.8, 0.7, 0.3]}, {"timesteps": [1000.0, 700.0, 400.0, 100.0]}])
def test_flow_levels_of_the_users_own(given: dict[str, Any]) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(**given)
    check_own_loop(scheduler, 4)
    with pytest.raises(ValueError, match="num_inference_steps must be 4"):
        NoiseSchedule.from_diffusers(scheduler).steps(10)
    scheduler.set_timesteps(4)
    assert NoiseSchedule.from_diffusers(scheduler).steps(10).num_inference_steps == 10


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("kind", [list, tuple, torch.tensor])
def test_flow_with_sigmas(kind: Any, shift: float) -> None:
    sigmas = [1.0, 0.8, 0.7, 0.3]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=sigmas)
    expected = NoiseSchedule.from_diffusers(scheduler).steps(4)
    for given in (sigmas, [*sigmas, 0.0]):
        table = NoiseSchedule.flow(shift, sigmas=kind(given)).steps(4)
        for name in ("timesteps", "sigma", "sigma_next", "a", "b"):
            torch.testing.assert_close(getattr(table, name), getattr(expected, name), rtol=1e-6, atol=0)
    schedule = NoiseSchedule.flow(shift, sigmas=sigmas)
    assert not schedule.has_spacing and float(schedule.steps(4, sigma_min=0.1).sigma_next[-1]) > 0.09
    with pytest.raises(ValueError, match=r"num_inference_steps must be 4, .* schedule was given, got 50"):
        schedule.steps(50)


@pytest.mark.parametrize(
    ("sigmas", "error"),
    [
        ([], ValueError), ([0.0], ValueError), ([0.5, 0.8], ValueError), ([1.0, 1.0], ValueError),
        ([1.5, 0.5], ValueError), ([float("nan")], ValueError), ([1.0, -0.1], ValueError), ([[1.0, 0.5]], ValueError),
        ("ab", TypeError), (["x"], TypeError), (object(), TypeError),
    ],
)  # fmt: skip
def test_bad_sigmas(sigmas: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="sigmas must"):
        NoiseSchedule.flow(sigmas=sigmas)


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler", "SCMScheduler"])
def test_schedulers_of_few_steps_are_told_that_there_is_nothing_to_gain(name: str) -> None:
    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    scheduler = getattr(diffusers, name)()
    with pytest.raises((TypeError, ValueError), match=f"scheduler is a {name}, .*nothing to gain"):
        NoiseSchedule.from_diffusers(scheduler)
    with pytest.raises(ValueError, match=f"schedule is a {name}, .*nothing to gain"):
        deqkern.sample(wave, torch.randn(2, *SHAPE), scheduler, 4)
