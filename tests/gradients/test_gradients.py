"""Gradients of `sample` and `invert` against autograd through the sequential chain."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from asserts import relative_error
from problems import adjoint_error, chain
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import deqkern
from deqkern import NoiseSchedule, Solution, models, ops, solvers
from deqkern.gradients import Adjoint, Exact, Implicit, Phantom
from deqkern.gradients.methods import NAMED
from deqkern.gradients.recurrences import adjoint_recurrence
from deqkern.ops import _dispatch

BATCH, SHAPE, STEPS = 3, (2, 5, 4), 8
SEQUENTIAL: dict[str, Any] = {"rtol": 0.0, "solver": solvers.sequential()}


class Tiny(torch.nn.Module):
    """Two convolutions with a time and a condition in between."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(2, 6, 3, padding=1, dtype=dtype)
        self.last = torch.nn.Conv2d(6, 2, 3, padding=1, dtype=dtype)
        self.time = torch.nn.Linear(1, 6, dtype=dtype)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        hidden = self.first(x) + self.time((t.to(x) / 1000)[:, None])[:, :, None, None]
        if condition is not None:
            hidden = hidden + condition[:, :, None, None]
        return 0.5 * x + self.last(torch.tanh(hidden))


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


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


@pytest.mark.parametrize("gradient", ["exact", "implicit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_samples_that_the_loss_ignores_have_no_gradient(dtype: torch.dtype, gradient: str) -> None:
    model, noise = Tiny(dtype).requires_grad_(False), torch.randn(2, *SHAPE, requires_grad=True)
    value = deqkern.sample(model, noise, NoiseSchedule.linear(), STEPS, rtol=1e-3, gradient=gradient).value
    one, none = (torch.autograd.grad(loss, noise, retain_graph=True)[0] for loss in (value[0].sum(), 0 * value.sum()))
    assert one[0].any() and not one[1].any() and not none.any()


def test_no_gradient_where_none_is_wanted() -> None:
    noise = leaf(1, *SHAPE)
    assert not deqkern.sample(Tiny(), noise, NoiseSchedule.linear(), STEPS).value.requires_grad
    with torch.no_grad():
        assert not deqkern.sample(Tiny(), noise, NoiseSchedule.linear(), STEPS, gradient="exact").value.requires_grad
    frozen = Tiny().requires_grad_(False)
    found = deqkern.sample(frozen, noise.detach(), NoiseSchedule.linear(), STEPS, gradient="exact")
    assert not found.value.requires_grad


@pytest.mark.parametrize("power", [1, 2])
def test_differentiating_twice_raises(power: int) -> None:
    """Also for a loss whose own derivative is constant."""
    noise, model = leaf(1, *SHAPE), Tiny()
    value = deqkern.sample(model, noise, NoiseSchedule.linear(), STEPS, gradient="implicit").value
    once = torch.autograd.grad(value.pow(power).sum(), [noise, model.last.weight], create_graph=True)
    for gradient in once:
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            torch.autograd.grad(gradient.square().sum(), [noise, model.first.weight], retain_graph=True)


@pytest.mark.parametrize("kind", ["chain", "fixed point"])
def test_a_backward_pass_in_another_thread_keeps_the_backends_of_its_solve(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of a GPU is, whose threads do not see the context."""
    asked, kernel = list[tuple[str, ...]](), _dispatch._kernel

    def spy(op: str, requested: tuple[str, ...], *of_tensor: Any) -> Any:
        asked.append(requested)
        return kernel(op, requested, *of_tensor)

    monkeypatch.setattr(_dispatch, "_kernel", spy)
    start = leaf(BATCH, *SHAPE)
    with ops.use_backend("reference", "cpu"):
        if kind == "chain":
            value = deqkern.sample(Tiny(), start, NoiseSchedule.linear(), STEPS, gradient="implicit").value
        else:
            value = deqkern.fixed_point(lambda z: torch.tanh(z / 2 + start), torch.zeros_like(start)).value
    asked.clear()
    other = threading.Thread(target=value.sum().backward)
    other.start()
    other.join()
    assert start.grad is not None and set(asked) == {("reference", "cpu")}


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


def test_states_or_parameters_changed_in_place_raise() -> None:
    noise, model = leaf(1, *SHAPE), Tiny()
    solution = deqkern.sample(model, noise, NoiseSchedule.linear(), STEPS, gradient="exact")
    solution.trajectory.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        solution.value.sum().backward()


def test_a_gradient_that_does_not_converge_warns() -> None:
    noise, seen = leaf(BATCH, *SHAPE), []
    gradient = Implicit(rtol=1e-9, max_iterations=2, callback=seen.append)
    value = deqkern.sample(Tiny(), noise, NoiseSchedule.linear(), 20, gradient=gradient).value
    with pytest.warns(deqkern.ConvergenceWarning, match="gradient: 0 of 3 samples"):
        value.sum().backward()
    assert [solution.iterations for solution in seen] == [2] and isinstance(seen[0], Solution)


@pytest.mark.parametrize("gradient", ["exact", "implicit", "phantom"])
def test_max_batch_bounds_every_product(gradient: str) -> None:
    model, noise, rows = Tiny(), leaf(BATCH, *SHAPE), list[int]()
    value = deqkern.sample(model, noise, NoiseSchedule.linear(), STEPS, gradient=gradient, max_batch=2).value
    model.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    value.sum().backward()
    assert max(rows) == 2


@pytest.mark.parametrize("gradient", ["exact", "implicit"])
def test_gradients_of_narrow_parameters_are_summed_in_fp32(gradient: str) -> None:
    weight = torch.ones((), dtype=torch.bfloat16, requires_grad=True)
    schedule, noise = NoiseSchedule.linear(), torch.zeros(1, *SHAPE)
    value = deqkern.sample(lambda x, t: weight.expand(x.shape), noise, schedule, 100, gradient=gradient, max_batch=1)
    (found,) = torch.autograd.grad(value.value.mean(), weight)
    after = torch.cat([schedule.steps(100).a.flip(0).cumprod(0).flip(0)[1:], torch.ones(1, dtype=torch.float64)])
    expected = (schedule.steps(100).b * after).sum()
    assert (found.double() - expected).abs() <= 2**-8 * expected.abs()


def test_the_tolerance_of_a_gradient_is_its_own() -> None:
    noise, seen = leaf(1, *SHAPE), list[Solution]()
    for rtol in (None, 1e-6, 0.0):
        gradient = Implicit(rtol=rtol, callback=seen.append)
        deqkern.sample(Tiny(), noise, NoiseSchedule.linear(), 20, gradient=gradient).value.sum().backward()
    loose, tight, rounding = (float(solution.residual) for solution in seen)
    assert rounding < 1e-12 < tight < 1e-5 < loose


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


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("order", [1, 2])
def test_the_order_of_the_adjoint(order: int, eta: float) -> None:
    """Against the closed form for a Gaussian, by the noise."""
    counts = (64, 128, 256, 512)
    errors = [float(adjoint_error(order, eta, steps, total=8192, batch=2).max()) for steps in counts]
    slopes = [math.log2(errors[k] / errors[k + 1]) for k in range(len(counts) - 1)]
    assert abs(slopes[-1] - order) <= 0.2, (errors, slopes)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(
    "schedule",
    [
        NoiseSchedule.cosine(timestep_spacing="trailing"),
        NoiseSchedule.linear(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"),
        NoiseSchedule.flow(),
    ],
    ids=["cosine", "zero snr", "flow"],
)
def test_the_adjoint_keeps_its_direction_where_steps_are_long_in_log_snr(schedule: NoiseSchedule, order: int) -> None:
    """At the noisy end of these, alpha doubles from step to step however many there are. Gaussian data."""
    variance, steps = torch.linspace(0.1, 2, 5, dtype=torch.float64), 50
    table = schedule.steps(steps)
    levels = {float(t): (a, s) for t, a, s in zip(table.timesteps, table.alpha, table.sigma, strict=True)}

    def model(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = torch.tensor([levels[float(value)] for value in t], dtype=torch.float64)[:, :, None].unbind(1)
        total = alpha**2 * variance + sigma**2
        x0, eps = alpha * variance / total * x, sigma / total * x
        u, w = {"epsilon": (0, 1), "v_prediction": (-sigma, alpha), "flow": (-1, 1)}[schedule.prediction_type]
        return u * x0 + w * eps

    found = []
    for gradient in (Exact(), Adjoint(order)):
        noise = torch.zeros(1, 5, dtype=torch.float64, requires_grad=True)
        value = deqkern.sample(model, noise, schedule, steps, gradient=gradient, **SEQUENTIAL).value
        found += torch.autograd.grad(value.sum(), noise)
    exact, adjoint = found
    assert relative_error(adjoint, exact).max() <= 0.7
    assert torch.nn.functional.cosine_similarity(adjoint, exact).min() >= 0.98


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_adjoint_where_levels_are_equal_or_have_no_signal_or_no_noise(eta: float, order: int) -> None:
    noise, found = leaf(2, *SHAPE), list[Tensor]()
    for level in ([0.9, 0.5, 0.2, 0.0], [0.9, 0.5, 0.5, 0.2, 0.0]):
        abar, count = torch.tensor([1.0, *level], dtype=torch.float64), len(level) + 1
        schedule = NoiseSchedule(abar, prediction_type="v_prediction")
        z = torch.zeros(count, *noise.shape, dtype=torch.float64) if eta else None
        value = deqkern.sample(
            lambda x, t: 0.3 * x.sin(), noise, schedule, count, eta=eta, step_noise=z, gradient=Adjoint(order), rtol=0.0
        ).value
        found += torch.autograd.grad(value.sum(), noise)
    assert all(one.isfinite().all() and one.any() for one in found)
    if order == 1:
        assert relative_error(found[1], found[0]).max() <= 1e-10
    table = schedule.steps(count, eta=eta)
    equal = int((table.alpha == table.alpha_next).nonzero()[0])
    assert adjoint_recurrence(table, order).previous[equal - 1] == 0, "the step after begins anew"


def test_the_adjoint_of_order_2_is_near_the_exact_gradient() -> None:
    """By the noise, the condition and the parameters, for a chain of many steps through a smooth model."""
    model, condition = Tiny(), leaf(1, 6)
    with torch.no_grad():
        for parameter in model.last.parameters():
            parameter.mul_(0.1)
    found: dict[str, list[Tensor]] = {}
    noise = leaf(1, *SHAPE)
    for name, gradient in {"exact": Exact(), "1": Adjoint(1), "2": Adjoint(2)}.items():
        value = deqkern.sample(
            model, noise, NoiseSchedule.linear(), 100, gradient=gradient, sigma_min=0.08,
            model_kwargs={"condition": condition}, **SEQUENTIAL,
        ).value  # fmt: skip
        found[name] = list(torch.autograd.grad(value.sum(), [noise, condition, *model.parameters()]))
    for exact, first, second in zip(*found.values(), strict=True):
        errors = [float((other - exact).norm() / exact.norm()) for other in (first, second)]
        assert errors[0] <= 0.3 and errors[1] <= 0.1 and errors[1] <= errors[0] / 2, errors


@pytest.mark.parametrize("name", ["digits", "photos"])
def test_trained_models_need_at_most_ten_products(name: str) -> None:
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
    """Every product goes back through the graph that made it."""
    encoder, noise, schedule = torch.nn.Linear(4, 1, dtype=torch.float64), leaf(BATCH, *SHAPE), NoiseSchedule.linear()
    gain = encoder(torch.randn(4, dtype=torch.float64)).exp()

    def model(x: Tensor, t: Tensor) -> Tensor:
        return gain * x.tanh()

    inputs = [noise, *encoder.parameters()]
    found = deqkern.sample(model, noise, schedule, STEPS, rtol=1e-12, gradient=gradient).value
    pulled = torch.autograd.grad(found.sum(), inputs)
    wanted = torch.autograd.grad(chain(model, noise, schedule, STEPS).sum(), inputs)
    torch.testing.assert_close(pulled, wanted, rtol=1e-8, atol=1e-8)


def test_the_adjoint_needs_a_schedule_that_does_not_clip() -> None:
    with pytest.raises(ValueError, match="schedule clips or thresholds"):
        deqkern.sample(
            Tiny(), torch.zeros(1, *SHAPE), NoiseSchedule.linear(clip_sample=True), STEPS, gradient="adjoint"
        )


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
