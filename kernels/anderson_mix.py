"""Type-II Anderson mixing: one pass over the newest count + 1 updates."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import cdiv, next_power_of_2
from .window import is_active

BLOCK = 512  # four floats, one 16-byte access, per thread and entry


@triton.jit(do_not_specialize=["head", "count"])  # they change from iteration to iteration
def anderson_mix_kernel(
    f_ring,
    gamma,
    window,
    out,
    head,
    count,
    plane,  # S * B * D, from one entry of the ring to the next
    batch,
    size,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[s, b, :] = f[head, s, b, :] - sum_j gamma[s, b, j] (f[head-j] - f[head-j-1])[s, b, :],  j < count

    f_ring (M+1, S, B, D), out (S, B, D), gamma (S, B, M): fp32. Grid (S * B * cdiv(D, BLOCK),), blocks of a row beside
    each other. A program reads its block of each of the count + 1 entries once. Accumulates in fp32.
    """
    blocks = tl.cdiv(size, BLOCK)
    row = tl.program_id(0) // blocks
    if not is_active(window, row, batch):
        return
    d = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = d < size
    row = row.to(tl.int64)
    ages = ()
    weights = ()
    for j in tl.static_range(M + 1):
        entry = ((head + M + 1 - j) % (M + 1)).to(tl.int64)
        ages += (tl.load(f_ring + (entry * plane + row * size) + d, mask=inside & (j <= count), other=0.0),)
    for j in tl.static_range(M):
        weights += (tl.load(gamma + row * M + j, mask=j < count, other=0.0),)
    mixed = ages[0]
    for j in tl.static_range(M):
        mixed = tl.where(j < count, mixed - weights[j] * (ages[j] - ages[j + 1]), mixed)
    tl.store(out + row * size + d, mixed, mask=inside)


def launch_size(size: int) -> tuple[int, int]:
    """(BLOCK, warps): blocks no wider than a row needs."""
    block = min(BLOCK, max(32, next_power_of_2(size)))
    return block, max(1, block // 128)


def anderson_mix(
    f_ring: torch.Tensor,  # (m+1, S, B, D)
    head: int,
    count: int,
    gamma: torch.Tensor,  # (S, B, m)
    window: torch.Tensor,  # (B, 2) int64
    out: torch.Tensor,  # (S, B, D), written
) -> None:
    length, steps, batch, size = f_ring.shape
    block, warps = launch_size(size)
    grid = (steps * batch * cdiv(size, block),)
    plane = steps * batch * size
    anderson_mix_kernel[grid](
        f_ring, gamma, window, out, head, count, plane, batch, size, length - 1, block, num_warps=warps
    )
