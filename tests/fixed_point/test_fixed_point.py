"""`fixed_point` against known answers: what it returns, when it stops, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from asserts import relative_error
from cells import BATCH, SIZE, SOLVERS, WIDE, Cell, contraction
from torch import Tensor

import deqkern
from deqkern import solvers
from deqkern.engine.stopping import ROUNDINGS
from deqkern.fixed_point.state import Flattening
from deqkern.gradients import Implicit
from deqkern.slopes import Frozen, Gaussian, Secant
from deqkern.solvers import Solver


@pytest.mark.parametrize("dtype", [torch.float32, WIDE])
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: f"{solver.name}-{solver.history_size}-{solver.beta}")
def test_a_linear_map_has_its_closed_form(solver: Solver, dtype: torch.dtype) -> None:
    matrix, offset = contraction(SIZE, 0.8), torch.randn(BATCH, 2, SIZE, dtype=WIDE)
    expected = torch.linalg.solve(torch.eye(SIZE, dtype=WIDE) - matrix.T, offset[..., None])[..., 0]
    calls: list[Tensor] = []

    def f(z: Tensor) -> Tensor:
        calls.append(z)
        return z @ matrix.to(dtype) + offset.to(dtype)

    z0 = torch.randn(BATCH, 2, SIZE, dtype=dtype)
    solution = deqkern.fixed_point(f, z0, solver=solver, max_iterations=200, gradient=None)
    assert solution.converged.all() and relative_error(solution.value.double(), expected).max() <= 3e-4
    assert solution.value.dtype is dtype and solution.value.shape == z0.shape
    assert all(z.shape == z0.shape and z.dtype is dtype and not z.requires_grad for z in calls)
    assert len(calls) == solution.iterations == len(solution.history)
    assert solution.nfe.tolist() == [len(calls)] * BATCH and torch.equal(solution.nfe_history[-1], solution.nfe)
    assert solution.residual_history.shape == (len(calls), 1, BATCH)
    first = relative_error(z0.double() @ matrix + offset, z0.double())  # |f(z0) - z0| / |z0|
    torch.testing.assert_close(solution.residual_history[0, 0], first, rtol=1e-4, atol=0)
    assert solution.trajectory.shape == (2, *z0.shape) and torch.equal(solution.trajectory[0], z0)
    torch.testing.assert_close(solution.trajectory[1], solution.value, rtol=0, atol=0)
    assert (solution.error_estimate <= 1e-4).all() and (solution.residual <= 1e-3).all()


def test_known_roots() -> None:
    cosine = deqkern.fixed_point(torch.cos, torch.tensor([0.0, 1.0, -2.0], dtype=WIDE), rtol=1e-10)
    assert cosine.converged.all() and (cosine.value - 0.7390851332151607).abs().max() <= 1e-9
    cubic = deqkern.fixed_point(lambda z: (z**3 + 1) / 4, torch.zeros(2, 1, dtype=WIDE), rtol=1e-10)
    assert (cubic.value**3 - 4 * cubic.value + 1).abs().max() <= 1e-9


@hypothesis.settings(max_examples=40)
@hypothesis.given(
    size=st.integers(1, 40),
    batch=st.integers(1, 5),
    radius=st.floats(0.0, 0.95),
    history=st.integers(0, 8),
    seed=st.integers(0, 2**16),
    scale=st.floats(1e-3, 1e3),
)
def test_random_contractions(size: int, batch: int, radius: float, history: int, seed: int, scale: float) -> None:
    torch.manual_seed(seed)
    matrix, offset = contraction(size, radius), scale * torch.randn(batch, size, dtype=WIDE)
    expected = torch.linalg.solve(torch.eye(size, dtype=WIDE) - matrix.T, offset.T).T
    start = torch.randn(batch, size, dtype=WIDE)
    solution = deqkern.fixed_point(
        lambda z: z @ matrix + offset, start, solver=solvers.anderson(history), rtol=1e-6, max_iterations=2000
    )
    assert solution.converged.all()
    assert relative_error(solution.value, expected).max() <= 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("solver", SOLVERS[:2], ids=lambda solver: solver.name)
def test_half_precision_converges(solver: Solver, dtype: torch.dtype) -> None:
    matrix, offset = contraction(64, 0.9, torch.float32), torch.randn(BATCH, 64)
    seen = set()

    def f(z: Tensor) -> Tensor:
        seen.add(z.dtype)
        return torch.tanh(z @ matrix.to(z.dtype) + offset.to(z.dtype))

    exact = deqkern.fixed_point(f, torch.zeros(BATCH, 64), rtol=1e-6).value
    seen.clear()
    solution = deqkern.fixed_point(f, torch.zeros(BATCH, 64, dtype=dtype), solver=solver, max_iterations=100)
    assert seen == {dtype} and solution.value.dtype is dtype and solution.trajectory.dtype is torch.float32
    assert solution.converged.all()
    assert relative_error(solution.value.float(), exact).max() <= 5 * torch.finfo(dtype).eps


@pytest.mark.parametrize("kind", [tuple, list])
def test_a_tuple_is_one_state(kind: Any) -> None:
    matrix, offset = contraction(10, 0.8), torch.randn(BATCH, 10, dtype=WIDE)

    def f(state: Any) -> Any:
        assert type(state) is kind and all(part.is_contiguous() for part in state)
        first, second, third = state
        joined = torch.cat([first.view(BATCH, -1), second.double(), third[:, None]], 1) @ matrix + offset
        return [joined[:, :6].view(BATCH, 2, 3), joined[:, 6:9].float(), joined[:, 9]]

    z0 = kind([torch.zeros(BATCH, 2, 3, dtype=WIDE), torch.zeros(BATCH, 3), torch.zeros(BATCH, dtype=WIDE)])
    told: list[Any] = []
    solution = deqkern.fixed_point(f, z0, gradient=None, callback=lambda *event: told.append(event))
    expected = torch.linalg.solve(torch.eye(10, dtype=WIDE) - matrix.T, offset.T).T
    value: Any = solution.value
    assert type(value) is kind and [part.dtype for part in value] == [WIDE, torch.float32, WIDE]
    assert [part.shape for part in value] == [part.shape for part in z0]
    rows = torch.cat([part.reshape(BATCH, -1).double() for part in value], 1)
    assert solution.converged.all() and relative_error(rows, expected).max() <= 3e-4
    assert solution.trajectory.shape == (2, BATCH, 10)
    assert [event[0] for event in told] == list(range(1, solution.iterations + 1))
    assert type(told[-1][1]) is kind and torch.equal(told[-1][1][0], value[0])


@pytest.mark.parametrize(
    ("dtypes", "wide", "rounding"),
    [
        ((torch.float32,), torch.float32, ROUNDINGS * 2.0**-23),
        ((torch.float32, WIDE), WIDE, ROUNDINGS * 2.0**-52),
        ((torch.bfloat16,), torch.float32, 2.0**-7),
        ((torch.float16, WIDE), WIDE, 2.0**-10),
        ((torch.float16, torch.bfloat16, torch.float32), torch.float32, 2.0**-7),
    ],
)
def test_rows_are_as_wide_as_the_widest_part_and_no_better_than_the_narrowest(
    dtypes: tuple[torch.dtype, ...], wide: torch.dtype, rounding: float
) -> None:
    parts = tuple(torch.zeros(2, 3, dtype=dtype) for dtype in dtypes)
    flattening = Flattening.of(parts, "z0")
    assert (flattening.dtype, flattening.rounding) == (wide, rounding) and flattening.rows(parts).dtype is wide
    assert [part.dtype for part in flattening.state(flattening.rows(parts))] == list(dtypes)


@pytest.mark.parametrize("dtype", [torch.float32, WIDE])
def test_a_slow_sample_holds_nobody_back(dtype: torch.dtype) -> None:
    """What has converged stands still to the bit, at the accuracy asked for, and the map still sees all of it."""
    rates = torch.tensor([0.1, 0.5, 0.999, 0.3], dtype=dtype)[:, None]
    offset, seen = torch.randn(4, SIZE, dtype=dtype), []

    def f(z: Tensor) -> Tensor:
        seen.append(z)
        return rates * z + offset

    with pytest.warns(deqkern.ConvergenceWarning, match="3 of 4 samples converged in 30 iterations"):
        found = deqkern.fixed_point(
            f, torch.zeros(4, SIZE, dtype=dtype), solver=solvers.picard(), max_iterations=30, gradient=None
        )
    assert found.converged.tolist() == [True, True, False, True]
    done = [int((found.history[:, b] <= 1e-4).int().argmax()) + 1 for b in range(4)]
    assert done[0] < done[3] < done[1] < 20
    for b in (0, 1, 3):
        assert all(torch.equal(z[b], found.value[b]) for z in seen[done[b] :])
        assert not torch.equal(seen[done[b] - 1][b], found.value[b])
    alone = deqkern.fixed_point(lambda z: 0.5 * z + offset[1:2], torch.zeros(1, SIZE, dtype=dtype), rtol=1e-7)
    assert relative_error(found.value[1:2], alone.value).max() <= 2e-4


def test_rtol_0_goes_on_to_rounding() -> None:
    cell, x = Cell(), torch.randn(BATCH, 3, dtype=WIDE)
    solution = deqkern.fixed_point(lambda z: cell(z, x), torch.zeros(BATCH, SIZE, dtype=WIDE), rtol=0, gradient=None)
    assert solution.converged.all() and (solution.residual <= 1e-15).all()


def test_a_solution_that_is_the_start_takes_one_call() -> None:
    solution = deqkern.fixed_point(lambda z: 0.5 * z, torch.zeros(2, 3), gradient=None)
    assert solution.converged.all() and solution.iterations == 1 and not solution.value.any()
    assert not solution.residual.any() and not solution.residual_history.any()


@pytest.mark.parametrize("solver", SOLVERS[:2], ids=lambda solver: solver.name)
def test_divergence_is_flagged(solver: Solver) -> None:
    second = torch.tensor([False, True])[:, None]  # z = z + 1 + z^2 has no solution
    with pytest.warns(deqkern.ConvergenceWarning, match="1 of 2 samples converged in 40 iterations"):
        solution = deqkern.fixed_point(
            lambda z: torch.where(second, z + 1 + z.square(), 0.5 * torch.cos(z)),
            torch.full((2, 3), 0.2, dtype=WIDE),
            solver=solver,
            max_iterations=40,
        )
    assert solution.converged.tolist() == [True, False] and solution.error_estimate[1] > 1e-4


def test_growth_starts_again_from_z0() -> None:
    with pytest.warns(deqkern.ConvergenceWarning, match="1 diverged and continued with plain iteration"):
        solution = deqkern.fixed_point(
            lambda z: 20 * z + 1, torch.ones(1, 2), solver=solvers.picard(), max_iterations=4
        )
    assert torch.equal(solution.value, torch.ones(1, 2))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_names_f(bad: float) -> None:
    def f(z: Tensor) -> Tensor:
        return torch.where(torch.arange(3)[:, None] == 1, bad, 0.5 * z + 1)

    with pytest.raises(ValueError, match=r"^f returned NaN or infinity at iteration 1 \(sample 1\)$"):
        deqkern.fixed_point(f, torch.zeros(3, 2))


def cell(z: Tensor) -> Tensor:
    raise AssertionError("f was called")


class Pair(NamedTuple):
    """It could not be made again of a list of its parts."""

    first: Tensor
    second: Tensor


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"f": 3}, TypeError, "f must be callable"),
        ({"z0": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "z0 must be fp32"),
        ({"z0": torch.zeros(0, 3)}, ValueError, "z0 must have shape"),
        ({"z0": torch.zeros(())}, ValueError, "z0 must have shape"),
        ({"z0": torch.full((2, 3), math.nan)}, ValueError, "z0 must be finite"),
        ({"z0": [1.0, 2.0]}, TypeError, "z0 must be a tensor, or"),
        ({"z0": ()}, ValueError, "z0 is an empty tuple"),
        ({"z0": (torch.zeros(2, 3), torch.zeros(3, 2))}, ValueError, "z0 must hold tensors of one batch size"),
        ({"z0": (torch.zeros(2, 3), torch.zeros(2, 3, device="meta"))}, ValueError, "z0 must hold .* one device"),
        ({"z0": {"z": torch.zeros(2, 3)}}, TypeError, "z0 must be a tensor, or"),
        ({"z0": Pair(torch.zeros(2, 3), torch.zeros(2))}, TypeError, "z0 must be a tensor, or .*, got Pair"),
        ({"solver": "anderson"}, TypeError, "solver must be a Solver"),
        ({"solver": solvers.default()}, ValueError, "solver of a fixed point must have the slope"),
        ({"solver": Solver(slope=Secant())}, ValueError, "solver of a fixed point must have the slope"),
        ({"solver": Solver(slope=Gaussian())}, ValueError, "solver of a fixed point must have the slope"),
        ({"solver": Solver(slope=Frozen(1.0))}, ValueError, "solver of a fixed point must have the slope"),
        ({"solver": solvers.sequential()}, ValueError, "solver of a fixed point must have no window"),
        ({"rtol": -1.0}, ValueError, "rtol must be finite"),
        ({"rtol": math.nan}, ValueError, "rtol must be finite"),
        ({"rtol": "1e-3"}, TypeError, "rtol must be a number"),
        ({"max_iterations": 0}, ValueError, "max_iterations must be an int >= 1"),
        ({"max_iterations": None}, ValueError, "max_iterations must be an int >= 1"),
        ({"gradient": "exact"}, ValueError, "gradient must be None, one of 'implicit', 'phantom'"),
        ({"gradient": Implicit(solver=solvers.default())}, ValueError, "gradient.solver of a fixed point"),
        ({"callback": 1}, TypeError, "callback must be callable"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        deqkern.fixed_point(**({"f": cell, "z0": torch.zeros(2, 3)} | arguments))


@pytest.mark.parametrize(
    ("f", "z0", "kind", "words"),
    [
        (
            lambda z: z[:, :2],
            torch.zeros(2, 3),
            ValueError,
            r"f returned shape \(2, 2\) for an input of shape \(2, 3\)",
        ),
        (lambda z: (z, z), torch.zeros(2, 3), TypeError, "a tensor for a tensor, got tuple"),
        (lambda z: z[0], (torch.zeros(2, 3), torch.zeros(2)), TypeError, "tuple or list of 2 tensors, got Tensor"),
        (lambda z: (z[0],), (torch.zeros(2, 3), torch.zeros(2)), TypeError, "tuple or list of 2 tensors"),
        (lambda z: z > 0, torch.zeros(2, 3), TypeError, "f must return floating-point tensors, got torch.bool"),
        (lambda z: None, torch.zeros(2, 3), TypeError, "got NoneType"),
        (lambda z: z.to("meta"), torch.zeros(2, 3), ValueError, "a tensor on meta for an input on cpu"),
    ],
)
def test_a_map_that_returns_no_state(f: Any, z0: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        deqkern.fixed_point(f, z0)


def test_a_map_may_change_what_it_is_given() -> None:
    """In place: the state it is called with is its own."""
    offset = torch.randn(2, 3)
    one = deqkern.fixed_point(lambda z: z.mul_(0.5).add_(offset), torch.zeros(2, 3), gradient=None)
    two = deqkern.fixed_point(lambda z: 0.5 * z + offset, torch.zeros(2, 3), gradient=None)
    assert torch.equal(one.value, two.value)


def test_anderson_takes_fewer_calls_than_plain_iteration() -> None:
    matrix = contraction(30, 1.0)
    matrix = (matrix + matrix.T) * (0.49 / torch.linalg.eigvalsh(matrix + matrix.T).abs().max() * 2)
    offset = torch.randn(BATCH, 30, dtype=WIDE)
    counts = [
        deqkern.fixed_point(
            lambda z: z @ matrix + offset, torch.zeros_like(offset), solver=solver, rtol=1e-6, max_iterations=2000
        ).iterations
        for solver in (solvers.anderson(), replace(solvers.anderson(), ridge=0.0), solvers.picard())
    ]
    assert max(counts[:2]) <= counts[2] / 4, counts


def test_plain_iteration_converges_after_mixing_diverged() -> None:
    """In a notch at 1 the residual is smaller by more than a thousand than where mixing leaps to from there."""
    place = torch.tensor([-10.0, 0.0, 0.5, 0.7, 3.5, 5.0, 15.0], dtype=WIDE)
    height = torch.tensor([0.5, 0.5, 0.25, 0.5, 0.5, 0.0, -3.0], dtype=WIDE)

    def f(z: Tensor) -> Tensor:
        right = torch.searchsorted(place, z).clamp(1, len(place) - 1)
        part = (z - place[right - 1]) / (place[right] - place[right - 1])
        residual = torch.lerp(height[right - 1], height[right], part)
        return z + residual * (1 - (1 - 2e-4) * torch.exp(-(((z - 1) / 0.02) ** 2)))

    start = torch.zeros(1, 1, dtype=WIDE)
    seen: list[float] = []
    found = deqkern.fixed_point(
        f, start, solver=solvers.anderson(), rtol=1e-7, max_iterations=80, gradient=None,
        callback=lambda k, z, error: seen.append(float(z)),
    )  # fmt: skip
    plain = deqkern.fixed_point(f, start, solver=solvers.picard(), rtol=1e-7, max_iterations=80, gradient=None)
    assert "1 diverged and continued with plain iteration" in found.message and seen.count(0.0) == 1
    assert found.converged.all() and plain.converged.all()
    torch.testing.assert_close(found.value, plain.value, rtol=1e-6, atol=0)
