"""The CUDA kernel of anderson_solve without a GPU: its own source, compiled for the CPU by lanes.cpp, lane by lane."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from deqkern import ops

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parent.parent / "csrc"
COMPILER = shutil.which("c++") or shutil.which("g++")
missing = "" if COMPILER and SOURCES.is_dir() else "no C++ compiler, or no sources"


@functools.cache
def _library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lanes.so"
        warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
        flags = ["-std=c++17", "-O2", "-shared", "-fPIC", "-U_FORTIFY_SOURCE", *warnings, "-I", str(SOURCES)]
        subprocess.run([str(COMPILER), *flags, str(HERE / "lanes.cpp"), "-o", str(path)], check=True)
        return ctypes.CDLL(str(path))


def anderson_solve(
    gram: Tensor,
    rhs: Tensor,
    window: Tensor,
    scope: str,
    ridge: float,
    ridge_absolute: float,
    implicit: bool,
    gamma: Tensor,
) -> None:
    """Twice, the second time with lanes, warps and blocks in the other order: a race would show."""
    assert all(value.is_contiguous() and value.device.type == "cpu" for value in (gram, rhs, window, gamma))
    other = torch.empty_like(gamma)
    for backward, out in enumerate((gamma, other)):
        good = _library().anderson_solve(
            *(ctypes.c_void_p(value.data_ptr()) for value in (gram, rhs, window, out)),
            *map(ctypes.c_int64, rhs.shape[:2]),
            rhs.shape[2],
            ops.SCOPES.index(scope),
            ctypes.c_double(ridge),
            ctypes.c_double(ridge_absolute),
            implicit,
            backward,
        )
        assert good, "lanes that must meet wait at different places"
    assert torch.equal(gamma, other)
