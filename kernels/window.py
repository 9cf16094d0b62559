"""The steps of a sample that are active: the one reading of `window` by the kernels whose programs are rows."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def is_active(window, row, batch):
    """Whether step row // B of sample row % B lies in its window (B, 2): begin <= step < end."""
    step = row // batch
    span = window + 2 * (row % batch)
    return (step >= tl.load(span)) & (step < tl.load(span + 1))
