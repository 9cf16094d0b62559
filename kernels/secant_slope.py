"""The next secant slopes: one small launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import cdiv
from .state import MOMENT_CROSS, MOMENT_SQUARE, MOMENTS

BLOCK = 512


@triton.jit
def secant_slope_kernel(moments, low, high, prior_weight, slope, row, total, BLOCK: tl.constexpr):
    """slope = (<dx, de> / <dx, dx> + prior_weight slope) / (1 + prior_weight), or without a quotient slope, clamped to
    low .. high.

    moments (S, B, K, 2), low, high (S,) float64; slope (S, B, K) fp32; row = B * K. Grid (cdiv(S * B * K, BLOCK),).
    In float64.
    """
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < total
    moments += place.to(tl.int64) * MOMENTS
    cross = tl.load(moments + MOMENT_CROSS, mask=inside, other=0.0)
    square = tl.load(moments + MOMENT_SQUARE, mask=inside, other=0.0)
    before = tl.load(slope + place, mask=inside, other=0.0).to(tl.float64)
    measured = (cross / tl.where(square > 0, square, 1.0) + prior_weight * before) / (1.0 + prior_weight)
    kept = tl.where((square > 0) & (tl.abs(measured) < float("inf")), measured, before)
    least = tl.load(low + place // row, mask=inside, other=0.0)
    most = tl.load(high + place // row, mask=inside, other=0.0)
    kept = tl.where(kept < least, least, tl.where(kept > most, most, kept))
    tl.store(slope + place, kept.to(tl.float32), mask=inside)


def secant_slope(
    moments: torch.Tensor,  # (S, B, K, 2) float64
    low: torch.Tensor,  # (S,) float64
    high: torch.Tensor,  # (S,) float64
    prior_weight: float,
    slope: torch.Tensor,  # (S, B, K), updated
) -> None:
    steps, batch, count = slope.shape
    total = steps * batch * count
    secant_slope_kernel[(cdiv(total, BLOCK),)](moments, low, high, prior_weight, slope, batch * count, total, BLOCK)
