"""What kernels make of integers that they are given: which steps of a sample are active, and places within a tensor."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def is_active(window, row, batch):
    """Whether step row // B of sample row % B lies in its window (B, 2): begin <= step < end."""
    step = row // batch
    span = window + 2 * (row % batch)
    return (step >= tl.load(span)) & (step < tl.load(span + 1))


@triton.jit
def window_of(window, sample, steps):
    """The begin and end of a sample's window (B, 2), cut to 0 .. S."""
    begin = tl.load(window + 2 * sample)
    end = tl.load(window + 2 * sample + 1)
    return tl.minimum(tl.maximum(begin, 0), steps), tl.minimum(tl.maximum(end, 0), steps)


@triton.jit
def within(index, bound):
    """`index` if it lies within 0 .. bound - 1, else the nearer end: a place within the tensor, whatever is given."""
    return tl.minimum(tl.maximum(index, 0), bound - 1)
