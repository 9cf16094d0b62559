"""`edm_sampler` against EDM's Euler steps, written from the paper (arXiv 2206.00364, algorithm 1 and eq. 5)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from asserts import relative_error
from torch import Tensor

from deqkern import ConvergenceWarning, models, solvers
from deqkern.integrations.edm import edm_sampler


class Net(torch.nn.Module):
    """A preconditioned network with class labels, two levels of bounds, and levels rounded to hundredths."""

    sigma_min, sigma_max = 0.01, 50.0

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Conv2d(2, 6, 3, padding=1), torch.nn.Conv2d(6, 2, 3, padding=1)
        self.label = torch.nn.Linear(4, 6)

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return (sigma * 100).round() / 100

    @torch.no_grad()
    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        x, s = x.float(), sigma.float().reshape(-1, 1, 1, 1)
        hidden = self.first(x / (1 + s**2).sqrt())
        if class_labels is not None:
            hidden = hidden + self.label(class_labels)[:, :, None, None]
        return x / (1 + s**2) + s / (1 + s**2).sqrt() * self.last(torch.tanh(hidden))


def by_hand(net: Any, latents: Tensor, labels: Tensor | None, steps: int, low: float, high: float) -> Tensor:
    part = torch.arange(steps, dtype=torch.float64) / (steps - 1)
    t = net.round_sigma((high ** (1 / 7) + part * (low ** (1 / 7) - high ** (1 / 7))) ** 7)
    t = torch.cat([t, torch.zeros(1, dtype=torch.float64)])
    x = latents.double() * t[0]
    for i in range(steps):
        x = x + (t[i + 1] - t[i]) * (x - net(x, t[i].expand(len(x)), labels).double()) / t[i]
    return x


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_sequential_loop(labelled: bool, dtype: torch.dtype) -> None:
    net, latents = Net(), torch.randn(3, 2, 8, 8, dtype=dtype)
    labels = torch.eye(4)[[0, 3, 1]] if labelled else None
    expected = by_hand(net, latents, labels, 18, 0.01, 50.0)  # the bounds of the net are the narrower ones
    for rtol, bar in ((0.0, 1e-5), (1e-4, 2e-3)):
        found = edm_sampler(net, latents, labels, rtol=rtol)
        assert found.dtype == dtype and relative_error(found.double(), expected).max() <= bar, rtol


def test_equals_the_sequential_loop_on_digits() -> None:
    loaded = models.load("digits")
    assert loaded.schedule.alphas_cumprod is not None
    levels = (1 / loaded.schedule.alphas_cumprod - 1).sqrt()

    class Digits:
        def round_sigma(self, sigma: Tensor) -> Tensor:
            return levels[torch.searchsorted(levels, sigma.double()).clamp_max(len(levels) - 1)]

        @torch.no_grad()
        def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None) -> Tensor:
            t, column = torch.searchsorted(levels.float(), sigma.float() * (1 - 1e-6)), sigma.float().view(-1, 1, 1, 1)
            return x - column * loaded.model((x / (1 + column**2).sqrt()).float(), t).sample

    net, latents = Digits(), torch.randn(2, *loaded.shape)
    expected = by_hand(net, latents, None, 18, 0.02, 80.0)
    for rtol, bar in ((0.0, 1e-5), (1e-4, 2e-3)):
        found = edm_sampler(net, latents, sigma_min=0.02, rtol=rtol)
        assert relative_error(found.double(), expected).max() <= bar, rtol


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_step_in_the_dtype_of_the_latents(dtype: torch.dtype) -> None:
    latents = torch.randn(2, 2, 8, 8).to(dtype)

    def net(x: Tensor, sigma: Tensor, labels: None) -> Tensor:
        assert x.dtype is sigma.dtype is dtype and sigma.tolist() == [80.0, 80.0]
        return torch.tanh(x)

    found, expected = edm_sampler(net, latents, num_steps=1), torch.tanh(80 * latents)
    assert found.dtype is dtype and relative_error(found, expected).max() <= 10 * torch.finfo(dtype).eps


def test_it_has_the_defaults_of_edm_and_says_what_has_not_converged() -> None:
    calls: list[list[float]] = []

    def net(x: Tensor, sigma: Tensor, labels: None) -> Tensor:
        calls.append(sigma.tolist())
        return torch.tanh(x)

    edm_sampler(net, torch.randn(2, 2, 8, 8), solver=solvers.sequential(), rtol=0.0)
    low, high = 0.002 ** (1 / 7), 80.0 ** (1 / 7)
    levels = torch.tensor([[(high + i / 17 * (low - high)) ** 7] * 2 for i in range(18)])
    torch.testing.assert_close(torch.tensor(calls), levels, rtol=1e-5, atol=0)
    calls.clear()
    with pytest.warns(ConvergenceWarning) as caught:
        edm_sampler(net, torch.randn(2, 2, 8, 8), max_iterations=1, max_batch=7)
    assert len(caught) == 1 and caught[0].filename == __file__ and max(map(len, calls)) == 7


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        ({"latents": [1.0]}, TypeError, "latents"),
        ({"num_steps": 0}, ValueError, "num_steps"),
        ({"sigma_min": 90.0}, ValueError, "sigma_min"),
        ({"sigma_min": 50.0}, ValueError, "sigma_min=50"),
        ({"sigma_min": -1.0, "net": lambda x, s, labels: x}, ValueError, "sigma_min=0"),
        ({"rho": 0.0}, ValueError, "rho"),
        ({"rho": "7"}, TypeError, "rho must be a number"),
        ({"sigma_min": None}, TypeError, "sigma_min must be a number"),
        ({"sigma_max": torch.ones(2)}, TypeError, "sigma_max must be a number"),
        ({"sigma_max": torch.inf, "net": lambda x, s, labels: x}, ValueError, "sigma_max"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=name):
        edm_sampler(**({"net": Net(), "latents": torch.randn(2, 2, 8, 8)} | change))
