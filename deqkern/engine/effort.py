"""How many iterations and evaluations a solve with the default solver takes, as measured on the shipped models."""

from __future__ import annotations

import math

from ..solvers.presets import THINNING
from ..support.checks import check_number, is_int
from .selection import is_worth_thinning

# Iterations of the default solver at rtol 1e-2, and evaluations per sample and step: the upper end of the medians of
# docs/records/convergence.md, and two iterations more at eta 0, since the slowest sample decides. Any eta > 0 counts
# as 1.
ITERATIONS, EVALUATIONS, EVALUATIONS_THINNED = 9, 4.3, 3.7
ITERATIONS_WITH_NOISE, EVALUATIONS_WITH_NOISE = 12, 5.3
# How many more iterations a chain of order 2 takes, each with as many evaluations (docs/records/convergence.md).
ITERATIONS_OF_ORDER_2 = 1
# How many more iterations, and evaluations per sample and step, each decade of rtol takes
# (docs/records/convergence.md).
ITERATIONS_PER_DECADE, EVALUATIONS_PER_DECADE = 1.5, 0.8
USUAL_RTOL, LEAST_RTOL = 1e-2, 1e-7


def effort(
    steps: int,
    eta: float,
    iterations: int | None,
    evaluations: float | None,
    rtol: float = USUAL_RTOL,
    order: int = 1,
) -> tuple[int, float]:
    """Iterations, and evaluations per sample, of the default solver; those that are given, if they are possible."""
    noiseless = (ITERATIONS, EVALUATIONS_THINNED if is_worth_thinning(steps, THINNING) else EVALUATIONS)
    usual = noiseless if eta == 0 else (ITERATIONS_WITH_NOISE, EVALUATIONS_WITH_NOISE)
    decades = max(math.log10(USUAL_RTOL / max(rtol, LEAST_RTOL)), 0.0)
    usual = (round(usual[0] + ITERATIONS_PER_DECADE * decades), usual[1] + EVALUATIONS_PER_DECADE * decades)
    if order == 2:
        more = usual[0] + ITERATIONS_OF_ORDER_2
        usual = (more, usual[1] * more / usual[0])
    if iterations is None:
        count = min(usual[0], steps)
    elif is_int(iterations) and 1 <= iterations <= steps:
        count = iterations
    else:
        raise ValueError(f"iterations must be None or an int in 1 .. {steps}, got {iterations!r}")
    if evaluations is None:
        # Step j has converged after iteration j: it is not evaluated again.
        most = count * steps - count * (count - 1) / 2
        return count, min(max(usual[1] * count / usual[0], 1.0) * steps, most)
    check_number("evaluations", evaluations)
    if not steps <= evaluations <= count * steps:
        raise ValueError(f"evaluations must lie in {steps} .. {count * steps}, steps * iterations, got {evaluations}")
    return count, float(evaluations)
