"""`deqkern.nn.DEQ` as a layer that is trained."""

from __future__ import annotations

import copy

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

import deqkern
from deqkern import solvers
from deqkern.gradients import Phantom
from deqkern.nn import DEQ


class Cell(torch.nn.Module):
    def __init__(self, size: int = 32) -> None:
        super().__init__()
        self.recur, self.norm = torch.nn.Linear(size, size), torch.nn.LayerNorm(size)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.norm(torch.tanh(0.3 * self.recur(z) + x))


class Classifier(torch.nn.Module):
    def __init__(self, gradient: str) -> None:
        super().__init__()
        self.inject, self.head = torch.nn.Linear(64, 32), torch.nn.Linear(32, 10)
        self.deq = DEQ(Cell(), rtol=1e-2, gradient=gradient)

    def forward(self, images: Tensor) -> Tensor:
        x = self.inject(images)
        return self.head(self.deq(torch.zeros_like(x), x))


@pytest.mark.parametrize("gradient", ["implicit", "phantom"])
def test_training_on_digits(gradient: str) -> None:
    data = load_digits()
    images, labels = torch.tensor(data.data, dtype=torch.float32) / 8 - 1, torch.tensor(data.target)
    model = Classifier(gradient)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for step in range(60):
        chosen = slice(step % 12 * 128, step % 12 * 128 + 128)
        loss = torch.nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert model.deq.solution is not None and model.deq.solution.converged.all()
    assert losses[0] > 2 and sum(losses[-10:]) / 10 < 0.4, losses
    model.eval()
    with torch.no_grad():
        right = model(images[1536:]).argmax(1) == labels[1536:]
    assert right.float().mean() >= 0.8


def test_a_module_like_others() -> None:
    layer = DEQ(Cell(), solver=solvers.picard(), rtol=1e-4, max_iterations=60, gradient=Phantom(2))
    assert layer.solution is None and "solver=picard, rtol=0.0001, max_iterations=60" in repr(layer)
    x = torch.randn(3, 32, requires_grad=True)
    value = layer.eval()(torch.zeros(3, 32), x)
    value.sum().backward()
    assert x.grad is not None and all(parameter.grad is not None for parameter in layer.parameters())
    assert layer.solution is not None and not layer.solution.value.requires_grad
    torch.testing.assert_close(layer.solution.value, value.detach(), rtol=0, atol=0)
    again = copy.deepcopy(layer)
    again.load_state_dict(layer.state_dict())
    torch.testing.assert_close(again(torch.zeros(3, 32), x), value, rtol=0, atol=0)
    assert set(layer.state_dict()) == {f"f.{name}" for name in layer.f.state_dict()}


def test_tuples_and_plain_functions() -> None:
    layer = DEQ(lambda state, x: (0.5 * state[1] + x, 0.5 * state[0]), rtol=1e-6)
    x = torch.ones(2, 3, requires_grad=True)
    first, second = layer((torch.zeros(2, 3), torch.zeros(2, 3)), x)
    torch.testing.assert_close(first, torch.full((2, 3), 4 / 3), rtol=1e-5, atol=0)
    (first + second).sum().backward()
    torch.testing.assert_close(x.grad, torch.full((2, 3), 2.0), rtol=1e-5, atol=0)
    assert not list(layer.parameters())
    assert layer.solution is not None and not any(part.requires_grad for part in layer.solution.value)


def test_autocast() -> None:
    layer, x = DEQ(Cell(), rtol=2e-2), torch.randn(4, 32)
    with torch.autocast("cpu", torch.bfloat16):
        value = layer(torch.zeros(4, 32), x)
        loss = value.square().mean()
    loss.backward()
    assert layer.solution is not None and layer.solution.converged.all() and value.dtype is torch.float32
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_bad_options_are_refused_when_it_is_made() -> None:
    with pytest.raises(TypeError, match="f must be callable"):
        DEQ(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="solver of a fixed point"):
        DEQ(Cell(), solver=solvers.default())
    with pytest.raises(ValueError, match="gradient must be"):
        DEQ(Cell(), gradient="exact")
    with pytest.raises(ValueError, match="max_iterations must be"):
        DEQ(Cell(), max_iterations=0)


def test_it_is_in_the_package() -> None:
    assert deqkern.nn.DEQ is DEQ


def test_a_warning_is_about_the_line_that_calls() -> None:
    layer, start = deqkern.nn.DEQ(lambda z, x: z + 1 + z**2 + 0 * x, max_iterations=3), torch.ones(1, 2)
    with pytest.warns(deqkern.ConvergenceWarning) as caught:
        layer(start, torch.zeros(1, 2))
        first = torch.randn(1, 2, requires_grad=True)
        gradient = deqkern.gradients.Implicit(max_iterations=1, rtol=1e-9)
        schedule = deqkern.NoiseSchedule.linear()
        solution = deqkern.sample(lambda x, t: x.sin(), first, schedule, 20, gradient=gradient, rtol=1e-6)
        solution.value.sum().backward()
    assert len(caught) == 2 and {warning.filename for warning in caught} == {__file__}
