"""Steps that are even in log-SNR, and chains that end early."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from schedules import (
    SPACINGS,
    make,
)
from torch import Tensor

from deqkern.chain.schedule import NoiseSchedule, StepTable
from deqkern.chain.timesteps import even_in_log_snr


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
