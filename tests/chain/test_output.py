"""What enters a chain that clips x0: the effective output, and the estimates of x0."""

from __future__ import annotations

import pytest
import torch
from schedules import (
    SHAPE,
    chain_step,
    relative,
)

from deqkern.chain.schedule import NoiseSchedule


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
