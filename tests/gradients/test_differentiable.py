"""What a sample is differentiable by: parameters, conditions and what a model holds besides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import chain
from tiny import BATCH, SEQUENTIAL, SHAPE, STEPS, Tiny, leaf
from torch import Tensor

import deqkern
from deqkern import NoiseSchedule
from deqkern.gradients import Implicit
from deqkern.gradients.methods import NAMED


class Parts:
    """A model that holds its parts where no one sees them."""

    def __init__(self, model: Tiny, offset: Tensor) -> None:
        self.model, self.offset = model, offset

    def __call__(self, x: Tensor, t: Tensor, extra: dict[str, Tensor]) -> Tensor:
        return self.model(x, t, extra["condition"]) + self.offset.exp()


@pytest.mark.parametrize("gradient", ["exact", "implicit", "phantom", "residual", "adjoint"])
def test_a_plain_function_has_its_parameters_found(gradient: str) -> None:
    model, offset, noise, condition = Tiny(), leaf(2, 1, 1), leaf(BATCH, *SHAPE), leaf(BATCH, 6)
    scaled = 2 * condition  # not a leaf: it must not be passed by
    solution = deqkern.sample(
        Parts(model, offset), noise, NoiseSchedule.linear(), STEPS, gradient=gradient,
        model_kwargs={"extra": {"condition": scaled}}, **SEQUENTIAL,
    )  # fmt: skip
    inputs = [noise, condition, offset, *model.parameters()]
    found = torch.autograd.grad(solution.value.square().sum(), inputs)
    assert all(value.norm() > 0 for value in found)
    if gradient == "exact":
        extra = {"condition": 2 * condition}
        value = chain(Parts(model, offset), noise, NoiseSchedule.linear(), STEPS, model_kwargs={"extra": extra})
        for left, right in zip(found, torch.autograd.grad(value.square().sum(), inputs), strict=True):
            assert (left - right).norm() <= 1e-9 * right.norm()


@pytest.mark.parametrize("gradient", list(NAMED))
def test_what_the_model_does_not_use_has_no_gradient(gradient: str) -> None:
    """As in torch: weight decay and the moments of an optimizer leave it alone."""
    model = Tiny()
    model.unused = torch.nn.Parameter(torch.ones(3).double())
    noise, idle = leaf(BATCH, *SHAPE), leaf(BATCH, 2)
    value = deqkern.sample(
        lambda x, t, idle: model(x, t), noise, NoiseSchedule.linear(), STEPS, gradient=gradient,
        model_kwargs={"idle": idle},
    ).value  # fmt: skip
    value.sum().backward()
    assert idle.grad is None and noise.grad is not None and model.last.weight.grad is not None
    value = deqkern.sample(model, noise, NoiseSchedule.linear(), STEPS, gradient=gradient).value
    value.sum().backward()
    assert model.unused.grad is None


@pytest.mark.parametrize("gradient", ["exact", "implicit"])
def test_a_model_may_write_into_what_it_is_given(gradient: str) -> None:
    """And the noise stays what it was, also where a function is called once to see what it holds."""
    weight, noise = leaf(1), leaf(BATCH, *SHAPE)
    before, schedule = noise.detach().clone(), NoiseSchedule.linear()

    def careless(x: Tensor, t: Tensor) -> Tensor:
        return x.mul_(0.5).sin_() * weight

    found = deqkern.sample(careless, noise, schedule, STEPS, rtol=1e-12, gradient=gradient).value
    assert torch.equal(noise, before)
    expected = chain(lambda x, t: (0.5 * x).sin() * weight, noise, schedule, STEPS)
    wanted = torch.autograd.grad(expected.sum(), [noise, weight])
    torch.testing.assert_close(torch.autograd.grad(found.sum(), [noise, weight]), wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("gradient", ["exact", "implicit"])
def test_what_a_function_holds_may_have_been_computed(gradient: str) -> None:
    """Every VJP goes back through the graph that made it."""
    encoder, noise, schedule = torch.nn.Linear(4, 1, dtype=torch.float64), leaf(BATCH, *SHAPE), NoiseSchedule.linear()
    gain = encoder(torch.randn(4, dtype=torch.float64)).exp()

    def model(x: Tensor, t: Tensor) -> Tensor:
        return gain * x.tanh()

    inputs = [noise, *encoder.parameters()]
    found = deqkern.sample(model, noise, schedule, STEPS, rtol=1e-12, gradient=gradient).value
    pulled = torch.autograd.grad(found.sum(), inputs)
    wanted = torch.autograd.grad(chain(model, noise, schedule, STEPS).sum(), inputs)
    torch.testing.assert_close(pulled, wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("gradient", ["exact", Implicit(rtol=1e-12)], ids=["exact", "implicit"])
@pytest.mark.parametrize("guided", [False, True])
def test_conditions_that_the_model_made_of_its_own_parameters(guided: bool, gradient: Any) -> None:
    """An embedding, and a learned null condition: their gradient goes through the arguments, once."""
    model, noise, labels = Tiny(), leaf(BATCH, *SHAPE), torch.arange(BATCH) % 3
    model.embedding, model.null = torch.nn.Embedding(3, 6, dtype=torch.float64), torch.nn.Parameter(leaf(1, 6).detach())

    def value(solve: Any) -> Tensor:
        given = {"condition": model.embedding(labels) + model.null}
        if not guided:
            return solve(model, given)
        return solve(deqkern.guided(model, 2.0, given, {"condition": model.null.expand(BATCH, -1)}), {})

    schedule = NoiseSchedule.linear()
    expected = value(lambda m, given: chain(m, noise, schedule, STEPS, model_kwargs=given))
    found = value(
        lambda m, given: (
            deqkern.sample(m, noise, schedule, STEPS, gradient=gradient, model_kwargs=given, **SEQUENTIAL).value
        )
    )
    inputs = [noise, *model.parameters()]
    cotangent = torch.randn_like(noise)
    wanted = torch.autograd.grad(expected, inputs, cotangent)
    for mine, right in zip(torch.autograd.grad(found, inputs, cotangent), wanted, strict=True):
        assert right.norm() > 0 and (mine - right).norm() <= 1e-9 * right.norm()


def test_a_tensor_that_a_module_holds_has_a_gradient() -> None:
    """As an embedding that is being learned, and is no parameter of the model."""

    class Holding(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.embeddings = {"new": torch.zeros(2, 1, 1, dtype=torch.float64, requires_grad=True)}

        def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
            return super().forward(x + self.embeddings["new"], t)

    model, noise = Holding(), torch.randn(BATCH, *SHAPE).double()
    held = model.embeddings["new"]
    expected = torch.autograd.grad(chain(model, noise, NoiseSchedule.linear(), STEPS).square().sum(), held)[0]
    value = deqkern.sample(model, noise, NoiseSchedule.linear(), STEPS, gradient="exact", **SEQUENTIAL).value
    value.square().sum().backward()
    torch.testing.assert_close(held.grad, expected, rtol=1e-9, atol=1e-12)
    assert model.last.weight.grad is not None
