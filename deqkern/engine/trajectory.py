"""The joint system: all states of a chain in the solver's basis, and a map that is evaluated at them in one batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..chain.schedule import StepTable
from ..solvers.basis import Basis
from ..solvers.presets import Solver
from ..solvers.slopes import slope_of
from ..support.eager import uncompiled
from .host import Ints, on_device

# No step need be settled better than this many roundings, in its one-step residual relative to the state.
ROUNDINGS = 1.7
# Nor better than this many roundings of the map, by the weight of its output: where those of the shipped models come to
# rest in bf16 and fp16, at 0.3 to 0.7.
MAP_ROUNDINGS = 0.75


class Map(Protocol):
    """What the chain is linear in, at states (N, *shape) of steps (N,) and samples (N,): (N, *shape)."""

    what: str  # how an error about the result begins

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the states that it is called at; None: their own."""

    @property
    def precision(self) -> float:
        """The eps of the arithmetic behind it, as far as the calls until now have shown."""

    def __call__(self, states: Tensor, steps: Tensor, samples: Tensor) -> Tensor:
        """Evaluate; the result may be of any floating dtype."""


@runtime_checkable
class Reserving(Protocol):
    """A map that holds a copy of the states it is called at."""

    def reserve(self, rows: int) -> None:
        """The most rows of a call to come."""


@dataclass
class Trajectory:
    """States x[0] .. x[S] of B chains; `evaluate` calls the map at the rows that `select` chose, in one batch.

    Rows are flat indices i * B + b of (step, sample); step i takes the map at x[i], or at x[i+1] if the table is
    implicit. The map sees and gives samples, in space; the states are kept in the basis, fp32 or fp64.
    """

    map: Map
    table: StepTable
    basis: Basis
    x: Tensor  # (S+1, B, D), in the basis
    z: Tensor | None  # (S, B, D), in the basis
    max_batch: int | None = None
    guess: str = "none"  # of states that a window comes to, unless they have one: "chain", "constant" or "none"
    nfe: Tensor = field(init=False)  # (B,) int64, on the CPU
    rows: Tensor = field(init=False)  # (N,) int64, the selected ones, on the device; and here and below
    row_steps: Tensor = field(init=False)  # their steps
    row_samples: Tensor = field(init=False)  # and samples
    scale: Tensor = field(init=False)  # (B,) float64, what corrections are relative to where a state is larger: |x[0]|

    def __post_init__(self) -> None:
        self.nfe = torch.zeros(self.batch, dtype=torch.int64, device="cpu")
        self.rows = self.row_steps = self.row_samples = torch.empty(0, dtype=torch.int64, device="cpu")
        self.scale = self.x[0].double().norm(dim=-1)
        self._images: dict[torch.dtype, Tensor] = {}  # (rows, *shape)
        # whether the op between states and samples reads and writes the map's own dtype in its one pass
        self.casts = self.x.is_cuda and self.basis.dct_h is not None
        self._counts = torch.zeros_like(self.nfe)

    @property
    def steps(self) -> int:
        """S."""
        return self.x.shape[0] - 1

    @property
    def batch(self) -> int:
        """B."""
        return self.x.shape[1]

    @property
    def thins(self) -> bool:
        """Whether outputs can be interpolated: along an explicit chain without noise, of states that start from it."""
        return self.guess == "chain" and not self.table.implicit and self.z is None

    def settled(self, rtol: float) -> Tensor:
        """A step whose one-step residual, relative to its state, is at most this (S,) is not evaluated again.

        With rtol > 0 no less than what the map's own rounding makes of it, which no iteration can take away.
        """
        rounding = torch.finfo(self.x.dtype).eps
        precision = self.map.precision if rtol and self.map.precision > rounding else 0.0
        weight = MAP_ROUNDINGS * (self.table.b.abs() + self.table.c.abs())
        return (precision * weight).clamp_min(max(rtol / (2 * self.steps), ROUNDINGS * rounding))

    def where(self, steps: Tensor) -> str:
        """What an error about the map says of `steps` (N,) bool or int64."""
        return f", timesteps {self.table.timesteps[steps].tolist()}"

    def images(self, rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The states `rows` (N,) of all S+1, as samples (N, *shape), in the dtype of the states if None is given.

        The memory is reused by the next call for that dtype.
        """
        count, dtype = len(rows), dtype or self.x.dtype
        if dtype not in self._images or len(self._images[dtype]) < count:
            self._images[dtype] = self.x.new_empty(count, *self.basis.shape, dtype=dtype)
        image = self._images[dtype][:count]
        self.basis.inverse(self.x.flatten(0, 1), image, rows)
        return image

    def reserve(self, rows: int) -> None:
        """The memory for calls with so many rows, though the first ones have fewer."""
        most = min(rows, self.max_batch or rows)
        dtype = self._image_dtype
        self._images[dtype] = self.x.new_empty(most, *self.basis.shape, dtype=dtype)
        if isinstance(self.map, Reserving):
            self.map.reserve(most)

    @property
    def selected(self) -> int:
        """The number of selected rows."""
        return len(self.rows)

    def select(self, rows: Ints) -> None:
        """Choose the states `rows` (N,) that `evaluate` calls the map at."""
        steps, samples = np.divmod(rows, self.batch)  # here: no kernels for it in an iteration
        self._counts = torch.from_numpy(np.bincount(samples, minlength=self.batch))
        places = on_device(np.stack([rows, steps, samples]), self.x.device)
        self.rows, self.row_steps, self.row_samples = places.unbind()

    def count(self) -> None:
        """Add the selected rows to `nfe`: once per evaluation, also where a captured one is replayed."""
        self.nfe += self._counts

    def evaluate(self, out: Tensor) -> None:
        """Call the map at the selected states; what it gives goes to `out` (S, B, D), in the basis."""
        places = (self.rows, self.row_steps, self.row_samples)
        for part, steps, samples in zip(*(calls(values, self.max_batch) for values in places), strict=True):
            image = self.images(part + self.batch if self.table.implicit else part, self._image_dtype)
            output = self.map(image, steps, samples)
            if output.dtype != image.dtype and not self.casts:
                output = image.copy_(output)  # the images are not needed any more
            self.basis.forward(output, out.flatten(0, 1), part)

    @property
    def _image_dtype(self) -> torch.dtype:
        return self.map.dtype or self.x.dtype if self.casts else self.x.dtype

    def held(self) -> Tensor | None:
        """What the op `extend` holds (4, S), on the CPU: x0, or with the guess "constant" the state (ParaDiGMS)."""
        if self.guess == "none":
            return None
        held = torch.stack(self.table.constant_x0())
        if self.guess == "constant":
            held[0], held[1:] = 1.0, 0.0
        return held


@uncompiled
def start(
    map: Map,
    first: Tensor,  # (B, *shape), the state that is known
    table: StepTable,
    solver: Solver,
    *,
    guess: Tensor | None = None,  # (S+1, B, *shape)
    step_noise: Tensor | None = None,  # (S, B, *shape)
    generator: torch.Generator | None = None,
    max_batch: int | None = None,
    noisy: bool = True,
) -> Trajectory:
    """The chain of `table` from its first state, in the solver's basis, with a first guess of the others.

    The guess is the solver's own if none is given; the first state of a given one is not looked at. Step noise that is
    not given is drawn from `generator`, in the order of the sequential chain. noisy: states are alpha x0 + sigma eps,
    unlike those of a gradient.
    """
    shape, device, steps, batch = tuple(first.shape[1:]), first.device, len(table.a), len(first)
    spectral = solver.basis == "spectral" and len(shape) == 3
    dtype = torch.promote_types(first.dtype, torch.float32)  # of the states
    basis = Basis.spectral(shape, device, dtype) if spectral else Basis.identity(shape, device)
    samples = torch.arange(batch, device=device)
    x = torch.zeros(steps + 1, batch, basis.size, device=device, dtype=dtype)
    basis.forward(first, x[0], samples)
    z = None
    if bool((table.n != 0).any()):
        if step_noise is None:
            step_noise = torch.stack([normal(first, generator) for _ in range(steps)])
        z = torch.empty(steps, batch, basis.size, device=device, dtype=dtype)
        basis.forward(step_noise.flatten(0, 1), z.flatten(0, 1), torch.arange(steps * batch, device=device))
    if guess is not None:
        rows = torch.arange(steps * batch, device=device)
        basis.forward(guess[1:].flatten(0, 1), x[1:].flatten(0, 1), rows)
    elif solver.start == "constant":
        x[1:] = x[0]
    elif batch:
        _scan_from_zero(x, z, table, basis, initial_slope(solver, table, basis, x))
    guesses = guess is None and (noisy or solver.start == "constant")
    return Trajectory(map, table, basis, x, z, max_batch, solver.start if guesses else "none")


def initial_slope(solver: Solver, table: StepTable, basis: Basis, x: Tensor) -> Tensor:
    """The slopes (S, B, K) that a solver starts with, for states x (S+1, B, D)."""
    slope = slope_of(table, solver.slope.initial(table, basis)).to(x.device, x.dtype)  # (S, K)
    return slope[:, None].expand(-1, x.shape[1], -1).contiguous()


def _scan_from_zero(
    x: Tensor,  # (S+1, B, D): x[0], and zeros that are overwritten
    z: Tensor | None,  # (S, B, D)
    table: StepTable,
    basis: Basis,
    slope: Tensor,  # (S, B, K)
) -> None:
    """The chain of a model whose output is slope[i] x[i]: the first correction of states that are zero."""
    steps, batch, size = len(x) - 1, *x.shape[1:]
    e = x.new_zeros(steps, batch, size)
    if not table.implicit:
        e[0] = slope[0].repeat_interleave(basis.bands.diff(), dim=-1, output_size=size) * x[0]
    ops.ddim_scan(
        *(x, e, z, *table.coefficients(x), slope, basis.bands),
        torch.tensor([[0, steps]], device="cpu").expand(batch, -1).contiguous().to(x.device),
        *(1.0, table.implicit, x[1:], torch.empty_like(e), x.new_empty(steps, batch, 3, dtype=torch.float64)),
    )


def calls(rows: Tensor, max_batch: int | None) -> tuple[Tensor, ...]:
    """The rows (N, ..) of each call of the model: at most `max_batch`."""
    return rows.split(int(max_batch or max(len(rows), 1)))


def normal(like: Tensor, generator: torch.Generator | None, dtype: torch.dtype | None = None) -> Tensor:
    """Standard normal noise like `like`, drawn as diffusers does: on the generator's device, its dtype by default."""
    device, dtype = like.device if generator is None else generator.device, dtype or like.dtype
    return torch.randn(like.shape, generator=generator, device=device, dtype=dtype).to(like.device)
