"""What an iteration reached: one program per sample."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import next_power_of_2
from .state import (
    CONVERGENCE,
    CONVERGENCE_CONTRACTION,
    CONVERGENCE_ESTIMATE,
    CONVERGENCE_LAST_CORRECTION,
    CONVERGENCE_RESIDUAL,
    CONVERGENCE_SMALLEST_CORRECTION,
    NORM_CORRECTION,
    NORM_RESIDUAL,
    NORM_STATE,
    NORMS,
)
from .window import window_of

SMALLEST_CHANGE = tl.constexpr(1e-300)  # no last change is taken to be smaller
LEAST_LEFT = tl.constexpr(0.1)  # no contraction is taken to leave less of the error


@triton.jit
def update_convergence_kernel(
    norms,
    scale,
    first_interpolated,  # None: nothing was interpolated
    tolerance,
    rtol,
    best_contraction,
    growth,
    window_size,
    convergence,
    window,
    diverged,
    steps,
    batch,
    IMPLICIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """change = max_i |g[i+1]| / min(|x[i+1]|, |x[0]|),
    ratio = change / min(last change, 1) within best_contraction .. 1,
    residual = max_i |r[i+1]| / |x[i+1]| of steps that are not exact now,
    rho = sqrt(ratio last_ratio),  left = change rho / max(1 - rho^2, 0.1), explicit: and no less than residual;
    and the next window. Where outputs were interpolated, change is inf, and no step converges from the first of them.

    norms (S, B, 3), scale (B,), tolerance (S,), convergence (B, 5) float64; window (B, 2), first_interpolated,
    diverged (B,) int64. Grid (B,): a program takes its steps BLOCK at a time. In float64, but for the scalars of a
    launch: fp32.
    """
    sample = tl.program_id(0)
    begin, end = window_of(window, sample, steps)
    convergence += sample * CONVERGENCE
    if begin >= steps:
        tl.store(diverged + sample, 0)
        return
    exact = begin
    if not IMPLICIT:
        exact = tl.minimum(begin + 1, end)
    known = end
    if first_interpolated is not None:
        known = tl.minimum(end, tl.load(first_interpolated + sample))
    largest = tl.load(scale + sample)
    change = tl.zeros([BLOCK], tl.float64)
    unsolved = tl.zeros([BLOCK], tl.float64)  # the largest relative residual of an active step that is not exact now
    allowed = tl.zeros([BLOCK], tl.float64)
    finite = tl.full([BLOCK], 1, tl.int32)
    first = tl.zeros([BLOCK], tl.int64) + steps  # the first step that has not converged
    for start in range(0, steps, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < steps
        row = norms + (i.to(tl.int64) * batch + sample) * NORMS
        residual = tl.load(row + NORM_RESIDUAL, mask=inside, other=0.0)
        correction = tl.load(row + NORM_CORRECTION, mask=inside, other=0.0)
        state = tl.load(row + NORM_STATE, mask=inside, other=0.0)
        good = (tl.abs(residual) < float("inf")) & (tl.abs(correction) < float("inf")) & (tl.abs(state) < float("inf"))
        finite = tl.where(good, finite, 0)
        residual, correction, state = tl.sqrt(residual), tl.sqrt(correction), tl.sqrt(state)
        # a state that is larger than the noise is taken for an overshoot, not for the scale of the data
        relative = correction / tl.where(state < largest, state, largest)
        change = tl.where(relative > change, relative, change)  # 0 / 0 is not larger
        relative = residual / state
        unsolved = tl.where((i >= exact) & (i < end) & (relative > unsolved), relative, unsolved)
        small = tl.load(tolerance + i, mask=inside, other=0.0)
        allowed += small
        done = (i < begin) | ((i < known) & (residual <= small * state)) | (i >= steps)
        first = tl.where(done, first, tl.minimum(first, i))
    last = tl.sqrt(tl.load(norms + ((steps - 1) * batch + sample) * NORMS + NORM_CORRECTION))
    whole = end == steps
    smallest = tl.load(convergence + CONVERGENCE_SMALLEST_CORRECTION)
    broken = tl.min(finite, 0) == 0
    failed = broken | (whole & (last > growth * smallest))
    reached = tl.where(known == steps, tl.max(change, 0), float("inf"))
    before = tl.load(convergence + CONVERGENCE_LAST_CORRECTION)
    before = tl.where(before < SMALLEST_CHANGE, SMALLEST_CHANGE, tl.where(before > 1.0, 1.0, before))
    ratio = reached / before
    ratio = tl.where(ratio < best_contraction, best_contraction, tl.where(ratio > 1.0, 1.0, ratio))
    square = ratio * tl.load(convergence + CONVERGENCE_CONTRACTION)
    left = reached * tl.sqrt(square) / tl.where(1.0 - square > LEAST_LEFT, 1.0 - square, LEAST_LEFT)
    residual_left = tl.max(unsolved, 0)
    if not IMPLICIT:
        left = tl.where(residual_left > left, residual_left, left)
    frontier = tl.where(failed, exact, tl.maximum(tl.min(first, 0), exact))
    most = tl.sum(allowed, 0)
    left = tl.where((frontier >= steps) & (left > most), most, left)
    converged = (frontier >= steps) | ((failed == 0) & (rtol > 0) & (left <= rtol))
    opened = tl.where(converged, steps, frontier)
    tl.store(convergence + CONVERGENCE_ESTIMATE, left)
    tl.store(convergence + CONVERGENCE_LAST_CORRECTION, reached)
    tl.store(convergence + CONVERGENCE_CONTRACTION, ratio)
    smallest = tl.where(whole & (last < smallest), last, smallest)
    tl.store(convergence + CONVERGENCE_SMALLEST_CORRECTION, smallest)
    tl.store(convergence + CONVERGENCE_RESIDUAL, tl.where(broken, float("inf"), residual_left))
    tl.store(window + 2 * sample, opened)
    tl.store(window + 2 * sample + 1, tl.minimum(opened + window_size, steps))
    tl.store(diverged + sample, failed.to(tl.int64))


def update_convergence(
    norms: torch.Tensor,  # (S, B, 3) float64
    scale: torch.Tensor,  # (B,) float64
    first_interpolated: torch.Tensor | None,  # (B,) int64
    tolerance: torch.Tensor,  # (S,) float64
    rtol: float,
    best_contraction: float,
    growth: float,
    window_size: int,
    implicit: bool,
    convergence: torch.Tensor,  # (B, 5) float64, updated
    window: torch.Tensor,  # (B, 2) int64, updated
    diverged: torch.Tensor,  # (B,) int64, written
) -> None:
    steps, batch, _ = norms.shape
    block = min(next_power_of_2(steps), 256)
    update_convergence_kernel[(batch,)](
        norms, scale, first_interpolated, tolerance, rtol, best_contraction, growth, window_size, convergence, window,
        diverged, steps, batch, implicit, block, num_warps=1,
    )  # fmt: skip
