"""A gradient method of the user's own as `gradient=`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import BATCH, SEQUENTIAL, SHAPE, STEPS, Tiny, leaf
from torch import Tensor

import deqkern
from deqkern import NoiseSchedule, gradients

SCHEDULE = NoiseSchedule.linear()


class LastSteps:
    """Exact through the last steps; through those before, as if the output of the model did not depend on its input."""

    def __init__(self, count: int) -> None:
        self.count = count

    def pull_back(self, chain: gradients.LinearizedChain, cotangent: Tensor) -> gradients.Pulled:
        a, b, n = (value.tolist() for value in (chain.table.a, chain.table.b, chain.table.n))
        lam, noise = cotangent, []
        for i in reversed(range(chain.steps)):
            noise.insert(0, n[i] * lam)
            through = chain.vjp(i, lam, weight=b[i]) if i >= chain.steps - self.count else 0.0
            lam = a[i] * lam + b[i] * through
        return chain.pulled(lam, torch.stack(noise) if chain.with_noise else None, vjps=self.count)


@pytest.mark.parametrize("max_batch", [None, 2])
def test_of_all_steps_it_is_the_exact_gradient(max_batch: int | None) -> None:
    model, noise, condition, z = Tiny(), leaf(BATCH, *SHAPE), leaf(BATCH, 6), leaf(STEPS, BATCH, *SHAPE)
    given: dict[str, Any] = {"eta": 1.0, "step_noise": z, "model_kwargs": {"condition": condition}}
    inputs, cotangent = [noise, z, condition, *model.parameters()], torch.randn(BATCH, *SHAPE).double()
    mine, theirs = (
        torch.autograd.grad(
            deqkern.sample(
                model, noise, SCHEDULE, STEPS, gradient=gradient, max_batch=max_batch, **given, **SEQUENTIAL
            ).value,
            inputs,
            cotangent,
        )
        for gradient in (LastSteps(STEPS), "exact")
    )
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


def test_of_the_last_steps_it_is_truncated_backpropagation() -> None:
    model, noise, count = Tiny(), leaf(BATCH, *SHAPE), 3
    solution = deqkern.sample(model, noise, SCHEDULE, STEPS, gradient=LastSteps(count), **SEQUENTIAL)
    found = torch.autograd.grad(solution.value.sum(), [noise, *model.parameters()])
    table = SCHEDULE.steps(STEPS)
    x = start = solution.trajectory[STEPS - count].detach().requires_grad_()
    for i in range(STEPS - count, STEPS):
        x = float(table.a[i]) * x + float(table.b[i]) * model(x, table.timesteps[i].expand(BATCH))
    by_start, *expected = torch.autograd.grad(x.sum(), [start, *model.parameters()])
    expected.insert(0, by_start * float(table.a[: STEPS - count].prod()))
    torch.testing.assert_close(found, tuple(expected), rtol=1e-9, atol=1e-12)


class Direct:
    """The cotangent of the last state as that of the first; each step passes it to the inputs as it is."""

    def pull_back(self, chain: gradients.LinearizedChain, cotangent: Tensor) -> gradients.Pulled:
        for i in range(chain.steps):
            chain.vjp(i, cotangent, weight=1.0)
        return chain.pulled(cotangent)


def test_of_a_fixed_point_it_is_given_one_implicit_step() -> None:
    """Here it is the Jacobian-free gradient (arXiv 2103.12803), that of one more evaluation of f."""
    weight, x = (0.1 * torch.randn(4, 4).double()).requires_grad_(), leaf(BATCH, 4)

    def f(z: Tensor) -> Tensor:
        return torch.tanh(z @ weight + x)

    z = deqkern.fixed_point(f, torch.zeros_like(x), rtol=1e-12, gradient=Direct()).value
    cotangent = torch.randn_like(x)
    found = torch.autograd.grad(z, [weight, x], cotangent)
    expected = torch.autograd.grad(f(z.detach()), [weight, x], cotangent)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_of_a_layer_and_an_inversion_and_a_search() -> None:
    x, model, sample = leaf(BATCH, 4), Tiny(), leaf(2, *SHAPE)
    layer = deqkern.nn.DEQ(lambda z, x: torch.tanh(0.5 * z + x), gradient=Direct(), rtol=1e-6)
    layer(torch.zeros_like(x), x).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    found = deqkern.invert(model, sample, SCHEDULE, STEPS, sigma_min=0.3, gradient=Direct())
    (by_sample,) = torch.autograd.grad(found.value.sum(), sample, retain_graph=True)
    assert (by_sample == 1).all()
    assert all(value is not None for value in torch.autograd.grad(found.value.sum(), list(model.parameters())))
    counts = []
    for gradient in (LastSteps(2), "residual"):
        method = deqkern.Optimize(gradient=gradient, generator=torch.Generator().manual_seed(0))
        found = deqkern.invert(model, sample.detach(), SCHEDULE, STEPS, method=method, max_iterations=1, **SEQUENTIAL)
        counts.append(found.nfe)
    assert (counts[0] - counts[1]).tolist() == [4, 4], "two solves, and two VJPs after each"


def test_a_method_of_second_order_chains_is_asked_for_none() -> None:
    """It may look at `chain.table.order` itself."""
    noise = leaf(1, *SHAPE)
    value = deqkern.sample(Tiny(), noise, SCHEDULE, STEPS, order=2, gradient=Direct(), rtol=1e-6).value
    assert torch.autograd.grad(value.sum(), noise)[0].isfinite().all()


def model_that_is_not_called(x: Tensor, t: Tensor) -> Tensor:
    raise AssertionError("the model was called")


def test_its_check_is_asked_before_the_model_is_called() -> None:
    class Careful(Direct):
        def check(self, table: Any) -> None:
            raise ValueError(f"not through {table.num_inference_steps} steps")

    first = torch.zeros(1, 3)
    for call, count in (
        (lambda: deqkern.sample(model_that_is_not_called, first, SCHEDULE, STEPS, gradient=Careful()), STEPS),
        (lambda: deqkern.invert(model_that_is_not_called, first, SCHEDULE, STEPS, gradient=Careful()), STEPS),
        (lambda: deqkern.fixed_point(lambda z: model_that_is_not_called(z, z), first, gradient=Careful()), 1),
    ):
        with pytest.raises(ValueError, match=f"not through {count} steps"):
            call()


@pytest.mark.parametrize("gradient", [Direct, object(), type("Half", (), {"pull_back": 3})()])
def test_what_is_no_method_is_refused(gradient: Any) -> None:
    words = r"gradient must be None, .* or an object with pull_back\(chain, cotangent\)"
    for call in (
        lambda: deqkern.sample(model_that_is_not_called, torch.zeros(1, 3), SCHEDULE, STEPS, gradient=gradient),
        lambda: deqkern.fixed_point(torch.cos, torch.zeros(1, 1), gradient=gradient),
        lambda: deqkern.Optimize(gradient=gradient),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_what_it_must_return_is_named() -> None:
    class Wrong:
        def pull_back(self, chain: Any, cotangent: Tensor) -> Tensor:
            return cotangent

    noise = leaf(1, *SHAPE)
    value = deqkern.sample(Tiny(), noise, SCHEDULE, STEPS, gradient=Wrong()).value  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"pull_back of Wrong must return what chain.pulled\(...\) makes, got Tensor"):
        value.sum().backward()
