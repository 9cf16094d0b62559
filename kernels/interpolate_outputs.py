"""The outputs of steps that were not evaluated, between those of the two evaluated ones around them: one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .bands import band_of
from .launch import cdiv, next_power_of_2
from .state import (
    OUTPUT_PATH_GAIN,
    OUTPUT_PATH_GAIN_LEVEL,
    OUTPUT_PATH_LEVEL,
    OUTPUT_PATH_OF_OUT,
    OUTPUT_PATH_OF_X,
    OUTPUT_PATH_SCALE,
)
from .window import within

BLOCK = 512  # four floats, one 16-byte access, per thread and row


@triton.jit(do_not_specialize=["number"])  # it changes from iteration to iteration
def interpolate_outputs_kernel(x, slope, bands, rows, path, e, number, steps, batch, size, count, BLOCK: tl.constexpr):
    """x0[j] = of_x[j] x[j] + of_out[j] e[j], j = l, r;   x0[i] = (1 - q) x0[l] + q x0[r],
    y = scale[i] (x[l] / scale[l] + (p - p_r) x0[l] + p_r x0[r]),
    e[i] = (x0[i] - of_x[i] y) / of_out[i] + slope[i] (x[i] - y),
    q = (level[i] - level[l]) / (level[r] - level[l]), p = gain[i] - gain[l],
    p_r = (gain_level[i] - gain_level[l] - level[l] p) / (level[r] - level[l]).

    x (S+1, B, D), e (S, B, D), slope (S, B, K): fp32; rows (3, N) int64: of i, l and r; path (6, S) fp64, its rows in
    kernels/state.py. Grid (N * cdiv(D, BLOCK),), blocks of a row beside each other. The coefficients are fp64
    numbers of a program, rounded to fp32, in which the elements are worked on.
    """
    blocks = tl.cdiv(size, BLOCK)
    n = tl.program_id(0) // blocks
    d = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = d < size
    row = within(tl.load(rows + n), steps * batch)
    left = within(tl.load(rows + number + n), steps * batch)
    right = within(tl.load(rows + 2 * number + n), steps * batch)
    i = path + row // batch
    l = path + left // batch  # noqa: E741
    r = path + right // batch
    level_l = tl.load(l + steps * OUTPUT_PATH_LEVEL)
    span = tl.load(r + steps * OUTPUT_PATH_LEVEL) - level_l
    span = tl.where(span == 0.0, float("inf"), span)
    q = (tl.load(i + steps * OUTPUT_PATH_LEVEL) - level_l) / span
    p = tl.load(i + steps * OUTPUT_PATH_GAIN) - tl.load(l + steps * OUTPUT_PATH_GAIN)
    p_r = tl.load(i + steps * OUTPUT_PATH_GAIN_LEVEL) - tl.load(l + steps * OUTPUT_PATH_GAIN_LEVEL)
    p_r = (p_r - level_l * p) / span
    scale = tl.load(i + steps * OUTPUT_PATH_SCALE)
    of_x = tl.load(i + steps * OUTPUT_PATH_OF_X).to(tl.float32)
    of_out = tl.load(i + steps * OUTPUT_PATH_OF_OUT).to(tl.float32)
    bend = tl.load(slope + row * count + band_of(d, bands, count), mask=inside, other=0.0)
    x_l = tl.load(x + left * size + d, mask=inside, other=0.0)
    e_l = tl.load(e + left * size + d, mask=inside, other=0.0)
    x_r = tl.load(x + right * size + d, mask=inside, other=0.0)
    e_r = tl.load(e + right * size + d, mask=inside, other=0.0)
    x0_l = tl.load(l + steps * OUTPUT_PATH_OF_X).to(tl.float32) * x_l
    x0_l += tl.load(l + steps * OUTPUT_PATH_OF_OUT).to(tl.float32) * e_l
    x0_r = tl.load(r + steps * OUTPUT_PATH_OF_X).to(tl.float32) * x_r
    x0_r += tl.load(r + steps * OUTPUT_PATH_OF_OUT).to(tl.float32) * e_r
    y = (scale / tl.load(l + steps * OUTPUT_PATH_SCALE)).to(tl.float32) * x_l
    y += (scale * (p - p_r)).to(tl.float32) * x0_l + (scale * p_r).to(tl.float32) * x0_r
    x0 = (1.0 - q).to(tl.float32) * x0_l + q.to(tl.float32) * x0_r
    output = (x0 - of_x * y) / of_out
    output += bend * (tl.load(x + row * size + d, mask=inside, other=0.0) - y)
    tl.store(e + row * size + d, output, mask=inside)


def interpolate_outputs(
    x: torch.Tensor,  # (S+1, B, D)
    slope: torch.Tensor,  # (S, B, K)
    bands: torch.Tensor,  # (K+1,) int64
    rows: torch.Tensor,  # (3, N) int64
    path: torch.Tensor,  # (6, S) float64
    e: torch.Tensor,  # (S, B, D), updated
) -> None:
    number, (steps, batch, size) = rows.shape[1], e.shape
    if number == 0:
        return
    block = min(BLOCK, max(32, next_power_of_2(size)))
    interpolate_outputs_kernel[(number * cdiv(size, block),)](
        x, slope, bands, rows, path, e, number, steps, batch, size, slope.shape[2], block,
        num_warps=max(1, block // 128),
    )  # fmt: skip
