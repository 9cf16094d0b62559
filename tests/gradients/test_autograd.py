"""The node in torch's graph: where there is one; once and not twice; in any thread; of tensors that do not change."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from tiny import BATCH, SHAPE, STEPS, Tiny, leaf

import deqkern
from deqkern import NoiseSchedule, ops
from deqkern.ops import _dispatch


def test_no_gradient_where_none_is_wanted() -> None:
    noise = leaf(1, *SHAPE)
    assert not deqkern.sample(Tiny(), noise, NoiseSchedule.linear(), STEPS).value.requires_grad
    with torch.no_grad():
        assert not deqkern.sample(Tiny(), noise, NoiseSchedule.linear(), STEPS, gradient="exact").value.requires_grad
    frozen = Tiny().requires_grad_(False)
    found = deqkern.sample(frozen, noise.detach(), NoiseSchedule.linear(), STEPS, gradient="exact")
    assert not found.value.requires_grad


@pytest.mark.parametrize("power", [1, 2])
def test_differentiating_twice_raises(power: int) -> None:
    """Also for a loss whose own derivative is constant."""
    noise, model = leaf(1, *SHAPE), Tiny()
    value = deqkern.sample(model, noise, NoiseSchedule.linear(), STEPS, gradient="implicit").value
    once = torch.autograd.grad(value.pow(power).sum(), [noise, model.last.weight], create_graph=True)
    for gradient in once:
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            torch.autograd.grad(gradient.square().sum(), [noise, model.first.weight], retain_graph=True)


@pytest.mark.parametrize("kind", ["chain", "fixed point"])
def test_a_backward_pass_in_another_thread_keeps_the_backends_of_its_solve(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of a GPU is, whose threads do not see the context."""
    asked, kernel = list[tuple[str, ...]](), _dispatch._kernel

    def spy(op: str, requested: tuple[str, ...], *of_tensor: Any) -> Any:
        asked.append(requested)
        return kernel(op, requested, *of_tensor)

    monkeypatch.setattr(_dispatch, "_kernel", spy)
    start = leaf(BATCH, *SHAPE)
    with ops.use_backend("reference", "cpu"):
        if kind == "chain":
            value = deqkern.sample(Tiny(), start, NoiseSchedule.linear(), STEPS, gradient="implicit").value
        else:
            value = deqkern.fixed_point(lambda z: torch.tanh(z / 2 + start), torch.zeros_like(start)).value
    asked.clear()
    other = threading.Thread(target=value.sum().backward)
    other.start()
    other.join()
    assert start.grad is not None and set(asked) == {("reference", "cpu")}


def test_states_or_parameters_changed_in_place_raise() -> None:
    noise, model = leaf(1, *SHAPE), Tiny()
    solution = deqkern.sample(model, noise, NoiseSchedule.linear(), STEPS, gradient="exact")
    solution.trajectory.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        solution.value.sum().backward()
