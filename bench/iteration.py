"""The solver's work in one iteration, everything but the model: the ops in the order of `deqkern.solve`, and the same
job in plain torch, arranged as in the code of arXiv 2210.12867 (DEQ-DDIM).

`before()` gives the model's input, `after(k, output)` takes its output: these two are timed, the model is not.
"""

from __future__ import annotations

import math
import time
import warnings
from abc import ABC, abstractmethod

import torch
import typer
from registry import Size, open_windows
from torch import Tensor

import deqkern
from deqkern import NoiseSchedule, ops
from deqkern.chain.step_table import StepTable
from deqkern.engine.iteration import Iteration
from deqkern.engine.rows import Rows
from deqkern.engine.stopping import Stopping
from deqkern.engine.trajectory import Traits, start
from deqkern.solvers.basis import Basis
from deqkern.solvers.slopes import Gaussian, Secant, slope_of

SIZE = Size(50, 1, (3, 64, 64))
HISTORY = 5
RIDGE = 1e-3  # absolute, as published
SCHEDULE = NoiseSchedule.linear()


class Denoiser:
    """A cheap epsilon-predictor of any size: the Wiener filter of data with variance 1/4, bent by a sine."""

    def __init__(self) -> None:
        assert SCHEDULE.alphas_cumprod is not None
        abar = SCHEDULE.alphas_cumprod.double()
        self.gain = ((1 - abar).sqrt() / (abar / 4 + 1 - abar)).float()

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:  # (N, *shape), (N,)
        gain = self.gain[t].view(-1, *[1] * (x.ndim - 1))
        return gain * (x + 0.05 * torch.sin(4 * x))


class Work(ABC):
    """One way to do an iteration. floor: bytes to move at least, None for plain torch. memory: bytes of its arrays."""

    name: str
    floor: int | None = None
    memory: int

    @abstractmethod
    def start(self, noise: Tensor) -> None:  # (B, *shape)
        """Go back to the first guess: the noise in every state."""

    @abstractmethod
    def before(self) -> Tensor:
        """The model's input (S * B, *shape)."""

    @abstractmethod
    def after(self, k: int, output: Tensor) -> None:
        """Finish iteration k = 0, 1, ..; output (S * B, *shape)."""

    @abstractmethod
    def states(self) -> Tensor:
        """The unknown states (S, B, D), as samples."""


class _Kernels(Work):
    """The arrays that both solvers of the library need."""

    def __init__(self, basis: Basis, units: int) -> None:
        steps, batch = SIZE.steps, SIZE.batch
        self.table, self.basis, self.floor = SCHEDULE.steps(steps), basis, 4 * units * SIZE.elements
        self.a, self.b, self.n = self.table.a.float(), self.table.b.float(), self.table.n.float()
        self.x = torch.zeros(steps + 1, batch, basis.size)
        self.window = open_windows(SIZE, self.x.device)
        self.norms = torch.zeros(steps, batch, 3, dtype=torch.float64)
        self.scale = torch.ones(batch, dtype=torch.float64)
        self.tolerance = torch.zeros(steps, dtype=torch.float64)
        self.diverged = torch.zeros(batch, dtype=torch.int64)

    def _scan(self, e: Tensor, slope: Tensor, f: Tensor, g: Tensor) -> None:
        ops.ddim_scan(
            *(self.x, e, None, self.a, self.b, None, self.n, slope, self.basis.bands, self.window, 1.0, False),
            *(f, g, self.norms),
        )

    def _update_convergence(self) -> None:
        """On a window of its own, since every step stays active here."""
        window = self.window.clone()
        ops.update_convergence(
            self.norms,
            self.scale,
            None,
            tolerance=self.tolerance,
            rtol=0.0,
            best_contraction=0.1,
            growth=1e3,
            window_size=SIZE.steps,
            implicit=False,
            convergence=torch.ones(len(window), 5, dtype=torch.float64),
            window=window,
            diverged=self.diverged,
        )


class Anderson(_Kernels):
    """`solvers.deq_ddim()`: scan, gram, solve and mix in the identity basis. The model reads x itself."""

    name = "ops of deq_ddim"

    def __init__(self) -> None:
        super().__init__(Basis.identity(SIZE.shape), 4 + (HISTORY + 1) + (HISTORY + 2))
        steps, batch, size = SIZE.steps, SIZE.batch, self.basis.size
        self.slope = torch.zeros(steps, batch, 1)
        self.g_ring, self.f_ring = torch.zeros(2, HISTORY + 1, steps, batch, size).unbind()
        self.gram = torch.zeros(steps, batch, HISTORY, HISTORY, dtype=torch.float64)
        self.rhs = torch.zeros(steps, batch, HISTORY, dtype=torch.float64)
        self.gamma = torch.zeros(steps, batch, HISTORY)
        self.memory = self.x.nbytes + self.g_ring.nbytes + self.f_ring.nbytes + 4 * SIZE.elements

    def start(self, noise: Tensor) -> None:
        self.x.copy_(noise.flatten(1).expand_as(self.x))

    def before(self) -> Tensor:
        return self.x[:-1].view(-1, *SIZE.shape)

    def after(self, k: int, output: Tensor) -> None:
        head, count = k % (HISTORY + 1), min(k, HISTORY)
        self._scan(output.view(SIZE.steps, SIZE.batch, -1), self.slope, self.f_ring[head], self.g_ring[head])
        if count:
            ops.anderson_gram(self.g_ring, head, count, self.window, self.gram, self.rhs)
            ops.anderson_solve(self.gram, self.rhs, self.window, "row", 0.0, RIDGE, False, self.gamma)
        ops.anderson_mix(self.f_ring, head, count, self.gamma, self.window, self.x[1:])
        self._update_convergence()

    def states(self) -> Tensor:
        return self.x[1:]


class Default(_Kernels):
    """`solvers.default()`: to pixels, back to the spectrum, moments, new slopes, scan."""

    name = "ops of default"

    def __init__(self) -> None:
        super().__init__(Basis.spectral(SIZE.shape), 2 + 2 + 3 + 4)
        rows = (SIZE.steps, SIZE.batch)
        self.secant = Secant()
        ends = torch.stack([self.table.slope_0, self.table.slope_1])
        self.low, self.high = ends.amin(0), ends.amax(0)
        self.first = slope_of(self.table, Gaussian().initial(self.table, self.basis))[:, None].float().contiguous()
        self.slope = self.first.clone()
        self.image = torch.zeros(SIZE.steps * SIZE.batch, *SIZE.shape)
        self.e, self.e_prev = torch.zeros(2, *rows, self.basis.size).unbind()
        self.g = torch.zeros_like(self.x)
        self.moments = torch.zeros(*rows, len(self.basis.bands) - 1, 2, dtype=torch.float64)
        self.rows = torch.arange(SIZE.steps * SIZE.batch)
        self.memory = self.x.nbytes + self.image.nbytes + 2 * self.e.nbytes + self.g.nbytes

    def start(self, noise: Tensor) -> None:
        self.basis.forward(noise, self.x[0], torch.arange(SIZE.batch))
        self.x[1:] = self.x[0]
        self.slope.copy_(self.first)

    def before(self) -> Tensor:
        self.basis.inverse(self.x.flatten(0, 1), self.image, self.rows)
        return self.image

    def after(self, k: int, output: Tensor) -> None:
        self.e, self.e_prev = self.e_prev, self.e
        self.basis.forward(output, self.e.flatten(0, 1), self.rows)
        if k:
            ops.band_moments(self.g[:-1], self.e, self.e_prev, self.basis.bands, self.window, self.moments)
            self.secant.refine(self.slope, self.moments, self.low, self.high)
        self._scan(self.e, self.slope, self.x[1:], self.g[1:])
        self._update_convergence()

    def states(self) -> Tensor:
        image = torch.empty(SIZE.steps * SIZE.batch, *SIZE.shape)
        self.basis.inverse(self.x[1:].flatten(0, 1), image, self.rows)
        return image.view(SIZE.steps, SIZE.batch, -1)


class PlainTorch(Work):
    """Anderson row by row in plain torch: the cumulative DDIM sum for all states, histories of X and F, the Gram matrix
    of all residuals at every iteration, one bordered system per state, and the stopping test.

    The new states are written where the model reads them. `released` does what the published code does instead: it
    allocates the states and builds the model's input from them, adds the part of X with its weight 1 - beta = 0, and
    takes the residual's norm twice. Its logging is left out.
    """

    def __init__(self, released: bool, size: Size = SIZE, device: torch.device | str = "cpu") -> None:
        steps, elements = size.steps, math.prod(size.shape)  # one sample: a row is a state
        self.size, self.released = size, released
        self.name = "plain torch, as released" if released else "plain torch"
        table = SCHEDULE.steps(steps)
        scale = table.a.cumprod(0)
        self.et_coeff = (table.b / scale).float()[:, None].to(device)  # (S, 1)
        self.sum_coeff = scale.float()[:, None].to(device)  # (S, 1)
        self.history_x, self.history_f = torch.zeros(2, steps, HISTORY, elements, device=device).unbind()
        self.chain = torch.zeros(steps + 1, elements, device=device)
        self.matrix = torch.zeros(steps, HISTORY + 1, HISTORY + 1, device=device)
        self.right = torch.zeros(steps, HISTORY + 1, 1, device=device)
        self.matrix[:, 0, 1:] = self.matrix[:, 1:, 0] = self.right[:, 0] = 1
        self.index = torch.arange(steps, device=device)
        self.memory = self.history_x.nbytes + self.history_f.nbytes

    def start(self, noise: Tensor) -> None:
        self.noise = noise.flatten(1)
        self.start_part = self.sum_coeff * self.noise
        self.chain.copy_(self.noise.expand_as(self.chain))
        self.history_x[:, 0] = self.chain[1:]
        self.place = 0

    def before(self) -> Tensor:
        if not self.released:
            return self.chain[:-1].view(-1, *self.size.shape)
        states, image = self.history_x[:, self.place], torch.zeros_like(self.chain[1:])
        image[self.index[:1]] = self.noise
        image[self.index[1:]] = states[self.index[:-1]]
        return image.view(-1, *self.size.shape)

    def after(self, k: int, output: Tensor) -> None:
        place, count = self.place, min(k + 1, HISTORY)
        x, f = self.history_x[:, :count], self.history_f[:, :count]
        f[:, place] = self.start_part + self.sum_coeff * (self.et_coeff * output.flatten(1)).cumsum(0)
        for _ in range(1 + self.released):
            residual = (f[:, place] - x[:, place]).norm().item()
        self.residual = residual / (1e-5 + f[:, place].norm().item())
        g = f - x
        ridge = RIDGE * torch.eye(count, device=g.device)
        self.matrix[:, 1 : count + 1, 1 : count + 1] = torch.bmm(g, g.mT) + ridge
        system = self.matrix[:, : count + 1, : count + 1]
        weights = torch.linalg.solve(system, self.right[:, : count + 1])[:, None, 1:, 0]  # (S, 1, count)
        self.place = (k + 1) % HISTORY
        if self.released:
            self.history_x[:, self.place] = 1.0 * (weights @ f)[:, 0] + 0.0 * (weights @ x)[:, 0]
        else:
            torch.bmm(weights, f, out=self.chain[1:, None])
            self.history_x[:, self.place] = self.chain[1:]

    def states(self) -> Tensor:
        return self.history_x[:, self.place, None]


def open_iteration(
    solver: deqkern.solvers.Solver,
    noise: Tensor,  # (B, *shape)
    table: StepTable,
) -> tuple[Iteration, Rows]:
    """The iteration of a solve, and the rows of all steps, as if they were all evaluated each time."""
    trajectory = start(noise, table, solver, Traits())
    iteration = Iteration(trajectory, solver, Stopping(trajectory, solver.width(len(table.a)), rtol=0.0))
    index = torch.arange(trajectory.steps * trajectory.batch, device=noise.device)
    steps, samples = index // trajectory.batch, index % trajectory.batch
    return iteration, Rows(trajectory, index, steps, samples, table.timesteps.to(noise.device)[steps])


def solver_seconds(solver: deqkern.solvers.Solver, noise: Tensor, iterations: int) -> list[float]:
    """What `deqkern.sample` itself takes from one model call to the next, once it has all of its history.

    Scaled to S active steps: with each iteration more of them are exact and left out. It ends when half of them are.
    """
    denoise, rows, found = Denoiser(), SIZE.steps * SIZE.batch, []
    calls, end = 0, 0.0

    def model(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls, end
        spent = time.perf_counter() - end
        if calls > max(solver.history_size, 1) and 2 * len(x) >= rows:
            found.append(spent * rows / len(x))
        output = denoise(x, t)
        calls, end = calls + 1, time.perf_counter()
        return output

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", deqkern.ConvergenceWarning)
        deqkern.sample(model, noise, SCHEDULE, SIZE.steps, solver=solver, rtol=0.0, max_iterations=iterations)
    return found


if __name__ == "__main__":
    from own_time import main

    typer.run(main)
