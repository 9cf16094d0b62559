"""The gradient methods against autograd through the sequential chain, or by their definition; what they cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from asserts import relative_error
from problems import chain
from tiny import BATCH, SEQUENTIAL, SHAPE, STEPS, Tiny, leaf
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import deqkern
from deqkern import NoiseSchedule, Solution, models
from deqkern.gradients import Adjoint, Exact, Implicit, Phantom


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("max_batch", [None, 5])
@pytest.mark.parametrize(
    "schedule",
    [
        NoiseSchedule.linear(),
        NoiseSchedule.scaled_linear(prediction_type="v_prediction", rescale_betas_zero_snr=True),
        NoiseSchedule.cosine(prediction_type="sample"),
        NoiseSchedule.flow(),
        NoiseSchedule.linear(clip_sample=True),
        NoiseSchedule.linear(thresholding=True),
    ],
    ids=["epsilon", "zero snr", "sample", "flow", "clip", "threshold"],
)
@pytest.mark.parametrize("gradient", ["exact", Implicit(rtol=1e-12)], ids=["exact", "implicit"])
def test_equal_autograd_through_the_chain(
    gradient: Any, schedule: NoiseSchedule, max_batch: int | None, eta: float
) -> None:
    if eta and schedule.prediction_type == "flow":
        pytest.skip("flow matching draws no noise")
    model, noise, condition = Tiny(), leaf(BATCH, *SHAPE), leaf(BATCH, 6)
    z = leaf(STEPS, BATCH, *SHAPE) if eta else None
    solution = deqkern.sample(
        model, noise, schedule, STEPS, eta=eta, step_noise=z, gradient=gradient, max_batch=max_batch,
        model_kwargs={"condition": condition}, **SEQUENTIAL,
    )  # fmt: skip
    inputs = [noise, condition, *model.parameters(), *([] if z is None else [z])]
    expected = chain(model, noise, schedule, STEPS, eta=eta, step_noise=z, model_kwargs={"condition": condition})
    torch.testing.assert_close(solution.value, expected, rtol=1e-9, atol=1e-9)
    cotangent = torch.randn_like(noise)
    wanted = torch.autograd.grad(expected, inputs, cotangent)
    for found, right in zip(torch.autograd.grad(solution.value, inputs, cotangent), wanted, strict=True):
        assert found.shape == right.shape and (found - right).norm() <= 1e-9 * right.norm()


@pytest.mark.parametrize("gradient", [Exact(), Implicit(rtol=1e-13)], ids=["exact", "implicit"])
def test_gradcheck(gradient: Any) -> None:
    model, steps = Tiny(), 4
    names = [name for name, _ in model.named_parameters()]

    def value(noise: Tensor, z: Tensor, condition: Tensor, *parameters: Tensor) -> Tensor:
        def call(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
            held = dict(zip(names, parameters, strict=True))
            return torch.func.functional_call(model, held, (x, t, condition))

        return deqkern.sample(
            call, noise, NoiseSchedule.linear(), steps, eta=1.0, step_noise=z, gradient=gradient,
            model_kwargs={"condition": condition}, **SEQUENTIAL,
        ).value  # fmt: skip

    shape = (1, 2, 2, 3)
    assert torch.autograd.gradcheck(
        value, (leaf(*shape), leaf(steps, *shape), leaf(1, 6), *model.parameters()), fast_mode=True
    )


@pytest.mark.parametrize(("steps", "tau"), [(1, 1.0), (2, 1.0), (5, 0.7)])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_phantom_is_what_damped_iterations_let_through(steps: int, tau: float, kind: str) -> None:
    """By its definition: unrolled from the solution, on the chain that freezes epsilon."""
    schedule, model = NoiseSchedule.linear(prediction_type=kind), Tiny()
    noise, z = leaf(BATCH, *SHAPE), leaf(STEPS, BATCH, *SHAPE)
    table = schedule.steps(STEPS, eta=1.0)
    solution = deqkern.sample(
        model, noise, schedule, STEPS, eta=1.0, step_noise=z, gradient=Phantom(steps, tau), **SEQUENTIAL
    )
    a, b, n, frozen = (v.tolist() for v in (table.a, table.b, table.n, table.slope_0))
    states = list(solution.trajectory.detach())
    for _ in range(steps):
        swept = [noise]
        for i in range(STEPS):
            argument = states[i]  # x[0] counts as one of the unknown states
            rest = model(argument, table.timesteps[i].expand(BATCH)) - frozen[i] * argument
            swept.append((a[i] + b[i] * frozen[i]) * swept[-1] + b[i] * rest + n[i] * z[i])
        states = [(1 - tau) * old + tau * new for old, new in zip(states, swept, strict=True)]
    inputs, cotangent = [noise, z, *model.parameters()], torch.randn_like(noise)
    wanted = torch.autograd.grad(states[-1], inputs, cotangent)
    for found, right in zip(torch.autograd.grad(solution.value, inputs, cotangent), wanted, strict=True):
        assert (found - right).norm() <= 1e-9 * right.norm()


def test_residual_is_that_of_deq_ddim() -> None:
    """2 tau / sqrt(abar) (x0 - target) for a squared distance: the model has no part in it."""
    schedule, noise, target = NoiseSchedule.linear(), leaf(BATCH, *SHAPE), torch.randn(BATCH, *SHAPE).double()
    solution = deqkern.sample(Tiny(), noise, schedule, STEPS, gradient="residual", **SEQUENTIAL)
    (found,) = torch.autograd.grad((solution.value - target).square().sum(), noise)
    table = schedule.steps(STEPS)
    expected = 0.2 * float(table.alpha_next[-1] / table.alpha[0]) * (solution.value - target)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-10, atol=1e-10)


def test_a_frozen_model_still_gives_the_gradient_of_the_noise() -> None:
    model, noise = Tiny().eval().requires_grad_(False), leaf(BATCH, *SHAPE)
    for gradient in ("exact", "implicit"):
        solution = deqkern.sample(model, noise, NoiseSchedule.linear(), STEPS, gradient=gradient, rtol=1e-12)
        (found,) = torch.autograd.grad(solution.value.sum(), noise)
        (expected,) = torch.autograd.grad(chain(model, noise, NoiseSchedule.linear(), STEPS).sum(), noise)
        assert (found - expected).norm() <= 1e-9 * expected.norm()


@pytest.mark.parametrize("gradient", ["exact", "implicit", "phantom", "adjoint"])
def test_a_model_that_ignores_the_state(gradient: str) -> None:
    noise, schedule = leaf(2, *SHAPE), NoiseSchedule.linear()
    value = deqkern.sample(lambda x, t: torch.ones_like(x), noise, schedule, STEPS, gradient=gradient).value
    (found,) = torch.autograd.grad(value.sum(), noise)
    torch.testing.assert_close(found, schedule.steps(STEPS).a.prod().expand_as(found), rtol=1e-4, atol=0)


def test_a_gradient_that_does_not_converge_warns() -> None:
    noise, seen = leaf(BATCH, *SHAPE), []
    gradient = Implicit(rtol=1e-9, max_iterations=2, callback=seen.append)
    value = deqkern.sample(Tiny(), noise, NoiseSchedule.linear(), 20, gradient=gradient).value
    with pytest.warns(deqkern.ConvergenceWarning, match="gradient: 0 of 3 samples"):
        value.sum().backward()
    assert [solution.iterations for solution in seen] == [2] and isinstance(seen[0], Solution)


@pytest.mark.parametrize("gradient", ["exact", "implicit", "phantom"])
def test_max_batch_bounds_every_vjp(gradient: str) -> None:
    model, noise, rows = Tiny(), leaf(BATCH, *SHAPE), list[int]()
    value = deqkern.sample(model, noise, NoiseSchedule.linear(), STEPS, gradient=gradient, max_batch=2).value
    model.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    value.sum().backward()
    assert max(rows) == 2


def test_the_tolerance_of_a_gradient_is_its_own() -> None:
    noise, seen = leaf(1, *SHAPE), list[Solution]()
    for rtol in (None, 1e-6, 0.0):
        gradient = Implicit(rtol=rtol, callback=seen.append)
        deqkern.sample(Tiny(), noise, NoiseSchedule.linear(), 20, gradient=gradient).value.sum().backward()
    loose, tight, rounding = (float(solution.residual) for solution in seen)
    assert rounding < 1e-12 < tight < 1e-5 < loose


class Wide(torch.nn.Module):
    """Holds many activations per sample, few states."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = torch.nn.Parameter(torch.randn(4096, 4))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        hidden = torch.tanh(x @ self.inside.T)  # (N, 4096)
        return hidden @ self.inside / 4096


def test_the_memory_of_exact_does_not_grow_with_the_steps() -> None:
    peaks = []
    for steps in (5, 10, 40):
        noise = torch.randn(64, 4, requires_grad=True)
        value = deqkern.sample(Wide(), noise, NoiseSchedule.linear(), steps, gradient="exact", **SEQUENTIAL).value
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            value.sum().backward()
        live = peak = 0
        for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
            if event.name() == "[memory]":
                live += event.nbytes()
                peak = max(peak, live)
        peaks.append(peak)
    assert peaks[0] >= 4 * 64 * 4096, "the allocator was not watched"
    assert peaks[1] <= 1.01 * peaks[0] and peaks[2] <= 1.01 * peaks[0], peaks


@pytest.mark.parametrize("name", ["digits", "photos"])
def test_trained_models_need_at_most_ten_batched_vjps(name: str) -> None:
    loaded, seen = models.load(name), []
    generator = torch.Generator().manual_seed(4)
    noise = torch.randn(1, *loaded.shape, generator=generator).requires_grad_()
    value = deqkern.sample(
        loaded.model, noise, loaded.schedule, 50, rtol=1e-5, gradient=Implicit(callback=seen.append)
    ).value
    cotangent = torch.randn(value.shape, generator=generator)
    (found,) = torch.autograd.grad(value, noise, cotangent)
    (expected,) = torch.autograd.grad(chain(loaded.model, noise, loaded.schedule, 50), noise, cotangent)
    assert seen[0].converged.all() and seen[0].iterations <= 10
    assert relative_error(found, expected).max() <= 1e-3


@pytest.mark.parametrize(
    ("gradient", "words"),
    [
        ("ift", "gradient must be None, one of 'exact'"),
        (1, "gradient must be None"),
        (lambda: Adjoint(3), "order must be 1 or 2"),
        (lambda: Phantom(steps=0), "steps must be an int >= 1"),
        (lambda: Phantom(tau=0.0), "tau must lie in"),
        (lambda: Implicit(rtol=-1.0), "rtol must be finite"),
        (lambda: Implicit(max_iterations=0), "max_iterations must be"),
        (lambda: Implicit(solver=1), "solver must be a Solver"),
        (lambda: Implicit(callback=1), "callback must be callable"),
    ],
)
def test_bad_gradients(gradient: Any, words: str) -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("the model was called")

    make: Callable[[], Any] = gradient if callable(gradient) else lambda: gradient
    with pytest.raises((ValueError, TypeError), match=words):
        deqkern.sample(model, torch.zeros(1, *SHAPE), NoiseSchedule.linear(), STEPS, gradient=make())


@pytest.mark.parametrize("method", ["joint", "stepwise"])
def test_the_gradient_of_an_inversion(method: str) -> None:
    """By the implicit function theorem: with M = d sample / d noise at the noise found, M^-T of the cotangent."""
    schedule, model, sample, condition = NoiseSchedule.linear(), Tiny(), leaf(2, *SHAPE), leaf(2, 6)
    with torch.no_grad():
        for parameter in model.last.parameters():
            parameter.mul_(0.3)
    found = deqkern.invert(
        model, sample, schedule, STEPS, method=method, sigma_min=0.3, rtol=1e-13, round_trip=True,
        model_kwargs={"condition": condition}, gradient=Implicit(rtol=1e-13),
    )  # fmt: skip
    assert found.round_trip is not None and found.round_trip.max() <= 1e-11
    assert not found.round_trip.requires_grad
    cotangent = torch.randn(sample.shape, dtype=torch.float64)
    got = torch.autograd.grad(found.value, [sample, condition, *model.parameters()], cotangent)

    def forward(x: Tensor) -> Tensor:
        return chain(model, x, schedule, STEPS, sigma_min=0.3, model_kwargs={"condition": condition})

    noise = found.value.detach().requires_grad_()
    jacobian = torch.autograd.functional.jacobian(forward, noise).view(sample.numel(), sample.numel())
    back = torch.linalg.solve(jacobian.T, cotangent.flatten()).view_as(sample)
    others = torch.autograd.grad(forward(noise), [condition, *model.parameters()], -back)
    for left, right in zip(got, [back, *others], strict=True):
        assert (left - right).norm() <= 1e-8 * right.norm()


def test_an_inversion_gives_gradients_where_it_solves() -> None:
    with pytest.raises(ValueError, match="gradient='implicit' is for method='joint'"):
        deqkern.invert(Tiny(), leaf(1, *SHAPE), NoiseSchedule.linear(), STEPS, method="naive", gradient="implicit")
    with pytest.raises(ValueError, match="gradient must be None, one of 'implicit', 'phantom', 'residual'"):
        deqkern.invert(Tiny(), leaf(1, *SHAPE), NoiseSchedule.linear(), STEPS, gradient="exact")
