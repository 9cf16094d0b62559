"""The states of a chain in the solver's basis, and what goes between them and the samples that a map sees."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..chain.step_table import StepTable
from ..solvers.basis import Basis
from ..solvers.presets import Solver
from ..solvers.slopes import initial_shrinkage, slope_of


@dataclass(frozen=True)
class Traits:
    """What the engine knows of the map that is evaluated outside of it.

    Attributes:
        dtype: Of the states that it is given; None for their own.
        precision: The eps of its arithmetic, as far as it is known before the first outputs.
        error_prefix: How an error about its outputs begins.
        max_batch: The most states that it is given at once; None for all.
        whole_batch: It is evaluated at all samples each time, also where they have converged.
        rounding: The one-step residual, relative to the state, at which a step has converged; None for one that
            follows from rtol.

    """

    dtype: torch.dtype | None = None
    precision: float = 0.0
    error_prefix: str = "model returned"
    max_batch: int | None = None
    whole_batch: bool = False
    rounding: float | None = None


class Trajectory:
    """States x[0] .. x[S] of B chains, fp32 or fp64, in the basis.

    A row is the flat index i * B + b of a step and a sample. Step i takes the map at x[i], or at x[i+1] if the table
    is implicit. The map sees and gives samples, in space.

    Attributes:
        x: (S+1, B, D), the states, in the basis.
        z: (S, B, D), the step noise, in the basis; None without.
        guess: Of states that a window reaches, unless they have one: "chain", "constant" or "none".
        scale: (B,) fp64, what corrections are relative to where a state is larger.
        precision: The largest eps of the map's arithmetic that is known.
        casts: Whether the op between states and samples reads and writes the map's own dtype in its one pass.

    """

    def __init__(
        self,
        table: StepTable,
        basis: Basis,
        x: Tensor,  # (S+1, B, D)
        *,
        z: Tensor | None = None,  # (S, B, D)
        traits: Traits = Traits(),
        guess: str = "none",
        scale: Tensor | None = None,  # (B,) fp64; None for |x[0]|
    ) -> None:
        self.table, self.basis, self.x, self.z, self.traits, self.guess = table, basis, x, z, traits, guess
        self.scale = x[0].double().norm(dim=-1) if scale is None else scale
        self.casts = x.is_cuda and basis.dct_h is not None
        self.precision = traits.precision
        self._images: dict[torch.dtype, Tensor] = {}  # (N, *shape)
        self._inputs: Tensor | None = None  # (N, *shape), where the map gets a copy of the images
        self._imaged = (0, 0)  # the rows of the images that the map was given: where they lie, and their number

    @property
    def steps(self) -> int:
        """S."""
        return self.x.shape[0] - 1

    @property
    def batch(self) -> int:
        """B."""
        return self.x.shape[1]

    @property
    def can_thin(self) -> bool:
        """Whether outputs can be interpolated: along an explicit chain without noise, of states that start from it."""
        return self.guess == "chain" and not self.table.implicit and self.z is None

    def images(self, rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The states `rows` (N,) of all S+1, as samples (N, *shape), in the dtype of the states if None is given.

        The memory is reused by the next call for that dtype.
        """
        count, dtype = len(rows), dtype or self.x.dtype
        if dtype not in self._images or len(self._images[dtype]) < count:
            self._images[dtype] = self.x.new_empty(count, *self.basis.shape, dtype=dtype)
        image = self._images[dtype][:count]
        self.basis.inverse(self.x.flatten(0, 1), image, rows)
        self._imaged = (0, 0)
        return image

    def inputs(self, rows: Tensor) -> Tensor:
        """What the map is given at the rows (N,): their states (N, *shape), in memory that it may write into."""
        if self.traits.whole_batch:
            return self.x[int(self.table.implicit)].view(-1, *self.basis.shape)
        asked = self.traits.dtype or self.x.dtype
        copies = self.table.converts or (asked != self.x.dtype and not self.casts)
        image = self._images_at(rows, self.x.dtype if copies else asked)
        if not copies:
            return image
        if self._inputs is None or len(self._inputs) < len(image):
            most = len(self._images[self.x.dtype])  # for which the images took their memory
            self._inputs = image.new_empty(most, *image.shape[1:], dtype=asked)
        return self._inputs[: len(image)].copy_(image)

    def _images_at(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """The states at which the map is evaluated at the rows (N,)."""
        image = self.images(rows + self.batch if self.table.implicit else rows, dtype)
        self._imaged = (rows.data_ptr(), len(rows))
        return image

    def receive(self, rows: Tensor, steps: Tensor, output: Tensor, out: Tensor) -> None:
        """Put what the map gave at the rows (N,), which are of `steps` (N,), into `out` (S, B, D), in the basis."""
        self.precision = max(self.precision, torch.finfo(output.dtype).eps)
        if self.traits.whole_batch:
            out[0] = output.view(out[0].shape)
            return
        if self.table.converts:
            if self._imaged != (rows.data_ptr(), len(rows)):
                self._images_at(rows, self.x.dtype)
            output = self.table.effective_output(self._images[self.x.dtype][: len(rows)], output, steps)
        if output.dtype != self.x.dtype and not self.casts:  # the images are not needed any more
            output = self._images[self.x.dtype][: len(rows)].copy_(output)
        self.basis.forward(output, out.flatten(0, 1), rows)

    def check(self, output: Tensor) -> int:
        """The number of rows in what the map gave. Raises where it is nothing that a map gives."""
        if not isinstance(output, Tensor):
            raise TypeError(f"outputs must be a tensor, or several one after the other, got {type(output).__name__}")
        prefix, device = self.traits.error_prefix, self.x.device
        if output.shape[1:] != self.basis.shape:
            raise ValueError(f"{prefix} shape {tuple(output.shape)} for samples of shape {self.basis.shape}")
        if output.device != device or not output.is_floating_point():
            raise ValueError(f"{prefix} {output.dtype} on {output.device} for an input on {device}")
        if output.layout is not torch.strided:
            raise ValueError(f"{prefix} a tensor of layout {output.layout}, not a dense one")
        return len(output)

    def describe(self, steps: Tensor) -> str:
        """What an error about the map says of `steps` (N,) int64."""
        return "" if self.traits.whole_batch else f", timesteps {self.table.timesteps[steps].tolist()}"

    def reserve(self, rows: int) -> None:
        """The memory for calls with up to that number of rows, though the first ones have fewer."""
        asked = self.traits.dtype or self.x.dtype
        dtype = asked if self.casts and not self.table.converts else self.x.dtype
        rows = min(rows, int(self.traits.max_batch or rows))
        self._images[dtype] = self.x.new_empty(rows, *self.basis.shape, dtype=dtype)

    def constant_x0(self) -> Tensor | None:
        """What `Extension` keeps constant (4, S), on the CPU: x0, or with the guess "constant" the state."""
        if self.guess == "none":
            return None
        kept = torch.stack(self.table.constant_x0())
        if self.guess == "constant":
            kept[0], kept[1:] = 1.0, 0.0
        return kept


def start(
    first: Tensor,  # (B, *shape), the state that is known
    table: StepTable,
    solver: Solver,
    traits: Traits,
    *,
    guess: Tensor | None = None,  # (S+1, B, *shape)
    step_noise: Tensor | None = None,  # (S, B, *shape)
    generator: torch.Generator | None = None,
    noisy: bool = True,
) -> Trajectory:
    """The chain of `table` from its first state, in the solver's basis, with an initial guess of the others.

    The guess is the solver's own if none is given; the first state of a given one is not looked at. Step noise that is
    not given is drawn from `generator`, in the order of the sequential chain. noisy: states are alpha x0 + sigma eps,
    unlike those of a gradient, which may grow along the chain.
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
    scale = None if noisy else torch.full((batch,), torch.inf, dtype=torch.float64, device=device)
    return Trajectory(table, basis, x, z=z, traits=traits, guess=solver.start if guesses else "none", scale=scale)


def initial_slope(solver: Solver, table: StepTable, basis: Basis, x: Tensor) -> Tensor:
    """The slopes (S, B, K) that a solver starts with, for states x (S+1, B, D)."""
    slope = slope_of(table, initial_shrinkage(solver.slope, table, basis)).to(x.device, x.dtype)  # (S, K)
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
    a, b, c, n = table.coefficients(x)
    ops.ddim_scan(
        x,
        e,
        z,
        a=a,
        b=b,
        c=c,
        n=n,
        slope=slope,
        bands=basis.bands,
        window=torch.tensor([[0, steps]], device="cpu").expand(batch, -1).contiguous().to(x.device),
        beta=1.0,
        implicit=table.implicit,
        f=x[1:],
        g=torch.empty_like(e),
        norms=x.new_empty(steps, batch, 3, dtype=torch.float64),
    )


def normal(like: Tensor, generator: torch.Generator | None, dtype: torch.dtype | None = None) -> Tensor:
    """Standard normal noise like `like`, drawn as diffusers does: on the generator's device, its dtype by default."""
    device, dtype = like.device if generator is None else generator.device, dtype or like.dtype
    return torch.randn(like.shape, generator=generator, device=device, dtype=dtype).to(like.device)
