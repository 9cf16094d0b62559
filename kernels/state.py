"""The names of what the ops keep side by side in one tensor, as places for kernels: see deqkern/ops/state.py.

A test compares them with those of Python and C++. Sums begin with the pointer: the interpreter adds from the left.
"""

from __future__ import annotations

import triton.language as tl

NORMS = tl.constexpr(3)  # norms (S, B, NORMS)
NORM_RESIDUAL = tl.constexpr(0)
NORM_CORRECTION = tl.constexpr(1)
NORM_STATE = tl.constexpr(2)

MOMENTS = tl.constexpr(2)  # moments (S, B, K, MOMENTS)
MOMENT_CROSS = tl.constexpr(0)
MOMENT_SQUARE = tl.constexpr(1)

CONVERGENCE = tl.constexpr(5)  # convergence (B, CONVERGENCE)
CONVERGENCE_ESTIMATE = tl.constexpr(0)
CONVERGENCE_LAST_CORRECTION = tl.constexpr(1)
CONVERGENCE_CONTRACTION = tl.constexpr(2)
CONVERGENCE_SMALLEST_CORRECTION = tl.constexpr(3)
CONVERGENCE_RESIDUAL = tl.constexpr(4)

CONSTANT_X0_KEEP = tl.constexpr(0)  # rows of constant_x0 (4, S)
CONSTANT_X0_X0_GAIN = tl.constexpr(1)
CONSTANT_X0_OF_X = tl.constexpr(2)
CONSTANT_X0_OF_OUT = tl.constexpr(3)

OUTPUT_PATH_SCALE = tl.constexpr(0)  # rows of path (6, S)
OUTPUT_PATH_GAIN = tl.constexpr(1)
OUTPUT_PATH_GAIN_LEVEL = tl.constexpr(2)
OUTPUT_PATH_LEVEL = tl.constexpr(3)
OUTPUT_PATH_OF_X = tl.constexpr(4)
OUTPUT_PATH_OF_OUT = tl.constexpr(5)
