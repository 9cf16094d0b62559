"""Slopes and solvers: limits, ranges, profiles on disk and between step counts, and refused options."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import problems
import pytest
import torch
from asserts import relative_error
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

import deqkern
from deqkern import NoiseSchedule, SlopeProfile, calibration, slopes, solvers
from deqkern.engine.trajectory import Traits, start
from deqkern.solvers.basis import Basis
from deqkern.solvers.slopes import slope_of
from deqkern.support import storage

SCHEDULE = NoiseSchedule.linear()
SHAPE = (1, 8, 8)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_slope_of_a_gaussian_is_its_derivative(kind: str) -> None:
    """The output of a Gaussian's denoiser is linear in x, so its slope is known for every prediction type."""
    table = NoiseSchedule.linear(prediction_type=kind).steps(20)
    variance = 0.3
    alpha, sigma = table.alpha, table.sigma
    x0 = alpha * variance / (alpha**2 * variance + sigma**2)  # d x0 / dx
    eps = (1 - alpha * x0) / sigma
    expected = {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0}[kind]
    shrinkage = slopes.Gaussian(variance).initial(table, Basis.spectral(SHAPE))
    torch.testing.assert_close(slope_of(table, shrinkage)[:, 0], expected)


def test_flow_slope_of_a_gaussian() -> None:
    table = NoiseSchedule.flow().steps(20)
    s, p = table.sigma, 0.3
    expected = (s - (1 - s) * p) / (s**2 + (1 - s) ** 2 * p)
    got = slope_of(table, slopes.Gaussian(p).initial(table, Basis.identity((3,))))[:, 0]
    torch.testing.assert_close(got[1:], expected[1:])  # at s = 1 the slope is never used


def test_secant_recovers_a_slope_keeps_what_was_not_measured_and_stays_in_range() -> None:
    low, high = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    moments = torch.tensor([[[[0.3, 1.0], [0.0, 0.0], [-2.0, 1.0], [5.0, 1.0]]]], dtype=torch.float64)
    slope = torch.full((1, 1, 4), 0.7)
    slopes.Secant(prior_weight=0.0).refine(slope, moments, low, high)
    torch.testing.assert_close(slope.flatten(), torch.tensor([0.3, 0.7, 0.0, 1.0]))
    slope = torch.full((1, 1, 4), 0.7)
    slopes.Secant(prior_weight=1.0).refine(slope, moments, low, high)
    assert slope[0, 0, 0].item() == pytest.approx(0.5)


def profile_of(variance: float, steps: int = 30) -> SlopeProfile:
    table, basis = SCHEDULE.steps(steps), Basis.spectral(SHAPE)
    shrinkage = slopes.Gaussian(variance).initial(table, basis)
    order = table.log_snr.argsort()
    return SlopeProfile(table.log_snr[order], shrinkage[order], SHAPE)


def test_profile_round_trip_and_interpolation(tmp_path: Path) -> None:
    profile = profile_of(0.3)
    strided = torch.cat([profile.log_snr[:, None], profile.shrinkage], 1)  # which a file does not take as they are
    profile = SlopeProfile(strided[:, 0], strided[:, 1:], SHAPE)
    profile.save(tmp_path / "profile.safetensors")
    loaded = SlopeProfile.load(tmp_path / "profile.safetensors")
    assert loaded.shape == SHAPE
    assert torch.equal(loaded.shrinkage, profile.shrinkage) and torch.equal(loaded.log_snr, profile.log_snr)
    table, basis = SCHEDULE.steps(77), Basis.spectral(SHAPE)
    exact = slopes.Gaussian(0.3).initial(table, basis)
    assert (loaded.initial(table, basis) - exact).abs().max() < 1e-5
    same = SCHEDULE.steps(30)
    torch.testing.assert_close(loaded.initial(same, basis), slopes.Gaussian(0.3).initial(same, basis))


def test_a_profile_is_constant_outside_of_its_levels_and_saved_in_any_layout(tmp_path: Path) -> None:
    whole = profile_of(0.3)
    middle = SlopeProfile(whole.log_snr[10:20], whole.shrinkage[10:20].T.contiguous().T, SHAPE)
    middle.save(tmp_path / "profile.safetensors")
    found = SlopeProfile.load(tmp_path / "profile.safetensors").initial(SCHEDULE.steps(50), Basis.spectral(SHAPE))
    torch.testing.assert_close(found[[0, -1]], middle.shrinkage[[0, -1]])


def test_a_profile_is_not_saved_where_a_file_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor in the place of a device, which a rename would take away."""
    profile = profile_of(0.3)
    os.mkfifo(tmp_path / "pipe")
    places = ((".", "is a folder"), ("no/file", "there is no folder"), ("pipe", "no regular file"))
    for place, words in places:
        for path in (tmp_path / place, str(tmp_path / place)):
            with pytest.raises(OSError, match=words):
                profile.save(path)
    assert (tmp_path / "pipe").is_fifo()
    for _ in range(2):  # over the first
        profile.save(str(tmp_path / "profile"))
        assert torch.equal(SlopeProfile.load(str(tmp_path / "profile")).log_snr, profile.log_snr)

    def full(*arguments: object) -> None:
        raise SafetensorError("no space left")

    monkeypatch.setattr(storage, "save_file", full)
    with pytest.raises(OSError, match="profile cannot be written: no space left"):
        profile.save(tmp_path / "profile")


def test_profile_refuses_other_files_and_other_shapes(tmp_path: Path) -> None:
    tensors = {"log_snr": torch.ones(1), "shrinkage": torch.ones(1, 1)}
    (tmp_path / "0").write_bytes(b"not safetensors")
    save_file(tensors, tmp_path / "1")
    save_file(tensors, tmp_path / "2", {"format": "another", "shape": "1"})
    for name in (*"012", "."):
        with pytest.raises(ValueError, match="does not hold a SlopeProfile"):
            SlopeProfile.load(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        SlopeProfile.load(tmp_path / "3")
    with pytest.raises(ValueError, match="profile was made for samples"):
        solver = solvers.default(profile=profile_of(0.3))
        deqkern.sample(problems.digits_density(SCHEDULE), torch.randn(1, 1, 4, 4), SCHEDULE, 10, solver=solver)
    with pytest.raises(ValueError, match=r"in 8 bands, got samples \(1, 8, 8\) in 1$"):
        profile_of(0.3).initial(SCHEDULE.steps(10), Basis.identity(SHAPE))


def test_calibrate_finds_the_slopes_of_a_gaussian_and_saves_iterations() -> None:
    model = problems.Gaussian(SCHEDULE, torch.zeros(64), torch.full((64,), 0.02))
    generator = torch.Generator().manual_seed(0)
    profile = deqkern.calibrate(model, SHAPE, SCHEDULE, 40, samples=1, generator=generator)
    table, basis = SCHEDULE.steps(40), Basis.spectral(SHAPE)
    exact = slopes.Gaussian(0.02).initial(table, basis)
    assert (profile.initial(table, basis) - exact)[1:].abs().max() < 1e-2
    noise = torch.randn(2, *SHAPE, generator=generator)
    plain = solvers.Solver(slopes.Secant(start=slopes.Gaussian()))
    before = deqkern.sample(model, noise, SCHEDULE, 50, solver=plain, rtol=1e-4)
    after = deqkern.sample(model, noise, SCHEDULE, 50, solver=solvers.default(profile, window=None), rtol=1e-4)
    assert after.iterations < before.iterations
    assert relative_error(after.value, problems.chain(model, noise, SCHEDULE, 50)).max() <= 3e-4


def test_calibrate_of_flow_matching_leaves_out_the_first_step() -> None:
    """There alpha = 0, and both slopes agree."""
    schedule = NoiseSchedule.flow()
    profile = deqkern.calibrate(lambda x, t: 0.3 * x.tanh(), (4,), schedule, 10, samples=1, etas=(0.0,))
    assert torch.equal(profile.log_snr, schedule.steps(10).log_snr[1:])
    assert profile.shrinkage.shape == (9, 1) and ((profile.shrinkage > 0) & (profile.shrinkage < 1)).all()


def test_calibrate_averages_over_what_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sample of each iteration counts the same at a step, however far it moved, but for those that stood still."""
    solves: list[dict[str, Any]] = []

    def sample(model: Any, noise: Tensor, schedule: Any, steps: int, *, solver: Any, **options: Any) -> None:
        assert noise.dtype is torch.bfloat16 and noise.shape == (2, *SHAPE) and noise.std() > 0.5
        moments = torch.ones(steps, 2, 3, 2, dtype=torch.float64)  # square 1 in each of three bands
        moments[:, :, 0, 0] = 0.9 * len(solves)
        moments[:, :, 2, 0] = 0.0
        moments[:, 1] *= 1000
        moments[0, 1] = 0.0
        solves.append(options)
        ends = torch.full((2, steps), 2.0, dtype=torch.float64).unbind()
        solver.slope.refine(torch.zeros(steps, 2, 3), moments, *ends)

    monkeypatch.setattr(calibration, "sample", sample)
    generator, given = torch.Generator(), {"label": torch.zeros(2)}
    profile = deqkern.calibrate(
        problems.digits_density(SCHEDULE), SHAPE, SCHEDULE, 10, generator=generator, dtype=torch.bfloat16,
        model_kwargs=given, max_batch=5,
    )  # fmt: skip
    expected = {"rtol": 1e-3, "generator": generator, "model_kwargs": given, "max_batch": 5}
    assert solves == [expected | {"eta": 0.0}, expected | {"eta": 1.0}]
    table = SCHEDULE.steps(10)
    assert torch.equal(profile.log_snr, table.log_snr)
    slope = torch.tensor([0.45, 1.0, 0.0], dtype=torch.float64)
    shrinkage = (slope / table.slope_1[:, None]).clamp_max(1)  # the output is epsilon: slope_0 is 0
    torch.testing.assert_close(profile.shrinkage, shrinkage, rtol=1e-9, atol=0)


def test_calibrate_refuses_bad_arguments() -> None:
    model = problems.digits_density(SCHEDULE)
    with pytest.raises(ValueError, match="samples"):
        deqkern.calibrate(model, SHAPE, SCHEDULE, samples=0)
    with pytest.raises(TypeError, match="generator must be"):
        deqkern.calibrate(model, SHAPE, SCHEDULE, generator=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="etas"):
        deqkern.calibrate(model, SHAPE, SCHEDULE, etas=())


BAD: list[dict[str, Any]] = [
    {"history_size": 17},
    {"history_size": -1},
    {"history_size": 2.0},
    {"scope": "all"},
    {"ridge": -1.0},
    {"ridge": float("nan")},
    {"ridge_absolute": float("inf")},
    {"beta": 0.0},
    {"beta": 1.5},
    {"window": 0},
    {"window": True},
    {"window": 1.0},
    {"window": 0.0},
    {"window": math.nan},
    {"history_size": True},
    {"ridge": "small"},
    {"beta": None},
    {"slope": "secant"},
    {"window": 3, "history_size": 2},
    {"basis": "fourier"},
    {"start": "zero"},
    {"history_size": 3, "slope": slopes.Secant()},
    {"beta": 0.5, "slope": slopes.Secant()},
]


@pytest.mark.parametrize("options", BAD, ids=[next(iter(options)) + str(i) for i, options in enumerate(BAD)])
def test_bad_solver_options_are_named(options: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{next(iter(options))} "):
        solvers.Solver(**{"slope": slopes.Frozen(), **options})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: solvers.default(profile=3), "profile must be a SlopeProfile"),  # type: ignore[arg-type]
        (lambda: slopes.Secant(start=slopes.Secant()), "start must be None or a slope that does not adapt"),  # type: ignore[arg-type]
        (lambda: slopes.Secant(prior_weight=-1.0), "prior_weight must be finite"),
        (lambda: slopes.Secant(prior_weight=float("inf")), "prior_weight must be finite"),
        (lambda: slopes.Gaussian(0.0), "variance must be finite and > 0"),
        (lambda: slopes.Frozen(float("nan")), "shrinkage must be finite"),
        (lambda: slopes.Secant(prior_weight="1"), "prior_weight must be a number"),  # type: ignore[arg-type]
        (lambda: slopes.Gaussian(None), "variance must be a number"),  # type: ignore[arg-type]
        (lambda: slopes.Frozen(True), "shrinkage must be a number"),
        (lambda: solvers.picard(window=True), "window must be None, an int >= 1, or a float"),
    ],
)
def test_bad_slopes_and_presets(make: Callable[[], object], words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        make()


def test_an_unknown_solver_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="memory"):
        solvers.Solver(slopes.Frozen(), memory=3)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("start", "mean", "count"),
    [(slopes.Gaussian(0.02), 0.0, 1), (slopes.Gaussian(0.02), 3.0, 2), (None, 0.0, 2), (None, 3.0, 3)],
)
@pytest.mark.parametrize("chain", ["eta 0", "eta 1", "order 2", "order 2, eta 1", "sample", "inversion"])
def test_iterations_on_a_gaussian_of_one_variance(chain: str, start: Any, mean: float, count: int) -> None:
    """Its slopes are the same in all bands, and constant. Where they are known one iteration solves the chain, and
    without a mean the initial guess already does. The first evaluation measures them where there is no mean, the second
    always.
    """
    exact = problems.Gaussian(SCHEDULE, torch.full((64,), mean), torch.full((64,), 0.02))
    assert SCHEDULE.alphas_cumprod is not None
    abar = SCHEDULE.alphas_cumprod.float().view(-1, 1, 1, 1)

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        eps = exact(x, t)
        return (x - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt() if chain == "sample" else eps

    options: dict[str, Any] = {"solver": solvers.Solver(slopes.Secant(start, prior_weight=0.0)), "rtol": 1e-3}
    noise = torch.randn(2, *SHAPE)
    if chain == "inversion":
        found = deqkern.invert(model, mean + 0.1 * noise, SCHEDULE, 50, **options)
    else:
        schedule = NoiseSchedule.linear(prediction_type="sample" if chain == "sample" else "epsilon")
        options |= {"eta": float("eta 1" in chain), "order": 2 if "order 2" in chain else 1}
        found = deqkern.sample(model, noise, schedule, 50, **options)
    assert found.iterations == count and (found.error_estimate <= 1e-4).all()


@pytest.mark.parametrize(
    ("basis", "shape", "bands"), [("spectral", (1, 8, 8), 8), ("identity", (1, 8, 8), 1), ("spectral", (8, 8), 1)]
)
def test_bands_of_a_solve(basis: str, shape: tuple[int, ...], bands: int) -> None:
    solver = solvers.Solver(slopes.Secant(), basis=basis)
    started = start(torch.randn(2, *shape), SCHEDULE.steps(5), solver, Traits())
    assert len(started.basis.bands) == bands + 1


@pytest.mark.parametrize("window", [1, 3, 10, 50])
def test_windows_reach_the_same_answer_with_no_more_rows_than_asked(window: int) -> None:
    model = problems.mixture(SCHEDULE, SHAPE, torch.Generator().manual_seed(3))
    noise = torch.randn(2, *SHAPE)
    solution = deqkern.sample(model, noise, SCHEDULE, 30, solver=solvers.picard(window=window), rtol=1e-4)
    assert solution.converged.all() and max(model.calls) <= 2 * window
    assert relative_error(solution.value, problems.chain(model, noise, SCHEDULE, 30)).max() <= 3e-4


def test_a_window_is_a_number_of_steps_or_a_share_of_them() -> None:
    widths = [(solvers.default(window=window).width(50), window) for window in (None, 7, 80, 0.75, 0.001)]
    assert widths == [(50, None), (7, 7), (50, 80), (38, 0.75), (1, 0.001)]
    assert [solvers.default().width(steps) for steps in (1, 2, 3, 4)] == [1, 2, 3, 3]
    model = problems.mixture(SCHEDULE, SHAPE, torch.Generator().manual_seed(3))
    deqkern.sample(model, torch.randn(2, *SHAPE), SCHEDULE, 30, solver=solvers.default(window=0.2))
    assert max(model.calls) == model.calls[0] == 2 * 6


@pytest.mark.parametrize("scope", ["row", "causal", "joint"])
@pytest.mark.parametrize("history_size", [1, 2, 16])
def test_mixing_of_every_scope_and_size_is_exact_when_asked(scope: str, history_size: int) -> None:
    model = problems.mixture(SCHEDULE, SHAPE, torch.Generator().manual_seed(3))
    noise = torch.randn(2, *SHAPE)
    solver = solvers.Solver(slopes.Gaussian(), history_size=history_size, scope=scope, beta=0.9)
    solution = deqkern.sample(model, noise, SCHEDULE, 20, solver=solver, rtol=0)
    assert relative_error(solution.value, problems.chain(model, noise, SCHEDULE, 20)).max() <= 1e-5


def test_anderson_beats_plain_iteration() -> None:
    model = problems.mixture(SCHEDULE, SHAPE, torch.Generator().manual_seed(3))
    noise = torch.randn(4, *SHAPE)
    plain = deqkern.sample(model, noise, SCHEDULE, 50, solver=solvers.picard(), rtol=1e-3)
    mixed = deqkern.sample(model, noise, SCHEDULE, 50, solver=solvers.parataa(), rtol=1e-3)
    assert mixed.iterations < plain.iterations


ONE = torch.ones(1, dtype=torch.float64)


@pytest.mark.parametrize(
    ("log_snr", "shrinkage", "error", "words"),
    [
        (ONE.float(), ONE[:, None], TypeError, "log_snr must be a float64 tensor"),
        ([1.0], ONE[:, None], TypeError, "log_snr must be a float64 tensor"),
        (ONE, ONE, ValueError, "must have shapes"),
        (ONE[:0], ONE[:0, None], ValueError, "must have shapes"),
        (torch.tensor([1.0, 0.0], dtype=torch.float64), ONE.expand(2, 1), ValueError, "log_snr must be finite and inc"),
        (torch.inf * ONE, ONE[:, None], ValueError, "log_snr must be finite and increase"),
        (ONE.expand(2), ONE.expand(2, 1), ValueError, "log_snr must be finite and increase"),
        (ONE, 2 * ONE[:, None], ValueError, "shrinkage must lie in"),
        (ONE, torch.nan * ONE[:, None], ValueError, "shrinkage must lie in"),
    ],
)
def test_bad_profiles(log_snr: Any, shrinkage: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        SlopeProfile(log_snr, shrinkage, (1,))


def test_a_profile_of_one_level_is_constant() -> None:
    profile = SlopeProfile(ONE, torch.tensor([[0.3]], dtype=torch.float64), (5,))
    found = profile.initial(SCHEDULE.steps(7), Basis.identity((5,)))
    assert found.shape == (7, 1) and (found == 0.3).all()


def test_calibration_in_the_dtype_that_a_function_takes() -> None:
    network = torch.nn.Linear(4, 4, dtype=torch.bfloat16)
    profile = deqkern.calibrate(lambda x, t: 0.2 * network(x), (4,), SCHEDULE, 10, dtype=torch.bfloat16, samples=1)
    assert profile.shape == (4,) and profile.shrinkage.isfinite().all()
