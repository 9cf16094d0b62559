from __future__ import annotations

import inputs
import pytest
import torch
from asserts import assert_close
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deqkern import ops

BACKENDS = inputs.backends("anderson_solve")
SCOPES = pytest.mark.parametrize("scope", ops.SCOPES)
HISTORIES = pytest.mark.parametrize("history", [1, 3, 5, 16])


def solve(
    backend: str,
    gram: Tensor,  # (S, B, m, m)
    rhs: Tensor,  # (S, B, m)
    scope: str = "row",
    ridge: float = 0.0,
    ridge_absolute: float = 0.0,
    window: Tensor | None = None,
) -> Tensor:
    """The answer (S, B, m); every step is active unless a window is given."""
    steps, batch, _ = rhs.shape
    window = torch.tensor([[0, steps]] * batch) if window is None else window
    gamma = torch.full(rhs.shape, torch.nan)
    arguments = {
        "gram": gram.contiguous(),
        "rhs": rhs.contiguous(),
        "window": window,
        "scope": scope,
        "ridge": ridge,
        "ridge_absolute": ridge_absolute,
        "implicit": False,
        "gamma": gamma,
    }
    inputs.run("anderson_solve", backend, arguments)
    return gamma


def least_squares(steps: int, batch: int, rows: int, history: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A history dG (S, B, rows, m), g (S, B, rows), and their gram and rhs."""
    factor = torch.randn(steps, batch, rows, history, dtype=torch.float64)
    right = torch.randn(steps, batch, rows, dtype=torch.float64)
    return factor, right, factor.mT @ factor, (factor.mT @ right[..., None])[..., 0]


@BACKENDS
@SCOPES
@HISTORIES
@pytest.mark.parametrize(("steps", "batch"), [(1, 1), (2, 3), (7, 5), (50, 3)])
@pytest.mark.parametrize("implicit", [False, True], ids=["explicit", "implicit"])
def test_equals_the_reference(backend: str, scope: str, history: int, steps: int, batch: int, implicit: bool) -> None:
    inputs.check("anderson_solve", inputs.anderson_solve(steps, batch, history, steps % 5, scope, implicit), backend)


@BACKENDS
@SCOPES
@pytest.mark.parametrize("history", range(1, 17))
def test_every_length_of_the_history(backend: str, scope: str, history: int) -> None:
    inputs.check("anderson_solve", inputs.anderson_solve(3, 2, history, scope=scope, implicit=True), backend)


@BACKENDS
@SCOPES
@pytest.mark.parametrize(("steps", "history"), [(31, 3), (32, 8), (33, 2), (48, 16), (300, 5), (300, 11)])
def test_long_chains(backend: str, scope: str, steps: int, history: int) -> None:
    """Longer than a block, some by one step; a few rows are not finite."""
    arguments = inputs.anderson_solve(steps, 3, history, steps % 5, scope)
    arguments["gram"][steps // 2, :, 0, 0] = torch.inf
    arguments["rhs"][steps - 2] = torch.nan
    inputs.check("anderson_solve", arguments, backend)


@BACKENDS
@SCOPES
@pytest.mark.parametrize("history", [1, 3, 5, 10, 16])
def test_nothing_beyond_the_arrays_is_read_or_written(backend: str, scope: str, history: int) -> None:
    """NaN before and after: a row that reads one would be left out."""
    arguments = inputs.anderson_solve(34, 3, history, scope=scope)
    expected = inputs.clone(arguments)
    inputs.run("anderson_solve", backend, expected)
    names = ("gram", "rhs", "gamma")
    held = {
        name: torch.full((arguments[name].numel() + 512,), torch.nan, dtype=arguments[name].dtype) for name in names
    }
    for name, memory in held.items():
        arguments[name] = memory[256:-256].view_as(arguments[name]).copy_(arguments[name])
    inputs.run("anderson_solve", backend, arguments)
    assert torch.equal(arguments["gamma"], expected["gamma"])
    for memory in held.values():
        assert memory[:256].isnan().all() and memory[-256:].isnan().all()


@BACKENDS
@SCOPES
def test_windows_that_reach_beyond_the_chain(backend: str, scope: str) -> None:
    if backend == "reference":
        pytest.skip("takes a first step that is not there for no first step")
    arguments = inputs.anderson_solve(6, 3, 3, scope=scope, implicit=True)
    *_, arguments["gram"], arguments["rhs"] = least_squares(6, 3, 9, 3)
    inside = inputs.clone(arguments) | {"window": torch.tensor([[0, 6], [2, 6], [6, 6]])}
    arguments["window"] = torch.tensor([[-4, 9], [2, 2**62], [2**62, 2**62]])
    for one in (arguments, inside):
        inputs.run("anderson_solve", backend, one)
    assert torch.equal(arguments["gamma"], inside["gamma"])


@BACKENDS
@SCOPES
@pytest.mark.parametrize(("ridge", "absolute"), [(0.0, 0.0), (1e-2, 0.0), (0.0, 3.0), (0.5, 0.5), (0.0, 1e30)])
def test_ridges(backend: str, scope: str, ridge: float, absolute: float) -> None:
    arguments = inputs.anderson_solve(7, 5, 4, scope=scope) | {"ridge": ridge, "ridge_absolute": absolute}
    inputs.check("anderson_solve", arguments, backend)


@BACKENDS
@SCOPES
def test_a_ridge_counts_only_the_history_that_exists(backend: str, scope: str) -> None:
    """Ages that hold nothing yet (zero rows and columns) change nothing, and get zero."""
    *_, gram, rhs = least_squares(4, 2, 9, 2)
    padded, right = torch.zeros(4, 2, 5, 5, dtype=torch.float64), torch.zeros(4, 2, 5, dtype=torch.float64)
    padded[..., :2, :2], right[..., :2] = gram, rhs
    gamma = solve(backend, padded, right, scope, ridge=0.1)
    assert_close(gamma[..., :2], solve(backend, gram, rhs, scope, ridge=0.1))
    assert not gamma[..., 2:].any()


@BACKENDS
@SCOPES
@pytest.mark.parametrize("scale", [1e-300, 1e-150, 1e-30, 1e30, 1e150, 1e300])
def test_huge_and_tiny_samples(backend: str, scope: str, scale: float) -> None:
    """A sample's scale cancels, and does not reach the other samples."""
    arguments = inputs.anderson_solve(6, 3, 4, scope=scope) | {"window": torch.tensor([[0, 6]] * 3)}
    *_, arguments["gram"], arguments["rhs"] = least_squares(6, 3, 12, 4)
    plain = solve(backend, arguments["gram"], arguments["rhs"], scope, 1e-6)
    factor = torch.tensor([1.0, scale, 1.0], dtype=torch.float64)[:, None]
    scaled = solve(backend, arguments["gram"] * factor[..., None], arguments["rhs"] * factor, scope, 1e-6)
    assert_close(scaled, plain)


@BACKENDS
def test_rows_of_very_different_scale(backend: str) -> None:
    """With the scope `row` each step stands alone: late steps of a converging chain are far smaller than early ones."""
    *_, gram, rhs = least_squares(6, 2, 12, 4)
    scale = 10.0 ** (-20.0 * torch.arange(6, dtype=torch.float64))[:, None, None]
    assert_close(
        solve(backend, gram * scale[..., None], rhs * scale, ridge=1e-6), solve(backend, gram, rhs, ridge=1e-6)
    )


@BACKENDS
@SCOPES
def test_rows_that_are_not_finite_are_left_out(backend: str, scope: str) -> None:
    arguments = inputs.anderson_solve(8, 4, 3, scope=scope) | {"window": torch.tensor([[0, 8]] * 4)}
    *_, arguments["gram"], arguments["rhs"] = least_squares(8, 4, 9, 3)
    arguments["gram"][2, 0, 1, 2] = torch.nan
    arguments["gram"][3, 1, 0, 0] = torch.inf
    arguments["rhs"][4, 2, 1] = -torch.inf
    arguments["rhs"][5, 2, 0] = torch.nan
    inputs.check("anderson_solve", arguments, backend)
    zeroed = arguments | {"gamma": torch.full((8, 4, 3), torch.nan)}
    finite = arguments["gram"].isfinite().all(-1).all(-1) & arguments["rhs"].isfinite().all(-1)
    zeroed["gram"] = torch.where(finite[..., None, None], arguments["gram"], 0.0)
    zeroed["rhs"] = torch.where(finite[..., None], arguments["rhs"], 0.0)
    inputs.run("anderson_solve", backend, zeroed)
    assert torch.equal(arguments["gamma"], zeroed["gamma"])
    assert torch.equal(arguments["gamma"][:, 3] != 0, torch.arange(8)[:, None].expand(8, 3) > 0)


@BACKENDS
@SCOPES
def test_nothing_but_what_is_not_finite(backend: str, scope: str) -> None:
    gram = torch.full((3, 2, 4, 4), torch.nan, dtype=torch.float64)
    assert not solve(backend, gram, gram[..., 0].contiguous(), scope, 1e-6).any()


@BACKENDS
@SCOPES
@pytest.mark.parametrize("ridge", [0.0, 1e-6])
def test_zero_systems(backend: str, scope: str, ridge: float) -> None:
    gram, rhs = torch.zeros(3, 2, 4, 4, dtype=torch.float64), torch.zeros(3, 2, 4, dtype=torch.float64)
    assert torch.equal(solve(backend, gram, rhs, scope, ridge), torch.zeros(3, 2, 4))
    assert torch.equal(solve(backend, gram, torch.ones_like(rhs), scope, ridge), torch.zeros(3, 2, 4))


@BACKENDS
@SCOPES
@HISTORIES
def test_duplicate_history_gives_the_minimum_norm_answer(backend: str, scope: str, history: int) -> None:
    factor, right, _, _ = least_squares(5, 2, 40, history)
    twice = torch.cat([factor, factor[..., : 16 - history]], -1) if history > 8 else torch.cat([factor, factor], -1)
    gram, rhs = twice.mT @ twice, (twice.mT @ right[..., None])[..., 0]
    gamma = solve(backend, gram, rhs, scope)
    if scope == "row":
        expected = torch.linalg.lstsq(twice, right[..., None], driver="gelsd").solution[..., 0]
        assert_close(gamma[1:], expected[1:], 1e-5)
    half = twice.shape[-1] - history
    assert_close(gamma[..., :half], gamma[..., history:], 1e-4)


@BACKENDS
def test_an_indefinite_matrix_keeps_its_positive_part(backend: str) -> None:
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    values = torch.tensor([3.0, 1.0, 0.5, -0.7, -2.0], dtype=torch.float64)
    rhs = torch.randn(2, 1, 5, dtype=torch.float64)
    gram = ((rotation * values) @ rotation.mT).expand(2, 1, 5, 5)
    expected = rotation[:, :3] @ ((rotation[:, :3].mT @ rhs[1, 0]) / values[:3])
    assert_close(solve(backend, gram, rhs)[1, 0], expected)


@BACKENDS
@SCOPES
@pytest.mark.parametrize("first", range(5))
def test_first_active_step_and_inactive_rows_get_zero(backend: str, scope: str, first: int) -> None:
    arguments = inputs.anderson_solve(6, 5, 3, first, scope)
    inputs.run("anderson_solve", backend, arguments)
    index = torch.arange(6)[:, None]
    free = (index > arguments["window"][:, 0]) & (index < arguments["window"][:, 1])
    assert torch.equal(arguments["gamma"].abs().amax(-1) > 0, free)


# Magnitudes at both ends of what double holds, signs, zeros, infinities and NaN.
WILD = st.one_of(
    st.floats(width=64, allow_subnormal=False),
    st.sampled_from([0.0, 1.0, -1.0, 1e300, -1e300, 1e-300, 1e154, float("nan"), float("inf")]),
)


@BACKENDS
@given(data=st.data(), scope=st.sampled_from(ops.SCOPES), steps=st.integers(2, 4), history=st.integers(1, 4))
def test_never_nan_and_never_infinite(backend: str, data: st.DataObject, scope: str, steps: int, history: int) -> None:
    cells = steps * history * (history + 1)
    values = torch.tensor(data.draw(st.lists(WILD, min_size=cells, max_size=cells)), dtype=torch.float64)
    gram, rhs = values.view(steps, 1, history, history + 1).split([history, 1], -1)
    ridge, absolute = data.draw(st.sampled_from([(0.0, 0.0), (1e-8, 0.0), (0.0, 1e-300), (1.0, 1e300)]))
    gram = torch.where(torch.ones(history, history).tril().bool(), gram, gram.mT)
    gamma = solve(backend, gram, rhs[..., 0], scope, ridge, absolute)
    assert gamma.isfinite().all(), (gram, rhs, gamma)


@BACKENDS
@given(
    seed=st.integers(0, 2**32),
    history=st.integers(1, 16),
    extra=st.integers(0, 8),
    ridge=st.sampled_from([0.0, 1e-8, 1e-3]),
)
def test_the_normal_equations_hold(backend: str, seed: int, history: int, extra: int, ridge: float) -> None:
    """At the least-squares answer no direction of the history is left in the residual."""
    torch.manual_seed(seed)
    factor, right, gram, rhs = least_squares(3, 2, history + 8 + extra, history)
    gamma = solve(backend, gram, rhs, ridge=ridge)[1:].double()
    shift = ridge * gram.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)[1:]
    residual = right[1:] - (factor[1:] @ gamma[..., None])[..., 0]
    gradient = (factor[1:].mT @ residual[..., None])[..., 0] - shift * gamma
    size = factor[1:].square().sum((-2, -1)).sqrt() * right[1:].norm(dim=-1)
    assert (gradient.norm(dim=-1) <= 1e-5 * size).all()


@BACKENDS
@given(
    seed=st.integers(0, 2**32),
    history=st.integers(1, 8),
    power=st.integers(-900, 900),
    scope=st.sampled_from(ops.SCOPES),
)
def test_powers_of_two_cancel(backend: str, seed: int, history: int, power: int, scope: str) -> None:
    torch.manual_seed(seed)
    *_, gram, rhs = least_squares(4, 1, 2 * history + 4, history)
    scaled = solve(backend, gram * 2.0**power, rhs * 2.0**power, scope, 1e-8)
    assert_close(scaled, solve(backend, gram, rhs, scope, 1e-8), 1e-6)


@BACKENDS
@pytest.mark.parametrize("exponent", [-310, -320])
def test_subnormal_systems_stay_finite(backend: str, exponent: int) -> None:
    *_, gram, rhs = least_squares(3, 1, 9, 3)
    assert solve(backend, gram * 10.0**exponent, rhs * 10.0**exponent).isfinite().all()


@BACKENDS
def test_a_ridge_far_beyond_the_system_leaves_nothing(backend: str) -> None:
    gram = 2.0**-900 * torch.eye(2, dtype=torch.float64).expand(3, 1, 2, 2)
    assert not solve(backend, gram, gram[..., 0], "row", ridge_absolute=1e300).any()


@BACKENDS
@pytest.mark.parametrize(
    ("diagonal", "ridge", "expected"),
    [
        ((1.0, 1e-13), 0.0, [1.0, 0.0]),  # rounding beside the other
        ((1e-13, 1.0), 0.0, [0.0, 1.0]),
        ((-1.0, 1e-13), 0.0, [0.0, 0.0]),
        ((1.0, 1e-11), 0.0, [1.0, 1e11]),
        ((1.0, 0.0), 0.5, [1 / 1.5, 2.0]),
    ],
)
def test_which_diagonals_count(
    backend: str, diagonal: tuple[float, float], ridge: float, expected: list[float]
) -> None:
    gram = torch.diag(torch.tensor(diagonal, dtype=torch.float64)).expand(2, 1, 2, 2)
    rhs = torch.ones(2, 1, 2, dtype=torch.float64)
    found = solve(backend, gram, rhs, "row", ridge_absolute=ridge)[1, 0]
    assert found.tolist() == pytest.approx(expected, rel=1e-4)


@BACKENDS
@pytest.mark.parametrize("scope", ["joint", "causal"])
def test_huge_rows_beside_one_that_is_not_finite(backend: str, scope: str) -> None:
    gram = 1.5e308 * torch.eye(2, dtype=torch.float64).repeat(4, 1, 1, 1)
    rhs = 0.75e308 * torch.ones(4, 1, 2, dtype=torch.float64)
    gram[1] = torch.inf
    assert_close(solve(backend, gram, rhs, scope)[2:], torch.full((2, 1, 2), 0.5))


@BACKENDS
def test_a_singular_system_changes_none_beside_it(backend: str) -> None:
    """Bit for bit, though the lanes of a warp go the same way: what solves that one is less exact."""
    *_, gram, rhs = least_squares(9, 1, 9, 3)
    length = torch.tensor([1.0, 1e-2, 3e-5], dtype=torch.float64)
    gram, rhs = gram * length * length[:, None], rhs * length
    expected = solve(backend, gram, rhs, "row")
    gram[4], rhs[4] = 1.0, 1.0
    found = solve(backend, gram, rhs, "row")
    assert_close(found[4], torch.full((1, 3), 1 / 3))
    others = torch.arange(9) != 4
    assert torch.equal(found[others], expected[others])


@BACKENDS
@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_a_diagonal_of_zeros_leaves_the_positive_part(backend: str, ridge: float) -> None:
    gram = torch.tensor([[0.0, 2.0], [2.0, 0.0]], dtype=torch.float64).expand(2, 1, 2, 2)
    rhs = torch.tensor([3.0, 1.0], dtype=torch.float64).expand(2, 1, 2)
    assert_close(solve(backend, gram, rhs, "row", ridge)[1], torch.ones(1, 2))


@BACKENDS
@pytest.mark.parametrize("power", [-1000, -1030])
def test_subnormal_systems_have_their_answer(backend: str, power: int) -> None:
    gram = 2.0**power * torch.diag(torch.tensor([1.0, 4.0], dtype=torch.float64)).expand(2, 1, 2, 2)
    rhs = 2.0**power * torch.tensor([0.5, 6.0], dtype=torch.float64).expand(2, 1, 2)
    assert solve(backend, gram, rhs, "row")[1].tolist() == [[0.5, 1.5]]


@BACKENDS
def test_answers_beyond_float32_stay_finite(backend: str) -> None:
    gram = 1e-30 * torch.eye(2, dtype=torch.float64).expand(3, 1, 2, 2)
    rhs = torch.tensor([1e30, 1e-30], dtype=torch.float64).expand(3, 1, 2)
    assert solve(backend, gram, rhs).isfinite().all()
