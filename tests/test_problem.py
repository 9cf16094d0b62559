"""A scheduler of diffusers as `schedule`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import deqkern

diffusers = pytest.importorskip("diffusers")


def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return 0.3 * torch.tanh(x)


NOISE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DDIMScheduler(clip_sample=False),
        diffusers.DDPMScheduler(),
        diffusers.DPMSolverMultistepScheduler(),
        diffusers.FlowMatchEulerDiscreteScheduler(),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_a_scheduler_is_as_good_as_what_is_read_of_it(scheduler: Any) -> None:
    schedule, seeds = deqkern.NoiseSchedule.from_diffusers(scheduler), [torch.Generator().manual_seed(3) for _ in "ab"]
    values = [
        deqkern.sample(model, NOISE, given, 10, generator=seed).value
        for given, seed in zip((schedule, scheduler), seeds, strict=True)
    ]
    assert torch.equal(*values)
    solve = deqkern.begin(NOISE, scheduler, 10)
    while solve.open:
        rows = solve.ask()
        solve.tell(model(rows.states, rows.timesteps))
    assert solve.solution().converged.all()
    assert deqkern.plan(model, NOISE, scheduler, 10, repeats=1).solver is not None
    deqkern.calibrate(model, (3, 8, 8), scheduler, 10, samples=1)
    if isinstance(scheduler, diffusers.DDIMScheduler):
        expected = deqkern.invert(model, NOISE, schedule, 10).value
        assert torch.equal(deqkern.invert(model, NOISE, scheduler, 10).value, expected)


def test_a_scheduler_that_cannot_be_inverted() -> None:
    for scheduler, message in (
        (diffusers.DDPMScheduler(), "draw noise, which cannot be undone"),
        (diffusers.DPMSolverMultistepScheduler(), r"order must be 1: .* schedule\.as_ddim\(\)"),
    ):
        with pytest.raises(ValueError, match=message):
            deqkern.invert(model, NOISE, scheduler, 10)


@pytest.mark.parametrize(
    ("schedule", "error", "message"),
    [
        (diffusers.DDPMScheduler, TypeError, r"got the class DDPMScheduler: make one, DDPMScheduler\(\.\.\)"),
        ("ddim", TypeError, "schedule must be a NoiseSchedule or a scheduler of diffusers, got str"),
        (None, TypeError, "got NoneType"),
        (
            diffusers.EulerAncestralDiscreteScheduler(),
            ValueError,
            r"schedule is a EulerAncestral.*take DDPMScheduler\.from_config\(schedule\.config",
        ),
        (diffusers.PNDMScheduler(), ValueError, r"take DPMSolverMultistepScheduler\.from_config\(schedule\.config\)"),
        (diffusers.EDMEulerScheduler(), ValueError, "schedule is a EDMEulerScheduler"),
        (
            diffusers.DDPMScheduler(variance_type="learned"),
            ValueError,
            "schedule is a DDPMScheduler with variance_type",
        ),
    ],
)
def test_what_is_no_schedule(schedule: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        deqkern.sample(model, NOISE, schedule, 10)


def test_a_subclass_with_a_rule_of_its_own() -> None:
    class Mine(diffusers.DDPMScheduler):  # type: ignore[name-defined, misc]
        def _get_variance(self, *args: Any, **kwargs: Any) -> Any:
            return super()._get_variance(*args, **kwargs) * 0.5

    with pytest.raises(ValueError, match="schedule is a DDPMScheduler with _get_variance of its own"):
        deqkern.sample(model, NOISE, Mine(), 10)
