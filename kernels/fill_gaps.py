"""The outputs of steps that were not evaluated, between those of the two evaluated ones around them: one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import cdiv, next_power_of_2

BLOCK = 512  # four floats, one 16-byte access, per thread and row


@triton.jit
def fill_gaps_kernel(x, slope, bands, rows, weights, e, number, size, count, BLOCK: tl.constexpr):
    """y = w0 x[left] + w1 e[left] + w2 x[right] + w3 e[right],
    e[row] = w4 x[left] + w5 e[left] + w6 x[right] + w7 e[right] + slope[row] (x[row] - y).

    x (S+1, B, D), e (S, B, D), slope (S, B, K), weights (N, 8): fp32; rows (3, N): row, left, right. Grid
    (N * cdiv(D, BLOCK),), blocks of a row beside each other. Accumulates in fp32.
    """
    blocks = tl.cdiv(size, BLOCK)
    n = tl.program_id(0) // blocks
    d = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = d < size
    row = tl.load(rows + n)
    left = tl.load(rows + number + n) * size
    right = tl.load(rows + 2 * number + n) * size
    band = tl.zeros([BLOCK], tl.int32)
    for k in range(1, count):
        band += (d >= tl.load(bands + k)).to(tl.int32)
    bend = tl.load(slope + row * count + band, mask=inside, other=0.0)
    x_left = tl.load(x + left + d, mask=inside, other=0.0)
    e_left = tl.load(e + left + d, mask=inside, other=0.0)
    x_right = tl.load(x + right + d, mask=inside, other=0.0)
    e_right = tl.load(e + right + d, mask=inside, other=0.0)
    w = weights + 8 * n
    state = tl.load(w) * x_left + tl.load(w + 1) * e_left + tl.load(w + 2) * x_right + tl.load(w + 3) * e_right
    output = tl.load(w + 4) * x_left + tl.load(w + 5) * e_left + tl.load(w + 6) * x_right + tl.load(w + 7) * e_right
    output += bend * (tl.load(x + row * size + d, mask=inside, other=0.0) - state)
    tl.store(e + row * size + d, output, mask=inside)


def fill_gaps(
    x: torch.Tensor,  # (S+1, B, D)
    slope: torch.Tensor,  # (S, B, K)
    bands: torch.Tensor,  # (K+1,) int64
    rows: torch.Tensor,  # (3, N) int64
    weights: torch.Tensor,  # (N, 8)
    e: torch.Tensor,  # (S, B, D), updated
) -> None:
    number, size = rows.shape[1], e.shape[2]
    if number == 0:
        return
    block = min(BLOCK, max(32, next_power_of_2(size)))
    fill_gaps_kernel[(number * cdiv(size, block),)](
        x, slope, bands, rows, weights, e, number, size, slope.shape[2], block, num_warps=max(1, block // 128)
    )
