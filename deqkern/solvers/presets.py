"""A solver is a choice of slope and a choice of mixing; the presets are the known ones and the default."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..ops import MAX_HISTORY, SCOPES
from ..support.checks import check_number, is_int, is_number
from .slopes import Frozen, Secant, Slope, SlopeProfile, check_slope

WINDOW, THINNING = 0.75, 0.15  # of the default solver


@dataclass(frozen=True)
class Solver:
    """What one iteration does: a choice of slope, mixing, window and thinning.

    Args:
        slope: The model of d output / d x in the scan: one of `deqkern.slopes` (`Frozen`, `Gaussian`, `Secant`,
            `SlopeProfile`), or an object of your own (`deqkern.slopes.Slope`).
        history_size: m of Anderson mixing, 0 .. 16; 0 is no mixing. Mixing assumes one fixed map, so it needs a slope
            that does not adapt.
        scope: Which steps share one least-squares problem: "row" (DEQ-DDIM), "causal" (ParaTAA), "joint" (classical).
        ridge: Regularisation, relative to the mean of the Gram diagonal.
        ridge_absolute: Regularisation, absolute.
        beta: Damping of the correction, 0 < beta <= 1. Below 1 it needs a slope that does not adapt.
        window: The most steps of a sample that are evaluated at once, or a share of the steps if it is a float below
            1; None for all. 1 is the sequential chain.
        thinning: Along a chain without noise, evaluate only steps that lie thinning S sqrt(m) apart where a state moved
            by a share m of itself in the last iteration, and interpolate the outputs between them; 0 for all of them.
        start: The initial guess of the states, "chain" (the chain of the initial slope) or "constant" (the noise
            everywhere). Of steps that come into a window: constant-x0 extrapolation, or the last state (ParaDiGMS).
        basis: "spectral" (samples of shape (C, H, W); others fall back to one band) or "identity".
        name: For messages and tables.

    Raises:
        ValueError: If an option is out of range, or two of them do not go together.
        TypeError: If an option is of another type, or the slope lacks a method.

    Example:
        >>> slope = deqkern.slopes.Gaussian()
        >>> solver = deqkern.solvers.Solver(slope=slope, history_size=3, scope="causal", name="mixed")
        >>> noise, schedule = torch.randn(2, 4), deqkern.NoiseSchedule.linear()
        >>> deqkern.sample(lambda x, t: 0.1 * x, noise, schedule, 10, solver=solver).converged.tolist()
        [True, True]
    """

    slope: Slope
    history_size: int = 0
    scope: str = "causal"
    ridge: float = 1e-4
    ridge_absolute: float = 0.0
    beta: float = 1.0
    window: int | float | None = None
    thinning: float = 0.0
    start: str = "chain"
    basis: str = "spectral"
    name: str = "custom"

    def __post_init__(self) -> None:
        check_slope("slope", self.slope)
        if not is_int(self.history_size) or not 0 <= self.history_size <= MAX_HISTORY:
            raise ValueError(f"history_size must be an int in 0 .. {MAX_HISTORY}, got {self.history_size!r}")
        for name in ("ridge", "ridge_absolute", "beta", "thinning"):
            check_number(name, getattr(self, name))
        if self.scope not in SCOPES:
            raise ValueError(f"scope must be one of {SCOPES}, got {self.scope!r}")
        if not 0 <= self.ridge < float("inf"):
            raise ValueError(f"ridge must be finite and >= 0, got {self.ridge}")
        if not 0 <= self.ridge_absolute < float("inf"):
            raise ValueError(f"ridge_absolute must be finite and >= 0, got {self.ridge_absolute}")
        if not 0 < self.beta <= 1:
            raise ValueError(f"beta must lie in (0, 1], got {self.beta}")
        if not (self.window is None or (self.window >= 1 if is_int(self.window) else _is_share(self.window))):
            raise ValueError(f"window must be None, an int >= 1, or a float in (0, 1), got {self.window!r}")
        if not 0 <= self.thinning < math.inf:
            raise ValueError(f"thinning must be finite and >= 0, got {self.thinning}")
        if self.thinning and (self.history_size or self.start != "chain"):
            raise ValueError("thinning needs history_size = 0 and start = 'chain': all steps enter a history")
        if self.start not in ("chain", "constant"):
            raise ValueError(f"start must be 'chain' or 'constant', got {self.start!r}")
        if self.basis not in ("spectral", "identity"):
            raise ValueError(f"basis must be 'spectral' or 'identity', got {self.basis!r}")
        if self.history_size and self.slope.adapts:
            raise ValueError("history_size > 0 needs a slope that does not adapt: mixing assumes one fixed map")
        if self.beta != 1 and self.slope.adapts:
            raise ValueError("beta < 1 needs a slope that does not adapt: slopes are measured along whole corrections")
        if self.history_size and self.window is not None:
            raise ValueError("window needs history_size = 0: the history of a step that enters later is not defined")

    def width(self, steps: int) -> int:
        """The steps that a window holds.

        Args:
            steps: S, those of the chain.

        Returns:
            1 .. S.

        Example:
            >>> deqkern.solvers.default(window=0.75).width(50)
            38
        """
        if self.window is None:
            return steps
        return min(int(self.window) if is_int(self.window) else math.ceil(self.window * steps), steps)


def _is_share(value: Any) -> bool:
    return is_number(value) and 0 < value < 1


def default(
    profile: SlopeProfile | None = None, window: int | float | None = WINDOW, thinning: float = THINNING
) -> Solver:
    """Secant slopes on 8 frequency bands per channel, no mixing; started from a model's `profile` if there is one.

    Args:
        profile: Measured by `deqkern.calibrate`; the first evaluation measures the slopes if None.
        window: See `Solver`. A smaller one takes fewer evaluations and more iterations; that of three quarters of the
            steps about as many as all of them at once (docs/convergence.md).
        thinning: See `Solver`.

    Returns:
        The solver that `sample` takes by default.

    Raises:
        TypeError: If profile is no `SlopeProfile`.
        ValueError: If window or thinning is out of range.

    Example:
        >>> deqkern.solvers.default(window=None).name
        'default'
    """
    if profile is None:
        return Solver(slope=Secant(), window=window, thinning=thinning, name="default")
    if not isinstance(profile, SlopeProfile):
        raise TypeError(f"profile must be a SlopeProfile, got {type(profile).__name__}")
    return Solver(slope=Secant(start=profile), window=window, thinning=thinning, name="default+profile")


def deq_ddim() -> Solver:
    """DEQ-DDIM as published: Anderson row by row, m = 5, absolute ridge 1e-3.

    Example:
        >>> deqkern.solvers.deq_ddim().history_size
        5

    Reference:
        Pokle, Geng, Kolter: Deep equilibrium approaches to diffusion models, arXiv 2210.12867.
    """
    return Solver(
        slope=Frozen(),
        history_size=5,
        scope="row",
        ridge=0.0,
        ridge_absolute=1e-3,
        start="constant",
        basis="identity",
        name="deq_ddim",
    )


def parataa(history_size: int = 3) -> Solver:
    """ParaTAA: triangular Anderson on the frozen-epsilon map, order k = S.

    Args:
        history_size: m of Anderson mixing, 0 .. 16.

    Example:
        >>> deqkern.solvers.parataa().scope
        'causal'

    Reference:
        Tang, Tang, Luo, Wang, Chang: Accelerating parallel sampling of diffusion models, arXiv 2402.09970.
    """
    return Solver(
        slope=Frozen(), history_size=history_size, scope="causal", start="constant", basis="identity", name="parataa"
    )


def anderson(history_size: int = 5, beta: float = 1.0) -> Solver:
    """Anderson mixing of type II for `deqkern.fixed_point`.

    Args:
        history_size: m, 0 .. 16; 0 is damped iteration.
        beta: Damping, 0 < beta <= 1.

    Example:
        >>> solver = deqkern.solvers.anderson(history_size=3)
        >>> solution = deqkern.fixed_point(torch.cos, torch.zeros(1, 1), solver=solver)
        >>> round(float(solution.value), 3)
        0.739

    Reference:
        Walker, Ni: Anderson acceleration for fixed-point iterations, SIAM Journal on Numerical Analysis 49 (2011).
    """
    return Solver(
        slope=Frozen(),
        history_size=history_size,
        scope="row",
        ridge=1e-8,
        beta=beta,
        start="constant",
        basis="identity",
        name="anderson",
    )


def picard(window: int | float | None = None) -> Solver:
    """Plain iteration on the DDIM sum; with a window, ParaDiGMS.

    Args:
        window: See `Solver`.

    Example:
        >>> deqkern.solvers.picard(window=10).width(50)
        10

    Reference:
        Shih, Belkhale, Ermon, Sadigh, Anari: Parallel sampling of diffusion models, arXiv 2305.16317.
    """
    return Solver(slope=Frozen(), window=window, start="constant", basis="identity", name="picard")


def sequential() -> Solver:
    """The sequential chain: one step of every sample per iteration, S iterations.

    Example:
        >>> noise, schedule = torch.randn(2, 4), deqkern.NoiseSchedule.linear()
        >>> solver = deqkern.solvers.sequential()
        >>> deqkern.sample(lambda x, t: 0.1 * x, noise, schedule, 10, solver=solver).iterations
        10
    """
    return Solver(slope=Frozen(), window=1, start="constant", basis="identity", name="sequential")


def check_solver(name: str, solver: Any) -> None:
    """A `Solver`."""
    if isinstance(solver, str):
        raise TypeError(f"{name} must be a Solver ('auto' is for deqkern.sample alone), got {solver!r}")
    if not isinstance(solver, Solver):
        raise TypeError(f"{name} must be a Solver, got {type(solver).__name__}")
