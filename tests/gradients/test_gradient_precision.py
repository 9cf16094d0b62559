"""Gradients in half precision and under autocast neither overflow nor vanish."""

from __future__ import annotations

import copy

import pytest
import torch
from problems import chain
from tiny import BATCH, SHAPE, STEPS, Tiny, leaf
from torch import Tensor

import deqkern
from deqkern import NoiseSchedule


@pytest.mark.parametrize("gradient", ["exact", "implicit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_samples_that_the_loss_ignores_have_no_gradient(dtype: torch.dtype, gradient: str) -> None:
    model, noise = Tiny(dtype).requires_grad_(False), torch.randn(2, *SHAPE, requires_grad=True)
    value = deqkern.sample(model, noise, NoiseSchedule.linear(), STEPS, rtol=1e-3, gradient=gradient).value
    one, none = (torch.autograd.grad(loss, noise, retain_graph=True)[0] for loss in (value[0].sum(), 0 * value.sum()))
    assert one[0].any() and not one[1].any() and not none.any()


@pytest.mark.parametrize("gradient", ["exact", "implicit"])
def test_gradients_of_narrow_parameters_are_summed_in_fp32(gradient: str) -> None:
    weight = torch.ones((), dtype=torch.bfloat16, requires_grad=True)
    schedule, noise = NoiseSchedule.linear(), torch.zeros(1, *SHAPE)
    value = deqkern.sample(lambda x, t: weight.expand(x.shape), noise, schedule, 100, gradient=gradient, max_batch=1)
    (found,) = torch.autograd.grad(value.value.mean(), weight)
    after = torch.cat([schedule.steps(100).a.flip(0).cumprod(0).flip(0)[1:], torch.ones(1, dtype=torch.float64)])
    expected = (schedule.steps(100).b * after).sum()
    assert (found.double() - expected).abs() <= 2**-8 * expected.abs()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gradient", ["exact", "implicit"])
def test_half_precision_keeps_small_gradients(dtype: torch.dtype, gradient: str) -> None:
    wide, scale = Tiny(torch.float32), 1e-7  # a loss that is a mean over many pixels
    narrow = Tiny(torch.float32)
    narrow.load_state_dict(wide.state_dict())
    narrow = narrow.to(dtype)
    noise = torch.randn(BATCH, *SHAPE).to(dtype).requires_grad_()
    value = deqkern.sample(narrow, noise, NoiseSchedule.linear(), STEPS, gradient=gradient, rtol=1e-3).value
    (value.float().square() * scale).sum().backward()
    full = noise.detach().float().requires_grad_()
    (chain(wide, full, NoiseSchedule.linear(), STEPS).square() * scale).sum().backward()
    for found, expected in [(noise.grad, full.grad), (narrow.last.weight.grad, wide.last.weight.grad)]:
        assert found is not None and expected is not None and found.dtype is dtype
        assert (found.float() - expected).norm() <= 0.1 * expected.norm()


@pytest.mark.parametrize("gradient", ["exact", "implicit", "phantom"])
def test_a_loss_that_overflowed_is_passed_on(gradient: str) -> None:
    """For a gradient scaler to see, without a solve."""
    noise, model, z = leaf(BATCH, *SHAPE), Tiny(), leaf(STEPS, BATCH, *SHAPE)
    value = deqkern.sample(model, noise, NoiseSchedule.linear(), STEPS, eta=1.0, step_noise=z, gradient=gradient).value
    for found in torch.autograd.grad(value, [noise, z, *model.parameters()], value.detach() * torch.inf):
        assert found.isnan().all()


@pytest.mark.parametrize("gradient", ["exact", "implicit"])
def test_autocast_is_that_of_the_call(gradient: str) -> None:
    seen: list[tuple[bool, torch.dtype]] = []
    model, noise = Tiny(torch.float32), torch.randn(BATCH, *SHAPE, requires_grad=True)
    model.last.register_forward_hook(lambda module, args, output: seen.append((torch.is_grad_enabled(), output.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        value = deqkern.sample(model, noise, NoiseSchedule.linear(), STEPS, gradient=gradient).value
    value.sum().backward()
    assert set(seen) == {(False, torch.bfloat16), (True, torch.bfloat16)}


def test_samples_with_small_gradients_keep_them_in_fp16() -> None:
    model = Tiny(torch.float32).half().requires_grad_(False)
    noise, weight = torch.randn(2, *SHAPE), torch.tensor([1.0, 1e-7]).view(2, 1, 1, 1)

    def grad(first: Tensor, weight: Tensor) -> Tensor:
        first = first.clone().requires_grad_()
        value = deqkern.sample(model, first, NoiseSchedule.linear(), STEPS, rtol=1e-3, gradient="implicit").value
        return torch.autograd.grad((weight * value.square()).sum(), first)[0]

    together, alone = grad(noise, weight)[1:], grad(noise[1:], weight[1:])
    assert (together - alone).norm() <= 5e-3 * alone.norm()


class Bias(torch.nn.Module):
    """A model in fp16 whose bias every row and pixel adds to."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 4, 1, dtype=torch.float16)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.conv(x)


@pytest.mark.parametrize("loss", [1.0, 1e-7, 1e3])
def test_half_precision_sums_neither_overflow_nor_vanish(loss: float) -> None:
    """65536 equal cotangents, more than fp16 can count, of any size."""
    model, noise = Bias(), torch.randn(4, 4, 128, 128)
    wide = copy.deepcopy(model).float()
    for case in (model, wide):
        value = deqkern.sample(case, noise, NoiseSchedule.linear(), 3, gradient="exact", rtol=0.0).value
        (value.float().mean() * loss * len(noise)).backward()
    for half, right in zip(model.parameters(), wide.parameters(), strict=True):
        assert half.grad is not None and right.grad is not None
        rounding = 2.0**-24 if loss < 1 else 0.0  # what fp16 cannot hold at all
        assert ((half.grad - right.grad).abs() <= 2e-2 * right.grad.abs().amax() + rounding).all()
