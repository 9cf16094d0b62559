"""Random arguments of every op at any size, and the comparison of a backend with the float64 reference.

Outputs start as NaN, and so does every input that a window leaves out: a kernel that reads one shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lanes
import pytest
import torch
from asserts import assert_close
from torch import Tensor

from deqkern import ops
from deqkern.ops import reference
from deqkern.ops.contract import Int64, Window
from deqkern.ops.state import INITIAL_CONVERGENCE, OutputPath

Arguments = dict[str, Any]

SOURCES = Path(__file__).resolve().parent.parent.parent
CONTRACTS = ops.CONTRACTS
WRITTEN = {op: contract.written for op, contract in CONTRACTS.items()}
HAS_CUDA = torch.cuda.is_available()
# Triton runs in its interpreter where there is no GPU.
DEVICES = {"reference": "cpu", "cpu": "cpu", "lanes": "cpu", "triton": "cuda" if HAS_CUDA else "cpu", "cuda": "cuda"}
INTERPRETED = not HAS_CUDA  # a program of a Triton kernel then takes a millisecond
# The backends of a GPU that have a kernel for the op; "lanes" is the CUDA kernel without one.
KERNELS: dict[str, tuple[str, ...]] = {
    op: ("triton",) if (SOURCES / "kernels" / f"{op}.py").exists() else ("cuda", "lanes") for op in CONTRACTS
}
# (S, B, D, K): every awkward length beside several others; windows go round by sample
SIZES = (
    (1, 1, 1, 1),
    (1, 3, 5, 3),
    (1, 1, 12289, 24),
    (2, 1, 17, 24),
    (2, 3, 1, 3),
    (2, 3, 257, 1),
    (2, 3, 12289, 3),
    (7, 3, 5, 24),
    (7, 1, 255, 3),
    (7, 3, 3072, 24),
    (7, 3, 257, 3),
    (50, 1, 3072, 3),
    (50, 3, 1, 1),
    (50, 1, 17, 3),
    (50, 3, 255, 24),
)
NAN = float("nan")


def wide(arguments: Arguments) -> Arguments:
    """A copy with every floating tensor in float64."""
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in clone(arguments).items()
    }


def filled(arguments: Arguments) -> Arguments:
    """A copy with random numbers in place of NaN: what is written outside the windows then shows."""
    return {
        name: torch.where(value.isnan(), torch.randn_like(value), value)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in arguments.items()
    }


def clone(arguments: Arguments) -> Arguments:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in arguments.items()}


def backends(op: str) -> pytest.MarkDecorator:
    """Parametrizes a test by `backend`: those that have a kernel for the op, skipped where their device is missing."""
    no_gpu = pytest.mark.skipif(not HAS_CUDA, reason="no GPU")
    names = ["reference", "cpu", *KERNELS.get(op, ())]
    no_lanes = pytest.mark.skipif(bool(lanes.missing), reason=lanes.missing)
    no_triton = pytest.mark.skipif(find_spec("triton") is None, reason="no Triton")
    on_gpu = [pytest.mark.gpu] if HAS_CUDA else []
    marks = {"cuda": [pytest.mark.gpu, no_gpu], "lanes": [no_lanes], "triton": [no_triton, *on_gpu]}
    return pytest.mark.parametrize("backend", [pytest.param(name, marks=marks.get(name, ())) for name in names])


def skip_slow(backend: str, steps: int, batch: int, size: int, history: int = 1) -> None:
    """Leaves a size to the GPU where Triton is interpreted; every awkward length has a size that is not left out."""
    large = steps * batch * size * history > 60_000 or steps * batch > 60
    if backend == "triton" and INTERPRETED and large:
        pytest.skip("many programs, and Triton is interpreted")


def some(numbers: range, backend: str) -> Sequence[int]:
    """All of them, or the ends and the middle where each call takes long."""
    slow = backend == "triton" and INTERPRETED
    return sorted({numbers[0], numbers[len(numbers) // 2], numbers[-1]}) if slow else numbers


def to(arguments: Arguments, device: str | torch.device) -> Arguments:
    """The tensors on another device; those that share memory still do."""
    memory: dict[int, Tensor] = {}

    def move(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in memory:
            memory[storage.data_ptr()] = torch.empty(0, dtype=value.dtype, device=value.device).set_(storage).to(device)
        return memory[storage.data_ptr()].as_strided(value.shape, value.stride(), value.storage_offset())

    return {name: move(value) if isinstance(value, Tensor) else value for name, value in arguments.items()}


def run(op: str, backend: str, arguments: Arguments) -> None:
    """Run `op` in place, on the backend's device if that is another."""
    if backend == "lanes":
        getattr(lanes, op)(**arguments)
        return
    moved = arguments if DEVICES[backend] == "cpu" else to(arguments, DEVICES[backend])
    with ops.use_backend(backend):
        getattr(ops, op)(**moved)
    for name, value in arguments.items():
        if isinstance(value, Tensor) and moved is not arguments:
            value.copy_(moved[name])


def check(op: str, arguments: Arguments, backend: str, rtol: float = 1e-5) -> None:
    """Run `op` on the backend and compare all that it writes with the reference in float64."""
    expected = wide(arguments)
    getattr(reference, op)(**expected)
    inputs = clone(arguments)
    run(op, backend, arguments)
    for name, value in arguments.items():
        if name in WRITTEN[op]:
            for part in range(value.shape[-1]) if name in ("norms", "convergence") else [slice(None)]:
                assert_close(value[..., part], expected[name][..., part], rtol, f"{op} {name}")
        elif isinstance(value, Tensor):
            assert torch.equal(value.nan_to_num(12345.0), inputs[name].nan_to_num(12345.0)), f"{op} changed {name}"


def windows(steps: int, batch: int, first: int = 0) -> Tensor:
    """(B, 2): the whole chain, a part of it, its end, its beginning, nothing, round and round from the `first`."""
    middle = steps // 2
    kinds = [(0, steps), (steps // 3, middle + 1), (middle, steps), (0, middle), (middle, middle)]
    return torch.tensor([kinds[(first + sample) % len(kinds)] for sample in range(batch)])


def bands(size: int, count: int) -> Tensor:
    """(K+1,): cuts at random; from three bands on, the first and one in the middle are empty."""
    inner = torch.randint(0, size + 1, (count - 1,)).sort().values
    if count >= 3:
        inner[0] = 0
        inner[-1] = inner[-2]
    return torch.cat([torch.tensor([0]), inner, torch.tensor([size])])


def inactive(window: Tensor, steps: int) -> Tensor:
    """(S, B) bool: the rows outside the windows."""
    index = torch.arange(steps)[:, None]
    return (index < window[:, 0]) | (index >= window[:, 1])


def ddim_scan(
    steps: int,
    batch: int,
    size: int,
    count: int,
    first: int = 0,
    noise: bool = True,
    implicit: bool = False,
    two_step: bool = False,
) -> Arguments:
    window = windows(steps, batch, first)
    outside = inactive(window, steps)
    index = torch.arange(steps + 1)[:, None]
    x, e, z = torch.randn(steps + 1, batch, size), torch.randn(steps, batch, size), torch.randn(steps, batch, size)
    slope = torch.randn(steps, batch, count)
    x[(index < window[:, 0]) | (index > window[:, 1]) | (window[:, 0] == window[:, 1])] = NAN
    for value in (e, z, slope):
        value[outside] = NAN
    c = None
    if two_step:
        c = 0.1 * torch.rand(steps) - 0.05
        c[0] = NAN
        before = (window[:, 0] - 1).clamp_min(0)
        e[before, torch.arange(batch)] = torch.randn(batch, size)
    return {
        "x": x,
        "e": e,
        "z": z if noise else None,
        "a": 0.9 + 0.1 * torch.rand(steps),
        "b": 0.2 * torch.rand(steps) - 0.1,
        "c": c,
        "n": torch.rand(steps),
        "slope": slope,
        "bands": bands(size, count),
        "window": window,
        "beta": 0.7,
        "implicit": implicit,
        "f": torch.full_like(e, NAN),
        "g": torch.full_like(e, NAN),
        "norms": torch.full((steps, batch, 3), NAN, dtype=torch.float64),
    }


def band_moments(steps: int, batch: int, size: int, count: int, first: int = 0) -> Arguments:
    window = windows(steps, batch, first)
    outside = inactive(window, steps)
    dx, e, e_prev = torch.randn(3, steps, batch, size).unbind()
    for value in (dx, e, e_prev):
        value[outside] = NAN
    return {
        "dx": dx.clone(),
        "e": e.clone(),
        "e_prev": e_prev.clone(),
        "bands": bands(size, count),
        "window": window,
        "moments": torch.full((steps, batch, count, 2), NAN, dtype=torch.float64),
    }


def secant_slope(steps: int, batch: int, count: int) -> Arguments:
    """Every kind of quotient: within its bounds, beyond them, no change of x, moments that are not finite."""
    moments = torch.randn(steps, batch, count, 2, dtype=torch.float64)
    moments[..., 1] = moments[..., 1].square()
    kind = torch.randint(0, 8, (steps, batch, count))
    moments[kind == 0] = 0
    moments[kind == 1] = NAN
    moments[..., 0][kind == 2] = torch.inf
    ends = torch.randn(2, steps, dtype=torch.float64).sort(0).values
    return {
        "moments": moments,
        "low": ends[0].clone(),
        "high": ends[1].clone(),
        "prior_weight": 0.3,
        "slope": torch.randn(steps, batch, count),
    }


def interpolate_outputs(steps: int, batch: int, size: int, count: int) -> Arguments:
    """Not quite half of the steps of each sample, between any two others; NaN in all that is not to be read."""
    x, e = torch.full((steps + 1, batch, size), NAN), torch.full((steps, batch, size), NAN)
    slope = torch.full((steps, batch, count), NAN)
    rows = []
    for b in range(batch):
        missing, known = torch.randperm(steps).tensor_split([(steps - 1) // 2])
        x[:steps, b], slope[missing, b] = torch.randn(steps, size), torch.randn(len(missing), count)
        e[known, b] = torch.randn(len(known), size)
        ends = known[torch.randint(0, len(known), (2, len(missing)))]
        rows.append(torch.cat([missing[None], ends]) * batch + b)
    return {
        "x": x,
        "slope": slope,
        "bands": bands(size, count),
        "rows": torch.cat(rows, 1),
        "path": _path(steps),
        "e": e,
    }


def _path(steps: int) -> Tensor:
    """(6, S) of a chain; its first two levels are equal."""
    level = torch.rand(steps, dtype=torch.float64).cumsum(0)
    level[:2] = level[0].clone()
    keep, x0_gain, of_x, of_out = 0.5 + torch.rand(4, steps, dtype=torch.float64)
    scale = torch.cat([torch.ones_like(keep[:1]), keep[:-1].cumprod(0)])
    gains = torch.stack([x0_gain, x0_gain * level]) / (scale * keep)
    gain, gain_level = gains.cumsum(1) - gains
    return torch.stack(OutputPath(scale, gain, gain_level, level, of_x, of_out))


def extrapolate_states(
    steps: int, batch: int, size: int, first: int = 0, noise: bool = True, implicit: bool = False
) -> Arguments:
    """Windows that go on to the end, by one step, not at all, that had none before, or of a sample that stays."""
    middle = steps // 2
    kinds = [
        ((0, middle), (middle, steps), 0),
        ((max(middle - 1, 0), middle), (middle, min(middle + 1, steps)), 0),
        ((max(middle - 2, 0), middle), (1, steps), 0),
        ((0, steps), (steps, steps), 0),
        ((0, 0), (0, steps), 0),
        ((0, middle), (0, steps), 1),
    ]
    chosen = [kinds[(first + sample) % len(kinds)] for sample in range(batch)]
    x, (last_change, e, z) = torch.full((steps + 1, batch, size), NAN), torch.full((3, steps, batch, size), NAN)
    for b, ((begin, end), (_, after), skipped) in enumerate(chosen):
        if 0 < end < after and not skipped:
            x[end - 1 + implicit : end + 1, b] = torch.randn(2 - implicit, size)
            e[end - 1, b] = torch.randn(size)
            z[end:after, b] = torch.randn(after - end, size)
            if implicit or end - begin > 1:  # it changed
                last_change[end - 1, b] = torch.randn(size)
    return {
        "x": x,
        "last_change": last_change.clone(),
        "e": e.clone(),
        "z": z.clone() if noise else None,
        "constant_x0": torch.randn(4, steps),
        "n": torch.rand(steps),
        "previous_window": torch.tensor([before for before, _, _ in chosen]),
        "window": torch.tensor([after for _, after, _ in chosen]),
        "skip": torch.tensor([skipped for _, _, skipped in chosen]),
        "beta": 0.7,
        "implicit": implicit,
    }


def _ring(steps: int, batch: int, size: int, history: int, head: int, count: int, window: Tensor) -> Tensor:
    """(m+1, S, B, D), with NaN where nothing may be read: outside the windows and beyond the age `count`."""
    ring = torch.randn(history + 1, steps, batch, size)
    ring[:, inactive(window, steps)] = NAN
    for age in range(count + 1, history + 1):
        ring[(head - age) % (history + 1)] = NAN
    return ring


def anderson_gram(steps: int, batch: int, size: int, history: int, head: int, count: int, first: int = 0) -> Arguments:
    window = windows(steps, batch, first)
    factor = torch.randn(steps, batch, history + 2, history, dtype=torch.float64) * size**0.5
    gram = factor.mT @ factor
    gram[inactive(window, steps)] = NAN
    gram[..., count - 1 :, :] = NAN  # what the last call left at greater ages, or never wrote
    gram[..., :, count - 1 :] = NAN
    return {
        "g_ring": _ring(steps, batch, size, history, head, count, window),
        "head": head,
        "count": count,
        "window": window,
        "gram": gram,
        "rhs": torch.full((steps, batch, history), NAN, dtype=torch.float64),
    }


def anderson_solve(
    steps: int, batch: int, history: int, first: int = 0, scope: str = "row", implicit: bool = False
) -> Arguments:
    """Well-conditioned systems; rows outside the windows are NaN."""
    window = windows(steps, batch, first)
    factor = torch.randn(steps, batch, 2 * history + 3, history, dtype=torch.float64)
    right = torch.randn(steps, batch, 2 * history + 3, 1, dtype=torch.float64)
    gram, rhs = factor.mT @ factor, (factor.mT @ right)[..., 0]
    outside = inactive(window, steps)
    gram[outside] = NAN
    rhs[outside] = NAN
    return {
        "gram": gram,
        "rhs": rhs,
        "window": window,
        "scope": scope,
        "ridge": 1e-6,
        "ridge_absolute": 0.0,
        "implicit": implicit,
        "gamma": torch.full((steps, batch, history), NAN),
    }


def anderson_mix(steps: int, batch: int, size: int, history: int, head: int, count: int, first: int = 0) -> Arguments:
    window = windows(steps, batch, first)
    gamma = torch.randn(steps, batch, history)
    gamma[inactive(window, steps)] = NAN
    gamma[..., count:] = NAN
    return {
        "f_ring": _ring(steps, batch, size, history, head, count, window),
        "head": head,
        "count": count,
        "gamma": gamma,
        "window": window,
        "out": torch.full((steps, batch, size), NAN),
    }


def update_convergence(
    steps: int, batch: int, first: int = 0, implicit: bool = False, rtol: float = 1e-2, gaps: bool = False
) -> Arguments:
    """Some steps at the start have converged; now and then a norm is zero or not finite, or a correction large.

    gaps: outputs were interpolated, of every second sample none.
    """
    window = windows(steps, batch, first)
    first_interpolated = window[:, 0] + 1 + torch.randint(0, steps + 1, (batch,))
    first_interpolated[::2] = window[::2, 1]
    norms = torch.rand(steps, batch, 3, dtype=torch.float64) + 0.1
    norms[..., 1] *= 10.0 ** -torch.randint(0, 9, (batch,))
    norms[: torch.randint(0, steps + 1, ()), :, 0] = 1e-12
    norms[inactive(window, steps)] = 0.0
    if steps > 2:
        norms[-2, batch // 2] = 0.0
        norms[-1, : batch // 5, 1] = torch.tensor([NAN, torch.inf, 1e12])[torch.randint(0, 3, ())]
    convergence = torch.rand(batch, 5, dtype=torch.float64) * 10.0 ** -torch.randint(0, 4, (batch, 1))
    convergence[0] = torch.tensor(INITIAL_CONVERGENCE)
    return {
        "norms": norms,
        "scale": torch.rand(batch, dtype=torch.float64) + 0.5,
        "first_interpolated": torch.minimum(first_interpolated, window[:, 1]) if gaps else None,
        "tolerance": 1e-4 * torch.rand(steps, dtype=torch.float64) + 1e-11,
        "rtol": rtol,
        "best_contraction": 0.1,
        "growth": 1e3,
        "window_size": max(steps // 2, 1),
        "implicit": implicit,
        "convergence": convergence,
        "window": window,
        "diverged": torch.full((batch,), 9),
    }


def rotation(size: int) -> Tensor:
    """(size, size) orthonormal, at random."""
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q.float().contiguous()


def mirrored(size: int, levels: int = 1) -> Tensor:
    """(size, size) orthonormal, at random, with the symmetry of a DCT-II: its rows, the halves of its even rows, .."""
    if levels == 0 or size == 1:
        return rotation(size)
    half, middle = divmod(size, 2)
    even, odd = mirrored(half + middle, 0 if middle else levels - 1), rotation(half)
    matrix = torch.zeros(size, size)
    for first, side, sign in ((0, even[:, :half], 1), (1, odd, -1)):
        matrix[first::2, :half] = side / 2**0.5
        matrix[first::2, half + middle :] = sign * matrix[first::2, :half].flip(1)
    matrix[::2, half : half + middle] = even[:, half:]
    return matrix


def dct2(
    count: int,
    channels: int,
    height: int,
    width: int,
    inverse: bool,
    rows: int | None = None,
    matrix: Callable[[int], Tensor] = mirrored,
) -> Arguments:
    """Random matrices in place of cosines; the `rows` of the spectrum are more than the images and in no order."""
    total = rows or count + 3
    size = channels * height * width
    image, spectrum = torch.randn(count, channels, height, width), torch.randn(total, size)
    (image if inverse else spectrum).fill_(NAN)
    order = torch.randperm(size)
    return {
        "image": image,
        "spectrum": spectrum,
        "rows": torch.randperm(total)[:count],
        "dct_h": matrix(height),
        "dct_w": matrix(width),
        "colour": rotation(channels),
        "order": order,
        "place": order.argsort(),
        "inverse": inverse,
    }


# Enough work for a second thread.
LARGE: dict[str, Callable[[], Arguments]] = {
    "dct2": lambda: dct2(24, 3, 32, 32, inverse=False),
    "ddim_scan": lambda: ddim_scan(50, 3, 3072, 24),
    "band_moments": lambda: band_moments(50, 3, 3072, 24),
    "secant_slope": lambda: secant_slope(50, 8, 24),
    "interpolate_outputs": lambda: interpolate_outputs(50, 3, 3072, 24),
    "extrapolate_states": lambda: extrapolate_states(50, 5, 3072),
    "anderson_gram": lambda: anderson_gram(20, 5, 3072, 3, 1, 2),
    "anderson_solve": lambda: anderson_solve(20, 10, 16),
    "anderson_mix": lambda: anderson_mix(20, 5, 3072, 3, 1, 2),
    "update_convergence": lambda: update_convergence(50, 8),
}
# Small, with every optional tensor, one sample and every step active.
EXAMPLES: dict[str, Callable[[], Arguments]] = {
    "dct2": lambda: dct2(2, 3, 4, 5, inverse=False),
    "ddim_scan": lambda: ddim_scan(4, 1, 10, 3, two_step=True),
    "band_moments": lambda: band_moments(4, 1, 10, 3),
    "secant_slope": lambda: secant_slope(4, 1, 3),
    "interpolate_outputs": lambda: interpolate_outputs(4, 1, 10, 3),
    "extrapolate_states": lambda: extrapolate_states(4, 1, 10),
    "anderson_gram": lambda: anderson_gram(4, 1, 10, 3, 1, 2),
    "anderson_solve": lambda: anderson_solve(4, 1, 3),
    "anderson_mix": lambda: anderson_mix(4, 1, 10, 3, 1, 2),
    "update_convergence": lambda: update_convergence(4, 1, gaps=True),
}


def large(op: str) -> Arguments:
    """Enough work for a second thread."""
    return LARGE[op]()


def example(op: str) -> Arguments:
    """Small finite arguments of any op, every step active, one sample."""
    arguments = EXAMPLES[op]()
    return {name: value.nan_to_num() if isinstance(value, Tensor) else value for name, value in arguments.items()}


# Integer tensors that are read, by op.
INTEGERS = [
    (op, argument)
    for op, contract in CONTRACTS.items()
    for argument in contract.tensors
    if isinstance(argument.rule, Int64) and (isinstance(argument.rule, Window) or not argument.rule.written)
]
WILD = (-(2**40), -1, 10**4, 2**40)


def wild(op: str, name: str) -> list[Arguments]:
    """Examples of the op in which the integers `name` lead out of bounds, at the beginning or at the end."""
    base, found = example(op), []
    for value in WILD:
        for place in (0, -1):
            arguments = clone(base)
            arguments[name].view(-1)[place] = value
            found.append(arguments)
    return found


# Rows that end within a vector and within a block. The last step of the last of three samples is active: what lies
# beyond it lies beyond the tensor.
SMALL: dict[str, list[Callable[[], Arguments]]] = {
    "dct2": [
        lambda shape=shape, inverse=inverse: dct2(*shape, inverse=inverse)
        for shape in [(2, 2, 5, 7), (1, 1, 35, 18), (1, 1, 9, 33), (1, 2, 9, 65), (1, 1, 66, 5)]
        for inverse in (False, True)
    ],
    "ddim_scan": [
        lambda kind=kind: ddim_scan(4, 3, 300, 9, **kind)
        for kind in ({}, {"implicit": True, "noise": False}, {"two_step": True})
    ],
    "band_moments": [lambda: band_moments(3, 3, 90, 9), lambda: band_moments(2, 3, 9, 9)],
    "secant_slope": [lambda: secant_slope(7, 3, 5)],
    "interpolate_outputs": [lambda: interpolate_outputs(5, 3, 90, 9), lambda: interpolate_outputs(4, 2, 9, 3)],
    "extrapolate_states": [
        lambda: extrapolate_states(8, 6, 90),
        lambda: extrapolate_states(7, 6, 9, noise=False, implicit=True),
    ],
    "anderson_gram": [
        lambda: anderson_gram(2, 3, 1200, 3, 1, 3),
        lambda: anderson_gram(2, 3, 9, 16, 5, 15),
    ],
    "anderson_solve": [lambda: anderson_solve(4, 3, 5)],
    "anderson_mix": [lambda: anderson_mix(3, 3, 90, 3, 1, 3), lambda: anderson_mix(2, 3, 9, 16, 5, 15)],
    "update_convergence": [
        lambda: update_convergence(300, 3, gaps=True),
        lambda: update_convergence(7, 3, implicit=True),
    ],
}
