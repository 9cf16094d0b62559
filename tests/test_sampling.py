"""`sample` against the sequential chain: exact where asked, within tolerance otherwise, and clear about bad input."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import problems
import pytest
import torch
from asserts import relative_error
from problems import chain
from torch import Tensor

import deqkern
from deqkern import NoiseSchedule, models, solvers
from deqkern.chain.step_table import StepTable
from deqkern.engine.trajectory import Trajectory
from deqkern.network.model import model_dtype

SCHEDULE = NoiseSchedule.linear()
SHAPE = (3, 8, 8)


def as_prediction(model: problems.Model, schedule: NoiseSchedule) -> problems.Model:
    """The same denoiser, giving what `schedule.prediction_type` asks for."""

    def predict(x: Tensor, t: Tensor) -> Tensor:
        column = (-1, *[1] * (x.ndim - 1))
        if schedule.prediction_type == "flow":
            sigma = (t / schedule.num_train_timesteps).view(column).double()
            alpha = 1 - sigma
        else:
            assert schedule.alphas_cumprod is not None
            abar = schedule.alphas_cumprod[t.long()].view(column)
            alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
        x0 = model.denoise(x.flatten(1), alpha.flatten(1).float(), sigma.flatten(1).float()).view_as(x)
        eps = (x - alpha * x0) / sigma
        outputs = {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0, "flow": eps - x0}
        return outputs[schedule.prediction_type].float()

    return predict


def rounding_floor(
    model: Callable[..., Tensor], noise: Tensor, schedule: NoiseSchedule, steps: int, **options: Any
) -> float:
    """How far the sequential chain itself moves when its noise is rounded differently in fp32.

    Epsilon-prediction where alpha is near 0 (the cosine schedule's first step: 5e-5) amplifies rounding by 1 / alpha.
    """
    expected = problems.chain(model, noise, schedule, steps, **options)
    nudged = noise * (1 + torch.finfo(torch.float32).eps * torch.sign(torch.randn_like(noise)))
    return float(relative_error(problems.chain(model, nudged, schedule, steps, **options), expected).max())


def configurations() -> list[Any]:
    variants: list[tuple[str, NoiseSchedule]] = []
    for kind, make in (
        ("linear", NoiseSchedule.linear),
        ("scaled", NoiseSchedule.scaled_linear),
        ("cosine", NoiseSchedule.cosine),
    ):
        variants += [
            (f"{kind}-{spacing}", make(timestep_spacing=spacing)) for spacing in ("leading", "linspace", "trailing")
        ]
    variants += [(f"linear-{kind}", NoiseSchedule.linear(prediction_type=kind)) for kind in ("v_prediction", "sample")]
    variants += [
        ("offset", NoiseSchedule.scaled_linear(steps_offset=1, set_alpha_to_one=False)),
        (
            "zero-snr-v",
            NoiseSchedule.linear(
                prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True
            ),
        ),
        (
            "zero-snr-sample",
            NoiseSchedule.linear(prediction_type="sample", timestep_spacing="trailing", rescale_betas_zero_snr=True),
        ),
        ("clip", NoiseSchedule.linear(clip_sample=True)),
        ("threshold", NoiseSchedule.linear(thresholding=True)),
    ]
    cases = [pytest.param(schedule, eta, id=f"{name}-eta{eta:g}") for name, schedule in variants for eta in (0.0, 1.0)]
    return [
        *cases,
        pytest.param(NoiseSchedule.flow(), 0.0, id="flow"),
        pytest.param(NoiseSchedule.flow(shift=3.0), 0.0, id="flow-shift"),
    ]


@pytest.mark.parametrize(("schedule", "eta"), configurations())
def test_exact_mode_equals_the_sequential_chain(schedule: NoiseSchedule, eta: float) -> None:
    generator = torch.Generator().manual_seed(1)
    model = as_prediction(problems.mixture(SCHEDULE, SHAPE, generator), schedule)
    noise = torch.randn(2, *SHAPE, generator=generator)
    options: dict[str, Any] = {"eta": eta}
    if eta:
        options["step_noise"] = torch.randn(20, 2, *SHAPE, generator=generator)
    expected = problems.chain(model, noise, schedule, 20, **options)
    assert expected.isfinite().all()
    bar = max(1e-5, 3 * rounding_floor(model, noise, schedule, 20, **options))
    for solver in (solvers.default(), solvers.parataa(), solvers.picard(), solvers.sequential()):
        solution = deqkern.sample(model, noise, schedule, 20, solver=solver, rtol=0, **options)
        assert solution.converged.all()
        assert relative_error(solution.value, expected).max() <= bar, solver.name
        assert solution.iterations <= 20


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("rtol", [1e-2, 1e-3])
@pytest.mark.parametrize("name", ["default", "parataa", "picard", "deq_ddim"])
def test_error_at_the_stop_is_within_three_tolerances(name: str, rtol: float, eta: float) -> None:
    generator = torch.Generator().manual_seed(2)
    for model in (problems.gaussian(SCHEDULE, SHAPE, generator), problems.mixture(SCHEDULE, SHAPE, generator)):
        noise = torch.randn(4, *SHAPE, generator=generator)
        options: dict[str, Any] = {"eta": eta}
        if eta:
            options["step_noise"] = torch.randn(50, 4, *SHAPE, generator=generator)
        expected = problems.chain(model, noise, SCHEDULE, 50, **options)
        solution = deqkern.sample(model, noise, SCHEDULE, 50, solver=getattr(solvers, name)(), rtol=rtol, **options)
        assert solution.converged.all() and (solution.error_estimate <= rtol).all()
        assert relative_error(solution.value, expected).max() <= 3 * rtol


def test_a_gaussian_of_known_variance_converges_at_once() -> None:
    model = problems.Gaussian(SCHEDULE, torch.zeros(192), torch.full((192,), 0.25))
    noise = torch.randn(2, *SHAPE)
    solution = deqkern.sample(model, noise, SCHEDULE, 50, solver=solvers.Solver(deqkern.slopes.Gaussian(0.25)))
    assert solution.iterations <= 2
    assert relative_error(solution.value, problems.chain(model, noise, SCHEDULE, 50)).max() <= 1e-4


def test_sigma_min_ends_the_chain_early() -> None:
    model = problems.gaussian(SCHEDULE, SHAPE, torch.Generator().manual_seed(0))
    noise = torch.randn(2, *SHAPE)
    solution = deqkern.sample(model, noise, SCHEDULE, 20, sigma_min=0.1, rtol=0)
    assert relative_error(solution.value, problems.chain(model, noise, SCHEDULE, 20, sigma_min=0.1)).max() <= 1e-5


def float64_residuals(trajectory: Tensor, table: StepTable, denoise: Callable[..., Tensor], z: Tensor | None) -> Tensor:
    """|x[i+1] - step(x[i])| / |x[i+1]| (S, B) of states (S+1, B, *shape), computed in float64."""
    x = trajectory.double().flatten(2)  # (S+1, B, D)
    found = []
    for i in range(len(x) - 1):
        alpha, sigma = table.alpha[i], table.sigma[i]
        eps = (x[i] - alpha * denoise(x[i], alpha, sigma)) / sigma
        step = table.a[i] * x[i] + table.b[i] * eps
        if z is not None:
            step += table.n[i] * z[i].double().flatten(1)
        found.append((x[i + 1] - step).norm(dim=1) / x[i + 1].norm(dim=1))
    return torch.stack(found)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize(
    "solver", [solvers.default(), solvers.deq_ddim(), solvers.picard(window=8)], ids=lambda solver: solver.name
)
def test_the_residual_history_is_that_of_the_states_before_each_iteration(solver: solvers.Solver, eta: float) -> None:
    model = problems.mixture(SCHEDULE, SHAPE, torch.Generator().manual_seed(2))
    wide = problems.GaussianMixture(SCHEDULE, model.means.double(), model.width)
    noise, z = torch.randn(2, *SHAPE), torch.randn(20, 2, *SHAPE) if eta else None

    def solved(limit: int | None) -> deqkern.Solution:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", deqkern.ConvergenceWarning)
            return deqkern.sample(
                model, noise, SCHEDULE, 20, eta=eta, step_noise=z, solver=solver, rtol=1e-4, max_iterations=limit
            )

    whole, table = solved(None), SCHEDULE.steps(20, eta=eta)
    assert whole.residual_history.shape == (whole.iterations, 20, 2)
    for k in range(1, whole.iterations):
        expected, found = float64_residuals(solved(k).trajectory, table, wide.denoise, z), whole.residual_history[k]
        evaluated = ~found.isnan()
        torch.testing.assert_close(found[evaluated], expected[evaluated], rtol=1e-3, atol=3e-6)
        assert not evaluated[:k].any() and evaluated.any()
    counts = (~whole.residual_history.isnan()).sum(1).cumsum(0)
    assert torch.equal(counts, whole.nfe_history) and torch.equal(whole.nfe_history[-1], whole.nfe)


def test_the_solution_holds_what_it_says() -> None:
    model = problems.mixture(SCHEDULE, SHAPE, torch.Generator().manual_seed(3))
    noise = torch.randn(3, *SHAPE)
    seen: list[tuple[int, Tensor, Tensor]] = []

    def callback(iteration: int, value: Tensor, estimate: Tensor) -> None:
        seen.append((iteration, value.clone(), estimate.clone()))
        value.zero_()
        estimate.zero_()

    solution = deqkern.sample(model, noise, SCHEDULE, 25, callback=callback)
    assert solution.value.shape == noise.shape and solution.trajectory.shape == (26, *noise.shape)
    torch.testing.assert_close(solution.trajectory[0], noise, atol=1e-5, rtol=1e-5)
    assert torch.equal(solution.trajectory[-1], solution.value)
    assert solution.history.shape == (solution.iterations, 3)
    assert torch.equal(solution.history, torch.stack([estimate for _, _, estimate in seen]))
    assert torch.equal(solution.history[-1], solution.error_estimate)
    assert [number for number, _, _ in seen] == list(range(1, solution.iterations + 1))
    assert torch.equal(seen[-1][1], solution.value)
    assert sum(model.calls) == int(solution.nfe.sum()) and len(model.calls) == solution.iterations
    assert re.fullmatch(r"3 of 3 samples converged in \d+ iterations \(rtol 0.01\)", solution.message)
    solution.value.zero_()
    assert solution.trajectory[-1].any()
    with pytest.raises(AttributeError):
        solution.iterations = 3  # type: ignore[misc]


def residuals(
    model: Callable[..., Tensor], trajectory: Tensor, schedule: NoiseSchedule, step_noise: Tensor | None = None
) -> Tensor:
    """|a x[i] + b out(x[i]) + n z[i] - x[i+1]| / |x[i+1]| (S, B) of the states (S+1, B, *shape), eta = 1 with noise."""
    table, x = schedule.steps(len(trajectory) - 1, eta=0.0 if step_noise is None else 1.0), trajectory
    found = []
    for i in range(len(x) - 1):
        after = table.a[i] * x[i] + table.b[i] * model(x[i], table.timesteps[i].expand(x.shape[1]))
        if step_noise is not None:
            after = after + table.n[i] * step_noise[i]
        found.append((after - x[i + 1]).flatten(1).norm(dim=1) / x[i + 1].flatten(1).norm(dim=1))
    return torch.stack(found)


@pytest.mark.parametrize("name", ["default", "parataa", "picard", "deq_ddim"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_residual_is_that_of_the_states_before_the_last_iteration(name: str, eta: float) -> None:
    model = problems.mixture(SCHEDULE, SHAPE, torch.Generator().manual_seed(3))
    noise, z = torch.randn(3, *SHAPE), torch.randn(25, 3, *SHAPE) if eta else None
    options: dict[str, Any] = {
        "eta": eta,
        "step_noise": z,
        "rtol": 0.0,
        "solver": replace(getattr(solvers, name)(), window=None),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", deqkern.ConvergenceWarning)
        before = deqkern.sample(model, noise, SCHEDULE, 25, max_iterations=1, **options)
        after = deqkern.sample(model, noise, SCHEDULE, 25, max_iterations=2, **options)
    assert after.residual.shape == (3,) and after.residual.dtype is torch.float64
    expected = residuals(model, before.trajectory, SCHEDULE, z)[2:].amax(0).double()  # two are exact by then
    assert (expected > 1e-3).all()
    torch.testing.assert_close(after.residual, expected, rtol=1e-3, atol=1e-6)


def test_the_residual_at_the_end_is_rounding() -> None:
    model = problems.mixture(SCHEDULE, SHAPE, torch.Generator().manual_seed(3))
    noise = torch.randn(3, *SHAPE)
    exact = deqkern.sample(model, noise, SCHEDULE, 50, rtol=0.0)
    assert exact.converged.all() and exact.iterations < 50
    assert (exact.residual > 0).all() and (exact.residual <= 1e-6).all()
    assert (residuals(model, exact.trajectory, SCHEDULE) <= 1e-6).all()
    loose = deqkern.sample(model, noise, SCHEDULE, 50, rtol=1e-2)
    assert (loose.residual > 3 * exact.residual).all() and loose.residual.max() > 1e3 * exact.residual.max()


def test_the_residual_of_a_sample_is_its_own() -> None:
    easy, hard = torch.full((1, 1, 8, 8), 0.3), torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    model = problems.digits_density(SCHEDULE)
    together = deqkern.sample(model, torch.cat([easy, hard]), SCHEDULE, 50, rtol=1e-3)
    assert together.nfe[0] != together.nfe[1]
    for b, noise in enumerate((easy, hard)):
        alone = deqkern.sample(model, noise, SCHEDULE, 50, rtol=1e-3)
        torch.testing.assert_close(together.residual[b], alone.residual[0], rtol=1e-2, atol=1e-7)


def test_converged_samples_and_settled_steps_are_not_evaluated_again() -> None:
    easy, hard = torch.full((1, 1, 8, 8), 0.3), torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    model = problems.digits_density(SCHEDULE)
    solver = solvers.default(window=None, thinning=0)
    solution = deqkern.sample(model, torch.cat([easy, hard]), SCHEDULE, 50, rtol=1e-3, solver=solver)
    assert solution.nfe.min() < solution.nfe.max()
    assert model.calls[0] == 100 and all(
        later <= sooner for sooner, later in zip(model.calls, model.calls[1:], strict=False)
    )
    assert int(solution.nfe.max()) < 50 * solution.iterations


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("window", [0.75, 10])
def test_previews_end_where_the_chain_leads_from_what_is_known(window: float, eta: float) -> None:
    """Also before a window has come to the end; so does a solve that is given up. The solve itself is the same."""
    model = problems.gaussian(SCHEDULE, SHAPE, torch.Generator().manual_seed(3))
    noise, seen = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(5)), []
    options: dict[str, Any] = {"eta": eta, "rtol": 1e-4, "solver": solvers.default(window=window)}
    if eta:
        options["step_noise"] = torch.randn(50, *noise.shape, generator=torch.Generator().manual_seed(6))
    solution = deqkern.sample(model, noise, SCHEDULE, 50, **options)
    watched = deqkern.sample(model, noise, SCHEDULE, 50, callback=lambda k, value, _: seen.append(value), **options)
    assert torch.equal(watched.trajectory, solution.trajectory) and torch.equal(watched.nfe, solution.nfe)
    errors = torch.stack([relative_error(value, solution.value) for value in seen]).mean(1)
    assert errors[3] < errors[1] < errors[0] < 0.9  # the first guess of all is at 0.92
    with pytest.warns(deqkern.ConvergenceWarning):
        given_up = deqkern.sample(model, noise, SCHEDULE, 50, max_iterations=2, **options)
    assert torch.equal(given_up.value, seen[1]) and (given_up.trajectory[-1] == given_up.value).all()


@pytest.mark.parametrize("max_batch", [1, 7, 60, 10_000])
def test_micro_batches_change_nothing(max_batch: int) -> None:
    model = problems.mixture(SCHEDULE, SHAPE, torch.Generator().manual_seed(3))
    noise = torch.randn(2, *SHAPE)
    whole = deqkern.sample(model, noise, SCHEDULE, 20)
    model.calls.clear()
    seen: list[Tensor] = []
    parts = deqkern.sample(model, noise, SCHEDULE, 20, max_batch=max_batch, callback=lambda k, x, _: seen.append(x))
    torch.testing.assert_close(parts.value, whole.value, atol=1e-4, rtol=1e-4)
    assert torch.equal(seen[-1], parts.value)
    assert parts.iterations == whole.iterations and max(model.calls) <= max_batch


@pytest.mark.parametrize("name", ["default", "parataa", "picard", "sequential"])
def test_every_sample_is_solved_as_if_it_were_alone(name: str) -> None:
    model = problems.mixture(SCHEDULE, SHAPE, torch.Generator().manual_seed(3))
    noise = torch.randn(3, *SHAPE)
    together = deqkern.sample(model, noise, SCHEDULE, 20, solver=getattr(solvers, name)())
    for b in range(3):
        alone = deqkern.sample(model, noise[b : b + 1], SCHEDULE, 20, solver=getattr(solvers, name)())
        torch.testing.assert_close(together.value[b], alone.value[0], atol=1e-3, rtol=1e-3)
        assert together.nfe[b] == alone.nfe[0]


def test_model_kwargs_follow_their_sample() -> None:
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(3, 192, generator=generator)

    def model(x: Tensor, t: Tensor, mean: Tensor, scale: float, shared: Tensor) -> Tensor:
        assert mean.shape == (len(x), 192) and shared.shape == (5,) and scale == 2.0
        exact = problems.Gaussian(SCHEDULE, mean, torch.full((192,), 0.1))
        return exact(x, t)

    noise = torch.randn(3, *SHAPE, generator=generator)
    kwargs = {"mean": means, "scale": 2.0, "shared": torch.ones(5)}
    solution = deqkern.sample(model, noise, SCHEDULE, 20, model_kwargs=kwargs, rtol=0)
    for b in range(3):
        alone = problems.Gaussian(SCHEDULE, means[b], torch.full((192,), 0.1))
        assert (
            relative_error(solution.value[b : b + 1], problems.chain(alone, noise[b : b + 1], SCHEDULE, 20)).max()
            <= 1e-5
        )


def test_generator_draws_in_the_sequential_order() -> None:
    model = problems.mixture(SCHEDULE, SHAPE, torch.Generator().manual_seed(3))
    noise = torch.randn(2, *SHAPE)
    generator = torch.Generator().manual_seed(5)
    step_noise = torch.stack([torch.randn(noise.shape, generator=generator) for _ in range(20)])
    given = deqkern.sample(model, noise, SCHEDULE, 20, eta=1.0, step_noise=step_noise, rtol=0)
    drawn = deqkern.sample(model, noise, SCHEDULE, 20, eta=1.0, generator=torch.Generator().manual_seed(5), rtol=0)
    assert torch.equal(given.value, drawn.value)


class Linear(torch.nn.Module):
    """An epsilon-predicting module with a parameter, so that it has a dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = torch.nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)  # quantized
        self.weight = torch.nn.Parameter(torch.tensor(0.9))
        self.seen: set[torch.dtype] = set()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen.add(x.dtype)
        return self.weight * torch.tanh(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_models_keep_an_fp32_state(dtype: torch.dtype) -> None:
    model = Linear().to(dtype)
    noise = torch.randn(2, *SHAPE)
    solution = deqkern.sample(model, noise, SCHEDULE, 20, rtol=0)
    assert model.seen == {dtype}
    assert solution.value.dtype == torch.float32 and solution.trajectory.dtype == torch.float32
    expected = problems.chain(lambda x, t: model(x.to(dtype), t).detach().float(), noise, SCHEDULE, 20)
    assert relative_error(solution.value, expected).max() <= {torch.float32: 1e-5}.get(dtype, 2e-2)
    half = deqkern.sample(model, noise.to(dtype), SCHEDULE, 20)
    assert half.value.dtype == dtype and half.trajectory.dtype == torch.float32


def test_any_layout_of_the_noise() -> None:
    model = problems.mixture(SCHEDULE, SHAPE, torch.Generator().manual_seed(3))
    noise = torch.randn(2, *SHAPE)
    expected = deqkern.sample(model, noise, SCHEDULE, 10).value
    layouts = [noise.to(memory_format=torch.channels_last), noise.mT.contiguous().mT, noise[:, :, ::1]]
    for layout in layouts:
        assert torch.equal(deqkern.sample(model, layout, SCHEDULE, 10).value, expected)
    one = torch.randn(1, *SHAPE)
    expanded = deqkern.sample(model, one.expand(2, *SHAPE), SCHEDULE, 10).value
    assert torch.equal(expanded[0], expanded[1])


@pytest.mark.parametrize("shape", [(7,), (5, 9), (2, 3, 4, 5), (1, 1, 1), (4, 5, 3)])
def test_samples_of_any_shape(shape: tuple[int, ...]) -> None:
    model = problems.mixture(SCHEDULE, shape, torch.Generator().manual_seed(3))
    noise = torch.randn(2, *shape)
    solution = deqkern.sample(model, noise, SCHEDULE, 15, rtol=0)
    assert relative_error(solution.value, problems.chain(model, noise, SCHEDULE, 15)).max() <= 1e-5


@pytest.mark.parametrize("steps", [1, 2, 3, 1000])
def test_short_and_long_chains(steps: int) -> None:
    model = problems.Gaussian(SCHEDULE, torch.zeros(4), torch.full((4,), 0.5))
    noise = torch.randn(1, 4)
    solution = deqkern.sample(model, noise, SCHEDULE, steps, rtol=1e-4)
    assert solution.converged.all() and solution.iterations <= steps
    assert relative_error(solution.value, problems.chain(model, noise, SCHEDULE, steps)).max() <= 3e-4


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_modes(context: Callable[[], Any]) -> None:
    model = Linear()
    noise = torch.randn(2, *SHAPE)
    expected = deqkern.sample(model, noise, SCHEDULE, 10).value
    with context():
        value = deqkern.sample(model, noise.clone(), SCHEDULE, 10).value
    assert torch.equal(value, expected) and not value.requires_grad


def test_an_empty_batch_gives_an_empty_result() -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("called")

    solution = deqkern.sample(model, torch.empty(0, *SHAPE), SCHEDULE, 10)
    assert (
        solution.value.shape == (0, *SHAPE)
        and solution.iterations == 0
        and solution.trajectory.shape == (11, 0, *SHAPE)
    )


def test_a_miss_is_data_and_one_warning() -> None:
    model = problems.mixture(SCHEDULE, SHAPE, torch.Generator().manual_seed(3))
    noise = torch.randn(2, *SHAPE)
    with pytest.warns(deqkern.ConvergenceWarning, match="0 of 2 samples") as caught:
        solution = deqkern.sample(model, noise, SCHEDULE, 50, rtol=1e-6, max_iterations=2)
    assert len(caught) == 1 and not solution.converged.any() and solution.iterations == 2
    assert solution.value.isfinite().all() and (solution.error_estimate > 1e-6).all()


def test_a_diverging_solver_falls_back_and_says_so() -> None:
    """A slope that is wrong by sign and size overflows; plain iteration still finishes the sample."""
    model = problems.mixture(SCHEDULE, SHAPE, torch.Generator().manual_seed(3))
    noise = torch.randn(2, *SHAPE)
    wild = replace(deqkern.slopes.Frozen(), shrinkage=-1e3)
    solver = solvers.Solver(slope=wild, start="constant")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = deqkern.sample(model, noise, SCHEDULE, 50, solver=solver, rtol=1e-3)
    assert "diverged and continued with plain iteration" in solution.message and solution.iterations <= 30
    assert relative_error(solution.value, problems.chain(model, noise, SCHEDULE, 50)).max() <= 3e-3


def test_an_interrupt_leaves_nothing_broken() -> None:
    model = problems.mixture(SCHEDULE, SHAPE, torch.Generator().manual_seed(3))
    noise = torch.randn(2, *SHAPE)
    expected = deqkern.sample(model, noise, SCHEDULE, 20).value
    calls = iter(range(3))

    def interrupted(x: Tensor, t: Tensor) -> Tensor:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return model(x, t)

    with pytest.raises(KeyboardInterrupt):
        deqkern.sample(interrupted, noise, SCHEDULE, 20)
    assert torch.is_grad_enabled()
    assert torch.equal(deqkern.sample(model, noise, SCHEDULE, 20).value, expected)


def never(x: Tensor, t: Tensor) -> Tensor:
    raise AssertionError("the model was called")


NOISE = torch.zeros(2, *SHAPE)
BAD: list[tuple[str, type[Exception], dict[str, Any]]] = [
    ("noise", TypeError, {"noise": [1.0]}),
    ("noise", TypeError, {"noise": NOISE.to(torch.complex64)}),
    ("noise", TypeError, {"noise": NOISE.long()}),
    ("noise", ValueError, {"noise": torch.zeros(3)}),
    ("noise", ValueError, {"noise": torch.zeros(3, 0)}),
    ("noise", ValueError, {"noise": torch.full((2, *SHAPE), torch.nan)}),
    ("schedule", TypeError, {"schedule": object()}),
    ("num_inference_steps", ValueError, {"num_inference_steps": 0}),
    ("num_inference_steps", ValueError, {"num_inference_steps": 1001}),
    ("num_inference_steps", TypeError, {"num_inference_steps": 2.5}),
    ("eta", ValueError, {"eta": -0.1}),
    ("eta", ValueError, {"eta": float("nan")}),
    ("eta", ValueError, {"eta": 1.0, "schedule": NoiseSchedule.flow()}),
    ("solver", TypeError, {"solver": "default"}),
    ("rtol", ValueError, {"rtol": -1e-3}),
    ("rtol", ValueError, {"rtol": float("nan")}),
    ("rtol", TypeError, {"rtol": "small"}),
    ("max_iterations", ValueError, {"max_iterations": 0}),
    ("max_batch", ValueError, {"max_batch": 0}),
    ("max_batch", ValueError, {"max_batch": 1.5}),
    ("sigma_min", ValueError, {"sigma_min": -1.0}),
    ("gradient", ValueError, {"gradient": "ift"}),
    ("callback", TypeError, {"callback": 3}),
    ("model", TypeError, {"model": 3}),
    ("model_kwargs", TypeError, {"model_kwargs": [1]}),
    ("generator", TypeError, {"generator": 3, "eta": 1.0}),
    ("step_noise", ValueError, {"step_noise": torch.zeros(10, 2, *SHAPE)}),
    ("step_noise", ValueError, {"step_noise": torch.zeros(9, 2, *SHAPE), "eta": 1.0}),
    ("step_noise", ValueError, {"step_noise": torch.full((10, 2, *SHAPE), torch.nan), "eta": 1.0}),
    ("step_noise", TypeError, {"step_noise": torch.zeros(10, 2, *SHAPE).int(), "eta": 1.0}),
    (
        "prediction_type",
        ValueError,
        {"schedule": NoiseSchedule.linear(rescale_betas_zero_snr=True, timestep_spacing="trailing")},
    ),
]


@pytest.mark.parametrize(("name", "error", "options"), BAD, ids=[f"{name}-{i}" for i, (name, _, _) in enumerate(BAD)])
def test_bad_arguments_are_named_and_nothing_is_computed(
    name: str, error: type[Exception], options: dict[str, Any]
) -> None:
    arguments = {"model": never, "noise": NOISE, "schedule": SCHEDULE, "num_inference_steps": 10, **options}
    with pytest.raises(error, match=name):
        deqkern.sample(**arguments)


def test_an_unknown_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="tolerance"):
        deqkern.sample(never, NOISE, SCHEDULE, tolerance=1e-3)  # type: ignore[call-arg]


def test_a_model_that_returns_something_else_is_named() -> None:
    with pytest.raises(ValueError, match=r"model returned shape \(16, 6, 8, 8\) for an input of shape \(16, 3, 8, 8\)"):
        deqkern.sample(lambda x, t: torch.cat([x, x], 1), NOISE, SCHEDULE, 10)
    with pytest.raises(TypeError, match="model must return a tensor"):
        deqkern.sample(lambda x, t: "picture", NOISE, SCHEDULE, 10)
    with pytest.raises(ValueError, match=r"model returned torch\.int64"):
        deqkern.sample(lambda x, t: x.long(), NOISE, SCHEDULE, 10)


@pytest.mark.parametrize("name", ["default", "parataa", "sequential"])
def test_a_model_that_returns_nan_is_named_with_its_timesteps(name: str) -> None:
    calls: list[int] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        calls.append(1)
        broken = (t == 300) & (len(calls) > 1)
        return torch.where(broken.view(-1, 1, 1, 1), torch.nan, 0.5 * x.sin())

    with pytest.raises(ValueError, match=r"model returned NaN or infinity at iteration \d+, timesteps \[300\]"):
        deqkern.sample(model, torch.randn(2, *SHAPE), SCHEDULE, 10, solver=getattr(solvers, name)(), rtol=0)


@pytest.mark.parametrize("solver", [solvers.default(), solvers.parataa()], ids=lambda solver: solver.name)
def test_fp64_states(solver: solvers.Solver) -> None:
    """An affine chain, exact to far below fp32."""

    def model(x: Tensor, t: Tensor) -> Tensor:
        return 0.3 * x + 0.1

    noise = torch.randn(2, *SHAPE, dtype=torch.float64)
    table, x = SCHEDULE.steps(20), noise
    for i in range(20):
        x = table.a[i] * x + table.b[i] * model(x, table.timesteps[i])
    solution = deqkern.sample(model, noise, SCHEDULE, 20, solver=solver, rtol=1e-11)
    assert solution.value.dtype is solution.trajectory.dtype is torch.float64 and solution.converged.all()
    assert relative_error(solution.value, x).max() <= 1e-10


def test_a_guess_saves_iterations_and_changes_nothing_else() -> None:
    model, noise = problems.mixture(SCHEDULE, SHAPE, torch.Generator().manual_seed(3)), torch.randn(2, *SHAPE)
    cold = deqkern.sample(model, noise, SCHEDULE, 25, rtol=1e-3)
    near = deqkern.sample(model, noise + 1e-4, SCHEDULE, 25, rtol=1e-3)
    warm = deqkern.sample(model, noise, SCHEDULE, 25, rtol=1e-3, guess=near.trajectory)
    assert warm.iterations <= cold.iterations // 2
    assert relative_error(warm.value, problems.chain(model, noise, SCHEDULE, 25)).max() <= 3e-3
    far = deqkern.sample(model, noise, SCHEDULE, 25, rtol=0.0, guess=torch.randn(26, *noise.shape))
    assert relative_error(far.value, problems.chain(model, noise, SCHEDULE, 25)).max() <= 1e-5


@pytest.mark.parametrize(
    ("guess", "error"),
    [(1.0, TypeError), (torch.zeros(26, 2, *SHAPE).int(), TypeError), (torch.zeros(25, 2, *SHAPE), ValueError),
     (torch.full((26, 2, *SHAPE), torch.nan), ValueError)],
)  # fmt: skip
def test_bad_guesses(guess: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="guess"):
        deqkern.sample(never, NOISE, SCHEDULE, 25, guess=guess)


def test_a_compiled_model_gives_what_the_model_gives() -> None:
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Tanh(), torch.nn.Conv2d(4, 3, 3, padding=1)
    )

    def model(x: Tensor, t: Tensor) -> Tensor:
        return 0.5 * x + network(x) * (t / 1000).view(-1, 1, 1, 1)

    noise = torch.randn(2, 3, 8, 8)
    expected = deqkern.sample(model, noise, SCHEDULE, 12, rtol=1e-4)
    compiled = torch.compile(model, backend="aot_eager", dynamic=True, fullgraph=True)
    found = deqkern.sample(compiled, noise, SCHEDULE, 12, rtol=1e-4)
    assert found.iterations == expected.iterations
    torch.testing.assert_close(found.value, expected.value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", [solvers.picard(), solvers.deq_ddim()], ids=lambda solver: solver.name)
def test_a_model_that_fails_at_states_off_the_chain_is_not_blamed(solver: solvers.Solver) -> None:
    """As one of half precision that overflows: solvers without slopes overshoot on the way."""
    model = problems.gaussian(SCHEDULE, SHAPE, torch.Generator().manual_seed(3))
    noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    largest = float(problems.chain(model, noise, SCHEDULE, 50).abs().max().clamp_min(noise.abs().max()))

    def narrow(x: Tensor, t: Tensor) -> Tensor:
        return torch.where(x.abs() > 2.5 * largest, torch.inf, model(x, t))

    expected = deqkern.sample(narrow, noise, SCHEDULE, 50, solver=solvers.sequential(), rtol=0.0).value
    found = deqkern.sample(narrow, noise, SCHEDULE, 50, solver=solver, rtol=1e-3)
    assert found.converged.all() and "diverged and continued with plain iteration" in found.message
    assert found.iterations <= 40 and relative_error(found.value, expected).max() <= 3e-3


@pytest.mark.parametrize("solver", [solvers.default(), solvers.parataa()], ids=lambda solver: solver.name)
@pytest.mark.parametrize("step", [3, 4])
def test_a_model_is_blamed_at_a_state_before_an_overshoot_but_not_after(step: int, solver: solvers.Solver) -> None:
    exact, calls = problems.mixture(SCHEDULE, SHAPE, torch.Generator().manual_seed(3)), 0

    def model(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        place, wrong = {1: (600, 1e6), 2: (900 - 100 * step, torch.nan)}.get(calls, (-1, 0.0))
        return torch.where((t == place).view(-1, 1, 1, 1), wrong, exact(x, t))

    if step == 3:  # from where the first call made the overshoot
        with pytest.raises(ValueError, match=r"iteration 2, timesteps \[600\] \(sample 0\)"):
            deqkern.sample(model, torch.randn(2, *SHAPE), SCHEDULE, 10, solver=solver)
    else:
        found = deqkern.sample(model, torch.randn(2, *SHAPE), SCHEDULE, 10, solver=solver)
        assert found.converged.all()
        assert torch.equal((~found.residual_history.isnan()).sum(1).cumsum(0), found.nfe_history)


@pytest.mark.parametrize("schedule", [SCHEDULE, NoiseSchedule.linear(clip_sample=True)], ids=["order 2", "clip"])
def test_a_model_may_write_into_what_it_is_given(schedule: NoiseSchedule) -> None:
    options: Any = {"order": 1 if schedule.clip_sample else 2, "rtol": 0.0}
    found, expected = (
        deqkern.sample(model, NOISE, schedule, 10, **options).value
        for model in (lambda x, t: x.mul_(0.5).sin_(), lambda x, t: (0.5 * x).sin())
    )
    assert torch.equal(found, expected)


def test_any_default_device() -> None:
    """Such as a GPU set by torch.set_default_device; "meta" computes nothing, so that any use of it shows."""
    model = torch.nn.Conv2d(3, 3, 3, padding=1)
    noise = torch.randn(2, *SHAPE)

    def call(x: Tensor, t: Tensor) -> Tensor:
        return 0.3 * model(x)

    with torch.device("meta"):
        schedule = NoiseSchedule.scaled_linear()
        for eta in (0.0, 1.0):
            for solver in (solvers.default(), solvers.parataa(), solvers.picard(window=3)):
                first = noise.clone().requires_grad_()
                found = deqkern.sample(call, first, schedule, 6, eta=eta, solver=solver, gradient="implicit")
                assert found.value.device.type == "cpu" and torch.autograd.grad(found.value.sum(), first)
        assert deqkern.sample(call, noise, NoiseSchedule.flow(), 6).value.device.type == "cpu"
        assert deqkern.sample(call, noise, schedule, 20, order=2).value.device.type == "cpu"
        thinned = deqkern.sample(call, noise, schedule, 50, solver=solvers.default(window=None))
        assert thinned.nfe_history[0].max() < 50
        assert deqkern.sample(call, noise, schedule, 6, sigma_min=0.1).value.device.type == "cpu"
        assert deqkern.invert(call, noise, schedule, 6, round_trip=True).converged.all()
        assert deqkern.invert(call, noise, schedule, 6, method="optimize", max_iterations=1).value.device.type == "cpu"
        assert deqkern.fixed_point(lambda z: 0.5 * z.cos(), noise, gradient=None).converged.all()


class Text(NamedTuple):
    embedding: Tensor
    rest: list[Tensor]


def test_a_named_tuple_of_arguments_follows_its_sample() -> None:
    text, seen = Text(torch.randn(2, 3, 1, 1), [torch.randn(2), torch.randn(5)]), set[tuple[int, ...]]()

    def model(x: Tensor, t: Tensor, text: Text) -> Tensor:
        assert len(text.embedding) == len(text.rest[0]) == len(x) and len(text.rest[1]) == 5
        seen.add(tuple(x.shape))
        return 0.1 * x + text.embedding

    found = deqkern.sample(model, torch.randn(2, *SHAPE), SCHEDULE, 10, model_kwargs={"text": text})
    assert found.converged.all() and len(seen) > 1


def test_solutions_are_compared_by_identity() -> None:
    found = deqkern.sample(lambda x, t: 0.1 * x, NOISE, SCHEDULE, 5)
    assert found == found and found != replace(found)


def test_an_empty_batch_has_no_gradient() -> None:
    with pytest.raises(ValueError, match="noise must hold at least one sample"):
        deqkern.sample(lambda x, t: x, torch.zeros(0, *SHAPE), SCHEDULE, 5, gradient="exact")


@pytest.mark.parametrize("view", ["transposed", "flipped", "channels_last", "expanded"])
def test_a_model_may_return_a_view_of_its_input(view: str) -> None:
    views: dict[str, Callable[[Tensor], Tensor]] = {
        "transposed": lambda x: x.mT,
        "flipped": lambda x: x.mT.flip(-1),
        "channels_last": lambda x: x.to(memory_format=torch.channels_last),
        "expanded": lambda x: x[:, :1].expand_as(x),
    }
    noise = torch.randn(2, 3, 8, 8)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return views[view](x)

    found = deqkern.sample(model, noise, SCHEDULE, 12, rtol=0.0)
    assert relative_error(found.value, chain(model, noise, SCHEDULE, 12)).max() <= 1e-4


class Plain(torch.nn.Module):
    """A module of x alone as a model of x and t."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize("order", [1, 2])
def test_states_go_to_the_model_in_its_own_dtype_where_the_transform_writes_it(
    order: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where that saves a pass each way."""
    conv, noise = torch.nn.Conv2d(3, 3, 3, padding=1, dtype=torch.bfloat16), torch.randn(2, 3, 8, 6)
    half = Plain(conv)
    usual = deqkern.sample(half, noise, SCHEDULE, 12, order=order)
    taken, construct = [], Trajectory.__init__

    def direct(self: Trajectory, *arguments: Any, **options: Any) -> None:
        construct(self, *arguments, **options)
        self.casts = True
        taken.append(self)

    monkeypatch.setattr(Trajectory, "__init__", direct)
    found = deqkern.sample(half, noise, SCHEDULE, 12, order=order)
    assert torch.equal(found.value, usual.value) and torch.equal(found.nfe, usual.nfe)
    assert (torch.bfloat16 in taken[0]._images) is (order == 1), "what converts outputs reads the states as they are"


def test_half_precision_ends_at_its_own_rounding() -> None:
    """And does not walk the whole chain for digits that the model does not have."""
    model, eps = models.load("digits"), torch.finfo(torch.bfloat16).eps
    noise, half = torch.randn(1, *model.shape), copy.deepcopy(model.model).bfloat16()
    found = deqkern.sample(half, noise, model.schedule, 30, rtol=1e-4)
    expected = deqkern.sample(half, noise, model.schedule, 30, rtol=0.0, solver=solvers.sequential())
    assert found.converged.all() and found.iterations <= 15, found.message
    assert relative_error(found.value, expected.value).max() <= 4 * eps
    assert found.error_estimate.max() <= 4 * eps


def test_weights_that_are_stored_in_eight_bits() -> None:
    """As diffusers' layerwise casting does: the module says what it computes in."""

    class Stored(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.full((3, 1, 1), 0.25).to(torch.float8_e4m3fn), requires_grad=False)
            self.scale = torch.nn.Parameter(torch.ones((), dtype=torch.bfloat16))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            assert x.dtype == self.scale.dtype
            return self.weight.to(x.dtype) * self.scale * x

    assert model_dtype(Stored(), torch.float64) == torch.bfloat16
    assert deqkern.sample(Stored(), torch.randn(1, 3, 4, 4), SCHEDULE, 5).converged.all()
    says = Stored()
    says.scale = torch.nn.Parameter(torch.ones(()))
    says.dtype = torch.float32  # type: ignore[assignment]
    assert model_dtype(says, torch.float64) == torch.float32


def test_the_solution_of_a_solve_is_taken_once() -> None:
    solve = deqkern.begin(torch.randn(1, 3, 4, 4), SCHEDULE, 4, rtol=0.0)
    while solve.open:
        solve.tell(0 * solve.ask().states)
    solve.solution()
    with pytest.raises(RuntimeError, match="taken before"):
        solve.solution()


@pytest.mark.parametrize("options", [{}, {"eta": 1.0}, {"order": 2}, {"max_batch": 7}, {"rtol": 0.0}], ids=str)
@pytest.mark.parametrize("clip", [False, True])
def test_a_loop_of_ones_own_does_what_sample_does(clip: bool, options: dict[str, Any]) -> None:
    """Also of a model that writes into its input, and told in parts or all at once."""
    schedule = NoiseSchedule.linear(clip_sample=clip)
    noise = torch.randn(2, 3, 4, 4)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return x.sin_().mul_(0.3) + 1e-4 * t.view(-1, 1, 1, 1)

    torch.manual_seed(0)
    expected = deqkern.sample(model, noise, schedule, 20, **options)
    torch.manual_seed(0)
    solve = deqkern.begin(noise, schedule, 20, **options)
    while solve.open:
        rows = solve.ask()
        assert solve.ask() is rows and len(rows.states) == len(rows)
        if "max_batch" in options:
            solve.tell(model(part.states, part.timesteps) for part in rows.split())
        else:
            solve.tell(model(rows.states, rows.timesteps))
    found = solve.solution()
    assert torch.equal(found.trajectory, expected.trajectory) and torch.equal(found.history, expected.history)
    assert found.iterations == expected.iterations and torch.equal(found.nfe, expected.nfe)


def test_a_loop_of_ones_own_that_breaks_the_rules() -> None:
    solve = deqkern.begin(torch.randn(2, 3, 4, 4), SCHEDULE, 6)
    with pytest.raises(RuntimeError, match="ask for rows"):
        solve.tell(torch.zeros(1))
    rows = solve.ask()
    wrong: list[tuple[Any, type[Exception], str]] = [
        (rows.states[:-1].clone(), ValueError, "one row for each"),
        (torch.zeros(len(rows), 3), ValueError, "shape"),
        ([None], TypeError, "outputs"),
        (torch.zeros(len(rows), 3, 4, 4, dtype=torch.int64), ValueError, "int64"),
    ]
    for outputs, error, message in wrong:
        with pytest.raises(error, match=message):
            solve.tell(outputs)
    solve.tell(0 * rows.states)  # it is not lost
    while solve.open:
        solve.tell(0 * solve.ask().states)
    with pytest.raises(RuntimeError, match="over"):
        solve.ask()
    assert solve.solution().converged.all()
