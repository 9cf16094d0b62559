"""The inner products that a new correction adds: one pass over count + 1 entries, and a small sum over blocks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import cdiv, next_power_of_2
from .window import is_active

PARTIALS = 32  # partial sums of each product added at a time


@triton.jit(do_not_specialize=["head"])
def anderson_gram_kernel(
    g_ring,
    window,
    partial,
    head,
    plane,  # S * B * D, from one entry of the ring to the next
    batch,
    size,
    LENGTH: tl.constexpr,  # m + 1
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """partial[s, b, j, c] = <dG_0, dG_j>,  partial[s, b, COUNT + j, c] = <dG_j, g>  over block c,  j < COUNT,
    g = g_ring[head], dG_j = g_ring[head-j] - g_ring[head-j-1].

    g_ring (m+1, S, B, D) fp32, partial (S, B, 2 COUNT, blocks) fp32. Grid (S * B * blocks,), a program is one warp. It
    reads its block of each of the COUNT + 1 entries once. Accumulates in fp32, at most BLOCK elements.
    """
    blocks = tl.cdiv(size, BLOCK)
    chunk = tl.program_id(0) % blocks
    row = tl.program_id(0) // blocks
    if not is_active(window, row, batch):
        return
    d = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = d < size
    row = row.to(tl.int64)
    ages = ()
    for j in tl.static_range(COUNT + 1):
        entry = ((head + LENGTH - j) % LENGTH).to(tl.int64)
        ages += (tl.load(g_ring + (entry * plane + row * size) + d, mask=inside, other=0.0),)
    sums = partial + row * 2 * COUNT * blocks + chunk
    newest = ages[0] - ages[1]
    for j in tl.static_range(COUNT):
        difference = ages[j] - ages[j + 1]
        tl.store(sums + j * blocks, tl.sum(newest * difference))
        tl.store(sums + (COUNT + j) * blocks, tl.sum(ages[0] * difference))


@triton.jit
def anderson_gram_finish_kernel(
    partial,
    window,
    gram,
    rhs,
    batch,
    blocks,
    M: tl.constexpr,
    COUNT: tl.constexpr,
    SIDE: tl.constexpr,  # M, and
    SUMS: tl.constexpr,  # 2 COUNT, to the next powers of two
    PARTIALS: tl.constexpr,
):
    """gram[s, b] moves one place down and right; its row and column 0 and rhs[s, b] are the partial sums, added in
    order and in float64. Zero at ages >= COUNT and outside the window.

    gram (S, B, M, M), rhs (S, B, M) float64, partial (S, B, 2 COUNT, blocks) fp32. Grid (S * B,).
    """
    row = tl.program_id(0)
    active = is_active(window, row, batch)
    row = row.to(tl.int64)
    gram += row * M * M
    rhs += row * M
    i = tl.arange(0, SIDE)[:, None]
    j = tl.arange(0, SIDE)[None, :]
    kept = active & (i >= 1) & (j >= 1) & (i < COUNT) & (j < COUNT)
    shifted = tl.load(gram + (i - 1) * M + (j - 1), mask=kept, other=0.0)
    term = tl.arange(0, SUMS)
    total = tl.zeros([SUMS, PARTIALS], tl.float64)
    for first in range(0, blocks, PARTIALS):
        block = first + tl.arange(0, PARTIALS)[None, :]
        place = partial + (row * 2 * COUNT + term[:, None]) * blocks + block
        wanted = active & (term[:, None] < 2 * COUNT) & (block < blocks)
        total += tl.load(place, mask=wanted, other=0.0).to(tl.float64)
    total = tl.sum(total, 1)
    tl.debug_barrier()  # all of gram has been read
    new = ((i == 0) & (j < COUNT)) | ((j == 0) & (i < COUNT))
    tl.store(gram + i * M + j, shifted, mask=(i < M) & (j < M) & ~new)
    tl.store(gram + term, total, mask=term < COUNT)
    tl.store(gram + term * M, total, mask=(term < COUNT) & (term > 0))
    tl.store(rhs + term - COUNT, total, mask=(term >= COUNT) & (term < 2 * COUNT))
    age = tl.arange(0, SIDE)
    tl.store(rhs + age, tl.zeros([SIDE], tl.float64), mask=(age >= COUNT) & (age < M))


def launch_size(size: int, count: int) -> int:
    """BLOCK: the count + 1 entries of a block fit into the registers of one warp, whose sums need no barrier."""
    return min(512 if count <= 4 else 256, max(32, next_power_of_2(size)))


def anderson_gram(
    g_ring: torch.Tensor,  # (m+1, S, B, D)
    head: int,
    count: int,
    window: torch.Tensor,  # (B, 2) int64
    gram: torch.Tensor,  # (S, B, m, m) float64, updated
    rhs: torch.Tensor,  # (S, B, m) float64, written
) -> None:
    length, steps, batch, size = g_ring.shape
    rows, history = steps * batch, length - 1
    block = launch_size(size, count)
    blocks = cdiv(size, block)
    partial = torch.empty((rows, 2 * count, blocks), dtype=torch.float32, device=g_ring.device)
    anderson_gram_kernel[(rows * blocks,)](
        g_ring, window, partial, head, rows * size, batch, size, length, count, block, num_warps=1
    )
    side, sums = next_power_of_2(history), next_power_of_2(2 * count)
    anderson_gram_finish_kernel[(rows,)](
        partial, window, gram, rhs, batch, blocks, history, count, side, sums, PARTIALS, num_warps=4
    )
