"""`invert(method="optimize")`: noises found by their loss, batch by batch, with the best ones kept."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import GaussianMixture
from torch import Tensor

import deqkern
from deqkern import NoiseSchedule, Optimize, models, optimization, solvers
from deqkern.gradients import Implicit
from deqkern.gradients.pullback import Pullback
from deqkern.problem import Problem

SCHEDULE, SHAPE, STEPS = NoiseSchedule.linear(), (1, 6, 6), 15
HALF = (torch.arange(6) < 3).float()


def masked(value: Tensor, sample: Tensor) -> Tensor:
    return ((value - sample) * HALF).flatten(1).square().sum(1)


def problem(batch: int) -> tuple[Any, Tensor, Tensor]:
    """A mixture of wide modes, samples of its chain, and other noises to start from."""
    generator = torch.Generator().manual_seed(5)
    model = GaussianMixture(SCHEDULE, 0.5 * torch.randn(3, 36, generator=generator), 0.7)
    noise, start = torch.randn(2, batch, *SHAPE, generator=generator).unbind()
    made = deqkern.sample(model, noise, SCHEDULE, STEPS, sigma_min=0.3, solver=solvers.sequential(), rtol=0.0).value
    return model, made, noise + 0.3 * start


@pytest.mark.parametrize("gradient", ["residual", "implicit", "exact", "phantom", "adjoint", Implicit(rtol=0.1)])
def test_the_loss_falls_and_the_best_noise_is_returned(gradient: Any) -> None:
    model, sample, start = problem(3)
    told: list[tuple[int, Tensor]] = []
    method = Optimize(gradient=gradient, noise=start, optimizer=lambda p: torch.optim.Adam(p, lr=0.05))
    found = deqkern.invert(
        model, sample, SCHEDULE, STEPS, method=method, sigma_min=0.3, rtol=1e-3, max_iterations=25, round_trip=True,
        callback=lambda step, noise, loss: told.append((step, loss)),
    )  # fmt: skip
    assert found.history.shape == (26, 3) and [step for step, _ in told] == list(range(1, 26))
    assert torch.equal(found.nfe_history[-1], found.nfe) and (found.nfe_history.diff(dim=0) > 0).all()
    assert found.residual_history.shape == (26, STEPS, 3) and found.residual_history.isnan().all()
    best = found.history.amin(0)
    assert (best <= 0.2 * found.history[0]).all()
    again = deqkern.sample(model, found.value, SCHEDULE, STEPS, sigma_min=0.3, solver=solvers.sequential(), rtol=0.0)
    loss = (again.value - sample).flatten(1).square().sum(1).double()
    torch.testing.assert_close(loss, best, rtol=0.1, atol=1e-3)
    torch.testing.assert_close(found.trajectory[0], found.value)
    assert found.round_trip is not None
    torch.testing.assert_close(found.round_trip**2 * sample.flatten(1).square().sum(1), loss, rtol=1e-3, atol=1e-6)
    assert found.converged.all() and "25 steps of the optimizer" in found.message


def test_a_masked_loss_leaves_the_rest_free_and_each_sample_stops_for_itself() -> None:
    model, sample, start = problem(2)
    blank = sample * HALF
    method = Optimize(loss=masked, noise=start, stop=0.05, optimizer=lambda p: torch.optim.Adam(p, lr=0.1))
    found = deqkern.invert(model, blank, SCHEDULE, STEPS, method=method, sigma_min=0.3, max_iterations=200)
    assert found.converged.all() and len(found.history) < 200
    assert (found.history.amin(0) <= 0.05).all() and (found.history[-1].amin() <= 0.05)


def test_each_sample_keeps_its_best_noise_and_what_its_solve_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first sample the second noise, the second one the first."""
    model, sample, start = problem(2)
    noises, solves = [start, start + 0.1, start - 0.1], list[deqkern.Solution]()
    losses = [[3.0, 1.0], [2.0, 5.0], [4.0, 4.0]]

    solve = Problem.solve

    def recorded(self: Problem) -> deqkern.Solution:
        solves.append(solve(self))
        return solves[-1]

    class Scripted:
        def __init__(self, parameters: list[Tensor]) -> None:
            (self.noise,), self.rest = parameters, iter(noises[1:])

        def step(self, closure: Callable[[], float]) -> None:
            assert closure() == sum(losses[len(solves) - 1])
            self.noise.copy_(next(self.rest))

    def loss(value: Tensor, target: Tensor) -> Tensor:
        return torch.tensor(losses[len(solves) - 1]) + 0 * value.flatten(1).sum(1)

    class Counted(Pullback):
        def __init__(self, network: Any, gradient: Any, rtol: float, max_batch: int | None) -> None:
            assert (rtol, max_batch) == (1e-3, 7)
            super().__init__(network, gradient, rtol, max_batch)

        def __call__(self, *arguments: Any) -> Any:
            pulls.append(super().__call__(*arguments))
            return pulls[-1]

    def counted(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        assert len(x) == len(label) <= 7
        return model(x, t)

    pulls: list[Any] = []
    monkeypatch.setattr(Problem, "solve", recorded)
    monkeypatch.setattr(optimization, "Pullback", Counted)
    method: Any = Optimize(loss=loss, noise=start, optimizer=Scripted, gradient="exact")  # type: ignore[arg-type]
    options: Any = {
        "sigma_min": 0.3,
        "max_iterations": 2,
        "rtol": 1e-3,
        "max_batch": 7,
        "model_kwargs": {"label": torch.arange(2)},
    }
    found = deqkern.invert(counted, sample, SCHEDULE, STEPS, method=method, **options)
    assert found.iterations == sum(solved.iterations for solved in solves)
    each = torch.stack([solved.nfe + pulled.vjps for solved, pulled in zip(solves, pulls, strict=True)])
    assert torch.equal(found.nfe_history, each.cumsum(0)) and torch.equal(found.nfe, each.sum(0))
    assert all((pulled.vjps > 0).all() for pulled in pulls)
    assert found.history.tolist() == losses and "loss 1 (median), 2 (largest) after 2 steps" in found.message
    for b, best in enumerate((1, 0)):
        torch.testing.assert_close(found.value[b], noises[best][b], rtol=1e-5, atol=1e-5)
        assert torch.equal(found.trajectory[:, b], solves[best].trajectory[:, b])
        for name in ("converged", "error_estimate", "residual"):
            assert getattr(found, name)[b] == getattr(solves[best], name)[b], name
    assert len({float(solved.residual[b]) for solved in solves for b in range(2)}) == 6


@pytest.mark.parametrize(
    ("losses", "stop", "count", "converged"),
    [
        ([[0.5, 3.0], [3.0, 0.5], [3.0, 3.0]], 1.0, 2, [True, True]),  # when each has been there
        ([[3.0, 1.0], [torch.nan, 1.0], [0.0, 0.0]], None, 2, [True, True]),  # or one will not come back
        ([[3.0, 1.0], [torch.nan, 1.0], [0.0, 0.0]], 1.0, 2, [False, True]),
        ([[3.0, 1.0], [2.0, 2.0], [2.0, 2.0]], 1.0, 3, [False, True]),
    ],
)
def test_where_the_search_ends(
    losses: list[list[float]], stop: float | None, count: int, converged: list[bool]
) -> None:
    model, sample, start = problem(2)
    told, seen = iter(losses), list[Tensor]()

    def loss(value: Tensor, target: Tensor) -> Tensor:
        return torch.tensor(next(told)) + 0 * value.flatten(1).sum(1)

    method = Optimize(loss=loss, noise=start, stop=stop)
    with warnings.catch_warnings(action="ignore"):
        found = deqkern.invert(
            model, sample, SCHEDULE, STEPS, method=method, sigma_min=0.3, max_iterations=2,
            callback=lambda step, noise, losses: (seen.append(losses.clone()), losses.fill_(-1)),
        )  # fmt: skip
    expected = torch.tensor(losses[:count], dtype=torch.float64)
    torch.testing.assert_close(found.history, expected, rtol=0, atol=0, equal_nan=True)
    assert found.converged.tolist() == converged and torch.equal(seen[0], expected[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    model, sample, start = problem(2)
    wide, noises = torch.promote_types(dtype, torch.float32), list[Tensor]()

    def loss(value: Tensor, target: Tensor) -> Tensor:
        assert value.dtype is target.dtype is wide
        return (value - target).flatten(1).square().sum(1)

    found = deqkern.invert(
        model, sample.to(dtype), SCHEDULE, STEPS, method=Optimize(loss=loss, noise=start.to(dtype)), sigma_min=0.3,
        max_iterations=2, callback=lambda step, noise, losses: noises.append(noise),
    )  # fmt: skip
    assert found.value.dtype is dtype and found.trajectory.dtype is wide and [n.dtype for n in noises] == [dtype] * 2
    assert not torch.equal(*noises) and (found.value.data_ptr() != found.trajectory.data_ptr())


def test_a_scalar_loss_and_lbfgs() -> None:
    model, sample, start = problem(2)
    calls: list[int] = []

    def scalar(value: Tensor, target: Tensor) -> Tensor:
        calls.append(len(value))
        return (value - target).square().mean()

    method = Optimize(
        loss=scalar, noise=start, gradient="exact", optimizer=lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=4)
    )
    found = deqkern.invert(model, sample, SCHEDULE, STEPS, method=method, sigma_min=0.3, rtol=1e-4, max_iterations=5)
    assert len(found.history) == len(calls) > 6, "a step of L-BFGS looks more than once"
    assert (found.history[:, 0] == found.history[:, 1]).all() and found.history.amin() <= 0.2 * found.history[0, 0]


def test_solves_start_from_the_states_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sample, start = problem(2)
    method = Optimize(noise=start, optimizer=lambda p: torch.optim.SGD(p, lr=1e-4))
    warm = deqkern.invert(model, sample, SCHEDULE, STEPS, method=method, sigma_min=0.3, max_iterations=4)
    cold = deqkern.sample(model, start, SCHEDULE, STEPS, sigma_min=0.3)
    assert warm.iterations <= cold.iterations + 4 * 2


def test_the_start_is_drawn_from_the_generator() -> None:
    model, sample, _ = problem(2)
    values = [
        deqkern.invert(
            model, sample, SCHEDULE, STEPS, sigma_min=0.3, max_iterations=1,
            method=Optimize(generator=torch.Generator().manual_seed(seed)),
        ).value
        for seed in (1, 1, 2)
    ]  # fmt: skip
    assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])
    drawn = Optimize(generator=torch.Generator().manual_seed(1)).first(sample.bfloat16())
    assert torch.equal(drawn, torch.randn(sample.shape, generator=torch.Generator().manual_seed(1)))


def test_a_given_start_stays_as_it_is_and_adam_moves_by_a_fifth() -> None:
    model, sample, start = problem(2)
    noises: list[Tensor] = []
    given = start.clone().requires_grad_()
    deqkern.invert(
        model, sample, SCHEDULE, STEPS, method=Optimize(noise=given), sigma_min=0.3, max_iterations=1,
        callback=lambda step, noise, loss: noises.append(noise),
    )  # fmt: skip
    assert torch.equal(given, start) and given.grad is None
    torch.testing.assert_close((noises[0] - start).abs(), torch.full_like(start, 0.2), rtol=1e-3, atol=0)


def test_it_works_where_the_schedule_clips_and_leaves_parameters_alone() -> None:
    loaded = models.load("digits")
    schedule = NoiseSchedule.linear(clip_sample=True)
    sample = torch.zeros(1, *loaded.shape)
    found = deqkern.invert(loaded.model, sample, schedule, 5, method="optimize", sigma_min=None, max_iterations=2)
    assert len(found.history) == 3 and found.history.isfinite().all()
    assert all(parameter.grad is None for parameter in loaded.model.parameters())


def test_the_adjoint_needs_a_schedule_that_does_not_clip() -> None:
    model, sample, _ = problem(1)
    with pytest.raises(ValueError, match="schedule clips or thresholds"):
        deqkern.invert(
            model, sample, NoiseSchedule.linear(clip_sample=True), STEPS, method=Optimize(gradient="adjoint")
        )


@pytest.mark.parametrize("gradient", ["residual", "exact"])
def test_the_search_in_inference_mode_is_the_same(gradient: str) -> None:
    model, sample, start = problem(2)

    def search(sample: Tensor, noise: Tensor) -> Tensor:
        method = Optimize(loss=weighted, gradient=gradient, noise=noise)
        return deqkern.invert(model, sample, SCHEDULE, STEPS, method=method, sigma_min=0.3, max_iterations=3).history

    def weighted(value: Tensor, sample: Tensor) -> Tensor:
        return (value * sample - sample.square()).flatten(1).square().sum(1)

    expected = search(sample, start)
    with torch.inference_mode():
        assert torch.equal(search(sample.clone(), start.clone()), expected)


def test_an_inexact_gradient_on_the_way_is_not_said() -> None:
    model, sample, start = problem(1)
    gradient = Implicit(solver=solvers.picard(), rtol=1e-9, max_iterations=1)
    with warnings.catch_warnings(action="error"):
        method = Optimize(noise=start, gradient=gradient)
        deqkern.invert(model, sample, SCHEDULE, STEPS, method=method, sigma_min=0.3, max_iterations=2)


def test_an_unreached_stop_is_said() -> None:
    model, sample, start = problem(2)
    with pytest.warns(deqkern.ConvergenceWarning, match="0 of 2 samples converged") as caught:
        found = deqkern.invert(
            model, sample, SCHEDULE, STEPS, method=Optimize(noise=start, stop=1e-9), sigma_min=0.3, max_iterations=2
        )
    assert not found.converged.any() and caught[0].filename == __file__


BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: Optimize(loss=1), TypeError, "loss must be callable"),  # type: ignore[arg-type]
    (lambda: Optimize(optimizer=1), TypeError, "optimizer must be callable"),  # type: ignore[arg-type]
    (lambda: Optimize(optimizer=lambda p: None), TypeError, "optimizer must return"),  # type: ignore[arg-type,return-value]
    (lambda: Optimize(gradient="ift"), ValueError, "gradient must be"),
    (lambda: Optimize(gradient=None), ValueError, "gradient must not be None"),  # type: ignore[arg-type]
    (lambda: Optimize(noise=torch.zeros(3)), ValueError, "noise must have shape"),
    (lambda: Optimize(noise=torch.zeros(1, *SHAPE, device="meta")), ValueError, "noise must have shape .* on meta"),
    (lambda: Optimize(noise=torch.full((1, *SHAPE), float("nan"))), ValueError, "noise must be finite"),
    (lambda: Optimize(noise=[0.0]), TypeError, "noise must be a tensor"),  # type: ignore[arg-type]
    (lambda: Optimize(generator=1), TypeError, "generator must be"),  # type: ignore[arg-type]
    (lambda: Optimize(stop=float("nan")), ValueError, "stop must not be NaN"),
    (lambda: Optimize(loss=lambda v, s: (v - s).square()), ValueError, "loss must return a scalar or"),
    (lambda: Optimize(loss=lambda v, s: v.sum() / 0), ValueError, "loss must be finite"),
    (lambda: Optimize(loss=lambda v, s: 1.0), TypeError, "loss must return a tensor"),  # type: ignore[arg-type,return-value]
    (lambda: Optimize(loss=lambda v, s: s.sum()), ValueError, "loss must be differentiable"),
]


@pytest.mark.parametrize(("make", "error", "words"), BAD)
def test_bad_options(make: Callable[[], Any], error: type[Exception], words: str) -> None:
    model, sample, _ = problem(1)
    with pytest.raises(error, match=words):
        deqkern.invert(model, sample, SCHEDULE, STEPS, method=make(), sigma_min=0.3)


class Trainable(torch.nn.Module):
    """A model with a parameter that requires grad."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.gain = model, torch.nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.gain * self.model(x, t)


@pytest.mark.parametrize("gradient", ["residual", "implicit"])
def test_a_model_that_could_be_trained(gradient: str) -> None:
    model, sample, start = problem(1)
    method = Optimize(gradient=gradient, noise=start)
    options: Any = {"method": method, "sigma_min": 0.3, "max_iterations": 4}
    trainable = Trainable(model)
    found, expected = (deqkern.invert(m, sample, SCHEDULE, STEPS, **options) for m in (trainable, model))
    torch.testing.assert_close(found.history, expected.history, rtol=1e-3, atol=1e-4)
    assert trainable.gain.grad is None
