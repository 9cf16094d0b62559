"""Solves inside of what torch.compile compiles."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from asserts import relative_error
from torch import Tensor

import deqkern
from deqkern import solvers

SCHEDULE = deqkern.NoiseSchedule.linear()


class Layered(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inject, self.recur, self.head = (torch.nn.Linear(8, 8) for _ in range(3))
        self.deq = deqkern.nn.DEQ(lambda z, x: torch.tanh(0.5 * self.recur(z) + x), rtol=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inject(x)
        return self.head(torch.relu(self.deq(torch.zeros_like(x), x)))


@pytest.mark.filterwarnings("error::deqkern.ConvergenceWarning")
def test_a_compiled_network_with_a_layer_that_solves() -> None:
    network, x = Layered(), torch.randn(5, 8)
    expected = network(x)
    expected.square().sum().backward()
    gradients = [value.grad.clone() for value in network.parameters() if value.grad is not None]
    network.zero_grad()
    found = torch.compile(network)(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    found.square().sum().backward()
    for value, gradient in zip(network.parameters(), gradients, strict=True):
        torch.testing.assert_close(value.grad, gradient, rtol=1e-3, atol=1e-4)


class Counted:
    """A backend that runs graphs as they are, and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, example: Any) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


def model(x: Tensor, t: Tensor) -> Tensor:
    return 0.5 * torch.tanh(x) + x * (t / 4000)[:, None]


@pytest.mark.parametrize("solver", [solvers.default(), solvers.deq_ddim()], ids=lambda solver: solver.name)
def test_a_compiled_step_has_few_graphs(solver: solvers.Solver) -> None:
    def step(noise: Tensor) -> Tensor:
        found = deqkern.sample(model, 1.0 * noise, SCHEDULE, 8, solver=solver, rtol=1e-5, gradient="implicit")
        loss = found.value.square().sum()
        loss.backward()
        return found.value

    noise, counted = torch.randn(2, 6, requires_grad=True), Counted()
    expected = step(noise).detach()
    assert noise.grad is not None
    gradient, noise.grad = noise.grad, None
    torch._dynamo.reset()
    found = torch.compile(step, backend=counted)(noise)
    assert float(relative_error(found.detach(), expected).max()) <= 1e-5
    assert float(relative_error(noise.grad, gradient).max()) <= 1e-4
    assert 0 < counted.graphs <= 12


def test_a_solve_does_not_import_the_compiler() -> None:
    code = (
        "import sys, torch, deqkern\n"
        "deqkern.sample(lambda x, t: 0.5 * x, torch.randn(2, 3), deqkern.NoiseSchedule.linear(), 5)\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
