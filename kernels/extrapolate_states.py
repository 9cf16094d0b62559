"""Constant-x0 extrapolation to the steps that come into a window: one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import cdiv, next_power_of_2
from .state import CONSTANT_X0_KEEP, CONSTANT_X0_OF_OUT, CONSTANT_X0_OF_X, CONSTANT_X0_X0_GAIN
from .window import window_of

BLOCK = 512  # four floats, one 16-byte access, per thread and row


@triton.jit
def extrapolate_states_kernel(
    x,
    last_change,
    e,
    z,  # None: no noise
    constant_x0,
    n,
    previous_window,
    window,
    skip,
    steps,
    plane,  # B * D, from one step to the next
    size,
    beta,
    IMPLICIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x[i+1] = keep[i] x[i] + x0_gain[i] x0 + n[i] z[i], last_change[i] = 0,   first <= i < window[b, 1],
    x0 = of_x[l] y + of_out[l] e[l],   first = previous_window[b, 1],   l = first - 1,
    y = x[l] - t last_change[l], implicit: x[l+1] - beta last_change[l].

    t is 0 if l was the first step of its window, 1 if it was the second, else beta; nothing follows an empty window.
    x (S+1, B, D), last_change, e, z (S, B, D), constant_x0 (4, S), n (S,): fp32; previous_window, window (B, 2), skip
    (B,) int64. Grid (B * cdiv(D, BLOCK),), blocks of a sample beside each other; a program goes through the new steps
    of its sample with x[i] and x0 in registers. Accumulates in fp32.
    """
    blocks = tl.cdiv(size, BLOCK)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    d = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = d < size
    begin, first = window_of(previous_window, sample, steps)
    _, end = window_of(window, sample, steps)
    if (first >= end) | (first <= begin) | (tl.load(skip + sample) != 0):
        return
    last = first - 1
    x += sample * size + d
    last_change += sample * size + d
    state = tl.load(x + first * plane, mask=inside, other=0.0)
    y = state
    share, corrected = beta, inside
    if not IMPLICIT:
        y = tl.load(x + last * plane, mask=inside, other=0.0)
        place = first - begin
        share, corrected = tl.where(place == 2, 1.0, beta), inside & (place > 1)
    y -= share * tl.load(last_change + last * plane, mask=corrected, other=0.0)
    of_x = tl.load(constant_x0 + steps * CONSTANT_X0_OF_X + last)
    of_out = tl.load(constant_x0 + steps * CONSTANT_X0_OF_OUT + last)
    x0 = of_x * y + of_out * tl.load(e + last * plane + sample * size + d, mask=inside, other=0.0)
    for i in range(first, end):
        keep = tl.load(constant_x0 + steps * CONSTANT_X0_KEEP + i)
        state = keep * state + tl.load(constant_x0 + steps * CONSTANT_X0_X0_GAIN + i) * x0
        if z is not None:
            state += tl.load(n + i) * tl.load(z + i * plane + sample * size + d, mask=inside, other=0.0)
        tl.store(x + (i + 1) * plane, state, mask=inside)
        tl.store(last_change + i * plane, tl.zeros([BLOCK], tl.float32), mask=inside)


def extrapolate_states(
    x: torch.Tensor,  # (S+1, B, D), updated
    last_change: torch.Tensor,  # (S, B, D), updated
    e: torch.Tensor,  # (S, B, D)
    z: torch.Tensor | None,  # (S, B, D)
    constant_x0: torch.Tensor,  # (4, S)
    n: torch.Tensor,  # (S,)
    previous_window: torch.Tensor,  # (B, 2) int64
    window: torch.Tensor,  # (B, 2) int64
    skip: torch.Tensor,  # (B,) int64
    beta: float,
    implicit: bool,
) -> None:
    steps, batch, size = e.shape
    block = min(BLOCK, max(32, next_power_of_2(size)))
    extrapolate_states_kernel[(batch * cdiv(size, block),)](
        x, last_change, e, z, constant_x0, n, previous_window, window, skip, steps, batch * size, size, beta, implicit,
        block, num_warps=max(1, block // 128),
    )  # fmt: skip
