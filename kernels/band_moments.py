"""Inner products per band: one pass that sums within blocks, and a small sum over the blocks of each band."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import cdiv
from .state import MOMENT_CROSS, MOMENT_SQUARE, MOMENTS
from .window import is_active, within

BLOCK = 256  # of one warp: its sums need no barrier
BANDS = 32  # bands looked at together
PARTIALS = 8  # partial sums of each band added at a time


@triton.jit
def band_moments_kernel(
    dx,
    e,
    e_prev,
    bands,
    window,
    partial,
    batch,
    size,
    count,  # K
    BLOCK: tl.constexpr,
    BANDS: tl.constexpr,
):
    """partial[i, b, :, c + k] = <dx, e - e_prev>, <dx, dx> over what block c and band k have in common.

    dx (S, B, D) fp32, e, e_prev (S, B, D) fp32, bf16 or fp16, partial (S, B, 2, blocks + K) fp32. Blocks and bands are
    intervals in order, so no two pairs that meet have the same c + k, and the pairs of a band lie beside each other.
    Grid (S * B * blocks,). Accumulates in fp32, at most BLOCK elements; the mask of a band keeps other bands' NaN out.
    """
    blocks = tl.cdiv(size, BLOCK)
    chunk = tl.program_id(0) % blocks
    row = tl.program_id(0) // blocks
    if not is_active(window, row, batch):
        return
    row = row.to(tl.int64)
    d = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = d < size
    change = tl.load(dx + row * size + d, mask=inside, other=0.0)
    output = tl.load(e + row * size + d, mask=inside, other=0.0).to(tl.float32)
    output -= tl.load(e_prev + row * size + d, mask=inside, other=0.0).to(tl.float32)
    cross = change * output
    square = change * change
    first = 0  # the bands of the first and the last element
    last = 0
    for k in range(1, count, BANDS):
        k += tl.arange(0, BANDS)
        start = tl.load(bands + k, mask=k < count, other=size)
        first += tl.sum((start <= chunk * BLOCK).to(tl.int32))
        last += tl.sum((start < tl.minimum(chunk * BLOCK + BLOCK, size)).to(tl.int32))
    sums = partial + row * MOMENTS * (blocks + count) + chunk
    for k in range(first, last + 1):
        mine = (d >= tl.load(bands + k)) & (d < tl.load(bands + k + 1))
        tl.store(sums + k, tl.sum(tl.where(mine, cross, 0.0)))
        tl.store(sums + blocks + count + k, tl.sum(tl.where(mine, square, 0.0)))


@triton.jit
def band_moments_finish_kernel(
    partial,
    bands,
    window,
    moments,
    batch,
    blocks,
    count,
    BLOCK: tl.constexpr,
    BANDS: tl.constexpr,
    PARTIALS: tl.constexpr,
):
    """moments[i, b, k, :] = the partial sums of band k in float64 and in order; zero outside the window or if empty.

    Grid (S * B * cdiv(K, BANDS),): a program sums BANDS bands of a row, side by side.
    """
    groups = tl.cdiv(count, BANDS)
    row = tl.program_id(0) // groups
    active = is_active(window, row, batch)
    row = row.to(tl.int64)
    band = tl.program_id(0) % groups * BANDS + tl.arange(0, BANDS)
    most = blocks * BLOCK + 1
    start = within(tl.load(bands + band, mask=band < count, other=0), most)
    stop = within(tl.load(bands + band + 1, mask=band < count, other=0), most)
    first = start // BLOCK
    number = tl.where(active & (start < stop), (stop - 1) // BLOCK - first + 1, 0)  # of blocks with a part of the band
    place = partial + row * MOMENTS * (blocks + count) + band + first
    cross = tl.zeros([BANDS, PARTIALS], tl.float64)
    square = tl.zeros([BANDS, PARTIALS], tl.float64)
    for k in range(0, tl.max(number), PARTIALS):
        chunk = k + tl.arange(0, PARTIALS)[None, :]
        wanted = chunk < number[:, None]
        cross += tl.load(place[:, None] + chunk, mask=wanted, other=0.0).to(tl.float64)
        square += tl.load(place[:, None] + (blocks + count) + chunk, mask=wanted, other=0.0).to(tl.float64)
    place = moments + (row * count + band) * MOMENTS
    tl.store(place + MOMENT_CROSS, tl.sum(cross, 1), mask=band < count)
    tl.store(place + MOMENT_SQUARE, tl.sum(square, 1), mask=band < count)


def band_moments(
    dx: torch.Tensor,  # (S, B, D)
    e: torch.Tensor,  # (S, B, D)
    e_prev: torch.Tensor,  # (S, B, D)
    bands: torch.Tensor,  # (K+1,) int64
    window: torch.Tensor,  # (B, 2) int64
    moments: torch.Tensor,  # (S, B, K, 2) float64, written
) -> None:
    steps, batch, size = dx.shape
    rows, count = steps * batch, moments.shape[2]
    blocks = cdiv(size, BLOCK)
    partial = torch.empty((rows, MOMENTS.value, blocks + count), dtype=torch.float32, device=dx.device)
    band_moments_kernel[(rows * blocks,)](
        dx, e, e_prev, bands, window, partial, batch, size, count, BLOCK, BANDS, num_warps=1
    )
    band_moments_finish_kernel[(rows * cdiv(count, BANDS),)](
        partial, bands, window, moments, batch, blocks, count, BLOCK, BANDS, PARTIALS, num_warps=1
    )
