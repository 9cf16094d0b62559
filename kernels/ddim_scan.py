"""Residual, scan over all steps, update and squared norms: one pass, and a small sum of the norms."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .bands import band_of
from .launch import cdiv, next_power_of_2
from .state import NORM_CORRECTION, NORM_RESIDUAL, NORM_STATE, NORMS
from .window import is_active, window_of

PARTIALS = 128  # partial sums added at a time


@triton.jit
def ddim_scan_kernel(
    x,
    e,
    z,  # None: no noise
    a,
    b,
    c,  # None: no step uses the output of the one before
    n,
    slope,
    bands,
    window,
    beta,
    f,
    g,
    partial,
    steps,
    plane,  # B * D, from one step to the next
    batch,
    size,
    count,  # K
    IMPLICIT: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """p[i] = a[i] x[i] + b[i] e[i] + c[i] e[i-1] + n[i] z[i],  r = p[i] - x[i+1],
    g[i] = (a[i] + b[i] slope[i]) g[i-1] + c[i] slope[i-1] g[i-2] + r,
    f[i] = x[i+1] + beta g[i], and at the first active step f = p, g = r;
    IMPLICIT: g[i] = (a[i] g[i-1] + r) / (1 - b[i] slope[i]), f[i] = x[i+1] + beta g[i] everywhere.

    x (S+1, B, D), z, f, g (S, B, D) fp32, e (S, B, D) fp32, bf16 or fp16, slope (S, B, K) with one factor per band.
    partial (S, B, NORMS, blocks) fp32: |r|^2, |g|^2, |x[i+1]|^2 of each block. Grid (B * blocks,): a program walks the
    active steps of one block, with g and x[i] in fp32 registers; the loads of the next STAGES - 1 steps are under way.

    f may be x[1:]: row i+1 of x has been read when row i of f is written, and no row is read twice.
    """
    blocks = tl.cdiv(size, BLOCK)
    chunk = tl.program_id(0) % blocks
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    begin, end = window_of(window, sample, steps)
    if begin >= end:
        return
    d = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = d < size
    # int64 here, so that its change of layout stays out of the loop over the steps
    band = band_of(d, bands, count).to(tl.int64)
    x += sample * size
    e += sample * size
    f += sample * size
    g += sample * size
    state = tl.load(x + begin * plane + d, mask=inside, other=0.0)
    correction = tl.zeros([BLOCK], tl.float32)
    bent_before = tl.zeros([BLOCK], tl.float32)  # slope[i-1] g[i-2]
    output_before = tl.zeros([BLOCK], tl.float32)
    if c is not None:
        output_before = tl.load(e + (begin - 1) * plane + d, mask=inside & (begin > 0), other=0.0).to(tl.float32)
    for i in tl.range(begin, end, num_stages=STAGES):
        after = tl.load(x + (i + 1) * plane + d, mask=inside, other=0.0)
        output = tl.load(e + i * plane + d, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(b + i)
        bend = tl.load(slope + (i * batch + sample) * count + band, mask=inside, other=0.0)
        growth = tl.load(a + i)
        plain = growth * state + weight * output
        if c is not None:
            lag = tl.load(c + i, mask=i > 0, other=0.0)
            plain += lag * output_before
            output_before = output
        if z is not None:
            plain += tl.load(n + i) * tl.load(z + sample * size + i * plane + d, mask=inside, other=0.0)
        residual = plain - after
        if IMPLICIT:
            correction = (growth * correction + residual) / (1.0 - weight * bend)
            update = after + beta * correction
        elif c is not None:  # at the first step correction and bent_before are zero
            bent = bend * correction
            correction = growth * correction + weight * bent + lag * bent_before + residual
            bent_before = bent
            update = tl.where(i == begin, plain, after + beta * correction)
        else:
            correction = tl.where(i == begin, residual, (growth + weight * bend) * correction + residual)
            update = tl.where(i == begin, plain, after + beta * correction)
        tl.store(g + i * plane + d, correction, mask=inside)
        tl.store(f + i * plane + d, update, mask=inside)
        sums = partial + (i * batch + sample) * NORMS * blocks + chunk
        tl.store(sums + blocks * NORM_RESIDUAL, tl.sum(residual * residual))
        tl.store(sums + blocks * NORM_CORRECTION, tl.sum(correction * correction))
        tl.store(sums + blocks * NORM_STATE, tl.sum(after * after))
        state = after


@triton.jit
def ddim_scan_norms_kernel(partial, window, norms, batch, blocks, PARTIALS: tl.constexpr):
    """norms[i, b, j] = sum of partial[i, b, j, :] in float64 and in order; zero outside the window. Grid (S * B,)."""
    row = tl.program_id(0).to(tl.int64)
    active = is_active(window, row, batch)
    j = tl.arange(0, 4)[:, None]  # the fourth stays empty
    sums = tl.zeros([4, PARTIALS], tl.float64)
    for first in range(0, blocks, PARTIALS):
        block = first + tl.arange(0, PARTIALS)[None, :]
        wanted = active & (j < NORMS) & (block < blocks)
        sums += tl.load(partial + (row * NORMS + j) * blocks + block, mask=wanted, other=0.0).to(tl.float64)
    j = tl.arange(0, 4)
    tl.store(norms + row * NORMS + j, tl.sum(sums, 1), mask=j < NORMS)


def launch_size(batch: int, size: int) -> tuple[int, int]:
    """(BLOCK, STAGES) of a program, which is one warp: its sums then need no barrier.

    The steps of a block come one after the other, so only B * D elements are worked on at a time. Where they are few,
    more programs with more steps of loads under way; where they are many, fewer instructions per byte. 1024 programs
    are about eight per multiprocessor, each with 4 * 3 * 128 bytes under way per stage.
    """
    if size <= 128 or batch * cdiv(size, 128) < 1024:
        return min(128, max(32, next_power_of_2(size))), 8
    return 256, 4


def ddim_scan(
    x: torch.Tensor,  # (S+1, B, D)
    e: torch.Tensor,  # (S, B, D)
    z: torch.Tensor | None,  # (S, B, D)
    a: torch.Tensor,  # (S,)
    b: torch.Tensor,  # (S,)
    c: torch.Tensor | None,  # (S,)
    n: torch.Tensor,  # (S,)
    slope: torch.Tensor,  # (S, B, K)
    bands: torch.Tensor,  # (K+1,) int64
    window: torch.Tensor,  # (B, 2) int64
    beta: float,
    implicit: bool,
    f: torch.Tensor,  # (S, B, D), written
    g: torch.Tensor,  # (S, B, D), written
    norms: torch.Tensor,  # (S, B, 3) float64, written
) -> None:
    steps, batch, size = e.shape
    block, stages = launch_size(batch, size)
    blocks = cdiv(size, block)
    partial = torch.empty((steps, batch, NORMS.value, blocks), dtype=torch.float32, device=x.device)
    ddim_scan_kernel[(batch * blocks,)](
        x, e, z, a, b, c, n, slope, bands, window, beta, f, g, partial, steps, batch * size, batch, size,
        slope.shape[2], implicit, block, stages, num_warps=1,
    )  # fmt: skip
    ddim_scan_norms_kernel[(steps * batch,)](partial, window, norms, batch, blocks, PARTIALS, num_warps=1)
