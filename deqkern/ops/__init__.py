"""The ops: validated here, once; run by the backend that fits the tensors (see `backends` and `use_backend`).

Every tensor is contiguous, on one device. State tensors and coefficients share one dtype, float32 or float64; the
model's output may be of any floating dtype; sums are float64 and indices int64. A wrong shape, device or value is a
ValueError and a wrong type or dtype a TypeError, each naming the argument. What the integer tensors hold is not looked
at, except by the CPU kernels, which refuse `bands`, `rows` and `order` that lead out of bounds. The ops write into
tensors they are given, return nothing and record no gradient.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TypeVar

import torch
from torch import Tensor

from . import _validate as check
from . import reference
from ._dispatch import backends, direct, use_backend
from .reference import SCOPES

__all__ = [
    "SCOPES",
    "anderson_gram",
    "anderson_mix",
    "anderson_solve",
    "backends",
    "band_moments",
    "dct2",
    "ddim_scan",
    "extrapolate_states",
    "interpolate_outputs",
    "secant_slope",
    "update_convergence",
    "use_backend",
]

MAX_HISTORY = 16

_Op = TypeVar("_Op")


def _documented(op: _Op) -> _Op:
    op.__doc__ = getattr(reference, op.__name__).__doc__  # type: ignore[attr-defined]
    return op


@_documented
def dct2(
    image: Tensor,
    spectrum: Tensor,
    rows: Tensor,
    dct_h: Tensor,
    dct_w: Tensor,
    colour: Tensor | None,
    order: Tensor,
    place: Tensor,
    inverse: bool,
) -> None:
    check.floating("image", image)
    if image.ndim != 4 or 0 in image.shape[1:]:
        raise ValueError(f"image must have shape (N, C, H, W), got {tuple(image.shape)}")
    count, channels, height, width = image.shape
    size = channels * height * width
    dtype, device = check.state("spectrum", spectrum), spectrum.device
    check.array("image", image, image.shape, image.dtype, device)
    check.array("spectrum", spectrum, (spectrum.shape[0] if spectrum.ndim else 1, size), dtype, device)
    check.array("rows", rows, (count,), torch.int64, device)
    check.array("dct_h", dct_h, (height, height), dtype, device)
    check.array("dct_w", dct_w, (width, width), dtype, device)
    if colour is not None:
        check.array("colour", colour, (channels, channels), dtype, device)
    check.array("order", order, (size,), torch.int64, device)
    check.array("place", place, (size,), torch.int64, device)
    run = _dct2_inverse if inverse else _dct2_forward
    run(image, spectrum, rows, dct_h, dct_w, colour, order, place, inverse)


@_documented
def ddim_scan(
    x: Tensor,
    e: Tensor,
    z: Tensor | None,
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    n: Tensor,
    slope: Tensor,
    bands: Tensor,
    window: Tensor,
    beta: float,
    implicit: bool,
    f: Tensor,
    g: Tensor,
    norms: Tensor,
) -> None:
    dtype, device = check.state("x", x), x.device
    shape = check.sizes("e", e, 3)
    steps, batch, size = shape
    count = check.sizes("slope", slope, 3)[2]
    check.array("x", x, (steps + 1, batch, size), dtype, device)
    check.array("e", e, shape, check.floating("e", e), device)
    if z is not None:
        check.array("z", z, shape, dtype, device)
    check.array("a", a, (steps,), dtype, device)
    check.array("b", b, (steps,), dtype, device)
    if c is not None:
        check.array("c", c, (steps,), dtype, device)
        if implicit:
            raise ValueError("c must be None for an implicit chain")
    check.array("n", n, (steps,), dtype, device)
    check.array("slope", slope, (steps, batch, count), dtype, device)
    check.array("bands", bands, (count + 1,), torch.int64, device)
    check.array("window", window, (batch, 2), torch.int64, device)
    check.real("beta", beta)
    check.array("f", f, shape, dtype, device)
    check.array("g", g, shape, dtype, device)
    check.array("norms", norms, (steps, batch, 3), torch.float64, device)
    _ddim_scan(x, e, z, a, b, c, n, slope, bands, window, beta, implicit, f, g, norms)


@_documented
def band_moments(dx: Tensor, e: Tensor, e_prev: Tensor, bands: Tensor, window: Tensor, moments: Tensor) -> None:
    dtype, device = check.state("dx", dx), dx.device
    shape = check.sizes("dx", dx, 3)
    steps, batch, _ = shape
    count = check.sizes("moments", moments, 4)[2]
    check.array("dx", dx, shape, dtype, device)
    check.array("e", e, shape, check.floating("e", e), device)
    check.array("e_prev", e_prev, shape, check.floating("e_prev", e_prev), device)
    check.array("bands", bands, (count + 1,), torch.int64, device)
    check.array("window", window, (batch, 2), torch.int64, device)
    check.array("moments", moments, (steps, batch, count, 2), torch.float64, device)
    _band_moments(dx, e, e_prev, bands, window, moments)


@_documented
def secant_slope(moments: Tensor, low: Tensor, high: Tensor, pull: float, slope: Tensor) -> None:
    shape = check.sizes("slope", slope, 3)
    device = slope.device
    check.array("moments", moments, (*shape, 2), torch.float64, device)
    check.array("low", low, shape[:1], torch.float64, device)
    check.array("high", high, shape[:1], torch.float64, device)
    check.real("pull", pull, 0.0)
    check.array("slope", slope, shape, check.state("slope", slope), device)
    _secant_slope(moments, low, high, pull, slope)


@_documented
def interpolate_outputs(x: Tensor, slope: Tensor, bands: Tensor, rows: Tensor, path: Tensor, e: Tensor) -> None:
    dtype, device = check.state("x", x), x.device
    shape = check.sizes("e", e, 3)
    steps, batch, size = shape
    count = check.sizes("slope", slope, 3)[2]
    number = rows.shape[-1] if isinstance(rows, Tensor) and rows.ndim else 0
    check.array("x", x, (steps + 1, batch, size), dtype, device)
    check.array("slope", slope, (steps, batch, count), dtype, device)
    check.array("bands", bands, (count + 1,), torch.int64, device)
    check.array("rows", rows, (3, number), torch.int64, device)
    check.array("path", path, (6, steps), torch.float64, device)
    check.array("e", e, shape, dtype, device)
    _interpolate_outputs(x, slope, bands, rows, path, e)


@_documented
def extrapolate_states(
    x: Tensor,
    moved: Tensor,
    e: Tensor,
    z: Tensor | None,
    held: Tensor,
    n: Tensor,
    before: Tensor,
    window: Tensor,
    skip: Tensor,
    beta: float,
    implicit: bool,
) -> None:
    dtype, device = check.state("x", x), x.device
    shape = check.sizes("e", e, 3)
    steps, batch, size = shape
    check.array("x", x, (steps + 1, batch, size), dtype, device)
    check.array("moved", moved, shape, dtype, device)
    check.array("e", e, shape, dtype, device)
    if z is not None:
        check.array("z", z, shape, dtype, device)
    check.array("held", held, (4, steps), dtype, device)
    check.array("n", n, (steps,), dtype, device)
    check.array("before", before, (batch, 2), torch.int64, device)
    check.array("window", window, (batch, 2), torch.int64, device)
    check.array("skip", skip, (batch,), torch.int64, device)
    check.real("beta", beta)
    _extrapolate_states(x, moved, e, z, held, n, before, window, skip, beta, implicit)


@_documented
def anderson_gram(g_ring: Tensor, head: int, count: int, window: Tensor, gram: Tensor, rhs: Tensor) -> None:
    dtype, device = check.state("g_ring", g_ring), g_ring.device
    size, steps, batch = _ring("g_ring", g_ring, dtype, device, head, count, 1)
    check.array("window", window, (batch, 2), torch.int64, device)
    check.array("gram", gram, (steps, batch, size, size), torch.float64, device)
    check.array("rhs", rhs, (steps, batch, size), torch.float64, device)
    _anderson_gram(g_ring, head, count, window, gram, rhs)


@_documented
def anderson_solve(
    gram: Tensor,
    rhs: Tensor,
    window: Tensor,
    scope: str,
    ridge: float,
    ridge_absolute: float,
    implicit: bool,
    gamma: Tensor,
) -> None:
    shape = check.sizes("rhs", rhs, 3)
    steps, batch, size = shape
    check.integer("the history size of rhs", size, 1, MAX_HISTORY)
    device = rhs.device
    check.array("gram", gram, (steps, batch, size, size), torch.float64, device)
    check.array("rhs", rhs, shape, torch.float64, device)
    check.array("window", window, (batch, 2), torch.int64, device)
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(SCOPES)}, got {scope!r}")
    check.real("ridge", ridge, 0.0)
    check.real("ridge_absolute", ridge_absolute, 0.0)
    check.array("gamma", gamma, shape, check.state("gamma", gamma), device)
    _anderson_solve(gram, rhs, window, scope, ridge, ridge_absolute, implicit, gamma)


@_documented
def anderson_mix(f_ring: Tensor, head: int, count: int, gamma: Tensor, window: Tensor, out: Tensor) -> None:
    dtype, device = check.state("f_ring", f_ring), f_ring.device
    size, steps, batch = _ring("f_ring", f_ring, dtype, device, head, count, 0)
    check.array("gamma", gamma, (steps, batch, size), dtype, device)
    check.array("window", window, (batch, 2), torch.int64, device)
    check.array("out", out, f_ring.shape[1:], dtype, device)
    _anderson_mix(f_ring, head, count, gamma, window, out)


@_documented
def update_convergence(
    norms: Tensor,
    scale: Tensor,
    gap: Tensor | None,
    tolerance: Tensor,
    rtol: float,
    contraction: float,
    growth: float,
    size: int,
    implicit: bool,
    errors: Tensor,
    window: Tensor,
    diverged: Tensor,
) -> None:
    steps, batch, _ = check.sizes("norms", norms, 3)
    device = norms.device
    check.array("norms", norms, (steps, batch, 3), torch.float64, device)
    check.array("scale", scale, (batch,), torch.float64, device)
    if gap is not None:
        check.array("gap", gap, (batch,), torch.int64, device)
    check.array("tolerance", tolerance, (steps,), torch.float64, device)
    check.real("rtol", rtol, 0.0)
    check.real("contraction", contraction, 0.0)
    check.real("growth", growth, 0.0)
    check.integer("size", size, 1, steps)
    check.array("errors", errors, (batch, 5), torch.float64, device)
    check.array("window", window, (batch, 2), torch.int64, device)
    check.array("diverged", diverged, (batch,), torch.int64, device)
    _update_convergence(
        norms, scale, gap, tolerance, rtol, contraction, growth, size, implicit, errors, window, diverged
    )


def _ring(
    name: str, ring: Tensor, dtype: torch.dtype, device: torch.device, head: int, count: int, least: int
) -> tuple[int, int, int]:
    """(m, S, B) of a ring (m+1, S, B, D) whose newest entry is `head`, with `count` >= `least` differences."""
    length, steps, batch, _ = shape = check.sizes(name, ring, 4)
    if not 2 <= length <= MAX_HISTORY + 1:
        raise ValueError(f"{name} must hold 2 .. {MAX_HISTORY + 1} entries, got {length}")
    check.array(name, ring, shape, dtype, device)
    check.integer("head", head, 0, length - 1)
    check.integer("count", count, least, length - 1)
    return length - 1, steps, batch


# For a loop that calls the ops with the same tensors again and again, after a first time that looked at them: past
# torch's dispatcher too, which takes longer than a launch.
unchecked = SimpleNamespace(**direct)
_dct2_forward = torch.ops.deqkern.dct2.forward
_dct2_inverse = torch.ops.deqkern.dct2.inverse
_ddim_scan = torch.ops.deqkern.ddim_scan.default
_band_moments = torch.ops.deqkern.band_moments.default
_secant_slope = torch.ops.deqkern.secant_slope.default
_interpolate_outputs = torch.ops.deqkern.interpolate_outputs.default
_extrapolate_states = torch.ops.deqkern.extrapolate_states.default
_update_convergence = torch.ops.deqkern.update_convergence.default
_anderson_gram = torch.ops.deqkern.anderson_gram.default
_anderson_solve = torch.ops.deqkern.anderson_solve.default
_anderson_mix = torch.ops.deqkern.anderson_mix.default
