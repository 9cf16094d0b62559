"""What an iteration reached: one program per sample."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import next_power_of_2


@triton.jit
def update_convergence_kernel(
    norms,
    scale,
    gap,  # None: nothing was filled in
    tolerance,
    rtol,
    contraction,
    growth,
    span,  # steps in a window
    errors,
    window,
    diverged,
    steps,
    batch,
    IMPLICIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """change = max_i |g[i+1]| / min(|x[i+1]|, |x[0]|),  ratio = change / min(last change, 1) within contraction .. 1,
    residual = max_i |r[i+1]| / |x[i+1]| of steps that are not exact now,
    rho = sqrt(ratio last_ratio),  left = change rho / max(1 - rho^2, 0.1), explicit: and no less than residual;
    and the next window. Where outputs were filled in, change is inf, and no step settles from the first of them, `gap`.

    norms (S, B, 3), scale (B,), tolerance (S,), errors (B, 5) float64; window (B, 2), gap, diverged (B,) int64. Grid
    (B,): a program walks its steps BLOCK at a time. In float64, but for the scalars of a launch: fp32.
    """
    sample = tl.program_id(0)
    begin = tl.load(window + 2 * sample)
    end = tl.load(window + 2 * sample + 1)
    if begin >= steps:
        tl.store(diverged + sample, 0)
        return
    exact = begin
    if not IMPLICIT:
        exact = tl.minimum(begin + 1, end)
    known = end
    if gap is not None:
        known = tl.minimum(end, tl.load(gap + sample))
    largest = tl.load(scale + sample)
    change = tl.zeros([BLOCK], tl.float64)
    unsolved = tl.zeros([BLOCK], tl.float64)  # the largest relative residual of an active step that is not exact now
    allowed = tl.zeros([BLOCK], tl.float64)
    finite = tl.full([BLOCK], 1, tl.int32)
    first = tl.zeros([BLOCK], tl.int64) + steps  # the first step that is not settled
    for start in range(0, steps, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < steps
        row = norms + (i.to(tl.int64) * batch + sample) * 3
        residual = tl.load(row, mask=inside, other=0.0)
        correction = tl.load(row + 1, mask=inside, other=0.0)
        state = tl.load(row + 2, mask=inside, other=0.0)
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
        settled = (i < begin) | ((i < known) & (residual <= small * state)) | (i >= steps)
        first = tl.where(settled, first, tl.minimum(first, i))
    last = tl.sqrt(tl.load(norms + ((steps - 1) * batch + sample) * 3 + 1))
    whole = end == steps
    smallest = tl.load(errors + 5 * sample + 3)
    broken = tl.min(finite, 0) == 0
    failed = broken | (whole & (last > growth * smallest))
    reached = tl.where(known == steps, tl.max(change, 0), float("inf"))
    before = tl.load(errors + 5 * sample + 1)
    before = tl.where(before < 1e-300, 1e-300, tl.where(before > 1.0, 1.0, before))
    ratio = reached / before
    ratio = tl.where(ratio < contraction, contraction, tl.where(ratio > 1.0, 1.0, ratio))
    square = ratio * tl.load(errors + 5 * sample + 2)
    left = reached * tl.sqrt(square) / tl.where(square < 0.9, 1.0 - square, 0.1)
    residual_left = tl.max(unsolved, 0)
    if not IMPLICIT:
        left = tl.where(residual_left > left, residual_left, left)
    frontier = tl.where(failed, exact, tl.maximum(tl.min(first, 0), exact))
    most = tl.sum(allowed, 0)
    left = tl.where((frontier >= steps) & (left > most), most, left)
    converged = (frontier >= steps) | ((failed == 0) & (rtol > 0) & (left <= rtol))
    opened = tl.where(converged, steps, frontier)
    tl.store(errors + 5 * sample, left)
    tl.store(errors + 5 * sample + 1, reached)
    tl.store(errors + 5 * sample + 2, ratio)
    tl.store(errors + 5 * sample + 3, tl.where(whole & (last < smallest), last, smallest))
    tl.store(errors + 5 * sample + 4, tl.where(broken, float("inf"), residual_left))
    tl.store(window + 2 * sample, opened)
    tl.store(window + 2 * sample + 1, tl.minimum(opened + span, steps))
    tl.store(diverged + sample, failed.to(tl.int64))


def update_convergence(
    norms: torch.Tensor,  # (S, B, 3) float64
    scale: torch.Tensor,  # (B,) float64
    gap: torch.Tensor | None,  # (B,) int64
    tolerance: torch.Tensor,  # (S,) float64
    rtol: float,
    contraction: float,
    growth: float,
    size: int,
    implicit: bool,
    errors: torch.Tensor,  # (B, 5) float64, updated
    window: torch.Tensor,  # (B, 2) int64, updated
    diverged: torch.Tensor,  # (B,) int64, written
) -> None:
    steps, batch, _ = norms.shape
    block = min(next_power_of_2(steps), 256)
    update_convergence_kernel[(batch,)](
        norms, scale, gap, tolerance, rtol, contraction, growth, size, errors, window, diverged, steps, batch,
        implicit, block, num_warps=1,
    )  # fmt: skip
