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
from deqkern.chain.schedule import StepTable
from deqkern.engine.loop import Solve
from deqkern.engine.trajectory import Traits, start
from deqkern.solvers.slopes import slope_of

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


def begun(solver: solvers.Solver, **options: Any) -> tuple[Solve, Tensor]:
    """A solve after its first iteration, and the states as they were before it."""
    schedule = SCHEDULES["epsilon"]
    model = gaussian(schedule, SHAPE, torch.Generator().manual_seed(1))
    noise, table = torch.randn(2, *SHAPE), schedule.steps(STEPS)
    trajectory = start(noise, table, solver, Traits(), **options)
    before, solving = trajectory.x.clone(), Solve(trajectory, solver, rtol=0.0, dtype=noise.dtype)
    rows = solving.ask()
    solving.tell(model(rows.states, rows.timesteps))
    return solving, before


def test_only_the_states_of_new_steps_are_guessed() -> None:
    solving, before = begun(solvers.default(window=3))
    ends = solving.window[:, 1].tolist()
    assert all(3 < end < STEPS for end in ends)
    changed = (solving.trajectory.x != before).any(-1)
    for b, end in enumerate(ends):
        assert changed[:, b].nonzero().flatten().tolist() == list(range(1, end + 1))


def test_a_constant_start_goes_on_with_the_last_state() -> None:
    solving, _ = begun(replace(solvers.picard(window=3), slope=slopes.Gaussian()))
    for b, end in enumerate(solving.window[:, 1].tolist()):
        assert end > 3
        states = solving.trajectory.x[3 : end + 1, b]
        assert torch.equal(states, states[:1].expand_as(states))


def test_a_given_guess_stays_and_so_do_the_states_of_a_gradient() -> None:
    for options in ({"guess": torch.randn(STEPS + 1, 2, *SHAPE)}, {"noisy": False}):
        solving, before = begun(solvers.default(window=3), **options)
        assert torch.equal(solving.trajectory.x[4:], before[4:])


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("implicit", [False, True])
def test_the_first_guess_is_the_chain_of_the_initial_slope(eta: float, order: int, implicit: bool) -> None:
    if implicit and (eta or order == 2):
        pytest.skip("such steps have no reverse")
    table = SCHEDULES["v_prediction"].steps(STEPS, eta=eta, order=order, sigma_min=0.1 if implicit else None)
    table = table.reversed() if implicit else table
    solver, noise = solvers.Solver(slopes.Gaussian(0.5), basis="identity"), torch.randn(2, *SHAPE).double()
    step_noise = torch.randn(STEPS, *noise.shape).double() if eta else None
    found = start(noise, table, solver, Traits(), step_noise=step_noise)
    slope = slope_of(table, solver.slope.initial(table, found.basis))[:, 0].tolist()
    states, output = [noise.flatten(1)], torch.zeros(2, 24).double()
    for i in range(STEPS):
        a, b, c, n = (float(values[i]) for values in (table.a, table.b, table.c, table.n))
        before, output = output, slope[i] * states[-1]
        state = a * states[-1] / (1 - b * slope[i]) if implicit else a * states[-1] + b * output + c * before
        states.append(state if step_noise is None else state + n * step_noise[i].flatten(1))
    torch.testing.assert_close(found.x, torch.stack(states))
