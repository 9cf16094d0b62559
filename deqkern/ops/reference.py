"""What every op means, in plain torch: the one reference that tests and benches compare with.

Shapes: S steps, B samples, D elements of a flattened sample, K bands, m history size. State i is x[i], i = 0 .. S;
step i leads from x[i] to x[i+1]. `window[b] = (begin, end)` holds the active steps begin <= i < end of sample b:
rows outside it are never read for a result nor written (norms, moments, gram, rhs and gamma are set to zero there).

Every function writes into the tensors it is given and returns nothing. Arithmetic is in the dtype of the state, so
the same text is the float64 reference when it is called with float64 tensors. Nothing here calls another op.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCOPES = ("row", "causal", "anticausal", "joint")


def _active(window: Tensor, steps: int) -> Tensor:  # (S, B) bool
    index = torch.arange(steps, device=window.device)[:, None]
    return (index >= window[:, 0]) & (index < window[:, 1])


def dct2(
    image: Tensor,  # (N, C, H, W)
    spectrum: Tensor,  # (R, C*H*W)
    rows: Tensor,  # (N,) int64, the row of `spectrum` that belongs to each image
    dct_h: Tensor,  # (H, H) orthonormal, row k even or odd about its middle, as k is
    dct_w: Tensor,  # (W, W), the same
    colour: Tensor | None,  # (C, C) orthonormal; None: no rotation
    order: Tensor,  # (C*H*W,) int64, a permutation: coefficient order[k] is stored at place k
    place: Tensor,  # (C*H*W,) int64, its inverse: for those who write where they compute
    inverse: bool,
) -> None:
    """Orthonormal 2-D DCT-II of every channel, colour rotation, and band order; or the inverse of all three.

    Forward, writes `spectrum[rows]`:  y[n, c] = sum_d colour[c, d] dct_h image[n, d] dct_w^T,
                                       spectrum[rows[n], k] = y[n].flat[order[k]].
    Inverse, writes `image`: the transposed maps in reverse order.
    """
    if inverse:
        y = torch.empty_like(image, dtype=spectrum.dtype)
        y.flatten(1)[:, order] = spectrum[rows]
        image.copy_(dct_h.mT @ (y if colour is None else torch.einsum("cd,nchw->ndhw", colour, y)) @ dct_w)
    else:
        y = dct_h @ image.to(spectrum.dtype) @ dct_w.mT
        y = y if colour is None else torch.einsum("cd,ndhw->nchw", colour, y)
        spectrum[rows] = y.flatten(1)[:, order]


def ddim_scan(
    x: Tensor,  # (S+1, B, D)
    e: Tensor,  # (S, B, D), the model's output at x[:-1], implicit: at x[1:]
    z: Tensor | None,  # (S, B, D), the noise of each step
    a: Tensor,  # (S,)
    b: Tensor,  # (S,)
    c: Tensor | None,  # (S,), of the output of the step before; None: no step uses it
    n: Tensor,  # (S,)
    slope: Tensor,  # (S, B, K)
    bands: Tensor,  # (K+1,) int64, band k holds the elements bands[k] .. bands[k+1]-1
    window: Tensor,  # (B, 2) int64
    beta: float,
    implicit: bool,
    f: Tensor,  # (S, B, D), written; may be x[1:]
    g: Tensor,  # (S, B, D), written
    norms: Tensor,  # (S, B, 3) float64, written
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
    steps = len(e)
    active = _active(window, steps)
    state = x.clone()
    widths = bands[1:] - bands[:-1]
    correction = torch.zeros_like(state[0])
    bent = torch.zeros_like(correction)  # slope[i-1] g[i-1], the change of the output before
    norms.zero_()
    for i in range(steps):
        plain = a[i] * state[i] + b[i] * e[i].to(x.dtype)
        if c is not None and i > 0:
            plain = plain + c[i] * e[i - 1].to(x.dtype)
        if z is not None:
            plain = plain + n[i] * z[i]
        residual = plain - state[i + 1]
        bend = torch.repeat_interleave(slope[i], widths, dim=-1)  # (B, D)
        first = (window[:, 0] == i)[:, None]  # (B, 1)
        correction, bent = torch.where(first, 0.0, correction), torch.where(first, 0.0, bent)
        if implicit:
            correction = (a[i] * correction + residual) / (1 - b[i] * bend)
            update = state[i + 1] + beta * correction
        else:
            bent_before, bent = bent, bend * correction
            correction = a[i] * correction + b[i] * bent + residual
            if c is not None and i > 0:
                correction = correction + c[i] * bent_before
            update = torch.where(first, plain, state[i + 1] + beta * correction)
        rows = active[i]
        g[i, rows] = correction[rows]
        f[i, rows] = update[rows]
        for j, vector in enumerate((residual, correction, state[i + 1])):
            norms[i, rows, j] = vector[rows].double().square().sum(-1)


def band_moments(
    dx: Tensor,  # (S, B, D), the last change of x[:-1]
    e: Tensor,  # (S, B, D)
    e_prev: Tensor,  # (S, B, D), the model's output before that change
    bands: Tensor,  # (K+1,) int64
    window: Tensor,  # (B, 2) int64
    moments: Tensor,  # (S, B, K, 2) float64, written
) -> None:
    """moments[i, b, k] = <dx, e - e_prev>, <dx, dx> over band k: what a secant slope is made of (Barzilai-Borwein)."""
    active = _active(window, e.shape[0])
    de = e.to(dx.dtype) - e_prev.to(dx.dtype)
    moments.zero_()
    band = torch.repeat_interleave(bands.diff())  # (D,)
    for j, product in enumerate((dx.double() * de, dx.double().square())):
        sums = torch.zeros_like(moments[..., j]).index_add_(-1, band, product)
        moments[..., j][active] = sums[active]


def secant_slope(
    moments: Tensor,  # (S, B, K, 2) float64, of band_moments
    low: Tensor,  # (S,) float64
    high: Tensor,  # (S,) float64
    pull: float,
    slope: Tensor,  # (S, B, K), updated
) -> None:
    """The next secant slopes: (<dx, de> / <dx, dx> + pull slope) / (1 + pull), held within low .. high.

    Where dx is zero, or the quotient not finite, the slope stays what it was, held within low .. high.
    """
    cross, square = moments.unbind(-1)
    measured = (cross / square + pull * slope) / (1 + pull)
    kept = torch.where((square > 0) & measured.isfinite(), measured, slope.double())
    slope.copy_(torch.minimum(torch.maximum(kept, low[:, None, None]), high[:, None, None]))


def interpolate_outputs(
    x: Tensor,  # (S+1, B, D)
    slope: Tensor,  # (S, B, K)
    bands: Tensor,  # (K+1,) int64
    rows: Tensor,  # (3, N) int64, i * B + b: of a step that was not evaluated, and of the two around it that were
    path: Tensor,  # (6, S) float64: scale, pulls, lifts, level, of_x, of_out
    e: Tensor,  # (S, B, D), updated
) -> None:
    """The outputs of steps i that were not evaluated, from those of steps l < i < r of the same sample that were.

    x0 is taken to be linear in `level` between l and r, and the state y to lie on the chain that then begins at x[l]:

        x0[j] = of_x[j] x[j] + of_out[j] e[j],      j = l, r
        q = (level[i] - level[l]) / (level[r] - level[l]),      0 / 0 is 0
        x0[i] = (1 - q) x0[l] + q x0[r]
        p = pulls[i] - pulls[l],    p_r = (lifts[i] - lifts[l] - level[l] p) / (level[r] - level[l])
        y = scale[i] (x[l] / scale[l] + (p - p_r) x0[l] + p_r x0[r])
        e[i] = (x0[i] - of_x[i] y) / of_out[i] + slope[i] (x[i] - y)

    rows[:, n] are the rows of i, l and r; no i is an l or r. With the steps x[i+1] = keep[i] x[i] + pull[i] x0[i],
    scale[i] is the product, and pulls[i] and lifts[i] are the sums of pull[j] / scale[j+1] and of that times level[j],
    over j < i.
    """
    at, left, right = rows
    batch = x.shape[1]
    scale, pulls, lifts, level, of_x, of_out = path
    i, l, r = at // batch, left // batch, right // batch  # noqa: E741
    span = torch.where(level[r] == level[l], torch.inf, level[r] - level[l])
    q, p = (level[i] - level[l]) / span, pulls[i] - pulls[l]
    p_r = (lifts[i] - lifts[l] - level[l] * p) / span
    coefficients = [1 - q, q, scale[i] / scale[l], scale[i] * (p - p_r), scale[i] * p_r, of_x[i], of_out[i]]
    q_l, q_r, ratio, pull_l, pull_r, of_x_i, of_out_i = (value[:, None].to(x.dtype) for value in coefficients)
    states, outputs = x.flatten(0, 1), e.view(-1, e.shape[2])

    def x0(row: Tensor, step: Tensor) -> Tensor:
        return of_x[step, None].to(x.dtype) * states[row] + of_out[step, None].to(x.dtype) * outputs[row]

    x0_l, x0_r = x0(left, l), x0(right, r)
    y = ratio * states[left] + pull_l * x0_l + pull_r * x0_r
    bend = torch.repeat_interleave(slope.flatten(0, 1)[at], bands.diff(), dim=-1)  # (N, D)
    outputs[at] = (q_l * x0_l + q_r * x0_r - of_x_i * y) / of_out_i + bend * (states[at] - y)


def extrapolate_states(
    x: Tensor,  # (S+1, B, D), updated
    moved: Tensor,  # (S, B, D), updated: the last correction of the states that the model was called at
    e: Tensor,  # (S, B, D), the model's output before that correction
    z: Tensor | None,  # (S, B, D)
    held: Tensor,  # (4, S): keep, pull, of_x, of_out
    n: Tensor,  # (S,)
    before: Tensor,  # (B, 2) int64, the window of that correction
    window: Tensor,  # (B, 2) int64, the window that follows
    skip: Tensor,  # (B,) int64: 1 for a sample that stays as it is
    beta: float,
    implicit: bool,
) -> None:
    """A guess of where the steps lead that come into a window, before[b, 1] <= i < window[b, 1]: x0 is held.

        x[i+1] = keep[i] x[i] + pull[i] x0 + n[i] z[i],     moved[i] = 0
        x0 = of_x[l] y + of_out[l] e[l],                    l = before[b, 1] - 1, the last step of the window before
        y = x[l] - t moved[l], implicit: x[l+1] - beta moved[l]           the state that the model was called at

    t is how far step l was moved along its correction: 0 if it was the first of its window, 1 if the second, else beta.
    A window that had no last step, l < 0, is not extended.
    """
    keep, pull, of_x, of_out = held
    samples = torch.arange(x.shape[1], device=x.device)
    begin, end = before.unbind(1)
    last, place = (end - 1).clamp_min(0), end - begin
    share = torch.where(place == 1, 0.0, torch.where(place == 2, 1.0, beta)).to(x.dtype)
    share = torch.full_like(share, beta) if implicit else share
    correction = torch.where(share[:, None] == 0, 0.0, moved[last, samples])
    y = x[last + int(implicit), samples] - share[:, None] * correction
    x0 = of_x[last, None] * y + of_out[last, None] * e[last, samples]
    for i in range(len(e)):
        new = ((i >= end) & (i < window[:, 1]) & (end > 0) & (skip == 0))[:, None]  # (B, 1)
        guess = keep[i] * x[i] + pull[i] * x0
        if z is not None:
            guess = guess + n[i] * z[i]
        x[i + 1] = torch.where(new, guess, x[i + 1])
        moved[i] = torch.where(new, 0.0, moved[i])


def anderson_gram(
    g_ring: Tensor,  # (m+1, S, B, D), the last corrections
    head: int,  # the newest is g_ring[head], the one before it g_ring[head-1], and so on around the ring
    count: int,  # differences that exist, 1 .. m
    window: Tensor,  # (B, 2) int64
    gram: Tensor,  # (S, B, m, m) float64, updated
    rhs: Tensor,  # (S, B, m) float64, written
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
    gram: Tensor,  # (S, B, m, m) float64
    rhs: Tensor,  # (S, B, m) float64
    window: Tensor,  # (B, 2) int64
    scope: str,  # one of SCOPES
    ridge: float,  # relative to the mean of the diagonal
    ridge_absolute: float,
    implicit: bool,
    gamma: Tensor,  # (S, B, m), written
) -> None:
    """Batched least squares:  gamma = argmin |g - dG gamma|^2 + (ridge mean(diag A) + ridge_absolute) |gamma|^2.

    A and the right-hand side are the sums of gram and rhs over the scope of step i: `row` i alone, `causal` all steps
    up to i, `anticausal` all steps from i on, `joint` all steps. A row with an entry that is not finite is left out of
    every sum. A singular or indefinite system gives the minimum-norm answer of its well-determined part (eigenvalues
    above 1e-12 of the largest); what is not finite becomes zero. The first active step gets zero unless the chain is
    `implicit`: it takes the plain step, and is exact. The mean of the diagonal is taken over its non-zero entries.
    """
    steps = gram.shape[0]
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
    elif scope == "anticausal":
        matrix, right = matrix.flip(0).cumsum(0).flip(0), right.flip(0).cumsum(0).flip(0)
    elif scope == "joint":
        matrix, right = matrix.sum(0, keepdim=True).expand_as(matrix), right.sum(0, keepdim=True).expand_as(right)
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.sum(-1) / (diagonal != 0).sum(-1).clamp_min(1)
    shift = ridge * mean + absolute
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    eigenvalues = eigenvalues + shift[..., None]
    kept = eigenvalues > 1e-12 * eigenvalues.abs().amax(-1, keepdim=True)
    weights = torch.where(kept, 1 / torch.where(kept, eigenvalues, 1.0), 0.0)
    answer = (vectors @ (weights[..., None] * (vectors.mT @ right[..., None])))[..., 0].to(gamma.dtype)
    index = torch.arange(steps, device=window.device)[:, None]
    usable = active if implicit else active & (index > window[:, 0])
    gamma.copy_(torch.where(usable[..., None] & answer.isfinite(), answer, 0.0))


def anderson_mix(
    f_ring: Tensor,  # (m+1, S, B, D), the last updates x + beta g
    head: int,
    count: int,
    gamma: Tensor,  # (S, B, m), index j counts ages
    window: Tensor,  # (B, 2) int64
    out: Tensor,  # (S, B, D), written; x[1:]
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
    norms: Tensor,  # (S, B, 3) float64, of ddim_scan: |r|^2, |g|^2, |x|^2
    scale: Tensor,  # (B,) float64, |x[0]|
    gap: Tensor | None,  # (B,) int64, the first active step whose output was filled in, but never the first; None: none
    tolerance: Tensor,  # (S,) float64, a step whose residual is below it, relative to the state, is settled
    rtol: float,
    contraction: float,  # no contraction from one iteration to the next is believed to be better
    growth: float,  # a last correction larger than this times the smallest one before it diverges
    size: int,  # steps in a window
    implicit: bool,
    errors: Tensor,  # (B, 5) float64, updated: error left, change, its ratio, smallest |g[S]|, largest relative |r|
    window: Tensor,  # (B, 2) int64, updated; begin = S is a sample that has converged
    diverged: Tensor,  # (B,) int64, written
) -> None:
    """What an iteration reached: the error that is left in each sample, and the steps that are still open.

        change = max_i |g[i+1]| / min(|x[i+1]|, |x[0]|)             inf while gap or window do not reach the end
        ratio = change / min(last change, 1), held within contraction .. 1
        residual = max_i |r[i+1]| / |x[i+1]|                        of steps that are not exact now; inf if not finite
        rho = sqrt(ratio last_ratio),     left = change rho / max(1 - rho^2, 0.1); explicit: and no less than residual

    0 / 0 is 0, and anything else over 0 is inf; |x[0]| may be inf.

    `left` is what a contraction by rho, rho^2, rho^2, .. from now on would still bring: between a linear and a
    superlinear end. The new window begins at the first step that is not settled, |r[i+1]| > tolerance[i] |x[i+1]|,
    but past the first active step of an explicit chain, which took the plain step and is exact. A sample has converged
    when its window is empty, then with no more left than all tolerances together, or left <= rtol, rtol > 0. It
    diverged if a norm is not finite, or by `growth`, and keeps what is exact. Samples that had converged before keep
    everything. From the gap on no step settles.
    """
    steps = norms.shape[0]
    residual, correction, state = norms.sqrt().unbind(-1)  # (S, B) each
    _, change_before, ratio_before, smallest, _ = errors.unbind(1)
    begin, end = window.unbind(1)
    active, whole = begin < steps, end == steps
    known = end if gap is None else torch.minimum(gap, end)
    index = torch.arange(steps, device=norms.device)[:, None]
    relative = correction / torch.where(state < scale, state, scale)
    change = torch.where(known == steps, relative.nan_to_num(0.0, torch.inf).amax(0), torch.inf)
    ratio = (change / change_before.clamp(1e-300, 1.0)).clamp(contraction, 1.0)
    rho = (ratio * ratio_before).sqrt()
    left = change * rho / (1 - rho.square()).clamp_min(0.1)
    finite = norms.isfinite().all(-1).all(0)
    failed = active & (~finite | (whole & (correction[-1] > growth * smallest)))
    exact = begin if implicit else torch.minimum(begin + 1, end)
    settled = (index < begin) | ((index < known) & (residual <= tolerance[:, None] * state))
    frontier = torch.maximum(settled.long().cumprod(0).sum(0), exact)
    frontier = torch.where(failed, exact, frontier)
    counted = (index >= exact) & (index < end)
    unsolved = torch.where(counted, (residual / state).nan_to_num(0.0, torch.inf), 0.0).amax(0)
    left = left if implicit else torch.maximum(left, unsolved)
    left = torch.where(frontier >= steps, left.clamp_max(tolerance.sum()), left)
    converged = (frontier >= steps) | (~failed & (rtol > 0) & (left <= rtol))
    opened = torch.where(converged, steps, frontier)
    smallest_now = torch.where(whole, torch.fmin(smallest, correction[-1]), smallest)
    now = torch.stack([left, change, ratio, smallest_now, torch.where(finite, unsolved, torch.inf)], 1)
    diverged.copy_(failed)
    errors.copy_(torch.where(active[:, None], now, errors))
    window.copy_(torch.where(active[:, None], torch.stack([opened, (opened + size).clamp_max(steps)], 1), window))
