"""Every op at every size that is timed: its inputs, the bytes that it has to move, and what memory it needs.

A byte floor counts each array once for every time that the op has to read or write it, in units of S * B * D * 4 bytes:

    ddim_scan            x, e (and z) read, f and g written                  4 (5)
    band_moments         dx, e, e_prev read                                  3
    dct2                 the image read and the spectrum written, or back    2
    interpolate_outputs  x read, x and e of the rows around it, e written    6 per row that it fills, every second one
    extrapolate_states   x and its last change written                       2 per state that it guesses, the last half
    anderson_gram        m + 1 corrections read                              m + 1
    anderson_mix         m + 1 updates read, the state written               m + 2
    anderson_solve       no unit: the Gram matrices and right sides read, gamma written
    secant_slope         no unit: the moments read, the slopes read and written
    update_convergence   no unit: the norms read

All windows are open and all of the history is there. Without history (m = 0) an iteration has no gram, solve and mix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deqkern.solvers.basis import Basis

STEPS = (25, 50, 100, 1000)
SHAPES = ((256,), (3, 32, 32), (4, 64, 64), (3, 256, 256))
BATCHES = (1, 8)
HISTORIES = (3, 5)
MEMORY_CAP = 2 * 1000**3  # bytes of one case, inputs and temporary memory

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """S steps of B samples; its text is part of a bench's name, as in `-k "S50 and 3x64x64"`."""

    steps: int
    batch: int
    shape: tuple[int, ...]

    def __str__(self) -> str:
        sizes = (f"S{self.steps}", f"B{self.batch}", "x".join(map(str, self.shape)))
        return " ".join(filter(None, sizes))

    @property
    def elements(self) -> int:
        """S * B * D."""
        return self.steps * self.batch * math.prod(self.shape)


@dataclass(frozen=True)
class Case:
    """One op at one size. `make(device)` gives its arguments; `temporary` is what the reference allocates, in bytes."""

    op: str
    variant: str
    size: Size
    make: Callable[[torch.device], Arguments]
    floor: int  # bytes
    temporary: int  # bytes

    def __str__(self) -> str:
        return " ".join(filter(None, (self.op, self.variant, str(self.size))))

    def memory(self) -> int:
        """Bytes of all arguments."""
        arguments = self.make(torch.device("meta"))
        return sum(value.nbytes for value in arguments.values() if isinstance(value, Tensor))


def cases(full: bool) -> list[Case]:
    """All cases, or those of a few sizes that take some minutes."""
    some = [Size(50, 1, shape) for shape in SHAPES[:3]]
    some += [Size(25, 1, (3, 256, 256)), Size(50, 8, (3, 32, 32)), Size(1000, 1, (3, 32, 32))]
    every = [Size(steps, batch, shape) for shape in SHAPES for steps in STEPS for batch in BATCHES]
    found = [case for size in (every if full else some) for case in _cases_of(size, HISTORIES if full else (5,))]
    return list({str(case): case for case in found}.values())  # anderson_solve is the same for every D


def _cases_of(size: Size, histories: tuple[int, ...]) -> Iterator[Case]:
    n, unit, flat = size.elements, 4 * size.elements, Size(size.steps, size.batch, ())
    for noise in (False, True):
        yield Case("ddim_scan", "eta>0" if noise else "", size, _ddim_scan(size, noise), (4 + noise) * unit, 4 * n)
    yield Case("ddim_scan", "two-step", size, _ddim_scan(size, False, two_step=True), 4 * unit, 4 * n)
    yield Case("band_moments", "", size, _band_moments(size), 3 * unit, 40 * n)
    filled = (size.steps - 1) // 2 * size.batch * math.prod(size.shape)
    if filled:
        yield Case("interpolate_outputs", "", size, _interpolate_outputs(size), 24 * filled, 40 * filled)
    guessed = size.steps // 2 * size.batch * math.prod(size.shape)
    if guessed:
        yield Case("extrapolate_states", "", size, _extrapolate_states(size), 8 * guessed, 16 * n)
    if len(size.shape) == 3:
        slopes = flat.elements * (len(basis_of(size.shape, torch.device("cpu")).bands) - 1)
        yield Case("secant_slope", "", size, _secant_slope(size), 24 * slopes, 40 * slopes)
    yield Case("update_convergence", "", flat, _update_convergence(flat), 24 * flat.elements, 400 * flat.elements)
    if len(size.shape) == 3:
        for inverse in (False, True):
            yield Case("dct2", "inverse" if inverse else "forward", size, _dct2(size, inverse), 2 * unit, 16 * n)
    for m in histories:
        yield Case("anderson_gram", f"m{m}", size, _anderson_gram(size, m), (m + 1) * unit, (16 * m + 8) * n)
        yield Case("anderson_mix", f"m{m}", size, _anderson_mix(size, m), (m + 2) * unit, 16 * n)
        systems = flat.elements * (8 * m * m + 8 * m + 4 * m)
        for scope in ("row", "causal"):
            make = _anderson_solve(flat, m, scope)
            yield Case("anderson_solve", f"m{m} {scope}", flat, make, systems, 100 * flat.elements * m * m)


def open_windows(size: Size, device: torch.device) -> Tensor:
    """(B, 2): every step of every sample is active."""
    return torch.tensor([[0, size.steps]] * size.batch, device=device)


def basis_of(shape: tuple[int, ...], device: torch.device) -> Basis:
    """The spectral basis of images, the identity for anything else."""
    return Basis.spectral(shape, device) if len(shape) == 3 else Basis.identity(shape, device)


def _states(size: Size, device: torch.device, *more: int) -> Tensor:
    return torch.randn(*more, size.steps, size.batch, math.prod(size.shape), device=device)


def _ddim_scan(size: Size, noise: bool, two_step: bool = False) -> Callable[[torch.device], Arguments]:
    def make(device: torch.device) -> Arguments:
        bands = basis_of(size.shape, device).bands
        coefficients = torch.rand(4, size.steps, device=device)
        return {
            "x": torch.randn(size.steps + 1, size.batch, math.prod(size.shape), device=device),
            "e": _states(size, device),
            "z": _states(size, device) if noise else None,
            "a": 0.9 + 0.1 * coefficients[0],
            "b": 0.2 * coefficients[1] - 0.1,
            "c": 0.05 * coefficients[3] if two_step else None,
            "n": coefficients[2].clone(),
            "slope": torch.rand(size.steps, size.batch, len(bands) - 1, device=device),
            "bands": bands,
            "window": open_windows(size, device),
            "beta": 1.0,
            "implicit": False,
            "f": _states(size, device),
            "g": _states(size, device),
            "norms": torch.zeros(size.steps, size.batch, 3, dtype=torch.float64, device=device),
        }

    return make


def _band_moments(size: Size) -> Callable[[torch.device], Arguments]:
    def make(device: torch.device) -> Arguments:
        bands = basis_of(size.shape, device).bands
        double: Any = {"dtype": torch.float64, "device": device}
        return {
            "dx": _states(size, device),
            "e": _states(size, device),
            "e_prev": _states(size, device),
            "bands": bands,
            "window": open_windows(size, device),
            "moments": torch.zeros(size.steps, size.batch, len(bands) - 1, 2, **double),
        }

    return make


def _interpolate_outputs(size: Size) -> Callable[[torch.device], Arguments]:
    def make(device: torch.device) -> Arguments:
        bands = basis_of(size.shape, device).bands
        index = torch.arange(size.steps * size.batch, device=device).view(size.steps, size.batch)
        row = index[1:-1:2] if size.steps % 2 else index[1:-2:2]
        rows = torch.stack([row, row - size.batch, row + size.batch]).flatten(1)
        return {
            "x": torch.randn(size.steps + 1, size.batch, math.prod(size.shape), device=device),
            "slope": torch.rand(size.steps, size.batch, len(bands) - 1, device=device),
            "bands": bands,
            "rows": rows,
            "path": torch.rand(6, size.steps, dtype=torch.float64, device=device),
            "e": _states(size, device),
        }

    return make


def _extrapolate_states(size: Size) -> Callable[[torch.device], Arguments]:
    def make(device: torch.device) -> Arguments:
        middle = size.steps - size.steps // 2
        return {
            "x": torch.randn(size.steps + 1, size.batch, math.prod(size.shape), device=device),
            "last_change": _states(size, device),
            "e": _states(size, device),
            "z": None,
            "constant_x0": torch.rand(4, size.steps, device=device),
            "n": torch.zeros(size.steps, device=device),
            "previous_window": torch.tensor([[0, middle]] * size.batch, device=device),
            "window": open_windows(size, device),
            "skip": torch.zeros(size.batch, dtype=torch.int64, device=device),
            "beta": 1.0,
            "implicit": False,
        }

    return make


def _dct2(size: Size, inverse: bool) -> Callable[[torch.device], Arguments]:
    def make(device: torch.device) -> Arguments:
        basis, count = basis_of(size.shape, device), size.steps * size.batch
        return {
            "image": torch.randn(count, *size.shape, device=device),
            "spectrum": torch.randn(count, basis.size, device=device),
            "rows": torch.arange(count, device=device),
            "dct_h": basis.dct_h,
            "dct_w": basis.dct_w,
            "colour": basis.colour,
            "order": basis.order,
            "place": basis.place,
            "inverse": inverse,
        }

    return make


def _secant_slope(size: Size) -> Callable[[torch.device], Arguments]:
    def make(device: torch.device) -> Arguments:
        rows = (size.steps, size.batch, len(basis_of(size.shape, torch.device("cpu")).bands) - 1)
        double: Any = {"dtype": torch.float64, "device": device}
        return {
            "moments": torch.rand(*rows, 2, **double),
            "low": torch.zeros(size.steps, **double),
            "high": torch.ones(size.steps, **double),
            "prior_weight": 1e-2,
            "slope": torch.rand(rows, device=device),
        }

    return make


def _update_convergence(size: Size) -> Callable[[torch.device], Arguments]:
    def make(device: torch.device) -> Arguments:
        double: Any = {"dtype": torch.float64, "device": device}
        norms = torch.rand(size.steps, size.batch, 3, **double)
        return {
            "norms": norms,
            "scale": torch.ones(size.batch, **double),
            "first_interpolated": None,
            "tolerance": torch.zeros(size.steps, **double),
            "rtol": 0.0,
            "best_contraction": 0.1,
            "growth": 1e3,
            "window_size": size.steps,
            "implicit": True,  # so that every step stays active
            "convergence": torch.ones(size.batch, 5, **double),
            "window": open_windows(size, device),
            "diverged": torch.zeros(size.batch, dtype=torch.int64, device=device),
        }

    return make


def _anderson_gram(size: Size, m: int) -> Callable[[torch.device], Arguments]:
    def make(device: torch.device) -> Arguments:
        double: Any = {"dtype": torch.float64, "device": device}
        return {
            "g_ring": _states(size, device, m + 1),
            "head": 2,
            "count": m,
            "window": open_windows(size, device),
            "gram": torch.zeros(size.steps, size.batch, m, m, **double),
            "rhs": torch.zeros(size.steps, size.batch, m, **double),
        }

    return make


def _anderson_solve(size: Size, m: int, scope: str) -> Callable[[torch.device], Arguments]:
    def make(device: torch.device) -> Arguments:
        double: Any = {"dtype": torch.float64, "device": device}
        factor = torch.randn(size.steps, size.batch, 3 * m, m, **double)
        return {
            "gram": (factor.mT @ factor).contiguous(),
            "rhs": torch.randn(size.steps, size.batch, m, **double),
            "window": open_windows(size, device),
            "scope": scope,
            "ridge": 1e-4,
            "ridge_absolute": 0.0,
            "implicit": False,
            "gamma": torch.zeros(size.steps, size.batch, m, device=device),
        }

    return make


def _anderson_mix(size: Size, m: int) -> Callable[[torch.device], Arguments]:
    def make(device: torch.device) -> Arguments:
        return {
            "f_ring": _states(size, device, m + 1),
            "head": 2,
            "count": m,
            "gamma": torch.randn(size.steps, size.batch, m, device=device),
            "window": open_windows(size, device),
            "out": _states(size, device),
        }

    return make
