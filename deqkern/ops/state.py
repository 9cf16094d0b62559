"""The names of what the ops keep side by side in one tensor: each view is a tuple of columns or rows of it, no copy.

The order of the names is the order in memory, in Python, in C++ (csrc/state.h) and in Triton (kernels/state.py); a test
compares the three. A `view` takes tensors and NumPy arrays alike.
"""

from __future__ import annotations

import math
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from torch import Tensor

A = TypeVar("A")
Array = TypeVar("Array", Tensor, "np.ndarray[Any, Any]")


class Norms(NamedTuple, Generic[A]):
    """`norms` (S, B, 3) float64: squared norms of step i of each sample, zero outside its window.

    Attributes:
        residual: |r[i+1]|^2 (S, B), what the step misses of its own equation.
        correction: |g[i+1]|^2 (S, B).
        state: |x[i+1]|^2 (S, B), before the correction.

    """

    residual: A
    correction: A
    state: A

    @classmethod
    def view(cls, norms: Array) -> Norms[Array]:
        """The columns of `norms` (..., 3)."""
        return Norms(*(norms[..., j] for j in range(len(cls._fields))))


class Moments(NamedTuple, Generic[A]):
    """`moments` (S, B, K, 2) float64: what a secant slope per band is made of.

    Attributes:
        cross: <dx, de> (S, B, K).
        square: <dx, dx> (S, B, K).

    """

    cross: A
    square: A

    @classmethod
    def view(cls, moments: Array) -> Moments[Array]:
        """The columns of `moments` (..., 2)."""
        return Moments(*(moments[..., j] for j in range(len(cls._fields))))


class Convergence(NamedTuple, Generic[A]):
    """`convergence` (B, 5) float64: how near each sample has come.

    Attributes:
        estimate: (B,), the relative error that is left, as estimated.
        last_correction: (B,), the largest relative correction of a state in the last iteration.
        contraction: (B,), by what factor it became smaller in that iteration.
        smallest_correction: (B,), the smallest |g[S]| until now.
        residual: (B,), the largest relative residual of a step that was not exact then.

    """

    estimate: A
    last_correction: A
    contraction: A
    smallest_correction: A
    residual: A

    @classmethod
    def view(cls, convergence: Array) -> Convergence[Array]:
        """The columns of `convergence` (B, 5)."""
        return Convergence(*(convergence[..., j] for j in range(len(cls._fields))))


# Before the first iteration.
INITIAL_CONVERGENCE: Convergence[float] = Convergence(
    estimate=math.inf, last_correction=math.inf, contraction=1.0, smallest_correction=math.inf, residual=math.inf
)


class ConstantX0(NamedTuple, Generic[A]):
    """`constant_x0` (4, S), in the dtype of the state: a step by the clean sample that the model predicts.

    x[i+1] = keep[i] x[i] + x0_gain[i] x0 + n[i] z[i],  x0 = of_x[i] x + of_out[i] out.

    Attributes:
        keep: (S,).
        x0_gain: (S,).
        of_x: (S,).
        of_out: (S,).

    """

    keep: A
    x0_gain: A
    of_x: A
    of_out: A

    @classmethod
    def view(cls, constant_x0: Array) -> ConstantX0[Array]:
        """The rows of `constant_x0` (4, S)."""
        return ConstantX0(*(constant_x0[j] for j in range(len(cls._fields))))


class OutputPath(NamedTuple, Generic[A]):
    """`path` (6, S) float64: the states along a chain whose x0 is linear in `level`, from sums over the steps j < i.

    Attributes:
        scale: (S,), the product of keep[j].
        gain: (S,), the sum of x0_gain[j] / scale[j+1].
        gain_level: (S,), the sum of level[j] x0_gain[j] / scale[j+1].
        level: (S,), what x0 is linear in.
        of_x: (S,), of `ConstantX0`.
        of_out: (S,), of `ConstantX0`.

    """

    scale: A
    gain: A
    gain_level: A
    level: A
    of_x: A
    of_out: A

    @classmethod
    def view(cls, path: Array) -> OutputPath[Array]:
        """The rows of `path` (6, S)."""
        return OutputPath(*(path[j] for j in range(len(cls._fields))))


class Status(NamedTuple, Generic[A]):
    """`status` (3 B,) int64: what the host reads after an iteration, in one piece, so that one copy brings it.

    Attributes:
        window: (B, 2), the begin and the end of the window of each sample.
        diverged: (B,), 1 for a sample whose iteration diverged.

    """

    window: A
    diverged: A

    @classmethod
    def view(cls, status: Array) -> Status[Array]:
        """The parts of `status` (3 B,)."""
        batch = len(status) // 3
        return Status(status[: 2 * batch].reshape(batch, 2), status[2 * batch :])
