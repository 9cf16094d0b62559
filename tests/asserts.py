"""Comparisons that the tests share."""

from __future__ import annotations

import os
import subprocess
import sys

from torch import Tensor


def assert_close(actual: Tensor, expected: Tensor, rtol: float = 1e-5, name: str = "result") -> None:
    """Equal shapes, NaN (not written) and infinities in the same places, and an error of at most rtol max |expected|.

    The error is measured against the largest entry, because entries that cancel have no relative accuracy of their own.
    """
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    written = ~expected.isnan()
    wrong = int((actual.isnan() == written).sum())
    assert not wrong, f"{name}: {wrong} of {written.numel()} entries are NaN (or written) where they must not be"
    written &= expected.isfinite()
    infinite = expected.isinf()
    assert bool((actual[infinite] == expected[infinite]).all()), f"{name}: infinities differ"
    if not written.any():
        return
    actual, expected = actual[written], expected[written]
    error, scale = float((actual - expected).abs().max()), float(expected.abs().max())
    assert error <= rtol * scale, f"{name}: error {error:.3e} at scale {scale:.3e}, allowed {rtol * scale:.3e}"


def in_new_python(code: str, **environment: str) -> str:
    """What a new Python with this one's import paths prints; it must end well."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | environment
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def relative_error(actual: Tensor, expected: Tensor) -> Tensor:  # (B,)
    """The relative 2-norm of the error of each sample (B, *shape)."""
    return (actual - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
