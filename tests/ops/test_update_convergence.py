from __future__ import annotations

from typing import Any

import inputs
import pytest
import torch
from aot import Case
from asserts import assert_close
from torch import Tensor

from deqkern.ops.state import INITIAL_CONVERGENCE

BACKENDS = inputs.backends("update_convergence")
COMPILED = [
    Case("update_convergence_kernel", {"IMPLICIT": False, "BLOCK": 64}, 1),
    Case("update_convergence_kernel", {"IMPLICIT": True, "BLOCK": 256, "first_interpolated": None}, 1),
]
INF = float("inf")
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in divide")  # numpy, where Triton is interpreted


@BACKENDS
@pytest.mark.parametrize("implicit", [False, True], ids=["explicit", "implicit"])
@pytest.mark.parametrize("rtol", [0.0, 1e-2])
@pytest.mark.parametrize(("steps", "batch"), [(1, 1), (1, 7), (2, 5), (7, 5), (50, 9), (1000, 3)])
def test_equals_the_reference(backend: str, steps: int, batch: int, implicit: bool, rtol: float) -> None:
    for first in inputs.some(range(5), backend):
        for gaps in (False, True):
            inputs.check(
                "update_convergence", inputs.update_convergence(steps, batch, first, implicit, rtol, gaps), backend
            )


def sample(
    residual: list[float],
    correction: list[float],
    state: list[float],
    *,
    convergence: tuple[float, ...] = INITIAL_CONVERGENCE,
    window: tuple[int, int] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """One sample from the norms themselves, not squared."""
    norms = torch.tensor([residual, correction, state], dtype=torch.float64).square().T[:, None].contiguous()
    steps = len(residual)
    return {
        "norms": norms,
        "scale": torch.ones(1, dtype=torch.float64),
        "first_interpolated": None,
        "tolerance": torch.full((steps,), 1e-3, dtype=torch.float64),
        "rtol": 1e-2,
        "best_contraction": 0.1,
        "growth": 1e3,
        "window_size": steps,
        "implicit": False,
        "convergence": torch.tensor([convergence], dtype=torch.float64),
        "window": torch.tensor([window or (0, steps)]),
        "diverged": torch.tensor([9]),
    } | options


def reached(backend: str, arguments: dict[str, Any]) -> tuple[Tensor, list[int], bool]:
    """The convergence (5,), the window and whether it diverged."""
    inputs.run("update_convergence", backend, arguments)
    return arguments["convergence"][0], arguments["window"][0].tolist(), bool(arguments["diverged"])


@BACKENDS
def test_what_is_left_follows_from_the_mean_contraction(backend: str) -> None:
    arguments = sample([1.0, 0.02, 0.01], [0.1, 0.2, 0.08], [1.0, 2.0, 0.4], convergence=(0.5, 0.8, 0.64, 1.0, INF))
    errors, window, diverged = reached(backend, arguments)
    change, ratio = 0.2, 0.2 / 0.8  # the second state is larger than the noise, so the noise is its scale
    left = change * 0.4 / (1 - 0.4**2)
    assert_close(errors, torch.tensor([left, change, ratio, 0.08, 0.025], dtype=torch.float64))
    assert window == [1, 3] and not diverged


@BACKENDS
@pytest.mark.parametrize("implicit", [False, True])
def test_what_is_left_is_no_less_than_the_residual_of_an_explicit_chain(backend: str, implicit: bool) -> None:
    arguments = sample([1.0, 0.06], [1e-9, 0.05], [1.0, 1.0], convergence=(1.0, 1.0, 0.1, 1.0, 1.0)) | {
        "implicit": implicit
    }
    if implicit:
        arguments["norms"][0, 0, 0] = 0.0
    errors, window, _ = reached(backend, arguments)
    assert_close(errors[0], torch.tensor(0.05 * 0.1 / 0.99 if implicit else 0.06, dtype=torch.float64))
    assert window == ([2, 2] if implicit else [1, 2])


@BACKENDS
@pytest.mark.parametrize(("ratio", "least"), [(0.5, 0.5), (0.85, 0.15), (0.95, 0.1), (1.5, 0.1)])
def test_a_slow_contraction_leaves_at_most_ten_times_as_much(backend: str, ratio: float, least: float) -> None:
    before = (1.0, 1.0, 1.0, 1.0, 1.0)
    errors, _, _ = reached(backend, sample([1.0] * 2, [0.1, ratio], [2.0] * 2, convergence=before, implicit=True))
    left = ratio * min(ratio, 1.0) ** 0.5 / least
    assert_close(errors[:3], torch.tensor([left, ratio, min(ratio, 1.0)], dtype=torch.float64))


@BACKENDS
def test_no_contraction_is_believed_to_be_better_than_the_best(backend: str) -> None:
    errors, window, _ = reached(
        backend, sample([1.0, 1e-3], [1e-9, 0.05], [1.0, 1.0], convergence=(1.0, 1.0, 0.1, 1.0, 1.0))
    )
    assert_close(errors[:3], torch.tensor([0.05 * 0.1 / 0.99, 0.05, 0.1], dtype=torch.float64))
    assert window == [2, 2]


@BACKENDS
def test_no_change_after_no_change_is_the_best_contraction(backend: str) -> None:
    errors, window, _ = reached(
        backend, sample([1.0, 0.5], [0.0] * 2, [1.0] * 2, convergence=(0.0, 0.0, 0.5, 1.0, 1.0))
    )
    assert_close(errors, torch.tensor([0.5, 0.0, 0.1, 0.0, 0.5], dtype=torch.float64))
    assert window == [1, 2]
    arguments = sample([1.0, 0.5], [0.0] * 2, [1.0] * 2, convergence=(0.0, 0.0, 0.5, 1.0, 1.0), rtol=0.0, implicit=True)
    errors, window, _ = reached(backend, arguments)
    assert errors[0] == 0.0 and window == [0, 2], "rtol = 0 asks for the residuals alone"


@BACKENDS
def test_converged_steps_leave_the_window_up_to_the_first_other(backend: str) -> None:
    arguments = sample([1e-4, 1e-4, 1.0, 1e-4, 1.0], [1.0] * 5, [1.0] * 5)
    assert reached(backend, arguments)[1] == [2, 5]
    assert reached(backend, arguments | {"window": torch.tensor([[1, 3]]), "window_size": 2})[1] == [2, 4]


@BACKENDS
@pytest.mark.parametrize(("implicit", "begin"), [(False, 1), (True, 0)])
def test_the_plain_step_of_an_explicit_chain_is_exact(backend: str, implicit: bool, begin: int) -> None:
    assert reached(backend, sample([1.0] * 3, [1.0] * 3, [1.0] * 3, implicit=implicit))[1] == [begin, 3]


@BACKENDS
def test_exact_mode_ends_with_the_last_step_only(backend: str) -> None:
    arguments = sample([1e-4, 1e-4, 1.0], [1e-9] * 3, [1.0] * 3, convergence=(1e-9, 1e-9, 0.1, 1.0, 1.0), rtol=0.0)
    assert reached(backend, arguments)[1] == [2, 3]
    errors, window, _ = reached(backend, arguments)  # the last step is the first active one now
    assert window == [3, 3] and errors[0] <= 1e-3


@BACKENDS
def test_nothing_is_known_before_the_window_reaches_the_end(backend: str) -> None:
    for smallest in (INF, 1e10, 1.0):  # of the last corrections before
        before = (INF, INF, 1.0, smallest, INF)
        arguments = sample([1.0] * 4, [1e9] * 4, [1.0] * 4, convergence=before, window=(0, 2), window_size=2)
        errors, window, diverged = reached(backend, arguments)
        assert errors[[0, 1, 3]].tolist() == [INF, INF, smallest] and window == [1, 3] and not diverged


@BACKENDS
@pytest.mark.parametrize("value", [float("nan"), INF])
@pytest.mark.parametrize("part", range(3))
def test_a_norm_that_is_not_finite_diverges(backend: str, value: float, part: int) -> None:
    arguments = sample([1e-5] * 4, [1e-5] * 4, [1.0] * 4)
    arguments["norms"][2, 0, part] = value
    errors, window, diverged = reached(backend, arguments)
    assert diverged and window == [1, 4] and errors[4] == INF and not errors.isnan().any()


@BACKENDS
def test_growth_diverges(backend: str) -> None:
    for last, expected in ((999.0, False), (1001.0, True)):
        arguments = sample([1.0] * 2, [1.0, last], [1.0] * 2, convergence=(1.0, 1.0, 1.0, 1.0, 1.0))
        assert reached(backend, arguments)[2] == expected


@BACKENDS
def test_a_sample_that_has_converged_keeps_everything(backend: str) -> None:
    arguments = sample(
        [float("nan")] * 2, [1.0] * 2, [1.0] * 2, convergence=(1e-3, 2e-3, 0.3, 4e-3, 5e-3), window=(2, 2)
    )
    errors, window, diverged = reached(backend, arguments)
    assert_close(errors, torch.tensor([1e-3, 2e-3, 0.3, 4e-3, 5e-3], dtype=torch.float64))
    assert window == [2, 2] and not diverged


@BACKENDS
@pytest.mark.parametrize("scale", [1.0, INF, 0.0])
@pytest.mark.parametrize(("correction", "change"), [(0.0, 0.5), (1e-6, INF)])
def test_a_state_of_norm_zero_has_no_scale_but_its_own(
    backend: str, scale: float, correction: float, change: float
) -> None:
    """Only a correction of zero is small beside it, whatever the scale."""
    arguments = sample([0.0] * 3, [correction, 0.0, 0.5], [0.0, 0.0, 1.0], convergence=(1.0, 1.0, 1.0, 1.0, 1.0))
    errors, _, diverged = reached(backend, arguments | {"scale": torch.tensor([scale], dtype=torch.float64)})
    assert errors[1] == (change if scale else INF) and not errors.isnan().any() and not diverged


@BACKENDS
def test_from_zero_with_an_infinite_scale_nothing_has_converged(backend: str) -> None:
    arguments = sample([1.0] * 3, [1.0] * 3, [0.0] * 3, scale=torch.tensor([INF], dtype=torch.float64))
    errors, window, diverged = reached(backend, arguments)
    assert errors[[0, 1, 4]].tolist() == [INF] * 3 and window == [1, 3] and not diverged


@BACKENDS
def test_an_infinite_scale_leaves_the_states(backend: str) -> None:
    arguments = sample([1.0] * 3, [0.1, 0.2, 0.3], [1.0, 4.0, 2.0], scale=torch.tensor([INF], dtype=torch.float64))
    assert_close(reached(backend, arguments)[0][1], torch.tensor(0.15, dtype=torch.float64))


@BACKENDS
@pytest.mark.parametrize(
    ("window", "residual"), [((0, 5), 8.0), ((1, 5), 4.0), ((1, 3), 0.5), ((2, 3), 0.25), ((4, 5), 4.0)]
)
def test_the_residual_is_the_largest_of_the_active_steps(
    backend: str, window: tuple[int, int], residual: float
) -> None:
    """Relative to the state, however large it is; also where the window does not reach the end."""
    arguments = sample([4.0, 1.0, 1.0, 3.0, 2.0], [1.0] * 5, [0.5, 2.0, 4.0, 1.0, 0.5], window=window, implicit=True)
    assert_close(reached(backend, arguments)[0][4], torch.tensor(residual, dtype=torch.float64))


@BACKENDS
@pytest.mark.parametrize(
    ("part", "residual"), [((0.0, 0.0), 0.25), ((1e-9, 0.0), INF), ((0.0, 2.0), 0.25), ((1.0, 2.0), 0.5)]
)
def test_the_residual_of_a_state_of_norm_zero(backend: str, part: tuple[float, float], residual: float) -> None:
    arguments = sample([0.5, part[0]], [1.0] * 2, [2.0, part[1]], implicit=True)
    assert reached(backend, arguments)[0][4] == residual


@BACKENDS
@pytest.mark.parametrize(("window", "residual"), [((0, 3), 3.0), ((1, 3), 2.0), ((2, 3), 0.0), ((0, 1), 0.0)])
def test_an_explicit_step_that_becomes_exact_has_no_residual(
    backend: str, window: tuple[int, int], residual: float
) -> None:
    arguments = sample([9.0, 3.0, 2.0], [1.0] * 3, [1.0] * 3, window=window)
    assert reached(backend, arguments)[0][4] == residual


@BACKENDS
def test_the_residual_is_kept_once_a_sample_has_converged(backend: str) -> None:
    """Beside one that is open, and from the iteration on which it converges in."""
    both = {
        "norms": torch.full((2, 2, 3), 0.25, dtype=torch.float64),
        "scale": torch.ones(2, dtype=torch.float64),
        "tolerance": torch.full((2,), 1e-3, dtype=torch.float64),
        "convergence": torch.tensor([[1e-3, 1e-3, 0.1, 1.0, 7.0], [1.0, 1.0, 1.0, 1.0, 7.0]], dtype=torch.float64),
        "window": torch.tensor([[2, 2], [0, 2]]),
        "diverged": torch.tensor([9, 9]),
    }
    arguments = sample([0.0], [0.0], [0.0]) | both | {"window_size": 2}
    arguments["norms"][:, 1, 0] = 1e-8
    arguments["implicit"] = True
    for _ in range(2):
        inputs.run("update_convergence", backend, arguments)
        assert_close(arguments["convergence"][:, 4], torch.tensor([7.0, 2e-4], dtype=torch.float64))
        assert arguments["window"].tolist() == [[2, 2], [2, 2]]
        arguments["norms"].fill_(torch.nan)


@BACKENDS
def test_from_the_first_interpolated_step_on_nothing_is_known(backend: str) -> None:
    """Steps converge before it, and no error is known; growth and residuals are, those of interpolated steps too."""
    norms = [1e-4, 1e-4, 1e-4, 0.5, 1e-4], [0.1] * 5, [1.0] * 5
    errors, window, diverged = reached(backend, sample(*norms, first_interpolated=torch.tensor([3])))
    assert errors[[0, 1]].tolist() == [INF, INF] and window == [3, 5] and not diverged
    assert_close(errors[3:], torch.tensor([0.1, 0.5], dtype=torch.float64))
    grown = sample(*norms, first_interpolated=torch.tensor([3]), convergence=(0.1, 0.1, 0.5, 0.1 / 2e3, 0.1))
    assert reached(backend, grown)[1:] == ([1, 5], True)
