"""`generalized_steps` against the loop of the DDIM authors' code, written from arXiv 2010.02502, eq. 12 and 16."""

from __future__ import annotations

from typing import Any

import problems
import pytest
import torch
from asserts import relative_error
from torch import Tensor

from deqkern import ConvergenceWarning, NoiseSchedule, models
from deqkern.integrations.ddim import generalized_steps

SCHEDULE, SHAPE = NoiseSchedule.linear(), (3, 8, 8)
BETAS = torch.linspace(1e-4, 0.02, 1000)


def by_hand(x: Tensor, seq: list[int], model: Any, b: Tensor, eta: float) -> tuple[list[Tensor], list[Tensor]]:
    abar = torch.cat([torch.ones(1), (1 - b).cumprod(0)])  # abar[t + 1]
    xs, x0_preds = [x], []
    for i, j in zip(reversed(seq), [*reversed(seq[:-1]), -1], strict=True):
        now, after = abar[i + 1], abar[j + 1]
        eps = model(xs[-1], torch.full((len(x),), float(i)))
        x0_preds.append((xs[-1] - (1 - now).sqrt() * eps) / now.sqrt())
        sigma = eta * ((1 - after) / (1 - now) * (1 - now / after)).sqrt()
        mean = after.sqrt() * x0_preds[-1] + (1 - after - sigma**2).sqrt() * eps
        xs.append(mean + sigma * torch.randn_like(x))
    return xs, x0_preds


@pytest.mark.parametrize(
    ("kind", "eta"), [("gaussian", 0.0), ("gaussian", 0.5), ("mixture", 0.0), ("mixture", 1.0), ("digits", 0.0)]
)
def test_equals_the_sequential_loop(kind: str, eta: float) -> None:
    model: Any
    betas, shape = BETAS, SHAPE
    if kind == "digits":
        loaded = models.load("digits")
        assert loaded.schedule.alphas_cumprod is not None
        abar = loaded.schedule.alphas_cumprod
        betas, shape = (1 - abar / torch.cat([torch.ones(1), abar[:-1]])).float(), loaded.shape
        model = lambda x, t: loaded.model(x, t).sample  # noqa: E731
    else:
        generator = torch.Generator().manual_seed(2)
        make = problems.gaussian if kind == "gaussian" else problems.mixture
        model = make(SCHEDULE, shape, generator)
    x, seq = torch.randn(2, *shape), list(range(1, 1000, 50))
    with torch.no_grad():
        torch.manual_seed(5)
        expected = by_hand(x, seq, model, betas, eta)
    for rtol, bar in ((0.0, 1e-5), (1e-4, 2e-3)):
        torch.manual_seed(5)
        xs, x0_preds = generalized_steps(x, seq, model, betas, eta=eta, rtol=rtol)
        assert len(xs) == len(seq) + 1 and len(x0_preds) == len(seq) and xs[0] is x
        assert relative_error(xs[-1], expected[0][-1]).max() <= bar, rtol
        for found, wanted in zip(xs + x0_preds, expected[0] + expected[1], strict=True):
            # an x0 of a noisy state is eps times sigma / alpha, and so is its rounding
            assert relative_error(found, wanted).max() <= 10 * bar, rtol


def test_the_estimates_come_in_batches_too() -> None:
    rows: list[int] = []
    exact = problems.mixture(SCHEDULE, SHAPE, torch.Generator().manual_seed(2))

    def model(x: Tensor, t: Tensor) -> Tensor:
        rows.append(len(x))
        assert t.dtype == torch.float32
        return exact(x, t)

    x, seq = torch.randn(2, *SHAPE), range(0, 1000, 100)
    found = generalized_steps(x, seq, model, BETAS, rtol=0, max_batch=7)
    assert max(rows) <= 7 and sum(rows[-3:]) == 20
    whole = generalized_steps(x, seq, exact, BETAS, rtol=0)
    for part, all_at_once in zip(found[1], whole[1], strict=True):
        assert relative_error(part, all_at_once).max() <= 1e-4


def test_the_noise_levels_are_in_the_precision_of_the_betas() -> None:
    narrow, x = torch.linspace(0.02, 0.2, 30).half().requires_grad_(), torch.randn(2, *SHAPE)
    abar = (1 - narrow.detach()).cumprod(0).float()
    betas = 1 - abar / torch.cat([torch.ones(1), abar[:-1]])
    model = lambda x, t: torch.tanh(x)  # noqa: E731
    expected = by_hand(x, list(range(30)), model, betas, 0.0)[0][-1]
    found = generalized_steps(x, range(30), model, narrow, rtol=0)[0][-1]
    assert not found.requires_grad and relative_error(found, expected).max() <= 1e-5


def test_all_states_are_in_the_dtype_of_x_and_what_has_not_converged_is_said() -> None:
    x, model = torch.randn(2, *SHAPE).bfloat16(), torch.nn.Conv2d(3, 3, 1).bfloat16()
    with pytest.warns(ConvergenceWarning) as caught:
        xs, x0_preds = generalized_steps(x, range(0, 1000, 100), lambda x, t: model(x), BETAS, max_iterations=1)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert {(value.dtype, value.requires_grad) for value in (*xs, *x0_preds)} == {(torch.bfloat16, False)}


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        ({"seq": []}, ValueError, "seq"),
        ({"seq": [5, 5]}, ValueError, "seq"),
        ({"seq": [0, 1000]}, ValueError, "seq"),
        ({"seq": [-1, 5]}, ValueError, "seq must ascend within 0"),
        ({"b": torch.zeros(1000)}, ValueError, "b must"),
        ({"b": torch.ones(1000)}, ValueError, "b must"),
        ({"b": torch.full((1000, 1), 0.01)}, ValueError, "b must"),
        ({"eta": 2.0}, ValueError, "eta"),
        ({"eta": -0.5}, ValueError, "eta"),
        ({"eta": float("nan")}, ValueError, "eta"),
        ({"eta": "1"}, TypeError, "eta"),
        ({"x": torch.zeros(3)}, ValueError, "x must"),
        ({"model": None}, TypeError, "model"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], name: str) -> None:
    arguments = {"x": torch.randn(2, *SHAPE), "seq": [0, 500, 900], "model": lambda x, t: x, "b": BETAS} | change
    with pytest.raises(error, match=name):
        generalized_steps(**arguments)
