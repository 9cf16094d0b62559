"""What a window guesses of the states that it comes to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from problems import chain, gaussian
from torch import Tensor

import deqkern
from deqkern import NoiseSchedule, slopes, solvers
from deqkern.network import Network
from deqkern.schedule import StepTable
from deqkern.trajectory import Trajectory, start

SHAPE, STEPS = (2, 3, 4), 12
SCHEDULES = {
    "epsilon": NoiseSchedule.linear(),
    "v_prediction": NoiseSchedule.linear(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    ),
    "sample": NoiseSchedule.linear(prediction_type="sample", timestep_spacing="linspace"),
    "flow": NoiseSchedule.flow(),
    "clipped": NoiseSchedule.linear(clip_sample=True, clip_sample_range=10.0),
}


class Point:
    """The exact model of data that is one point: x0 stays what it is along every chain."""

    def __init__(self, table: StepTable) -> None:
        self.table, self.point = table, torch.randn(SHAPE, generator=torch.Generator().manual_seed(5)).double()

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        i = (self.table.timesteps == t[:, None]).int().argmax(1)
        alpha, sigma, u, w = (
            v[i].view(-1, 1, 1, 1) for v in (self.table.alpha, self.table.sigma, self.table.u, self.table.w)
        )
        return u * self.point + w * (x - alpha * self.point) / sigma


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in SCHEDULES),
        ("epsilon", {"eta": 1.0}),
        ("clipped", {"eta": 0.5}),
        ("epsilon", {"order": 2}),
        ("flow", {"order": 2}),
        ("v_prediction", {"order": 2, "eta": 1.0}),
    ],
    ids=str,
)
def test_where_x0_stays_the_guesses_are_the_chain(name: str, options: dict[str, Any]) -> None:
    """The steps of the first window start from another guess, since no x0 is known yet."""
    schedule = SCHEDULES[name]
    model = Point(schedule.steps(STEPS, **options))
    noise = torch.randn(2, *SHAPE, dtype=torch.float64)
    step_noise = torch.randn(STEPS, *noise.shape, dtype=torch.float64) if options.get("eta") else None
    solver = solvers.default(window=3)
    found = deqkern.sample(model, noise, schedule, STEPS, solver=solver, rtol=1e-5, step_noise=step_noise, **options)
    torch.testing.assert_close(
        found.value, chain(model, noise, schedule, STEPS, step_noise=step_noise, **options), rtol=1e-4, atol=1e-4
    )
    assert found.iterations < STEPS, found.message
    entered = found.residual_history.isfinite().int().argmax(0)  # (S, B), the first iteration of each step
    first = found.residual_history.gather(0, entered[None])[0]
    assert first[4:].max() <= 1e-6 < first[0].min()


def test_an_inversion_goes_on_along_its_chain_too() -> None:
    schedule = SCHEDULES["epsilon"]
    table = schedule.steps(STEPS, sigma_min=0.1)
    model, noise = Point(table), torch.randn(2, *SHAPE, dtype=torch.float64)
    image = chain(model, noise, schedule, STEPS, sigma_min=0.1)
    found = deqkern.invert(model, image, schedule, STEPS, method="stepwise", sigma_min=0.1, rtol=1e-8)
    torch.testing.assert_close(found.value, noise, rtol=1e-5, atol=1e-5)
    entered = found.residual_history.isfinite().int().argmax(0)
    assert found.residual_history.gather(0, entered[None])[0, :-1].max() <= 1e-7


def begun(solver: solvers.Solver, **options: Any) -> tuple[Trajectory, Tensor]:
    """A trajectory whose sample 1 is to go on from step 3, and its states as they were."""
    schedule = SCHEDULES["epsilon"]
    model = gaussian(schedule, SHAPE, torch.Generator().manual_seed(1))
    noise, table = torch.randn(2, *SHAPE), schedule.steps(STEPS)
    trajectory = start(Network(model, table, {}, noise), noise, table, solver, **options)
    before = trajectory.x.clone()
    trajectory.extend(1, range(3, 7), *torch.randn(2, trajectory.basis.size))
    return trajectory, before


def test_only_the_states_of_new_steps_of_that_sample_change() -> None:
    trajectory, before = begun(solvers.default())
    changed = (trajectory.x != before).any(-1)
    assert changed[:, 1].nonzero().flatten().tolist() == [4, 5, 6, 7] and not changed[:, 0].any()


def test_a_constant_start_goes_on_with_the_last_state() -> None:
    trajectory, before = begun(replace(solvers.picard(), slope=slopes.Gaussian()))
    assert torch.equal(trajectory.x[4:8, 1], before[3, 1].expand(4, -1))


def test_a_given_guess_stays_and_so_do_the_states_of_a_gradient() -> None:
    for options in ({"guess": torch.randn(STEPS + 1, 2, *SHAPE)}, {"noisy": False}):
        trajectory, before = begun(solvers.default(), **options)
        assert torch.equal(trajectory.x, before)
