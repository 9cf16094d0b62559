"""Which steps are evaluated, what stands for the outputs of the others, and solves that leave steps out."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import problems
import pytest
import torch
from asserts import assert_close, relative_error
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import deqkern
from deqkern import NoiseSchedule, solvers
from deqkern.chain.step_table import StepTable
from deqkern.engine.selection import (
    APPROACH,
    LARGEST_MOVE,
    LEAST_MOVE,
    PATIENCE,
    Thinning,
    active,
    gaps,
    is_worth_thinning,
    relative_changes,
)
from deqkern.ops import reference
from deqkern.solvers.presets import Solver

SCHEDULE = NoiseSchedule.linear()
SHAPE = (3, 16, 16)
FLAT = torch.cat([torch.linspace(0.99, 0.5, 450), torch.full((300,), 0.4), torch.linspace(0.3, 0.01, 250)])
TABLES = {
    "DDIM": SCHEDULE.steps(40),
    "v": NoiseSchedule.cosine(prediction_type="v_prediction").steps(40),
    "x0": NoiseSchedule.scaled_linear(prediction_type="sample").steps(40),
    "chain with gaps": NoiseSchedule.linear(timestep_spacing="linspace").steps(33),
    "clipped": NoiseSchedule.linear(clip_sample=True).steps(40),
    "2M": SCHEDULE.steps(40, order=2),
    "flow": NoiseSchedule.flow().steps(40),
    "zero SNR": NoiseSchedule.linear(prediction_type="v_prediction", rescale_betas_zero_snr=True).steps(40),
    "one noise level": NoiseSchedule(FLAT).steps(40),
}


def thinning(steps: int = 50, share: float = 0.2, rtol: float = 1e-2) -> Thinning:
    return Thinning(SCHEDULE.steps(steps), share, rtol)


@given(st.data())
def test_the_ends_are_evaluated_and_no_gap_is_longer_than_it_may_be(data: st.DataObject) -> None:
    steps, batch = data.draw(st.integers(1, 120)), data.draw(st.integers(1, 3))
    thin = thinning(steps, share=data.draw(st.floats(0.0, 1.0)))
    begin = data.draw(st.lists(st.integers(0, steps), min_size=batch, max_size=batch))
    window = np.array([[first, data.draw(st.integers(first, steps))] for first in begin])
    moved = np.random.default_rng(3).random((steps, batch)) ** 4
    moved[np.random.default_rng(4).random((steps, batch)) < 0.1] = np.inf
    evaluated = thin.choose_steps(active(window, steps), moved)
    assert evaluated.shape == (steps, batch) and evaluated.dtype == bool
    for b, (first, end) in enumerate(window.tolist()):
        places = np.flatnonzero(evaluated[:, b]).tolist()
        if first == end:
            assert not places
            continue
        assert places[0] == first and places[-1] == end - 1
        for here, there in itertools.pairwise(places):
            move = min(float(moved[here, b]), LARGEST_MOVE)
            assert there - here <= max(1.0, thin.distance * move**0.5)
            assert there - here <= 1 + (here - first) / APPROACH


def test_steps_that_move_little_are_all_evaluated() -> None:
    opened, rtol = active(np.array([[0, 100], [3, 90]]), 100), 1e-3
    for move in (0.0, 0.9 * LEAST_MOVE * rtol, (2 / (0.2 * 100)) ** 2 * 0.99):
        evaluated = thinning(100, rtol=rtol).choose_steps(opened, np.full((100, 2), move))
        assert evaluated.sum(0).tolist() == [100, 87]
    evaluated = thinning(100).choose_steps(opened, np.full((100, 2), np.inf))
    assert np.flatnonzero(evaluated[:, 0]).tolist()[:8] == [0, 1, 2, 4, 7, 11, 17, 23]


def test_no_share_is_too_large() -> None:
    """Only what `APPROACH` allows is left out, and nothing where a state does not move."""
    moved = np.full((40, 1), np.inf)
    moved[[0, 9]] = 0.0
    for share in (1e3, 1e308):
        evaluated = thinning(40, share).choose_steps(active(np.array([[0, 40]]), 40), moved)
        assert np.flatnonzero(evaluated).tolist() == [0, 1, 2, 4, 7, 11, 17, 26, 39]


def test_each_sample_is_thinned_by_its_own_moves() -> None:
    """Beside one that has converged, and one that rests."""
    window, moved = np.array([[40, 40], [3, 30], [10, 20], [0, 40]]), np.full((40, 4), np.inf)
    moved[:, 1] = 0.0
    evaluated = thinning(40, 1e3).choose_steps(active(window, 40), moved)
    places = [np.flatnonzero(evaluated[:, b]).tolist() for b in range(4)]
    assert places == [[], list(range(3, 30)), [10, 11, 12, 14, 17, 19], [0, 1, 2, 4, 7, 11, 17, 26, 39]]


def test_a_short_chain_is_not_thinned() -> None:
    assert [is_worth_thinning(steps, 0.2) for steps in (1, 10, 31, 32, 1000)] == [False, False, False, True, True]
    assert not is_worth_thinning(1000, 0.0)
    model = problems.mixture(SCHEDULE, SHAPE, torch.Generator().manual_seed(3))
    for steps, whole in ((42, True), (43, False)):
        solution = deqkern.sample(model, torch.randn(1, *SHAPE), SCHEDULE, steps, solver=solvers.default(window=None))
        assert (int(solution.nfe_history[0]) == steps) is whole


def test_gaps_lie_between_the_evaluated_steps_of_their_sample() -> None:
    opened = active(np.array([[1, 9], [0, 4], [10, 10], [0, 4]]), 10)
    evaluated = np.zeros((10, 4), dtype=bool)
    evaluated[[1, 2, 5, 8], 0] = True
    evaluated[[0, 1, 2, 3], 1] = True
    evaluated[[0, 3], 3] = True
    first, rows = gaps(opened, evaluated)
    assert first.tolist() == [3, 10, 10, 1]
    places = [(1, 0, 3, 3), (2, 0, 3, 3), (3, 2, 5, 0), (4, 2, 5, 0), (6, 5, 8, 0), (7, 5, 8, 0)]
    assert rows.T.tolist() == [[4 * step + b for step in steps] for *steps, b in places]


def test_how_far_states_moved() -> None:
    """Where a step begins: the state after the step before it."""
    norms = np.array([[9.0, 4.0, 16.0], [9.0, 0.0, 0.0], [9.0, 1.0, 0.0], [9.0, np.nan, 1.0], [9.0, 0.0, 4.0], [0] * 3])
    with np.errstate(all="raise"):
        assert relative_changes(norms[:, None])[:, 0].tolist() == [0.0, 0.5, np.inf, np.inf, np.inf, 0.0]


def walked(table: StepTable, x: Tensor, clean: Tensor) -> tuple[Tensor, Tensor]:
    """The states (S+1, D) of the chain along which the model says that x0 is clean[i], and its outputs (S, D)."""
    keep, x0_gain, of_x, of_out = table.constant_x0()
    states = [x]
    for i in range(table.num_inference_steps):
        states.append(keep[i] * states[-1] + x0_gain[i] * clean[i])
    outputs = [(clean[i] - of_x[i] * states[i]) / of_out[i] for i in range(table.num_inference_steps)]
    return torch.stack(states), torch.stack(outputs)


@pytest.mark.parametrize("drift", [0.0, 1.0])
@pytest.mark.parametrize("name", TABLES)
def test_where_x0_is_linear_in_log_snr_nothing_is_lost(name: str, drift: float) -> None:
    """A chain whose x0 is constant, or linear in log-SNR between two steps, in float64; and a state off that chain."""
    table, left, right = TABLES[name], 11, 17
    clean = torch.randn(5, dtype=torch.float64) + drift * table.log_snr[:, None] * torch.randn(5, dtype=torch.float64)
    x, e = walked(table, torch.randn(5, dtype=torch.float64), clean)
    evaluated = np.ones((table.num_inference_steps, 1), dtype=bool)
    evaluated[left + 1 : right] = False
    _, rows = gaps(np.ones_like(evaluated), evaluated)
    x[14] += 1.0
    filled = e.clone()
    filled[left + 1 : right] = torch.nan
    slope = torch.randn(table.num_inference_steps, 1, 1, dtype=torch.float64)
    path = Thinning(table, 0.2, 1e-2).path
    reference.interpolate_outputs(
        x[:, None], slope, torch.tensor([0, 5]), torch.from_numpy(rows), path, filled[:, None]
    )
    expected = e.clone()
    expected[14] += slope[14, 0]
    assert_close(filled, expected, 1e-9)


def steps_seen(solution: deqkern.Solution) -> Tensor:
    """(iterations, S, B) bool: what was evaluated."""
    return ~solution.residual_history.isnan()


@pytest.mark.parametrize("order", [1, 2])
def test_fewer_evaluations_for_the_same_chain(order: int) -> None:
    model = problems.mixture(SCHEDULE, SHAPE, torch.Generator().manual_seed(3))
    noise = torch.randn(2, *SHAPE)
    chain = deqkern.sample(model, noise, SCHEDULE, 100, order=order, solver=solvers.sequential(), rtol=0)
    found = {}
    for share in (0.0, 0.2):
        model.calls.clear()
        solver = solvers.default(window=None, thinning=share)
        solution = found[share] = deqkern.sample(model, noise, SCHEDULE, 100, order=order, solver=solver, rtol=1e-3)
        assert solution.converged.all() and relative_error(solution.value, chain.value).max() <= 3e-3
        assert sum(model.calls) == int(solution.nfe.sum()) and model.calls == steps_seen(solution).sum((1, 2)).tolist()
    assert found[0.2].nfe.sum() <= 0.8 * found[0.0].nfe.sum()
    assert found[0.2].iterations <= found[0.0].iterations + 3  # here x0 turns from one mode to the other at once


def test_a_solve_ends_with_all_open_steps_evaluated() -> None:
    """Of each sample, at its stop: an error is estimated only where nothing is interpolated."""
    model = problems.mixture(SCHEDULE, SHAPE, torch.Generator().manual_seed(3))
    for rtol in (1e-1, 1e-2, 1e-3):
        solution = deqkern.sample(model, torch.randn(3, *SHAPE), SCHEDULE, 100, rtol=rtol)
        seen = steps_seen(solution)
        assert not seen[0].all(), "the first iteration leaves steps out"
        for b in range(3):
            last = int(seen[:, :, b].any(1).nonzero().max())
            first = int(seen[last, :, b].nonzero().min())
            assert seen[last, first:, b].all()
            partial = [k for k in range(last) if not seen[k, int(seen[k, :, b].nonzero().min()) :, b].all()]
            assert partial and solution.history[partial, b].isinf().all()


def test_a_model_that_is_not_smooth_in_time_is_thinned_for_so_many_iterations_only() -> None:
    """What is interpolated moves with the steps that are left out, by as much as keeps them left out."""
    direction = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    assert SCHEDULE.alphas_cumprod is not None
    abar = SCHEDULE.alphas_cumprod.float()

    def model(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = abar[t].sqrt().view(-1, 1, 1, 1), (1 - abar[t]).sqrt().view(-1, 1, 1, 1)
        clean = 0.6 * torch.tanh(3 * x * alpha / (alpha**2 + 0.3 * sigma**2))
        return (x - alpha * (clean + 0.5 * direction * torch.sin(0.3 * t).view(-1, 1, 1, 1))) / sigma

    solver = solvers.default(window=None)
    solution = deqkern.sample(model, torch.randn(2, *SHAPE), SCHEDULE, 100, solver=solver, rtol=1e-3)
    assert solution.converged.all() and solution.iterations <= PATIENCE + 14
    for k, b in itertools.product(range(solution.iterations), range(2)):
        seen = steps_seen(solution)[k, :, b]
        if seen.any():
            assert bool(seen[int(seen.int().argmax()) :].all()) is (k >= PATIENCE)


def test_the_residual_of_a_solve_that_was_cut_short_is_that_of_all_its_steps() -> None:
    model = problems.mixture(SCHEDULE, SHAPE, torch.Generator().manual_seed(3))
    for limit in (1, 2, 3):
        solver = solvers.default(window=None)
        with pytest.warns(deqkern.ConvergenceWarning):
            noise = torch.randn(2, *SHAPE)
            solution = deqkern.sample(model, noise, SCHEDULE, 100, max_iterations=limit, rtol=1e-3, solver=solver)
        seen = steps_seen(solution)[-1]
        assert not seen[limit:].all() and solution.error_estimate.isinf().all()
        begin = seen.int().argmax(0)  # the step that is exact now has no residual
        later = torch.where(torch.arange(100)[:, None] > begin, solution.residual_history[-1].nan_to_num(0.0), 0.0)
        assert (solution.residual >= later.amax(0)).all()


@pytest.mark.parametrize("solver", [solvers.default(), replace(solvers.default(), window=12)], ids=["all", "window"])
def test_exact_mode_is_the_sequential_chain(solver: Solver) -> None:
    model = problems.mixture(SCHEDULE, SHAPE, torch.Generator().manual_seed(3))
    noise = torch.randn(2, *SHAPE)
    chain = deqkern.sample(model, noise, SCHEDULE, 100, solver=solvers.sequential(), rtol=0)
    solution = deqkern.sample(model, noise, SCHEDULE, 100, solver=solver, rtol=0)
    assert not steps_seen(solution)[0, : solver.width(100)].all()
    assert relative_error(solution.value, chain.value).max() <= 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"eta": 1.0},
        {"solver": solvers.parataa()},
        {"solver": solvers.default(window=None, thinning=0)},
        {"guess": True},
    ],
    ids=["noise", "mixing", "thinning=0", "guess"],
)
def test_nothing_is_left_out_where_it_cannot_be(options: dict[str, Any]) -> None:
    model = problems.mixture(SCHEDULE, SHAPE, torch.Generator().manual_seed(3))
    noise = torch.randn(1, *SHAPE)
    options = {"solver": solvers.default(window=None)} | options
    if "guess" in options:
        options["guess"] = torch.randn(51, 1, *SHAPE)
    solution = deqkern.sample(model, noise, SCHEDULE, 50, rtol=1e-2, **options)
    assert solution.nfe_history[0].tolist() == [50]


def test_inversion_evaluates_all_steps() -> None:
    model = problems.gaussian(SCHEDULE, SHAPE, torch.Generator().manual_seed(3))
    found = deqkern.invert(model, torch.randn(1, *SHAPE), SCHEDULE, 50, rtol=1e-3, solver=solvers.default(window=None))
    assert found.nfe_history[0].tolist() == [50]


def test_a_sample_that_fell_back_is_thinned_no_more() -> None:
    calls = 0

    def model(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.sin(x) * (1e4 if calls == 3 else 1.0)

    noise = torch.randn(1, *SHAPE)
    with pytest.warns(deqkern.ConvergenceWarning):
        solver = solvers.default(window=None)
        solution = deqkern.sample(model, noise, SCHEDULE, 50, rtol=1e-6, max_iterations=8, solver=solver)
    assert "1 diverged" in solution.message
    seen = steps_seen(solution)[:, :, 0]
    assert not seen[0].all()
    for k in range(3, 8):
        assert seen[k, int(seen[k].nonzero().min()) :].all()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"thinning": "0.2"}, TypeError, "thinning"),
        ({"thinning": -0.1}, ValueError, "thinning must be finite and >= 0"),
        ({"thinning": float("nan")}, ValueError, "thinning must be finite and >= 0"),
        ({"thinning": float("inf")}, ValueError, "thinning must be finite and >= 0"),
        ({"thinning": 0.2, "start": "constant"}, ValueError, "thinning needs"),
        ({"thinning": 0.2, "history_size": 2, "slope": deqkern.slopes.Frozen()}, ValueError, "thinning needs"),
    ],
)
def test_bad_input(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Solver(**{"slope": deqkern.slopes.Secant()} | options)
