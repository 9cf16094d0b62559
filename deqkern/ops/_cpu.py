"""The CPU kernels of `deqkern._C` under the reference's signatures: pointers, sizes, scalars, threads.

Arguments were validated by the public functions. State and coefficients are fp32 here; a model output of another
floating type is converted first.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, get_num_threads

from . import reference

try:
    _C: Any = importlib.import_module("deqkern._C")
    unavailable = ""
except ImportError as error:
    _C = None
    unavailable = f"deqkern._C did not load: {error}"


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
    plain = image if image.dtype is torch.float32 else image.float()
    _C.dct2(
        plain.data_ptr(),
        spectrum.data_ptr(),
        rows.data_ptr(),
        dct_h.data_ptr(),
        dct_w.data_ptr(),
        0 if colour is None else colour.data_ptr(),
        order.data_ptr(),
        *image.shape,
        spectrum.shape[0],
        inverse,
        get_num_threads(),
    )
    if inverse and plain is not image:
        image.copy_(plain)


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
    e = e.float()
    _C.ddim_scan(
        x.data_ptr(),
        e.data_ptr(),
        0 if z is None else z.data_ptr(),
        a.data_ptr(),
        b.data_ptr(),
        0 if c is None else c.data_ptr(),
        n.data_ptr(),
        slope.data_ptr(),
        bands.data_ptr(),
        window.data_ptr(),
        f.data_ptr(),
        g.data_ptr(),
        norms.data_ptr(),
        *e.shape,
        slope.shape[2],
        beta,
        implicit,
        get_num_threads(),
    )


def band_moments(dx: Tensor, e: Tensor, e_prev: Tensor, bands: Tensor, window: Tensor, moments: Tensor) -> None:
    e, e_prev = e.float(), e_prev.float()
    _C.band_moments(
        dx.data_ptr(),
        e.data_ptr(),
        e_prev.data_ptr(),
        bands.data_ptr(),
        window.data_ptr(),
        moments.data_ptr(),
        *dx.shape,
        moments.shape[2],
        get_num_threads(),
    )


def secant_slope(moments: Tensor, low: Tensor, high: Tensor, pull: float, slope: Tensor) -> None:
    _C.secant_slope(moments.data_ptr(), low.data_ptr(), high.data_ptr(), slope.data_ptr(), *slope.shape, pull)


def interpolate_outputs(x: Tensor, slope: Tensor, bands: Tensor, rows: Tensor, path: Tensor, e: Tensor) -> None:
    _C.interpolate_outputs(
        x.data_ptr(),
        slope.data_ptr(),
        bands.data_ptr(),
        rows.data_ptr(),
        path.data_ptr(),
        e.data_ptr(),
        *e.shape,
        slope.shape[2],
        rows.shape[1],
        get_num_threads(),
    )


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
    _C.extrapolate_states(
        x.data_ptr(),
        moved.data_ptr(),
        e.data_ptr(),
        0 if z is None else z.data_ptr(),
        held.data_ptr(),
        n.data_ptr(),
        before.data_ptr(),
        window.data_ptr(),
        skip.data_ptr(),
        *e.shape,
        beta,
        implicit,
        get_num_threads(),
    )


def anderson_gram(g_ring: Tensor, head: int, count: int, window: Tensor, gram: Tensor, rhs: Tensor) -> None:
    ring, steps, batch, size = g_ring.shape
    _C.anderson_gram(
        g_ring.data_ptr(),
        window.data_ptr(),
        gram.data_ptr(),
        rhs.data_ptr(),
        steps,
        batch,
        size,
        ring - 1,
        head,
        count,
        get_num_threads(),
    )


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
    _C.anderson_solve(
        gram.data_ptr(),
        rhs.data_ptr(),
        window.data_ptr(),
        gamma.data_ptr(),
        *rhs.shape,
        reference.SCOPES.index(scope),
        ridge,
        ridge_absolute,
        implicit,
        get_num_threads(),
    )


def anderson_mix(f_ring: Tensor, head: int, count: int, gamma: Tensor, window: Tensor, out: Tensor) -> None:
    ring, steps, batch, size = f_ring.shape
    _C.anderson_mix(
        f_ring.data_ptr(),
        gamma.data_ptr(),
        window.data_ptr(),
        out.data_ptr(),
        steps,
        batch,
        size,
        ring - 1,
        head,
        count,
        get_num_threads(),
    )


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
    _C.update_convergence(
        norms.data_ptr(),
        scale.data_ptr(),
        0 if gap is None else gap.data_ptr(),
        tolerance.data_ptr(),
        errors.data_ptr(),
        window.data_ptr(),
        diverged.data_ptr(),
        *norms.shape[:2],
        rtol,
        contraction,
        growth,
        size,
        implicit,
    )
