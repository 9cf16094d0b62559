"""Where an element lies: the one reading of `bands` by the kernels that bend each element by the slope of its band."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def band_of(d, bands, count):
    """The band of each element d, of `count` that begin at bands (K+1,): how many others begin at or before it."""
    band = tl.zeros(d.shape, tl.int32)
    for k in range(1, count):
        band += (d >= tl.load(bands + k)).to(tl.int32)
    return band
