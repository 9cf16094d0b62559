from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from asserts import assert_close, in_new_python

from deqkern.interpolation import slerp


def test_it_comes_with_the_package() -> None:
    assert "slerp" in in_new_python("import deqkern; print(deqkern.interpolation.slerp)")


def test_the_ends_are_the_ends_and_the_norm_stays() -> None:
    first, second = torch.randn(2, 3, 2, 5, 7).unbind()
    second = second * (first.flatten(1).norm(dim=1) / second.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
    frames = slerp(first, second, torch.linspace(0, 1, 9))
    assert frames.shape == (9, 3, 2, 5, 7)
    assert_close(frames[0], first, 1e-6)
    assert_close(frames[-1], second, 1e-6)
    norms = frames.flatten(2).norm(dim=2)
    assert_close(norms, norms[:1].expand_as(norms), 1e-5)


def test_each_sample_has_its_own_angle() -> None:
    first = torch.tensor([[2.0, 0.0], [2.0, 0.0]])
    second = torch.tensor([[0.0, 3.0], [1.0, 1.0]])
    middle = slerp(first, second, torch.tensor([0.5]))[0]
    right, half = math.sin(math.pi / 4), math.sin(math.pi / 8) / math.sin(math.pi / 4)
    assert_close(middle, torch.tensor([[2 * right, 3 * right], [3 * half, half]]), 1e-6)


@pytest.mark.parametrize("factor", [1.0, 2.0, -1.0, 0.0])
def test_without_an_arc_it_is_a_straight_line(factor: float) -> None:
    first = torch.randn(1, 4, 4)
    frames = slerp(first, factor * first, torch.tensor([0.0, 0.25, 1.0]))
    assert_close(frames, torch.stack([first, (0.75 + 0.25 * factor) * first, factor * first]), 1e-6)


def test_an_arc_that_is_almost_a_straight_line_is_an_arc() -> None:
    angle = torch.tensor(math.pi - 1e-4, dtype=torch.float64)
    first, second = torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.stack([angle.cos(), angle.sin()])[None]
    middle = slerp(first, second, torch.tensor([0.5]))[0]
    assert_close(middle, torch.stack([(angle / 2).cos(), (angle / 2).sin()])[None], 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_keeps_the_dtype(dtype: torch.dtype) -> None:
    first, second = torch.randn(2, 1, 4, 4).to(dtype).unbind()
    assert slerp(first, second, torch.tensor([0.0, 0.5], dtype=torch.float64)).dtype is dtype


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="second must have the shape of first"):
        slerp(torch.zeros(1, 4), torch.zeros(2, 4), torch.tensor([0.5]))


@pytest.mark.parametrize("t", [0.5, [0.5], torch.tensor(0.5)])
def test_t_must_be_a_row(t: Any) -> None:
    with pytest.raises(ValueError, match=r"t must be a tensor \(F,\)"):
        slerp(torch.zeros(1, 4), torch.zeros(1, 4), t)
