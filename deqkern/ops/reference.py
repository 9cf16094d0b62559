"""What every op means, in plain torch: the one reference that tests and benches compare with.

Shapes: S steps, B samples, D elements of a flattened sample, K bands, m history size. State i is x[i], i = 0 .. S;
step i leads from x[i] to x[i+1]. `window[b] = (begin, end)` holds the active steps begin <= i < end of sample b, cut to
0 .. S: rows outside it are never read for a result nor written (norms, moments, gram, rhs and gamma are set to zero
there).

A signature is the op's contract (deqkern/ops/contract.py), from which its validation, schema and calls are made; the
ops are the functions in `__all__`. Every function writes into the tensors it is given and returns nothing. Arithmetic
is in the dtype of the state, so the same text is the float64 reference when it is called with float64 tensors. Nothing
here calls another op.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from . import state
from .contract import AtLeast, Bands, Between, Float64, Index, Int64, OneOf, Output, Overloads, State, Window

__all__ = [
    "anderson_gram",
    "anderson_mix",
    "anderson_solve",
    "band_moments",
    "dct2",
    "ddim_scan",
    "extrapolate_states",
    "interpolate_outputs",
    "secant_slope",
    "update_convergence",
]

SCOPES = ("row", "causal", "joint")
# Eigenvalues of a system of `anderson_solve` below this, relative to the largest, are taken for zero.
SMALLEST_EIGENVALUE = 1e-12
# No last change of `update_convergence` is taken to be smaller, and no contraction to leave less of the error.
SMALLEST_CHANGE, LEAST_LEFT = 1e-300, 0.1


def _cut(window: Tensor, steps: int) -> Tensor:
    return window.clamp(0, steps)


def _active(window: Tensor, steps: int) -> Tensor:  # (S, B) bool
    index = torch.arange(steps, device=window.device)[:, None]
    return (index >= window[:, 0]) & (index < window[:, 1])


def _widths(bands: Tensor, size: int) -> Tensor:
    """The widths (K,) of bands (K+1,); ValueError unless they go from 0 to `size` and do not decrease."""
    widths = bands.diff()
    if bool((bands[0] != 0) | (bands[-1] != size) | (widths < 0).any()):
        raise ValueError(f"bands must go from 0 to {size} and not decrease, got {bands.tolist()}")
    return widths


def _check_index(name: str, index: Tensor, below: int) -> None:
    if bool(((index < 0) | (index >= below)).any()):
        raise ValueError(f"{name} must be within 0 .. {below - 1}")


def dct2(
    image: Annotated[Tensor, Output("N, C, H, W", written="inverse")],
    spectrum: Annotated[Tensor, State("R, C*H*W", written="forward")],
    rows: Annotated[Tensor, Index("N", below="R")],  # the row of `spectrum` that belongs to each image
    dct_h: Annotated[Tensor, State("H, H")],  # orthonormal, row k even or odd about its middle, as k is
    dct_w: Annotated[Tensor, State("W, W")],  # the same
    colour: Annotated[Tensor | None, State("C, C")],  # orthonormal; None: the channels stay as they are
    order: Annotated[Tensor, Index("C*H*W", below="C*H*W")],  # a permutation: coefficient order[k] is stored at place k
    place: Annotated[Tensor, Index("C*H*W", below="C*H*W")],  # its inverse: for those who write where they compute
    inverse: Annotated[bool, Overloads(("forward", "inverse"))],
) -> None:
    """Orthonormal 2-D DCT-II of every channel, colour transform, and band order; or the inverse of all three.

    Forward, writes `spectrum[rows]`:  y[n, c] = sum_d colour[c, d] dct_h image[n, d] dct_w^T,
                                       spectrum[rows[n], k] = y[n].flat[order[k]].
    Inverse, writes `image`: the transposed maps in reverse order.
    """
    _check_index("rows", rows, len(spectrum))
    _check_index("order", order, len(order))
    if inverse:
        y = torch.empty_like(image, dtype=spectrum.dtype)
        y.flatten(1)[:, order] = spectrum[rows]
        image.copy_(dct_h.mT @ (y if colour is None else torch.einsum("cd,nchw->ndhw", colour, y)) @ dct_w)
    else:
        y = dct_h @ image.to(spectrum.dtype) @ dct_w.mT
        y = y if colour is None else torch.einsum("cd,ndhw->nchw", colour, y)
        spectrum[rows] = y.flatten(1)[:, order]


def ddim_scan(
    x: Annotated[Tensor, State("S+1, B, D")],
    e: Annotated[Tensor, Output("S, B, D")],  # the model's output at x[:-1], implicit: at x[1:]
    z: Annotated[Tensor | None, State("S, B, D")],  # the noise of each step
    a: Annotated[Tensor, State("S")],
    b: Annotated[Tensor, State("S")],
    c: Annotated[Tensor | None, State("S", none_if="implicit")],  # of the output of the step before; None: it has none
    n: Annotated[Tensor, State("S")],
    slope: Annotated[Tensor, State("S, B, K")],
    bands: Annotated[Tensor, Bands("K+1")],  # band k holds the elements bands[k] .. bands[k+1]-1
    window: Annotated[Tensor, Window("B, 2")],
    beta: float,
    implicit: bool,
    f: Annotated[Tensor, State("S, B, D", written=True)],  # may be x[1:]
    g: Annotated[Tensor, State("S, B, D", written=True)],
    norms: Annotated[Tensor, Float64("S, B, 3", written=True)],  # state.Norms
) -> None:
    """Residual, scan over all steps with one slope per band, update and squared norms, in one pass.

        p[i] = a[i] x[i] + b[i] e[i] + c[i] e[i-1] + n[i] z[i]                          r[i+1] = p[i] - x[i+1]
        g[i+1] = (a[i] + b[i] slope[i]) g[i] + c[i] slope[i-1] g[i-1] + r[i+1],         g[begin] = g[begin-1] = 0
        f[i+1] = x[i+1] + beta g[i+1],                                                  f[begin+1] = p[begin]
        norms[i] = |r[i+1]|^2, |g[i+1]|^2, |x[i+1]|^2

    c is that of a two-step method: e[begin-1] is read then, outside the window; c[0] is not looked at.

    Implicit, where step i takes the model's output at its own end x[i+1]: the same but for

        g[i+1] = (a[i] g[i] + r[i+1]) / (1 - b[i] slope[i]),     f[i+1] = x[i+1] + beta g[i+1] everywhere.

    Index i of f, g and norms holds the value that belongs to state i+1. All of x is read before f is written.
    A chain that runs the other way is one of these two with its steps in the other order: inversion, which knows the
    end, is implicit with a' = 1/a, b' = -b/a, n' = -n/a; the transposed chain of a gradient is explicit, same a and b.
    Neither has c.
    """
    steps, widths = len(e), _widths(bands, x.shape[-1])
    window = _cut(window, steps)
    active = _active(window, steps)
    before = x.clone()
    correction = torch.zeros_like(before[0])
    bent = torch.zeros_like(correction)  # slope[i-1] g[i-1], the change of the output before
    norms.zero_()
    for i in range(steps):
        plain = a[i] * before[i] + b[i] * e[i].to(x.dtype)
        if c is not None and i > 0:
            plain = plain + c[i] * e[i - 1].to(x.dtype)
        if z is not None:
            plain = plain + n[i] * z[i]
        residual = plain - before[i + 1]
        bend = torch.repeat_interleave(slope[i], widths, dim=-1)  # (B, D)
        first = (window[:, 0] == i)[:, None]  # (B, 1)
        correction, bent = torch.where(first, 0.0, correction), torch.where(first, 0.0, bent)
        if implicit:
            correction = (a[i] * correction + residual) / (1 - b[i] * bend)
            update = before[i + 1] + beta * correction
        else:
            bent_before, bent = bent, bend * correction
            correction = a[i] * correction + b[i] * bent + residual
            if c is not None and i > 0:
                correction = correction + c[i] * bent_before
            update = torch.where(first, plain, before[i + 1] + beta * correction)
        rows = active[i]
        g[i, rows] = correction[rows]
        f[i, rows] = update[rows]
        found = state.Norms(residual, correction, before[i + 1])
        for norm, vector in zip(state.Norms.view(norms), found, strict=True):
            norm[i, rows] = vector[rows].double().square().sum(-1)


def band_moments(
    dx: Annotated[Tensor, State("S, B, D")],  # the last change of x[:-1]
    e: Annotated[Tensor, Output("S, B, D")],
    e_prev: Annotated[Tensor, Output("S, B, D")],  # the model's output before that change
    bands: Annotated[Tensor, Bands("K+1")],
    window: Annotated[Tensor, Window("B, 2")],
    moments: Annotated[Tensor, Float64("S, B, K, 2", written=True)],  # state.Moments
) -> None:
    """moments[i, b, k] = <dx, e - e_prev>, <dx, dx> over band k: what a secant slope is made of (Barzilai-Borwein)."""
    active, widths = _active(window, e.shape[0]), _widths(bands, dx.shape[-1])
    de = e.to(dx.dtype) - e_prev.to(dx.dtype)
    moments.zero_()
    band = torch.repeat_interleave(widths)  # (D,)
    products = state.Moments(dx.double() * de, dx.double().square())
    for moment, product in zip(state.Moments.view(moments), products, strict=True):
        moment[active] = torch.zeros_like(moment).index_add_(-1, band, product)[active]


def secant_slope(
    moments: Annotated[Tensor, Float64("S, B, K, 2")],  # of band_moments
    low: Annotated[Tensor, Float64("S")],
    high: Annotated[Tensor, Float64("S")],
    prior_weight: Annotated[float, AtLeast(0.0)],  # of the slope until now, relative to that of what was measured
    slope: Annotated[Tensor, State("S, B, K", written=True)],
) -> None:
    """The next secant slopes: (<dx, de> / <dx, dx> + prior_weight slope) / (1 + prior_weight).

    Where dx is zero, or the quotient not finite, the slope stays what it was. All are clamped to low .. high.
    """
    cross, square = state.Moments.view(moments)
    measured = (cross / square + prior_weight * slope) / (1 + prior_weight)
    kept = torch.where((square > 0) & measured.isfinite(), measured, slope.double())
    slope.copy_(torch.minimum(torch.maximum(kept, low[:, None, None]), high[:, None, None]))


def interpolate_outputs(
    x: Annotated[Tensor, State("S+1, B, D")],
    slope: Annotated[Tensor, State("S, B, K")],
    bands: Annotated[Tensor, Bands("K+1")],
    rows: Annotated[Tensor, Index("3, N", below="S*B")],  # i * B + b: of a step not evaluated, and of l and r
    path: Annotated[Tensor, Float64("6, S")],  # state.OutputPath
    e: Annotated[Tensor, State("S, B, D", written=True)],
) -> None:
    """The outputs of steps i that were not evaluated, from those of steps l < i < r of the same sample that were.

    x0 is taken to be linear in `level` between l and r, and the state y to lie on the chain that then begins at x[l]:

        x0[j] = of_x[j] x[j] + of_out[j] e[j],      j = l, r
        q = (level[i] - level[l]) / (level[r] - level[l]),      0 / 0 is 0
        x0[i] = (1 - q) x0[l] + q x0[r]
        p = gain[i] - gain[l],      p_r = (gain_level[i] - gain_level[l] - level[l] p) / (level[r] - level[l])
        y = scale[i] (x[l] / scale[l] + (p - p_r) x0[l] + p_r x0[r])
        e[i] = (x0[i] - of_x[i] y) / of_out[i] + slope[i] (x[i] - y)

    rows[:, n] are the rows of i, l and r; no i is an l or r. With the steps x[i+1] = keep[i] x[i] + x0_gain[i] x0[i],
    scale[i] is the product of keep[j], gain[i] the sum of x0_gain[j] / scale[j+1], and gain_level[i] the sum of that
    times level[j], over j < i.
    """
    _check_index("rows", rows, e.shape[0] * e.shape[1])
    at, left, right = rows
    batch, widths = x.shape[1], _widths(bands, x.shape[2])
    scale, gain, gain_level, level, of_x, of_out = state.OutputPath.view(path)
    i, l, r = at // batch, left // batch, right // batch  # noqa: E741
    span = torch.where(level[r] == level[l], torch.inf, level[r] - level[l])
    q, p = (level[i] - level[l]) / span, gain[i] - gain[l]
    p_r = (gain_level[i] - gain_level[l] - level[l] * p) / span
    coefficients = [1 - q, q, scale[i] / scale[l], scale[i] * (p - p_r), scale[i] * p_r, of_x[i], of_out[i]]
    q_l, q_r, ratio, gain_l, gain_r, of_x_i, of_out_i = (value[:, None].to(x.dtype) for value in coefficients)
    states, outputs = x.flatten(0, 1), e.view(-1, e.shape[2])

    def x0(row: Tensor, step: Tensor) -> Tensor:
        return of_x[step, None].to(x.dtype) * states[row] + of_out[step, None].to(x.dtype) * outputs[row]

    x0_l, x0_r = x0(left, l), x0(right, r)
    y = ratio * states[left] + gain_l * x0_l + gain_r * x0_r
    bend = torch.repeat_interleave(slope.flatten(0, 1)[at], widths, dim=-1)  # (N, D)
    outputs[at] = (q_l * x0_l + q_r * x0_r - of_x_i * y) / of_out_i + bend * (states[at] - y)


def extrapolate_states(
    x: Annotated[Tensor, State("S+1, B, D", written=True)],
    last_change: Annotated[Tensor, State("S, B, D", written=True)],  # of the states that the model was called at
    e: Annotated[Tensor, State("S, B, D")],  # the model's output before that change
    z: Annotated[Tensor | None, State("S, B, D")],
    constant_x0: Annotated[Tensor, State("4, S")],  # state.ConstantX0
    n: Annotated[Tensor, State("S")],
    previous_window: Annotated[Tensor, Window("B, 2")],  # that of the last change
    window: Annotated[Tensor, Window("B, 2")],  # the one that follows
    skip: Annotated[Tensor, Int64("B")],  # not 0 for a sample that stays as it is
    beta: float,
    implicit: bool,
) -> None:
    """Constant-x0 extrapolation to the steps that come into a window, previous_window[b, 1] <= i < window[b, 1].

        x[i+1] = keep[i] x[i] + x0_gain[i] x0 + n[i] z[i],     last_change[i] = 0
        x0 = of_x[l] y + of_out[l] e[l],                       l = previous_window[b, 1] - 1, its last step
        y = x[l] - t last_change[l], implicit: x[l+1] - beta last_change[l]       the state that the model was called at

    t is the share of its correction by which step l changed: 0 if it was the first of its window, 1 if the second, else
    beta. Nothing follows an empty window.
    """
    keep, x0_gain, of_x, of_out = state.ConstantX0.view(constant_x0)
    samples = torch.arange(x.shape[1], device=x.device)
    window = _cut(window, len(e))
    begin, end = _cut(previous_window, len(e)).unbind(1)
    last, place = (end - 1).clamp_min(0), end - begin
    share = torch.where(place == 1, 0.0, torch.where(place == 2, 1.0, beta)).to(x.dtype)
    share = torch.full_like(share, beta) if implicit else share
    correction = torch.where(share[:, None] == 0, 0.0, last_change[last, samples])
    y = x[last + int(implicit), samples] - share[:, None] * correction
    x0 = of_x[last, None] * y + of_out[last, None] * e[last, samples]
    for i in range(len(e)):
        new = ((i >= end) & (i < window[:, 1]) & (begin < end) & (skip == 0))[:, None]  # (B, 1)
        guess = keep[i] * x[i] + x0_gain[i] * x0
        if z is not None:
            guess = guess + n[i] * z[i]
        x[i + 1] = torch.where(new, guess, x[i + 1])
        last_change[i] = torch.where(new, 0.0, last_change[i])


def anderson_gram(
    g_ring: Annotated[Tensor, State("m+1, S, B, D")],  # the last corrections
    head: Annotated[int, Between(0, "m")],  # the newest is g_ring[head], the next g_ring[head-1], around the ring
    count: Annotated[int, Between(1, "m")],  # differences that exist
    window: Annotated[Tensor, Window("B, 2")],
    gram: Annotated[Tensor, Float64("S, B, m, m", written=True)],
    rhs: Annotated[Tensor, Float64("S, B, m", written=True)],
) -> None:
    """The inner products that a new correction adds. Index j counts ages: dG_0 is the newest difference.

    gram moves one place down and right, then  gram[0, j] = gram[j, 0] = <dG_0, dG_j>;   rhs[j] = <dG_j, g>,
    dG_j = g_ring[head-j] - g_ring[head-j-1], j < count. Entries of age >= count are zero.
    """
    size = g_ring.shape[0]
    active = _active(window, gram.shape[0])
    ages = [g_ring[(head - j) % size] for j in range(count + 1)]
    differences = torch.stack([(ages[j] - ages[j + 1]).double() for j in range(count)])  # (count, S, B, D)
    row = (differences[0] * differences).sum(-1).permute(1, 2, 0)  # (S, B, count)
    right = (differences * ages[0].double()).sum(-1).permute(1, 2, 0)
    shifted = torch.zeros_like(gram)
    shifted[..., 1:, 1:] = gram[..., :-1, :-1]
    shifted[..., 0, :count] = row
    shifted[..., :count, 0] = row
    shifted[..., count:, :] = 0
    shifted[..., :, count:] = 0
    gram.copy_(torch.where(active[..., None, None], shifted, torch.zeros_like(gram)))
    rhs.zero_()
    rhs[..., :count] = torch.where(active[..., None], right, torch.zeros_like(right))


def anderson_solve(
    gram: Annotated[Tensor, Float64("S, B, m, m")],
    rhs: Annotated[Tensor, Float64("S, B, m")],
    window: Annotated[Tensor, Window("B, 2")],
    scope: Annotated[str, OneOf(SCOPES)],
    ridge: Annotated[float, AtLeast(0.0)],  # relative to the mean of the diagonal
    ridge_absolute: Annotated[float, AtLeast(0.0)],
    implicit: bool,
    gamma: Annotated[Tensor, State("S, B, m", written=True)],
) -> None:
    """Batched least squares:  gamma = argmin |g - dG gamma|^2 + (ridge mean(diag A) + ridge_absolute) |gamma|^2.

    A and the right-hand side are the sums of gram and rhs over the scope of step i: `row` i alone, `causal` all steps
    up to i, `joint` all steps. A row with an entry that is not finite is left out of every sum. A singular or
    indefinite system gives the minimum-norm answer of its well-determined part (eigenvalues above 1e-12 of the
    largest); what is not finite becomes zero. The first active step gets zero unless the chain is `implicit`: it takes
    the plain step, and is exact. The mean of the diagonal is taken over its non-zero entries.
    """
    steps = gram.shape[0]
    window = _cut(window, steps)
    active = _active(window, steps)
    finite = gram.isfinite().all(-1).all(-1) & rhs.isfinite().all(-1) & active
    matrix = torch.where(finite[..., None, None], gram.double(), 0.0)
    right = torch.where(finite[..., None], rhs.double(), 0.0)
    scale = matrix.abs().amax((0, 2, 3)).clamp_min(right.abs().amax((0, 2)))  # (B,)
    exponent = torch.where(scale > 0, scale.log2().floor(), torch.zeros_like(scale)).clamp(-1000, 1000)
    absolute = torch.exp2(-exponent) * ridge_absolute
    matrix = torch.ldexp(matrix, -exponent[:, None, None])
    right = torch.ldexp(right, -exponent[:, None])
    if scope == "causal":
        matrix, right = matrix.cumsum(0), right.cumsum(0)
    elif scope == "joint":
        matrix, right = matrix.sum(0, keepdim=True).expand_as(matrix), right.sum(0, keepdim=True).expand_as(right)
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.sum(-1) / (diagonal != 0).sum(-1).clamp_min(1)
    shift = ridge * mean + absolute
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    eigenvalues = eigenvalues + shift[..., None]
    kept = eigenvalues > SMALLEST_EIGENVALUE * eigenvalues.abs().amax(-1, keepdim=True)
    weights = torch.where(kept, 1 / torch.where(kept, eigenvalues, 1.0), 0.0)
    answer = (vectors @ (weights[..., None] * (vectors.mT @ right[..., None])))[..., 0].to(gamma.dtype)
    index = torch.arange(steps, device=window.device)[:, None]
    usable = active if implicit else active & (index > window[:, 0])
    gamma.copy_(torch.where(usable[..., None] & answer.isfinite(), answer, 0.0))


def anderson_mix(
    f_ring: Annotated[Tensor, State("m+1, S, B, D")],  # the last updates x + beta g
    head: Annotated[int, Between(0, "m")],
    count: Annotated[int, Between(0, "m")],
    gamma: Annotated[Tensor, State("S, B, m")],  # index j counts ages
    window: Annotated[Tensor, Window("B, 2")],
    out: Annotated[Tensor, State("S, B, D", written=True)],  # x[1:]
) -> None:
    """Type-II Anderson mixing (Walker, Ni 2011): out = f_ring[head] - sum_j gamma[j] dF_j over the ages j < count.

    dF_j = f_ring[head-j] - f_ring[head-j-1] = dU_j + beta dG_j, so with f = x + beta g this is
    x + beta g - (dU + beta dG) gamma.
    """
    size = f_ring.shape[0]
    active = _active(window, out.shape[0])
    mixed = f_ring[head].clone()
    for j in range(count):
        difference = f_ring[(head - j) % size] - f_ring[(head - j - 1) % size]
        mixed -= gamma[..., j, None].to(mixed.dtype) * difference
    out[active] = mixed[active]


def update_convergence(
    norms: Annotated[Tensor, Float64("S, B, 3")],  # state.Norms, of ddim_scan
    scale: Annotated[Tensor, Float64("B")],  # |x[0]|
    first_interpolated: Annotated[Tensor | None, Int64("B")],  # step whose output was interpolated; None: none was
    tolerance: Annotated[Tensor, Float64("S")],  # a step whose relative residual is not above it has converged
    rtol: Annotated[float, AtLeast(0.0)],
    best_contraction: Annotated[float, AtLeast(0.0)],  # from one iteration to the next: none is believed to be better
    growth: Annotated[float, AtLeast(0.0)],  # a last correction larger than this times the smallest before diverges
    window_size: Annotated[int, Between(1, "S")],
    implicit: bool,
    convergence: Annotated[Tensor, Float64("B, 5", written=True)],  # state.Convergence
    window: Annotated[Tensor, Window("B, 2", written=True)],  # begin = S is a sample that has converged
    diverged: Annotated[Tensor, Int64("B", written=True)],  # 1 or 0
) -> None:
    """What an iteration reached: the error that is left in each sample, and the steps that stay in its window.

        change = max_i |g[i+1]| / min(|x[i+1]|, |x[0]|)             inf while not all of the chain was evaluated
        ratio = change / min(last change, 1), clamped to best_contraction .. 1
        residual = max_i |r[i+1]| / |x[i+1]|                        of steps that are not exact now; inf if not finite
        rho = sqrt(ratio last_ratio),     left = change rho / max(1 - rho^2, 0.1); explicit: and no less than residual

    0 / 0 is 0, and anything else over 0 is inf; |x[0]| may be inf.

    `left` is what a contraction by rho, rho^2, rho^2, .. from now on would still bring: between a linear and a
    superlinear end. The new window begins at the first step that has not converged, |r[i+1]| > tolerance[i] |x[i+1]|,
    but past the first active step of an explicit chain, which took the plain step and is exact. A sample has converged
    when its window is empty, then with no more left than all tolerances together, or left <= rtol, rtol > 0. It
    diverged if a norm is not finite, or by `growth`, and keeps what is exact. Samples that had converged before keep
    everything. From the first interpolated step on, which is never a window's first one, no step converges; it is S or
    beyond where all outputs were evaluated.
    """
    steps = norms.shape[0]
    residual, correction, size = state.Norms.view(norms.sqrt())  # (S, B) each
    before = state.Convergence.view(convergence)
    begin, end = _cut(window, steps).unbind(1)
    active, whole = begin < steps, end == steps
    known = end if first_interpolated is None else torch.minimum(first_interpolated, end)
    index = torch.arange(steps, device=norms.device)[:, None]
    relative = correction / torch.where(size < scale, size, scale)
    change = torch.where(known == steps, relative.nan_to_num(0.0, torch.inf).amax(0), torch.inf)
    ratio = (change / before.last_correction.clamp(SMALLEST_CHANGE, 1.0)).clamp(best_contraction, 1.0)
    rho = (ratio * before.contraction).sqrt()
    left = change * rho / (1 - rho.square()).clamp_min(LEAST_LEFT)
    finite = norms.isfinite().all(-1).all(0)
    failed = active & (~finite | (whole & (correction[-1] > growth * before.smallest_correction)))
    exact = begin if implicit else torch.minimum(begin + 1, end)
    done = (index < begin) | ((index < known) & (residual <= tolerance[:, None] * size))
    frontier = torch.maximum(done.long().cumprod(0).sum(0), exact)
    frontier = torch.where(failed, exact, frontier)
    counted = (index >= exact) & (index < end)
    unsolved = torch.where(counted, (residual / size).nan_to_num(0.0, torch.inf), 0.0).amax(0)
    left = left if implicit else torch.maximum(left, unsolved)
    left = torch.where(frontier >= steps, left.clamp_max(tolerance.sum()), left)
    converged = (frontier >= steps) | (~failed & (rtol > 0) & (left <= rtol))
    opened = torch.where(converged, steps, frontier)
    smallest = torch.where(whole, torch.fmin(before.smallest_correction, correction[-1]), before.smallest_correction)
    unsolved = torch.where(finite, unsolved, torch.inf)
    now = torch.stack(state.Convergence(left, change, ratio, smallest, unsolved), 1)
    diverged.copy_(failed)
    convergence.copy_(torch.where(active[:, None], now, convergence))
    window.copy_(
        torch.where(active[:, None], torch.stack([opened, (opened + window_size).clamp_max(steps)], 1), window)
    )
