"""The inner products that a new correction adds: one pass over count + 1 entries, and a small sum over blocks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import cdiv, next_power_of_2
from .window import is_active

PARTIALS = 32  # partial sums of each product added at a time


@triton.jit(do_not_specialize=["head", "count"])  # they change from iteration to iteration
def anderson_gram_kernel(
    g_ring,
    window,
    partial,
    head,
    count,
    plane,  # S * B * D, from one entry of the ring to the next
    batch,
    size,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """partial[s, b, j, c] = <dG_0, dG_j>,  partial[s, b, M + j, c] = <dG_j, g>  over block c,  j < count,
    g = g_ring[head], dG_j = g_ring[head-j] - g_ring[head-j-1].

    g_ring (M+1, S, B, D) fp32, partial (S, B, 2 M, blocks) fp32. Grid (S * B * blocks,), a program is one warp. It
    reads its block of each of the count + 1 entries once. Accumulates in fp32, at most BLOCK elements.
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
    for j in tl.static_range(M + 1):
        entry = ((head + M + 1 - j) % (M + 1)).to(tl.int64)
        ages += (tl.load(g_ring + (entry * plane + row * size) + d, mask=inside & (j <= count), other=0.0),)
    sums = partial + row * 2 * M * blocks + chunk
    newest = ages[0] - ages[1]
    for j in tl.static_range(M):
        if j < count:
            difference = ages[j] - ages[j + 1]
            tl.store(sums + j * blocks, tl.sum(newest * difference))
            tl.store(sums + (M + j) * blocks, tl.sum(ages[0] * difference))


@triton.jit(do_not_specialize=["count"])
def anderson_gram_finish_kernel(
    partial,
    window,
    gram,
    rhs,
    count,
    batch,
    blocks,
    M: tl.constexpr,
    SIDE: tl.constexpr,  # M, and
    SUMS: tl.constexpr,  # 2 M, to the next powers of two
    PARTIALS: tl.constexpr,
):
    """gram[s, b] moves one place down and right; its row and column 0 and rhs[s, b] are the partial sums, added in
    order and in float64. Zero at ages >= count and outside the window.

    gram (S, B, M, M), rhs (S, B, M) float64, partial (S, B, 2 M, blocks) fp32. Grid (S * B,).
    """
    row = tl.program_id(0)
    active = is_active(window, row, batch)
    row = row.to(tl.int64)
    gram += row * M * M
    rhs += row * M
    i = tl.arange(0, SIDE)[:, None]
    j = tl.arange(0, SIDE)[None, :]
    kept = active & (i >= 1) & (j >= 1) & (i < count) & (j < count)
    shifted = tl.load(gram + (i - 1) * M + (j - 1), mask=kept, other=0.0)
    term = tl.arange(0, SUMS)  # of the first M, those of gram; then those of rhs
    of_gram = term < count
    of_rhs = (term >= M) & (term < M + count)
    total = tl.zeros([SUMS, PARTIALS], tl.float64)
    for first in range(0, blocks, PARTIALS):
        block = first + tl.arange(0, PARTIALS)[None, :]
        place = partial + (row * 2 * M + term[:, None]) * blocks + block
        wanted = active & (of_gram | of_rhs)[:, None] & (block < blocks)
        total += tl.load(place, mask=wanted, other=0.0).to(tl.float64)
    total = tl.sum(total, 1)
    tl.debug_barrier()  # all of gram has been read
    new = ((i == 0) & (j < count)) | ((j == 0) & (i < count))
    tl.store(gram + i * M + j, shifted, mask=(i < M) & (j < M) & ~new)
    tl.store(gram + term, total, mask=of_gram)
    tl.store(gram + term * M, total, mask=of_gram & (term > 0))
    tl.store(rhs + term - M, total, mask=of_rhs)
    age = tl.arange(0, SIDE)
    tl.store(rhs + age, tl.zeros([SIDE], tl.float64), mask=(age >= count) & (age < M))


def launch_size(size: int, history: int) -> int:
    """BLOCK: the history + 1 entries of a block fit into the registers of one warp, whose sums need no barrier."""
    return min(512 if history <= 4 else 256, max(32, next_power_of_2(size)))


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
    block = launch_size(size, history)
    blocks = cdiv(size, block)
    partial = torch.empty((rows, 2 * history, blocks), dtype=torch.float32, device=g_ring.device)
    anderson_gram_kernel[(rows * blocks,)](
        g_ring, window, partial, head, count, rows * size, batch, size, history, block, num_warps=1
    )
    side, sums = next_power_of_2(history), next_power_of_2(2 * history)
    anderson_gram_finish_kernel[(rows,)](
        partial, window, gram, rhs, count, batch, blocks, history, side, sums, PARTIALS, num_warps=4
    )
