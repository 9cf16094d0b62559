"""Guesses of the states that steps lead to which come into a window, along the chain with x0 held: one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import cdiv, next_power_of_2

BLOCK = 512  # four floats, one 16-byte access, per thread and row


@triton.jit
def extrapolate_states_kernel(
    x,
    moved,
    e,
    z,  # None: no noise
    held,
    n,
    before,
    window,
    skip,
    steps,
    plane,  # B * D, from one step to the next
    size,
    beta,
    IMPLICIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x[i+1] = keep[i] x[i] + pull[i] x0 + n[i] z[i], moved[i] = 0,   before[b, 1] <= i < window[b, 1],
    x0 = of_x[l] y + of_out[l] e[l],   y = x[l] - t moved[l], implicit: x[l+1] - beta moved[l],   l = before[b, 1] - 1.

    t is 0 if l was the first step of its window, 1 if it was the second, else beta. x (S+1, B, D), moved, e, z
    (S, B, D), held (4, S): keep, pull, of_x, of_out, n (S,): fp32; before, window (B, 2), skip (B,) int64. Grid
    (B * cdiv(D, BLOCK),), blocks of a sample beside each other; a program walks the new steps of its sample with x[i]
    and x0 in registers. Accumulates in fp32.
    """
    blocks = tl.cdiv(size, BLOCK)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    d = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = d < size
    first = tl.load(before + 2 * sample + 1)
    end = tl.load(window + 2 * sample + 1)
    if (first >= end) | (first <= 0) | (tl.load(skip + sample) != 0):
        return
    last = first - 1
    x += sample * size + d
    moved += sample * size + d
    state = tl.load(x + first * plane, mask=inside, other=0.0)
    y = state
    share, corrected = beta, inside
    if not IMPLICIT:
        y = tl.load(x + last * plane, mask=inside, other=0.0)
        place = first - tl.load(before + 2 * sample)
        share, corrected = tl.where(place == 2, 1.0, beta), inside & (place > 1)
    y -= share * tl.load(moved + last * plane, mask=corrected, other=0.0)
    of_x = tl.load(held + 2 * steps + last)
    of_out = tl.load(held + 3 * steps + last)
    x0 = of_x * y + of_out * tl.load(e + last * plane + sample * size + d, mask=inside, other=0.0)
    for i in range(first, end):
        state = tl.load(held + i) * state + tl.load(held + steps + i) * x0
        if z is not None:
            state += tl.load(n + i) * tl.load(z + i * plane + sample * size + d, mask=inside, other=0.0)
        tl.store(x + (i + 1) * plane, state, mask=inside)
        tl.store(moved + i * plane, tl.zeros([BLOCK], tl.float32), mask=inside)


def extrapolate_states(
    x: torch.Tensor,  # (S+1, B, D), updated
    moved: torch.Tensor,  # (S, B, D), updated
    e: torch.Tensor,  # (S, B, D)
    z: torch.Tensor | None,  # (S, B, D)
    held: torch.Tensor,  # (4, S)
    n: torch.Tensor,  # (S,)
    before: torch.Tensor,  # (B, 2) int64
    window: torch.Tensor,  # (B, 2) int64
    skip: torch.Tensor,  # (B,) int64
    beta: float,
    implicit: bool,
) -> None:
    steps, batch, size = e.shape
    block = min(BLOCK, max(32, next_power_of_2(size)))
    extrapolate_states_kernel[(batch * cdiv(size, block),)](
        x, moved, e, z, held, n, before, window, skip, steps, batch * size, size, beta, implicit, block,
        num_warps=max(1, block // 128),
    )  # fmt: skip
