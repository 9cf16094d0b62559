"""What is read of the schedulers of diffusers."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from schedules import (
    TRAINED_BETAS,
    ddim,
    make,
)

from deqkern.chain.schedule import NoiseSchedule
from deqkern.chain.schedulers import SCHEDULERS, SchedulerRow, replaced_methods, row_by_step


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
        ("LCMScheduler", {}, "nothing to gain"),
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


@pytest.mark.parametrize("row", SCHEDULERS, ids=lambda row: row.name)
def test_a_row_speaks_of_what_diffusers_has(row: SchedulerRow) -> None:
    scheduler = getattr(pytest.importorskip("diffusers"), row.name)()
    assert row_by_step(scheduler) is row and not replaced_methods(scheduler, row)
    options = {*row.accepted, *(row.own_levels or ())} | ({"variance_type"} if row.processes else set())
    assert options <= set(scheduler.config), "of each option there is one of that name"
    assert all(scheduler.config[name] in values for name, values in row.accepted.items())
    takes_eta = "eta" in inspect.signature(scheduler.step).parameters
    assert takes_eta == (row.noise_of(scheduler).eta is None)
    assert row.flow == (NoiseSchedule.from_diffusers(scheduler).prediction_type == "flow")


@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("row", SCHEDULERS, ids=lambda row: row.name)
def test_a_step_has_the_dtype_of_its_row(row: SchedulerRow, state: torch.dtype) -> None:
    scheduler = getattr(pytest.importorskip("diffusers"), row.name)()
    scheduler.set_timesteps(4)
    x, output = torch.randn(1, 2, 4, 4).to(state), torch.randn(1, 2, 4, 4, dtype=torch.bfloat16)
    found = scheduler.step(output, scheduler.timesteps[0], x, return_dict=False)[0]
    assert found.dtype == row.result_dtype(output.dtype, state)


def test_the_options_of_a_row_are_those_of_the_scheduler_as_it_is_set() -> None:
    multistep = pytest.importorskip("diffusers").DPMSolverMultistepScheduler
    row = row_by_step(multistep())
    assert row is not None
    assert [row.order_of(multistep(solver_order=order)) for order in (1, 2, 3)] == [1, 2, 3]
    noise = row.noise_of(multistep(algorithm_type="sde-dpmsolver++"))
    assert (noise.eta, noise.dtype) == (1.0, torch.float32) and row.noise_of(multistep()).eta == 0.0
