"""Curves of convergence of several solvers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike

from .style import COLOURS, ESTIMATE, new_figure, plain


@dataclass(frozen=True)
class Curve:
    """One solve as a curve of `convergence`.

    Attributes:
        solver: Its name, which decides the colour.
        true_error: After each iteration.
        error_estimate: After each iteration.

    Example:
        >>> deqkern.plots.Curve("default", true_error=[0.5, 0.02, 0.004], error_estimate=[1.0, 0.05, 0.008]).solver
        'default'

    """

    solver: str
    true_error: Sequence[float]
    error_estimate: Sequence[float]


def convergence(
    path: str | PathLike[str], panels: Mapping[str, Sequence[Curve]], *, rtol: float | None = None, title: str = ""
) -> None:
    """Draw errors against iterations: a panel per key, a colour per solver, dashed for its own estimate.

    Args:
        path: The picture, as in `save_comparison`.
        panels: Name -> curves.
        rtol: A dotted line; None for none.
        title: Of the picture.

    Raises:
        ImportError: matplotlib is not installed.

    Example:
        >>> curve = deqkern.plots.Curve("default", true_error=[0.5, 0.02, 0.004], error_estimate=[1.0, 0.05, 0.008])
        >>> deqkern.plots.convergence("convergence.png", {"eta 0": [curve]}, rtol=1e-2)

    """
    figure = new_figure(6.0 * len(panels), 4.6, layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    solvers = list(dict.fromkeys(curve.solver for curves in panels.values() for curve in curves))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(solvers)}
    for axis, (name, curves) in zip(axes, panels.items(), strict=True):
        for curve in curves:
            colour = colours[curve.solver]
            for values, style, label in (
                (curve.true_error, "o-", plain(curve.solver)),
                (curve.error_estimate, "--", "_"),
            ):
                iterations = range(1, len(values) + 1)
                axis.semilogy(iterations, values, style, color=colour, label=label, markersize=3.5, linewidth=1.5)
        if rtol:
            axis.axhline(rtol, color="0.4", linestyle=":", linewidth=1.2, label=f"rtol {rtol:g}")
        axis.plot([], [], "--", color="0.4", label=ESTIMATE)
        axis.set(title=plain(name), xlabel="iterations (one batched model call each)")
        axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("relative error, largest of the samples")
    axes[-1].legend(fontsize=8, frameon=False)
    if title:
        figure.suptitle(plain(title), weight="bold")
    figure.savefig(path, dpi=150)
