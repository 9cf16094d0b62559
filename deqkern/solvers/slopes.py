"""Slopes: cheap models of d output / d x, one number per step, sample and frequency band.

A slope is given by its shrinkage kappa, which lies between the two ends of the physical range in [0, 1]:
d eps / dx = kappa / sigma and d x0 / dx = (1 - kappa) / alpha, whatever it is that the model predicts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor

from .. import ops
from ..chain.schedule import StepTable
from ..support.checks import check_finite, check_number
from .basis import Basis
from .profile import SlopeProfile as SlopeProfile


class Slope(Protocol):
    """What `slope` of a `Solver` may be: any object with `adapts` and `initial`.

    The classes of `deqkern.slopes` are of this kind, and so may be one of your own. One that learns from the iteration
    is a `LearningSlope`.

    Attributes:
        adapts: Whether the slopes change from one iteration to the next. True makes it a `LearningSlope`.

    Example:
        Another constant shrinkage in each band, 0 at the lowest frequency.

        >>> class Rising:
        ...     adapts = False
        ...     def initial(self, table, basis):
        ...         bands = len(basis.bands) - 1
        ...         kappa = torch.arange(bands, dtype=torch.float64) / bands
        ...         return kappa.expand(table.num_inference_steps, -1)
        >>> solver = deqkern.solvers.Solver(slope=Rising())
        >>> noise, schedule = torch.randn(2, 1, 8, 8), deqkern.NoiseSchedule.linear()
        >>> solution = deqkern.sample(lambda x, t: 0.1 * x, noise, schedule, 10, solver=solver)
        >>> solution.converged.tolist()
        [True, True]
    """

    @property
    def adapts(self) -> bool:
        """Whether the slopes change from one iteration to the next."""

    def initial(self, table: StepTable, basis: Basis) -> Tensor:
        """The shrinkages that a solve starts with.

        Args:
            table: The S steps of the chain: `table.num_inference_steps`, `table.alpha`, `table.sigma`,
                `table.log_snr` (S,), float64 on the CPU.
            basis: The basis of the states: `basis.bands` (K+1,) are the ends of its K bands, from low to high
                frequencies, channel by channel; `basis.shape` that of a sample.

        Returns:
            (S, K), finite, of any float dtype. 0 freezes epsilon and 1 freezes x0.
        """


class LearningSlope(Slope, Protocol):
    """A slope whose `adapts` is True: it is refined in each iteration. `Secant` is one.

    Such a slope goes with no mixing and with beta = 1. Where it keeps something from one iteration to the next, its
    `initial`, which is called before every solve and maybe twice, is where to forget it; one object then serves one
    solve at a time.

    Attributes:
        measures_at_once: Whether `refine` is called in the first iteration as well, with moments from zero to the first
            states. If not, the first iteration uses the slopes of `initial`.

    Example:
        Secants with momentum: of the moments of all iterations, each with half the weight of the one after it.

        >>> class Momentum:
        ...     adapts, measures_at_once = True, True
        ...     def initial(self, table, basis):
        ...         self.sums = 0.0
        ...         return deqkern.slopes.Gaussian().initial(table, basis)
        ...     def refine(self, slope, moments, low, high):
        ...         self.sums = moments + 0.5 * self.sums
        ...         cross, square = self.sums.unbind(-1)
        ...         secant = (cross / square).clamp(low[:, None, None], high[:, None, None])
        ...         slope.copy_(torch.where(square > 0, secant, slope))
        >>> solver = deqkern.solvers.Solver(slope=Momentum())
        >>> noise, schedule = torch.randn(2, 1, 8, 8), deqkern.NoiseSchedule.linear()
        >>> solution = deqkern.sample(lambda x, t: 0.1 * x, noise, schedule, 10, solver=solver)
        >>> solution.converged.tolist()
        [True, True]
    """

    @property
    def measures_at_once(self) -> bool:
        """Whether `refine` is called in the first iteration as well."""

    def refine(self, slope: Tensor, moments: Tensor, low: Tensor, high: Tensor) -> None:
        """Write the next slopes into `slope`: finite ones, and best within low .. high.

        To wait for the device, or to branch on what is in a tensor, would slow every iteration, and not work with
        `cuda_graph`.

        Args:
            slope: (S, B, K), those of the last iteration, in the dtype of the states.
            moments: (S, B, K, 2) float64, <dx, de> and <dx, dx> over a band, of the last change dx of a state and de of
                its output. Both are zero where nothing was measured; the slope had better stay there.
            low: (S,) float64, the least slope of a step.
            high: (S,) float64, the largest slope of a step.
        """


def learns(slope: Slope) -> TypeGuard[LearningSlope]:
    """Whether it is a `LearningSlope`: whether it says that it adapts."""
    return slope.adapts


def check_slope(name: str, slope: Any) -> None:
    """A `Slope`, or a `LearningSlope`. Raises TypeError that says what it lacks."""
    if isinstance(slope, type):
        raise TypeError(f"{name} must be an object, got the class {slope.__name__}")
    missing = [member for member in ("adapts", "initial") if not hasattr(slope, member)]
    if not missing and slope.adapts:
        missing = [member for member in ("measures_at_once", "refine") if not hasattr(slope, member)]
    if missing:
        raise TypeError(
            f"{name} must be one of deqkern.slopes or an object like them, got {type(slope).__name__}, "
            f"which has no {' and no '.join(missing)}"
        )
    for member in ("adapts", "measures_at_once"):
        if not isinstance(getattr(slope, member, False), bool):
            raise TypeError(f"{name}.{member} must be a bool, got {getattr(slope, member)!r}")
    for member in ("initial", "refine"):
        if not callable(getattr(slope, member, check_slope)):
            raise TypeError(f"{name}.{member} must be a method, got {getattr(slope, member)!r}")


def initial_shrinkage(slope: Slope, table: StepTable, basis: Basis) -> Tensor:
    """`slope.initial` (S, K). Raises TypeError or ValueError that names the slope if that is something else."""
    shrinkage: Any = slope.initial(table, basis)
    name, shape = f"initial of the slope {type(slope).__name__}", (table.num_inference_steps, len(basis.bands) - 1)
    if not isinstance(shrinkage, Tensor) or not shrinkage.is_floating_point():
        got = shrinkage.dtype if isinstance(shrinkage, Tensor) else type(shrinkage).__name__
        raise TypeError(f"{name} must return a tensor of floating-point numbers, got {got}")
    if shrinkage.shape != shape:
        raise ValueError(f"{name} must return shape {shape}, one row per step, got {tuple(shrinkage.shape)}")
    check_finite(f"what {name} returns", shrinkage)
    return shrinkage.detach()


def slope_of(table: StepTable, shrinkage: Tensor) -> Tensor:
    """The slope d output / d x (S, ...) of a shrinkage (S, ...)."""
    shape = (-1, *[1] * (shrinkage.ndim - 1))
    low, high = table.slope_0.view(shape).to(shrinkage), table.slope_1.view(shape).to(shrinkage)
    return low + (high - low) * shrinkage


@dataclass(frozen=True)
class Frozen:
    """A constant shrinkage: 0 freezes epsilon (Picard on the DDIM sum), 1 freezes x0 (Picard in data prediction).

    Args:
        shrinkage: Finite.

    Raises:
        ValueError: If shrinkage is not finite.
        TypeError: If shrinkage is not a number.

    Example:
        >>> solver = deqkern.solvers.Solver(slope=deqkern.slopes.Frozen(1.0), name="Picard on x0")
        >>> noise, schedule = torch.randn(2, 4), deqkern.NoiseSchedule.linear()
        >>> deqkern.sample(lambda x, t: 0.1 * x, noise, schedule, 10, solver=solver).converged.tolist()
        [True, True]
    """

    shrinkage: float = 0.0
    adapts = False

    def __post_init__(self) -> None:
        check_number("shrinkage", self.shrinkage)
        if not math.isfinite(self.shrinkage):
            raise ValueError(f"shrinkage must be finite, got {self.shrinkage}")

    def initial(self, table: StepTable, basis: Basis) -> Tensor:
        """See `Slope`."""
        return torch.full(
            (table.num_inference_steps, len(basis.bands) - 1), self.shrinkage, dtype=torch.float64, device="cpu"
        )


@dataclass(frozen=True)
class Gaussian:
    """The Wiener filter of data with variance P in every band: kappa = sigma^2 / (alpha^2 P + sigma^2).

    Args:
        variance: P, finite and positive.

    Raises:
        ValueError: If variance is out of range.
        TypeError: If variance is not a number.

    Example:
        Exact for Gaussian data, whose chain then takes one iteration.

        >>> schedule = deqkern.NoiseSchedule.linear()
        >>> abar = schedule.alphas_cumprod.float()
        >>> def model(x, t):
        ...     a = abar[t][:, None]
        ...     return (1 - a).sqrt() / (0.3 * a + 1 - a) * x
        >>> solver = deqkern.solvers.Solver(slope=deqkern.slopes.Gaussian(0.3))
        >>> deqkern.sample(model, torch.randn(2, 4), schedule, 10, solver=solver).iterations
        1
    """

    variance: float = 0.25
    adapts = False

    def __post_init__(self) -> None:
        check_number("variance", self.variance)
        if not 0 < self.variance < math.inf:
            raise ValueError(f"variance must be finite and > 0, got {self.variance}")

    def initial(self, table: StepTable, basis: Basis) -> Tensor:
        """See `Slope`."""
        return table.shrinkage(self.variance)[:, None].expand(-1, len(basis.bands) - 1)


@dataclass(frozen=True)
class Secant:
    """Slopes measured in the last iteration, <dx, de> / <dx, dx> per step, sample and band (Barzilai-Borwein).

    Args:
        start: A slope that does not adapt, for the first iteration. With None the first evaluation measures it, with
            the states themselves for dx and the outputs for de: the secant to zero, where a model of centred data gives
            about zero.
        prior_weight: The relative weight of the slope before in the next one.

    Raises:
        ValueError: If prior_weight is negative or not finite.
        TypeError: If start is no such slope, or prior_weight is not a number.

    Example:
        >>> solver = deqkern.solvers.Solver(slope=deqkern.slopes.Secant(prior_weight=0.1))
        >>> noise, schedule = torch.randn(2, 4), deqkern.NoiseSchedule.linear()
        >>> deqkern.sample(lambda x, t: 0.1 * x, noise, schedule, 10, solver=solver).converged.tolist()
        [True, True]

    Reference:
        Barzilai, Borwein: Two-point step size gradient methods, IMA Journal of Numerical Analysis 8 (1988).
    """

    start: Slope | None = None
    prior_weight: float = 1e-2
    adapts = True

    def __post_init__(self) -> None:
        if self.start is not None:
            check_slope("start", self.start)
            if self.start.adapts:
                name = type(self.start).__name__
                raise TypeError(f"start must be None or a slope that does not adapt, such as Gaussian(), got {name}")
        check_number("prior_weight", self.prior_weight)
        if not 0 <= self.prior_weight < math.inf:
            raise ValueError(f"prior_weight must be finite and >= 0, got {self.prior_weight}")

    @property
    def measures_at_once(self) -> bool:
        """Whether the first evaluation measures the first slopes."""
        return self.start is None

    def initial(self, table: StepTable, basis: Basis) -> Tensor:
        """See `Slope`."""
        return initial_shrinkage(Gaussian() if self.start is None else self.start, table, basis)

    def refine(self, slope: Tensor, moments: Tensor, low: Tensor, high: Tensor) -> None:
        """See `LearningSlope`."""
        ops.unchecked.secant_slope(moments, low, high, prior_weight=self.prior_weight, slope=slope)
