"""`plan`, on models whose time is made up: the clock moves only when they are called."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import save_tiny_model
from terminal import plain, run
from torch import Tensor

import deqkern
from deqkern import NoiseSchedule, problem, solvers
from deqkern.integrations.k_diffusion import sample_deq
from deqkern.network import latency
from deqkern.network.latency import Latencies
from deqkern.planning import plan

SCHEDULE = NoiseSchedule.linear()


@dataclass
class Timed:
    """A model that takes `cost(rows)` seconds of the fake clock."""

    cost: Callable[[int], float]
    calls: list[int] = field(default_factory=list)
    now: float = 0.0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        assert len(x) == len(t)
        self.calls.append(len(x))
        self.now += self.cost(len(x))
        return 0.5 * x


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], float]], Timed]:
    def build(cost: Callable[[int], float]) -> Timed:
        model = Timed(cost)
        monkeypatch.setattr(latency, "perf_counter", lambda: model.now)
        return model

    return build


def noise(batch: int = 1) -> Tensor:
    return torch.randn(batch, 1, 4, 4)


Build = Callable[[Callable[[int], float]], Timed]


@pytest.mark.parametrize(("eta", "iterations", "evaluations"), [(0.0, 9, 185), (1.0, 12, 265), (0.3, 12, 265)])
def test_a_device_that_one_sample_leaves_idle_pays(
    timed: Build, eta: float, iterations: int, evaluations: float
) -> None:
    found = plan(timed(lambda rows: 0.02), noise(), SCHEDULE, 50, eta=eta)
    assert found.pays
    assert found.sequential_seconds == pytest.approx(50 * 0.02)
    assert found.parallel_seconds == pytest.approx(iterations * 0.02)
    assert found.speedup == pytest.approx(50 / iterations)
    assert (found.solver, found.max_batch, found.out_of_memory) == (solvers.default(), None, None)
    assert (found.ways[0].iterations, found.ways[0].evaluations) == (iterations, pytest.approx(evaluations))
    assert found.message.startswith("Yes")
    assert f"{iterations} iterations and {evaluations:.0f} evaluations" in found.message
    assert "shipped models" in found.message


@pytest.mark.parametrize("batch", [1, 16])
def test_a_full_device_says_no_and_is_not_measured_further(timed: Build, batch: int) -> None:
    model = timed(lambda rows: 0.01 * rows)
    found = plan(model, noise(batch), SCHEDULE, 50)
    assert not found.pays
    assert found.sequential_seconds / found.ways[0].seconds == pytest.approx(50 / 185, rel=0.1)
    assert found.speedup < 0.5  # of the narrowest window
    assert (found.solver, found.max_batch) == (solvers.sequential(), None)
    assert list(found.latencies) == [batch, 2 * batch, 4 * batch]
    assert found.message.startswith("No")
    assert "sequential()" in found.message


def test_slow_sizes_that_do_not_follow_each_other_are_no_full_device(timed: Build) -> None:
    found = plan(timed(lambda rows: 0.01 if rows == 1 else 0.05 if rows < 8 else 0.25), noise(), SCHEDULE, 50)
    assert list(found.latencies) == [1, 2, 4, 8, 16, 32, 38]


@pytest.mark.parametrize(("factor", "sizes"), [(1.75, [1, 2, 4, 8, 15]), (1.85, [1, 2, 4])])
def test_twice_the_rows_for_almost_twice_the_time_is_a_full_device(
    timed: Build, factor: float, sizes: list[int]
) -> None:
    found = plan(timed(lambda rows: 0.01 * factor ** math.log2(rows)), noise(), SCHEDULE, 20)
    assert list(found.latencies) == sizes


@pytest.mark.parametrize("smallest", [[0.5, 4.0, 5.0, 4.0, 0.5, 7.0, 1.0, 2.0], [0.5, 2.0, 1.0, 4.0, 0.5, 7.0, 8.0, 9]])
def test_sizes_are_measured_after_a_warm_up_and_the_fastest_call_counts(timed: Build, smallest: list[float]) -> None:
    """The first of each four is the warm-up, here the fastest of all, and does not count."""
    seconds = iter(smallest[:4] + [0.5, 7.0, 1.0, 2.0] * 2 + smallest[4:])
    model = timed(lambda rows: next(seconds))
    found = plan(model, noise(2), SCHEDULE, 3, repeats=3)
    assert model.calls == [2] * 4 + [4] * 4 + [6] * 4 + [2] * 4  # the smallest once more
    assert found.latencies == {2: 1.0, 4: 1.0, 6: 1.0}


def test_the_smallest_size_is_measured_again_for_as_long_as_the_largest(timed: Build) -> None:
    model = timed(lambda rows: {1: 1.0, 2: 1.5, 4: 2.0, 6: 2.6}[rows])
    plan(model, noise(1), SCHEDULE, 8, repeats=2)
    assert model.calls == [1] * 3 + [2] * 3 + [4] * 3 + [6] * 3 + [1] * (1 + 6)  # 2 * 2.6, rounded up


def test_the_smallest_size_is_measured_again_for_no_longer_than_the_chain(timed: Build) -> None:
    model = timed(lambda rows: 1.0 if rows == 1 else 10.0)
    plan(model, noise(1), SCHEDULE, 3, repeats=2)
    assert model.calls == [1] * 3 + [2] * 3 + [3] * 3 + [1] * (1 + 2 * 3)


def test_time_that_others_took_does_not_count(timed: Build) -> None:
    """Two calls of three wait for a busy machine, of whatever size: the answer is that of an idle one."""
    quiet, calls = plan(timed(lambda rows: 0.01 * rows), noise(), SCHEDULE, 50), iter(range(1000))
    busy = plan(timed(lambda rows: 0.01 * rows + (0.0 if next(calls) % 4 == 2 else 0.1)), noise(), SCHEDULE, 50)
    assert not quiet.pays and quiet.solver == solvers.sequential()
    assert (busy.pays, busy.solver, busy.speedup) == (quiet.pays, quiet.solver, pytest.approx(quiet.speedup))
    assert busy.latencies == pytest.approx(quiet.latencies)


def test_time_is_linear_between_sizes(timed: Build) -> None:
    """With t = 1 + rows / 8 the sum over the iterations is known: iterations + evaluations / 8."""
    found = plan(timed(lambda rows: 1 + rows / 8), noise(), SCHEDULE, 50, iterations=10, evaluations=300)
    assert found.ways[0].seconds == pytest.approx(10 + 300 / 8, rel=0.02)
    assert found.sequential_seconds == pytest.approx(50 * (1 + 1 / 8))
    assert "as given" in found.message
    assert "as given" in plan(timed(lambda rows: 1.0), noise(), SCHEDULE, 50, evaluations=300).message


def test_time_beyond_and_below_what_was_measured() -> None:
    latencies = Latencies({8: 3.0, 4: 1.0})
    assert latencies.sizes == [4, 8]
    assert [latencies.of(rows, 8) for rows in (1, 4, 5, 8)] == [1.0, 1.0, 1.5, 3.0]
    assert latencies.of(18, 8) == 3.0 + 3.0 + 1.0 and latencies.of(12, 12) == 4.5


def effort(
    timed: Build, steps: int, eta: float, iterations: int | None, evaluations: float | None, **options: Any
) -> tuple[int, Any]:
    """Iterations, and evaluations per sample, that `plan` counts on for the default solver."""
    given: Any = {"eta": eta, "iterations": iterations, "evaluations": evaluations, "repeats": 1} | options
    way = plan(timed(lambda rows: 0.01), noise(), SCHEDULE, steps, **given).ways[0]
    return way.iterations, pytest.approx(way.evaluations)


def test_counts_are_those_that_can_be(timed: Build) -> None:
    assert effort(timed, 1, 0.0, None, None) == (1, 1)
    assert effort(timed, 9, 0.0, None, None) == (9, 9 * 4.3)
    assert effort(timed, 50, 0.0, 50, None) == (50, 50 * 50 * 3.7 / 9)
    assert effort(timed, 50, 0.0, 1, None) == (1, 38), "a window of three quarters of the steps, once"
    assert effort(timed, 50, 0.0, 18, None) == (18, 370)
    assert effort(timed, 42, 0.0, None, None)[1] == 42 * 4.3 and effort(timed, 43, 0.0, None, None)[1] == 43 * 3.7
    assert effort(timed, 50, 1.0, None, 400) == (12, 400)
    assert effort(timed, 50, 0.0, 9, 50) == (9, 50)
    assert effort(timed, 42, 0.0, 42, None, rtol=1e-7) == (42, sum(range(43)))


def test_a_tighter_tolerance_takes_more(timed: Build) -> None:
    """Per decade 1.5 iterations, and 0.8 evaluations per sample and step (docs/records/convergence.md)."""
    assert effort(timed, 50, 0.0, None, None, rtol=1e-4) == (12, 50 * (3.7 + 2 * 0.8))
    counts = [effort(timed, 50, 0.0, None, None, rtol=10**-exponent)[0] for exponent in (2.2, 2.5)]
    assert counts == [9, 10]
    assert effort(timed, 50, 1.0, None, None, rtol=0.5) == (12, 265)
    exact, tight = (effort(timed, 50, 0.0, None, None, rtol=rtol) for rtol in (0.0, 1e-7))
    assert exact[0] == tight[0]
    assert effort(timed, 50, 0.0, 9, 250, rtol=1e-4) == (9, 250)


def test_second_order_takes_an_iteration_more(timed: Build) -> None:
    assert effort(timed, 50, 0.0, None, None, order=2) == (10, 185 * 10 / 9)
    assert effort(timed, 50, 1.0, None, None, order=2) == (13, 265 * 13 / 12)
    assert effort(timed, 5, 0.0, None, None, order=2)[0] == 5
    assert effort(timed, 50, 0.0, 9, 250, order=2) == (9, 250)
    model = timed(lambda rows: 0.02)
    found = plan(model, noise(), SCHEDULE, 50, order=2)
    assert found.ways[0].iterations == 10 and found.speedup == pytest.approx(50 / 10)
    auto = deqkern.sample(model, noise(), SCHEDULE, 50, order=2, solver="auto")
    assert auto.plan is not None and auto.plan.ways[0].iterations == 10


def test_a_small_gain_is_none(timed: Build) -> None:
    found = plan(timed(lambda rows: 0.01), noise(), SCHEDULE, 50, iterations=48)
    assert 1 < found.speedup < 1.1
    assert (found.pays, found.solver) == (False, solvers.sequential())
    assert "Less than 1.1 times is not counted" in found.message


def test_one_step_has_nothing_to_gain(timed: Build) -> None:
    found = plan(timed(lambda rows: 0.01), noise(), SCHEDULE, 1)
    assert (found.speedup, found.pays, len(found.ways)) == (1, False, 1)


def test_a_window_where_more_rows_suddenly_cost(timed: Build) -> None:
    found = plan(timed(lambda rows: 0.01 if rows <= 8 else 1.0), noise(), SCHEDULE, 50)
    assert [way.window for way in found.ways] == [38, 25, 13, 7]
    assert [way.max_batch for way in found.ways] == [8, 8, 8, None]
    assert found.pays
    assert found.solver == solvers.default(window=13)
    assert "a window of 13 steps, max_batch 8" in found.message


@pytest.mark.parametrize(
    ("steps", "iterations", "evaluations", "ways"),
    [
        (10, 8, 20.0, [(8, 8, 20), (5, 9, 17.4), (3, 10, 13.8), (2, 10, 11.6)]),
        (50, 30, 60.0, [(38, 30, 60), (25, 33, 52.2), (13, 46, 50), (7, 50, 50)]),  # each step is evaluated once
        (4, 1, 4.0, [(3, 1, 3), (2, 1, 2)]),  # and no step more often than there are iterations
    ],
)
def test_narrower_windows_take_more_iterations_and_fewer_evaluations(
    timed: Build, steps: int, iterations: int, evaluations: float, ways: list[tuple[int, int, float]]
) -> None:
    found = plan(
        timed(lambda rows: 0.01), noise(), SCHEDULE, steps, iterations=iterations, evaluations=evaluations
    ).ways
    assert [(way.window, way.iterations) for way in found] == [way[:2] for way in ways]
    assert [way.evaluations for way in found] == pytest.approx([way[2] for way in ways])


def test_smaller_calls_where_larger_ones_are_slow(timed: Build) -> None:
    found = plan(timed(lambda rows: 0.01 * (1 if rows <= 16 else rows)), noise(), SCHEDULE, 50, eta=1)
    assert found.ways[0].max_batch == 16


def test_max_batch_bounds_every_call(timed: Build) -> None:
    model = timed(lambda rows: 0.01)
    found = plan(model, noise(2), SCHEDULE, 50, max_batch=12)
    assert (max(model.calls), found.max_batch) == (12, 12)
    assert list(found.latencies) == [2, 4, 8, 12]
    full = 185 * 2 / 12  # calls, if every one were full; the last one of each of the 9 iterations need not be
    assert full <= found.ways[0].seconds / 0.01 <= full + 9


def test_max_batch_below_the_batch_cuts_the_sequential_chain_too(timed: Build) -> None:
    found = plan(timed(lambda rows: 0.01), noise(8), SCHEDULE, 50, max_batch=3)
    assert found.latencies == {3: pytest.approx(0.01)}
    assert found.sequential_seconds == pytest.approx(50 * 3 * 0.01)
    assert found.max_batch == 3


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_is_a_limit(timed: Build, error: Exception) -> None:
    def cost(rows: int) -> float:
        if rows > 16:
            raise error
        return 0.01

    found = plan(timed(cost), noise(), SCHEDULE, 50)
    assert list(found.latencies) == [1, 2, 4, 8, 16]
    assert (found.out_of_memory, found.ways[0].max_batch, found.pays) == (32, 16, True)
    assert (found.solver, found.max_batch) == (solvers.default(window=13), None)
    assert "With 32 rows the memory was not enough" in found.message


@pytest.mark.parametrize("limit", [0, 8])
def test_other_errors_and_no_memory_at_all_are_raised(timed: Build, limit: int) -> None:
    def cost(rows: int) -> float:
        if rows > limit:
            raise RuntimeError("unrelated") if limit else torch.OutOfMemoryError("none")
        return 0.01

    with pytest.raises(RuntimeError, match="unrelated" if limit else "none"):
        plan(timed(cost), noise(), SCHEDULE, 50)


def test_the_message(timed: Build) -> None:
    found = plan(timed(lambda rows: 0.01), noise(), SCHEDULE, 1)
    assert found.message == (
        "No: parallel sampling does not pay here. 1 sequential steps of 1 sample take 0.01 s; a window of 1 step: "
        "0.01 s, 1.00 times as fast, with 1 iterations and 1 evaluations per sample (as the shipped models need at "
        "rtol 0.01, yours may differ). Use deqkern.solvers.sequential()."
    )
    found = plan(timed(lambda rows: 0.01 * (1 if rows <= 16 else rows)), noise(2), SCHEDULE, 50, max_batch=16)
    assert found.message == (
        "Yes: parallel sampling pays here. 50 sequential steps of 2 samples take 0.5 s; a window of 13 steps, "
        "max_batch 16: 0.22 s, 2.27 times as fast, with 14 iterations and 128 evaluations per sample (as the shipped "
        "models need at rtol 0.01, yours may differ). A call with 16 rows takes 0.01 s, 1 times that with 2. The "
        "solver's own work is not counted."
    )


def test_what_it_says_is_what_sample_takes(timed: Build) -> None:
    model = timed(lambda rows: 0.01)
    found = deqkern.plan(model, noise(2), SCHEDULE, 10, max_batch=4)
    assert isinstance(found, deqkern.Plan)
    solution = deqkern.sample(model, noise(2), SCHEDULE, 10, solver=found.solver, max_batch=found.max_batch)
    assert bool(solution.converged.all())


def test_auto_takes_the_default_solver_where_that_is_faster(timed: Build) -> None:
    model, first = timed(lambda rows: 0.02), noise(2)
    found = deqkern.sample(model, first, SCHEDULE, 20, solver="auto")
    assert found.plan is not None and found.plan.pays and found.plan.solver == solvers.default()
    expected = deqkern.sample(model, first, SCHEDULE, 20)
    assert expected.plan is None
    assert torch.equal(found.value, expected.value) and torch.equal(found.trajectory, expected.trajectory)
    assert found.iterations == expected.iterations < 20 and torch.equal(found.nfe, expected.nfe)


def test_auto_goes_step_by_step_where_parallel_does_not_pay(timed: Build) -> None:
    model, first = timed(lambda rows: 0.01 * rows), noise(2)
    found = deqkern.sample(model, first, SCHEDULE, 20, solver="auto", rtol=0.0)
    assert found.plan is not None and not found.plan.pays
    assert (found.iterations, found.nfe.tolist(), bool(found.converged.all())) == (20, [20, 20], True)
    assert torch.equal(found.value, deqkern.sample(model, first, SCHEDULE, 20, solver=solvers.sequential()).value)
    assert len(model.calls) > 2 * 20  # what measuring took is not in nfe


def test_auto_takes_the_window_and_the_max_batch_of_its_plan(timed: Build) -> None:
    for cost, window, max_batch in [
        (lambda rows: 0.01 if rows <= 8 else 1.0, 13, 8),
        (lambda rows: 0.01 * (1 if rows <= 16 else rows), 13, None),
        (lambda rows: 0.01 * (1 if rows <= 4 else rows), 13, 4),
    ]:
        model, first = timed(cost), noise()
        found = deqkern.sample(model, first, SCHEDULE, 50, solver="auto")
        chosen = found.plan
        assert chosen is not None and (chosen.solver.window, chosen.max_batch) == (window, max_batch)
        assert max(model.calls[-found.iterations :]) <= (max_batch or window)
        expected = deqkern.sample(model, first, SCHEDULE, 50, solver=chosen.solver, max_batch=chosen.max_batch)
        assert torch.equal(found.value, expected.value) and found.iterations == expected.iterations


def test_auto_measures_the_solve_that_was_asked_for(timed: Build) -> None:
    """With its arguments, its step noise drawn as ever, and a gradient."""
    timing, first = timed(lambda rows: 1 / 64), noise(2).requires_grad_()

    def model(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        assert len(text) == len(x)
        with torch.no_grad():
            timing(x, t)
        return 0.5 * x + text[:, None, None, None]

    def run(**options: Any) -> deqkern.Solution:
        return deqkern.sample(
            model, first, SCHEDULE, 50, eta=1.0, rtol=1e-4, gradient="exact", sigma_min=0.1,
            generator=torch.Generator().manual_seed(3), model_kwargs={"text": torch.tensor([1.0, 2.0])}, **options,
        )  # fmt: skip

    found = run(solver="auto", max_batch=60)
    assert found.plan is not None and found.plan.pays
    assert (max(timing.calls), found.plan.max_batch) == (60, 60)
    assert found.plan == plan(
        model, first, SCHEDULE, 50, eta=1.0, rtol=1e-4, max_batch=60, model_kwargs={"text": torch.tensor([1.0, 2.0])}
    )
    expected = run(solver=found.plan.solver, max_batch=60)
    assert torch.equal(found.value, expected.value)
    gradients = [torch.autograd.grad(solution.value.sum(), first)[0] for solution in (found, expected)]
    assert torch.equal(*gradients) and gradients[0].norm() > 0


def untouched(x: Tensor, t: Tensor) -> Tensor:
    raise AssertionError("called")


@pytest.mark.parametrize(
    ("call", "kind", "reason"),
    [
        (lambda: deqkern.sample(untouched, noise(), SCHEDULE, solver="fast"), TypeError, "solver must be .*'fast'"),
        (
            lambda: deqkern.sample(untouched, noise(), SCHEDULE, 50, solver="auto", max_iterations=49),
            ValueError,
            "max_iterations must be None or at least 50 with solver='auto'",
        ),
        (lambda: deqkern.sample(untouched, noise(0), SCHEDULE, solver="auto"), ValueError, "noise must hold at least"),
        (lambda: deqkern.invert(untouched, noise(), SCHEDULE, solver="auto"), TypeError, "solver must be .*'auto'"),
        (lambda: deqkern.fixed_point(untouched, noise(), solver="auto"), TypeError, "solver must be .*'auto'"),
        (
            lambda: sample_deq(untouched, noise(), torch.linspace(1, 0, 5), solver="auto"),
            TypeError,
            r"solver must be .*for deqkern.sample alone\), got 'auto'",
        ),
    ],
)
def test_auto_is_refused_where_it_does_not_fit(call: Callable[[], Any], kind: type[Exception], reason: str) -> None:
    with pytest.raises(kind, match=reason):
        call()


def test_auto_is_refused_with_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problem, "check_cuda_graph", lambda *arguments: None)  # which wants a GPU
    with pytest.raises(ValueError, match=r"cuda_graph=True needs .* solver='auto'"):
        deqkern.sample(untouched, noise(), SCHEDULE, solver="auto", cuda_graph=True)


def test_a_guided_model_and_per_sample_arguments() -> None:
    rows: list[tuple[int, int]] = []

    def model(x: Tensor, t: Tensor, text: Tensor, extra: Tensor) -> Tensor:
        assert len(text) == len(extra) == len(x)
        rows.append((len(x), len(t)))
        return 0.5 * x + text[:, None, None, None]

    cond, uncond = ({"text": torch.randn(2), "extra": torch.randn(2)} for _ in range(2))
    found = plan(deqkern.guided(model, 3.0, cond, uncond), noise(2), SCHEDULE, 4, max_batch=8, repeats=1)
    assert set(found.latencies) <= {2, 4, 6}
    assert rows[:4] == [(4, 4)] * 2 + [(8, 8)] * 2
    plain_model = plan(model, noise(2), SCHEDULE, 4, repeats=1, model_kwargs=cond)
    assert min(plain_model.latencies) == 2


def test_rows_are_the_first_steps_of_all_samples() -> None:
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def model(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        seen.append((x, t, label))
        return x

    example = noise(2)
    plan(model, example, SCHEDULE, 4, max_batch=6, repeats=1, model_kwargs={"label": torch.tensor([3, 5])})
    x, t, label = max(seen, key=lambda call: len(call[0]))
    assert torch.equal(x, example.repeat(3, 1, 1, 1)) and label.tolist() == [3, 5] * 3
    assert torch.equal(t, SCHEDULE.steps(4).timesteps[:3].repeat_interleave(2))


def test_the_model_and_the_random_state_stay_as_they_are() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 3, padding=1), torch.nn.Dropout())
    assert model.training
    called = []
    model.register_forward_hook(lambda *_: called.append(model.training))
    before, example = [p.clone() for p in model.parameters()], noise().requires_grad_()
    state = torch.get_rng_state()
    plan(lambda x, t: model(x), example, SCHEDULE, 4, repeats=1)
    assert all(called)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("changes", "kind", "reason"),
    [
        ({"model": 3}, TypeError, "model must be callable"),
        ({"example": 3}, TypeError, "example must be a tensor"),
        ({"example": torch.zeros(0, 1, 4, 4)}, ValueError, "example must hold at least one"),
        ({"example": torch.full((1, 4), torch.nan)}, ValueError, "example must be finite"),
        ({"schedule": "linear"}, TypeError, "schedule must be"),
        ({"num_inference_steps": 0}, ValueError, "num_inference_steps must"),
        ({"eta": -1.0}, ValueError, "eta must"),
        ({"order": 3}, ValueError, "order must"),
        ({"order": 2, "eta": 0.5}, ValueError, "eta must be 0 or 1"),
        ({"iterations": True}, ValueError, "iterations must"),
        ({"evaluations": True}, TypeError, "evaluations must be a number"),
        ({"repeats": True}, ValueError, "repeats must"),
        ({"iterations": 0}, ValueError, "iterations must"),
        ({"iterations": 51}, ValueError, "iterations must"),
        ({"iterations": 9.5}, ValueError, "iterations must"),
        ({"evaluations": 49}, ValueError, "evaluations must lie"),
        ({"evaluations": 451}, ValueError, "evaluations must lie"),
        ({"evaluations": float("nan")}, ValueError, "evaluations must lie"),
        ({"evaluations": "many"}, TypeError, "evaluations must be a number"),
        ({"model_kwargs": [1]}, TypeError, "model_kwargs must"),
        ({"max_batch": 0}, ValueError, "max_batch must"),
        ({"repeats": 0}, ValueError, "repeats must"),
        ({"repeats": 1.5}, ValueError, "repeats must"),
    ],
)
def test_bad_input_is_named_before_the_model_is_called(
    changes: dict[str, Any], kind: type[Exception], reason: str
) -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("called")

    arguments = {"model": model, "example": noise(), "schedule": SCHEDULE, "num_inference_steps": 50} | changes
    with pytest.raises(kind, match=reason):
        plan(**arguments)


def test_a_model_that_returns_another_shape_is_an_error() -> None:
    with pytest.raises(ValueError, match="model returned shape"):
        plan(lambda x, t: x[:, :, :2], noise(), SCHEDULE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny_model(path)
    return path


def test_the_command_prints_a_table_and_the_message(folder: Path) -> None:
    text = plain(run("plan", "--model", folder, "--steps", 10, "--batch", 2, "--repeats", 1).stdout)
    assert "tiny, 10 steps, batch 2, eta 0" in text
    assert "sequential" in text
    assert "10 sequential steps of 2 samples take" in text


def test_the_command_knows_the_order(folder: Path) -> None:
    options = ("plan", "--model", folder, "--steps", 20, "--repeats", 1, "--order", 2)
    report = json.loads(run(*options, "--json").stdout)
    assert (report["order"], report["ways"][0]["iterations"]) == (2, 10)
    assert "eta 0, DPM-Solver++ 2M," in plain(run(*options).stdout)


def test_the_command_prints_json(folder: Path) -> None:
    options = ("--model", folder, "--steps", 10, "--iterations", 4, "--evaluations", 30, "--max-batch", 6, "--json")
    report = json.loads(run("plan", *options).stdout)
    assert report["solver"] in ("default", "sequential")
    assert set(report["latencies"]) <= {"1", "2", "4", "6"}
    assert report["ways"][0] | {"seconds": 0, "max_batch": 0} == {
        "window": 8,
        "max_batch": 0,
        "iterations": 4,
        "evaluations": 30.0,
        "seconds": 0,
    }
    assert report["pays"] == (report["speedup"] >= 1.1)


def test_sampling_by_command_says_what_auto_chose(folder: Path, tmp_path: Path) -> None:
    options = (
        "sample",
        "--model",
        folder,
        "--steps",
        10,
        "--batch",
        2,
        "--solver",
        "auto",
        "--out",
        tmp_path / "a.png",
    )
    entry = json.loads(run(*options, "--json").stdout)["runs"][0]
    assert entry["solver"] == "auto" and entry["plan"]["solver"] in ("default", "sequential")
    assert (entry["iterations"] == 10) == (entry["plan"]["solver"] == "sequential")
    assert re.search(r"(Yes|No): parallel sampling", plain(run(*options).stdout))
    assert "--max-iterations" in plain(run(*options, "--max-iterations", 9, code=2).stderr)


@pytest.mark.parametrize("option", ["--steps", "--batch", "--iterations", "--evaluations", "--max-batch", "--repeats"])
def test_a_bad_option_of_the_command_is_named(folder: Path, option: str) -> None:
    assert option in plain(run("plan", "--model", folder, option, 0, code=2).stderr)
