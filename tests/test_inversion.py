"""`invert` against chains with known noise, on every method, and clear about what cannot be undone."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from asserts import relative_error
from problems import GaussianMixture, gaussian, mixture
from torch import Tensor

import deqkern
from deqkern import NoiseSchedule, inversion, models, solvers

SCHEDULE = NoiseSchedule.linear()
SHAPE = (3, 8, 8)
STEPS = 30


class Wide:
    """The mixture's denoiser in fp64."""

    def __init__(self, mixture: GaussianMixture) -> None:
        self.mixture = GaussianMixture(mixture.schedule, mixture.means.double(), mixture.width)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        assert SCHEDULE.alphas_cumprod is not None
        abar = SCHEDULE.alphas_cumprod[t.long()].double()[:, None]
        flat, alpha, sigma = x.flatten(1), abar.sqrt(), (1 - abar).sqrt()
        return ((flat - alpha * self.mixture.denoise(flat, alpha, sigma)) / sigma).view_as(x)


def data_of(model: GaussianMixture, count: int, dtype: torch.dtype = torch.float32) -> Tensor:  # (B, *SHAPE)
    means = model.means[torch.arange(count) % len(model.means)].to(dtype)
    return (means + model.width * torch.randn(count, means.shape[1], dtype=dtype)).view(-1, *SHAPE)


@pytest.mark.parametrize("method", ["joint", "stepwise"])
def test_the_noise_of_a_gaussian_is_found_again(method: str) -> None:
    model = gaussian(SCHEDULE, SHAPE, torch.Generator().manual_seed(1))
    noise = torch.randn(3, *SHAPE)
    made = deqkern.sample(model, noise, SCHEDULE, STEPS, sigma_min=0.08, solver=solvers.sequential(), rtol=0.0).value
    found = deqkern.invert(model, made, SCHEDULE, STEPS, method=method, rtol=1e-5, round_trip=True)
    assert found.converged.all() and relative_error(found.value, noise).max() <= 1e-4
    assert found.round_trip is not None and found.round_trip.max() <= 1e-4


@pytest.mark.parametrize("steps", [10, 20, 50, 100])
def test_round_trips_of_a_mixture_in_fp64(steps: int) -> None:
    model = mixture(SCHEDULE, SHAPE, torch.Generator().manual_seed(2))
    sample = data_of(model, 4, torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", deqkern.ConvergenceWarning)
        found = deqkern.invert(Wide(model), sample, SCHEDULE, steps, rtol=1e-10, round_trip=True)
    assert found.value.dtype is torch.float64 and found.round_trip is not None
    assert torch.equal(found.round_trip <= 1e-9, found.converged), "a step so long may have no start; then it is said"
    assert found.converged.sum() >= 3
    if steps >= 50:
        assert found.converged.all() and found.iterations <= 20


@pytest.mark.parametrize("method", ["joint", "stepwise", "naive"])
def test_the_trajectory_is_the_chain_from_noise_to_sample(method: str) -> None:
    model = mixture(SCHEDULE, SHAPE, torch.Generator().manual_seed(2))
    sample = data_of(model, 2)
    found = deqkern.invert(model, sample, SCHEDULE, STEPS, method=method, rtol=1e-5)
    assert found.trajectory.shape == (STEPS + 1, *sample.shape)
    torch.testing.assert_close(found.trajectory[0], found.value)
    torch.testing.assert_close(found.trajectory[-1], sample, rtol=1e-5, atol=1e-5)
    again = deqkern.sample(model, found.value, SCHEDULE, STEPS, sigma_min=0.08, solver=solvers.sequential(), rtol=0.0)
    error = relative_error(again.value, sample).max()
    assert error <= 1e-3 if method != "naive" else error >= 1e-3


def test_naive_inversion_makes_one_call_per_step_and_claims_nothing() -> None:
    model = mixture(SCHEDULE, SHAPE, torch.Generator().manual_seed(2))
    model.calls.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = deqkern.invert(model, data_of(model, 2), SCHEDULE, STEPS, method="naive")
    assert model.calls == [2] * STEPS and found.nfe.tolist() == [STEPS] * 2
    assert not found.converged.any()
    for unknown in (found.error_estimate, found.residual, found.history, found.residual_history):
        assert unknown.isnan().all()
    assert found.nfe_history.tolist() == [[k + 1] * 2 for k in range(STEPS)]


class Conditioned:
    """A mixture that is shifted by an argument of each sample."""

    def __init__(self, model: GaussianMixture) -> None:
        self.model = model

    def __call__(self, x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        return self.model(x, t) + 0.1 * shift[:, None, None, None]


def test_what_the_joint_solve_leaves_goes_on_stepwise(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Conditioned(mixture(SCHEDULE, SHAPE, torch.Generator().manual_seed(2)))
    sample, shift = data_of(model.model, 3), torch.tensor([0.0, 1.0, -1.0])
    options: dict[str, Any] = {"rtol": 1e-5, "round_trip": True, "model_kwargs": {"shift": shift}}
    joint = deqkern.invert(model, sample, SCHEDULE, STEPS, **options)
    monkeypatch.setattr(inversion, "JOINT_LIMIT", 2)
    found = deqkern.invert(model, sample, SCHEDULE, STEPS, **options)
    assert "3 of the samples continued step by step" in found.message
    assert found.converged.all() and found.history.shape == (found.iterations, 3)
    assert found.round_trip is not None and found.round_trip.max() <= 1e-4
    torch.testing.assert_close(found.value, joint.value, rtol=1e-3, atol=1e-3)
    assert (found.nfe > 2 * STEPS).all()


def mixed(model: GaussianMixture) -> Tensor:
    """(3, *SHAPE), of which the last is solved in four iterations and the second takes far more."""
    return data_of(model, 3) * torch.tensor([1.0, 0.3, 2.0]).view(3, 1, 1, 1)


@pytest.mark.filterwarnings("ignore::deqkern.ConvergenceWarning")
def test_what_each_solve_reached_is_reported_for_its_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixture(SCHEDULE, SHAPE, torch.Generator().manual_seed(2))
    sample, seen = mixed(model), list[tuple[int, Tensor, Tensor]]()
    joint = deqkern.invert(model, sample, SCHEDULE, STEPS, rtol=1e-5, max_iterations=4)
    left = (~joint.converged).nonzero().flatten()
    assert 0 < len(left) < 3
    again = deqkern.invert(model, sample[left], SCHEDULE, STEPS, rtol=1e-5, method="stepwise")
    monkeypatch.setattr(inversion, "JOINT_LIMIT", 4)
    found = deqkern.invert(model, sample, SCHEDULE, STEPS, rtol=1e-5, callback=lambda *args: seen.append(args))
    taken = again.converged | (again.error_estimate < joint.error_estimate[left])
    assert taken.tolist() == again.converged.tolist() == [True, False], (
        "one that is solved, and one that gets no further"
    )
    kept = joint.converged.index_fill(0, left[~taken], True)
    for name in ("residual", "error_estimate", "converged", "value"):
        assert torch.equal(getattr(found, name)[kept], getattr(joint, name)[kept]), name
    assert torch.equal(found.trajectory[:, kept], joint.trajectory[:, kept])
    torch.testing.assert_close(found.residual[left[taken]], again.residual[taken], rtol=1e-2, atol=1e-7)
    assert found.converged[left[taken]].all()
    evaluated = ~found.residual_history.isnan()
    assert evaluated.shape == (found.iterations, STEPS, 3) and not evaluated[4:, :, joint.converged].any()
    assert torch.equal(evaluated.sum(1).cumsum(0), found.nfe_history)
    assert torch.equal(found.nfe_history[-1], found.nfe) and torch.equal(found.nfe_history[3], joint.nfe)
    assert found.iterations == 4 + again.iterations
    assert [number for number, _, _ in seen] == list(range(1, found.iterations + 1))
    assert torch.equal(torch.stack([estimate for _, _, estimate in seen]), found.history)
    assert torch.equal(seen[-1][1][found.converged], found.value[found.converged])
    for _, value, _ in seen[4:]:
        assert torch.equal(value[joint.converged], joint.value[joint.converged])
    torch.testing.assert_close(seen[3][1], joint.value)


@pytest.mark.filterwarnings("ignore::deqkern.ConvergenceWarning")
def test_the_residual_is_that_of_the_states_before_the_last_iteration() -> None:
    model = mixture(SCHEDULE, SHAPE, torch.Generator().manual_seed(2))
    sample, table = data_of(model, 3), SCHEDULE.steps(STEPS, sigma_min=0.08).reversed()
    before = deqkern.invert(model, sample, SCHEDULE, STEPS, max_iterations=1).trajectory.flip(0)
    after = deqkern.invert(model, sample, SCHEDULE, STEPS, max_iterations=2)
    expected = []
    for i in range(STEPS):
        out = model(before[i + 1], table.timesteps[i].expand(3))
        residual = table.a[i] * before[i] + table.b[i] * out - before[i + 1]
        expected.append(residual.flatten(1).norm(dim=1) / before[i + 1].flatten(1).norm(dim=1))
    assert (torch.stack(expected).amax(0) > 1e-3).all()
    torch.testing.assert_close(after.residual, torch.stack(expected).amax(0).double(), rtol=1e-3, atol=1e-6)
    in_order = torch.stack(expected).flip(0).double()  # of the trajectory
    torch.testing.assert_close(after.residual_history[1], in_order, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", ["joint", "stepwise", "naive"])
def test_the_callback_sees_every_iteration(method: str) -> None:
    model = mixture(SCHEDULE, SHAPE, torch.Generator().manual_seed(2))
    seen: list[tuple[int, Tensor, Tensor]] = []
    sample = data_of(model, 2)
    found = deqkern.invert(model, sample, SCHEDULE, STEPS, method=method, callback=lambda *args: seen.append(args))
    assert [number for number, _, _ in seen] == list(range(1, found.iterations + 1))
    assert torch.equal(seen[-1][1], found.value) and not torch.equal(seen[0][1], found.value)
    estimates = torch.stack([estimate for _, _, estimate in seen])
    torch.testing.assert_close(estimates, found.history, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("method", ["joint", "stepwise"])
def test_a_sample_that_is_given_up_is_flagged(method: str) -> None:
    model = mixture(SCHEDULE, SHAPE, torch.Generator().manual_seed(2))
    with pytest.warns(deqkern.ConvergenceWarning, match="0 of 2 samples") as caught:
        found = deqkern.invert(model, data_of(model, 2), SCHEDULE, STEPS, method=method, max_iterations=2)
    assert caught[0].filename == __file__
    assert not found.converged.any() and (found.error_estimate > 1e-4).all() and found.iterations == 2


def test_half_precision_and_micro_batches() -> None:
    model = mixture(SCHEDULE, SHAPE, torch.Generator().manual_seed(2))
    sample = data_of(model, 2).bfloat16()
    found = deqkern.invert(model, sample, SCHEDULE, STEPS, rtol=1e-2, max_batch=1, round_trip=True)
    assert found.value.dtype is torch.bfloat16 and max(model.calls) == 1 and found.converged.all()


def test_a_reversed_table_undoes_each_step() -> None:
    table = SCHEDULE.steps(STEPS, sigma_min=0.1)
    back = table.reversed()
    assert back.implicit and not table.implicit and not back.reversed().implicit
    x, out = torch.randn(2, STEPS, dtype=torch.float64).unbind()
    after = table.a * x + table.b * out
    torch.testing.assert_close(back.a * after.flip(0) + back.b * out.flip(0), x.flip(0))
    for name in ("timesteps", "alpha", "sigma", "slope_0", "slope_1"):
        assert torch.equal(getattr(back, name), getattr(table, name).flip(0))
    torch.testing.assert_close(back.reversed().b, table.b)
    with pytest.raises(ValueError, match="eta must be 0: steps that draw noise"):
        SCHEDULE.steps(STEPS, eta=1.0).reversed()


def test_flow_matching() -> None:
    """The exact velocity of N(0, 1/4) data."""
    schedule = NoiseSchedule.flow()

    def model(x: Tensor, t: Tensor) -> Tensor:
        s = (t / 1000).view(-1, 1, 1, 1)
        return (s - (1 - s) / 4) / (s**2 + (1 - s) ** 2 / 4) * x

    sample = torch.randn(2, *SHAPE) / 2
    found = deqkern.invert(model, sample, schedule, STEPS, rtol=1e-5, round_trip=True)
    assert found.converged.all() and found.round_trip is not None and found.round_trip.max() <= 1e-4


@pytest.mark.parametrize(
    ("schedule", "options", "error", "words"),
    [
        (NoiseSchedule.linear(clip_sample=True), {}, ValueError, "schedule clips or thresholds"),
        (NoiseSchedule.linear(thresholding=True), {}, ValueError, "schedule clips or thresholds"),
        (NoiseSchedule.linear(prediction_type="sample"), {"sigma_min": None}, ValueError, "forgets its state"),
        (SCHEDULE, {"method": "exact"}, ValueError, "method must be one of 'joint'"),
        (SCHEDULE, {"method": "naive", "solver": solvers.default()}, ValueError, "solver is for method='joint'"),
        (SCHEDULE, {"round_trip": 1}, TypeError, "round_trip must be a bool"),
        (SCHEDULE, {"rtol": -1.0}, ValueError, "rtol must be"),
        (SCHEDULE, {"sigma_min": -0.1}, ValueError, "sigma_min must be"),
        (SCHEDULE, {"cuda_graph": True}, ValueError, "cuda_graph=True needs"),
        (SCHEDULE, {"cuda_graph": True, "method": "stepwise"}, ValueError, "cuda_graph=True is for method='joint'"),
        (SCHEDULE, {"cuda_graph": True, "method": "naive"}, ValueError, "cuda_graph=True is for method='joint'"),
        (SCHEDULE, {"cuda_graph": 1, "method": "naive"}, TypeError, "cuda_graph must be a bool"),
    ],
)
def test_bad_options(schedule: NoiseSchedule, options: dict[str, Any], error: type[Exception], words: str) -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("the model was called")

    with pytest.raises(error, match=words):
        deqkern.invert(model, torch.zeros(1, *SHAPE), schedule, STEPS, **options)


@pytest.mark.parametrize(
    ("sample", "error"),
    [([1.0], TypeError), (torch.zeros(1, 3, 8, 8).int(), TypeError), (torch.full((1, 3), torch.nan), ValueError)],
)
def test_bad_samples(sample: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="sample must"):
        deqkern.invert(lambda x, t: x, sample, SCHEDULE, STEPS)


def test_pixels_that_were_not_scaled_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="sample has values up to 255") as caught:
        deqkern.invert(lambda x, t: 0 * x, torch.full((1, *SHAPE), 255.0), SCHEDULE, STEPS)
    assert len(caught) == 1 and caught[0].filename == __file__


def test_an_empty_batch() -> None:
    found = deqkern.invert(lambda x, t: x, torch.zeros(0, *SHAPE), SCHEDULE, STEPS)
    assert found.value.shape == (0, *SHAPE) and found.nfe.shape == (0,)


def test_what_all_samples_share_is_not_cut_when_some_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table with as many rows as samples are left."""
    monkeypatch.setattr(inversion, "JOINT_LIMIT", 1)
    shapes: set[torch.Size] = set()

    def model(x: Tensor, t: Tensor, table: Tensor, label: Tensor) -> Tensor:
        shapes.add(table.shape)
        return 0.3 * torch.tanh(x) + table[label].sum(1, keepdim=True)

    sample = torch.stack([torch.zeros(4), torch.full((4,), 0.01), torch.linspace(-3, 3, 4)])
    given = {"table": torch.tensor([[0.0, 0.0], [0.1, 0.2]]), "label": torch.tensor([0, 1, 1])}
    found = deqkern.invert(model, sample, SCHEDULE, 6, model_kwargs=given, round_trip=True)
    assert "samples continued step by step" in found.message and shapes == {torch.Size([2, 2])}
    assert found.round_trip is not None and found.round_trip[1:].max() <= 1e-3


@pytest.mark.parametrize("method", ["joint", "naive"])
def test_the_round_trip_is_that_of_the_value(method: str) -> None:
    network = torch.nn.Conv2d(3, 3, 3, padding=1, dtype=torch.bfloat16).requires_grad_(False)
    sample = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(1)).bfloat16()

    def model(x: Tensor, t: Tensor) -> Tensor:  # which takes no fp32
        return 0.2 * network(x)

    found = deqkern.invert(model, sample, SCHEDULE, 10, method=method, rtol=1e-3, round_trip=True)
    again = deqkern.sample(
        model, found.value, SCHEDULE, 10, sigma_min=inversion.SIGMA_MIN, solver=solvers.sequential(), rtol=0.0
    )
    assert found.value.dtype is torch.bfloat16 and found.round_trip is not None
    expected = (again.value.double() - sample.double()).flatten(1).norm(dim=1) / sample.double().flatten(1).norm(dim=1)
    torch.testing.assert_close(found.round_trip, expected)


@pytest.mark.parametrize("options", [{"gradient": "implicit"}, {"round_trip": True}, {"method": "optimize"}])
def test_an_empty_batch_has_nothing_to_differentiate_or_compare(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="sample must hold at least one sample"):
        deqkern.invert(lambda x, t: x, torch.zeros(0, *SHAPE), SCHEDULE, STEPS, **options)


@pytest.mark.parametrize("kind", ["weights", "autocast"])
def test_a_model_in_half_precision_is_inverted_to_its_own_rounding(kind: str) -> None:
    """No iteration takes that away, and none tries to: steps settle at it."""
    found = models.load("digits")
    noise = torch.randn(1, *found.shape, generator=torch.Generator().manual_seed(1))
    image = deqkern.sample(found.model, noise, found.schedule, 16, sigma_min=0.08, rtol=1e-3).value
    model = copy.deepcopy(found.model)
    if kind == "weights":
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        solution = deqkern.invert(model, image, found.schedule, 16, round_trip=True)
    assert solution.converged.all() and solution.iterations <= inversion.JOINT_LIMIT, solution.message
    assert solution.round_trip is not None and solution.round_trip.max() <= 5e-2
    exact = deqkern.invert(model.float(), image, found.schedule, 16)
    assert (relative_error(solution.value, exact.value) <= 0.1).all()


def test_stepwise_inversion_ends_where_no_step_settles_any_more() -> None:
    """After so many iterations on one step, and not after as many as all steps may take together."""
    calls = 0

    def model(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.sin(40 * x) + 0.1 * calls

    with pytest.warns(deqkern.ConvergenceWarning):
        found = deqkern.invert(model, torch.rand(2, *SHAPE), SCHEDULE, STEPS, method="stepwise", rtol=1e-6)
    assert inversion.STEP_LIMIT <= found.iterations <= 3 * inversion.STEP_LIMIT and not found.converged.any()
