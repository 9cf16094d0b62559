"""Stored runs: their errors, and the residual of every step at every iteration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch

from ..runs import StoredRun
from .style import COLOURS, ESTIMATE, new_figure, plain, shortened, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.lines import Line2D

_DOTTED = 60  # about so many points are marked
_MARKERS = "osv^D*P"  # of the first seven runs, of the next ..
_RUNS_DPI = 100
_RUNS_WIDTH, _LINES_HEIGHT, _HEAT_HEIGHT = 12.0, 4.2, 3.2  # inches
_LINE = 0.18  # inches of a line of text
_SQUEEZED = 5  # heat maps share a range of iterations up to this ratio of them
_HEATCOLOURS = "magma"


def save_runs(path: str | PathLike[str], runs: Mapping[str, StoredRun], *, title: str = "") -> None:
    """Draw stored runs: errors against iterations and evaluations, and the residual of every step at every iteration.

    The lines show the largest error of the samples: solid where it was measured, dashed where the solver estimated it.
    "rtol" of a run's metadata is a dotted line if it is a positive number.

    Args:
        path: The picture, as in `save_comparison`.
        runs: Name -> run.
        title: Of the picture.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: `runs` is no mapping, or a run is no `StoredRun`.
        ValueError: `runs` is empty.

    Example:
        >>> noise, schedule = torch.randn(2, 1, 8, 8), deqkern.NoiseSchedule.linear()
        >>> solution = deqkern.sample(lambda x, t: 0.1 * x, noise, schedule, 10)
        >>> deqkern.runs.save("run.safetensors", solution)
        >>> deqkern.plots.save_runs("run.png", {"default": deqkern.runs.load("run.safetensors")})

    """
    runs_figure(runs, title).savefig(path, dpi=_RUNS_DPI)


def runs_figure(runs: Mapping[str, StoredRun], title: str = "") -> Figure:
    """Make the figure of `save_runs`: two axes of lines, their legend, then one axis per run, then the colour scale.

    Args:
        runs: Name -> run.
        title: Of the figure.

    Returns:
        The figure, which belongs to no window.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: `runs` is no mapping, or a run is no `StoredRun`.
        ValueError: `runs` is empty.

    Example:
        >>> noise, schedule = torch.randn(2, 1, 8, 8), deqkern.NoiseSchedule.linear()
        >>> solution = deqkern.sample(lambda x, t: 0.1 * x, noise, schedule, 10)
        >>> deqkern.runs.save("run.safetensors", solution)
        >>> figure = deqkern.plots.runs_figure({"default": deqkern.runs.load("run.safetensors")})
        >>> len(figure.axes)
        4

    """
    if not isinstance(runs, Mapping):
        raise TypeError(f"runs must map names to StoredRun, got {type(runs).__name__}")
    if not runs:
        raise ValueError("runs must not be empty")
    for name, run in runs.items():
        if not isinstance(run, StoredRun):
            raise TypeError(f"runs must map names to StoredRun, got {type(run).__name__} for {name!r}")
    columns = 2 if len(runs) == 4 else min(len(runs), 3)
    rows = math.ceil(len(runs) / columns)
    titles = [_heat_title(str(name), run, columns) for name, run in runs.items()]
    title = wrapped(shortened(title, 300), 100)
    entries = [shortened(str(name), 120) for name in runs]
    side_by_side = max(1, int(_RUNS_WIDTH / (0.6 + 0.075 * max(map(len, [*entries, ESTIMATE])))))  # inches
    legend = math.ceil((len(entries) + 1) / side_by_side)
    taller = max(text.count("\n") for text in titles)
    heights = (_LINES_HEIGHT + _LINE * legend, (_HEAT_HEIGHT + _LINE * taller) * rows)
    figure = new_figure(_RUNS_WIDTH, sum(heights) + (_LINE * (title.count("\n") + 2) if title else 0), "constrained")
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)[:, 0]
    handles = _draw_errors(above.subplots(1, 2, sharey=True), list(runs.values()))
    above.legend(
        handles,
        [*map(plain, entries), ESTIMATE],
        loc="outside lower center",
        ncols=side_by_side,
        fontsize=8,
        frameon=False,
    )
    axes = below.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(runs) :]:
        axis.remove()
    heat = list(axes.flat[: len(runs)])
    image = _draw_residuals(heat, list(runs.values()))
    for axis, text in zip(heat, titles, strict=True):
        axis.set_title(plain(text), fontsize=10)
    for axis in axes[:, 0]:
        axis.set_ylabel("step, from noise up to sample")
    bar = below.colorbar(image, ax=heat, aspect=30, pad=0.01)
    bar.set_label("one-step residual / state\n(grey: converged, not evaluated)")
    if title:
        figure.suptitle(plain(title), weight="bold")
    return figure


def _heat_title(name: str, run: StoredRun, columns: int) -> str:
    """On lines that fit over one of so many heat maps."""
    width = int((_RUNS_WIDTH - 1.5) / columns / 0.09)  # characters of 10 pt
    nfe = float(run.nfe_history[-1].double().mean())
    return wrapped(f"{shortened(name, 3 * width)}: {len(run.history)} iterations, nfe {nfe:.0f}", width)


def _rtol(run: StoredRun) -> float | None:
    said = run.metadata.get("rtol")
    if isinstance(said, int | float) and not isinstance(said, bool) and 0 < said < math.inf:
        return float(said)
    return None


def _draw_errors(axes: Sequence[Axes], runs: Sequence[StoredRun]) -> list[Line2D]:
    """Error against iterations and against evaluations. Returns a line per run, and one for what is estimated."""
    rtols, handles = set(), []
    for i, run in enumerate(runs):
        iterations, nfe = range(1, len(run.history) + 1), run.nfe_history.double().mean(1).tolist()
        errors = [(run.history, "--")] if run.true_error is None else [(run.true_error, "-"), (run.history, "--")]
        again, colour = divmod(i, len(COLOURS))
        for j, (values, style) in enumerate(errors):
            worst = values.amax(1)
            known = worst.isfinite() & (worst > 0)
            for axis, along in zip(axes, (iterations, nfe), strict=True):
                (line,) = axis.semilogy(
                    along,
                    worst.where(known, torch.nan).tolist(),
                    style,
                    color=COLOURS[colour],
                    marker=_MARKERS[again % len(_MARKERS)] if j == 0 or again else None,
                    markevery=max(1, math.ceil(int(known.sum()) / _DOTTED)),
                    markersize=3.5,
                    linewidth=1.5,
                )
            if j == 0:
                handles.append(line)
            rtol = _rtol(run)
            if rtol is not None and bool(known.any()):
                rtols.add(rtol)
    labels = ("iterations (one batched model call each)", "model evaluations per sample")
    for axis, label in zip(axes, labels, strict=True):
        for rtol in rtols:
            axis.axhline(rtol, color="0.4", linestyle=":", linewidth=1.2)
        axis.set_xlabel(label)
        axis.locator_params(axis="x", integer=True, min_n_ticks=1)
        axis.grid(alpha=0.25)
    beside = axes[-1].get_yaxis_transform()
    for rtol in rtols:
        axes[-1].text(1.01, rtol, f"rtol {rtol:g}", transform=beside, va="center", fontsize=8, color="0.3")
    axes[0].set_ylabel("relative error, largest of the samples")
    return [*handles, *axes[-1].plot([], [], "--", color="0.4")]


def _draw_residuals(axes: Sequence[Axes], runs: Sequence[StoredRun]) -> AxesImage:
    """A heat map per run on one colour scale: grey below the first step that is evaluated, white above where none is.

    They have one range of iterations, unless one run has so many that another could not be seen.
    """
    from matplotlib.colors import ListedColormap, LogNorm

    worst = [run.residual_history.nan_to_num(-1.0, torch.inf).amax(2) for run in runs]  # (iterations, S)
    shown = torch.cat([values[(values > 0) & values.isfinite()] for values in worst])
    low, high = (float(shown.min()), float(shown.max())) if len(shown) else (0.1, 1.0)
    norm = LogNorm(min(low, high / 10), high)
    longest = max(map(len, worst))
    common = longest <= _SQUEEZED * min(map(len, worst))
    for axis, values in zip(axes, worst, strict=True):
        count, steps = values.shape
        evaluated = values >= 0
        converged = (evaluated.cumsum(1) == 0) & evaluated.any(1, keepdim=True)
        place: dict[str, Any] = {
            "extent": (0.5, count + 0.5, 0.5, steps + 0.5),
            "origin": "lower",
            "aspect": "auto",
            "interpolation": "nearest",
        }
        grey = torch.ones(steps, count).where(converged.T, torch.nan)
        axis.imshow(grey.numpy(), cmap=ListedColormap(["0.9"]), **place)
        residual = values.clamp(norm.vmin, norm.vmax).where(evaluated, torch.nan)
        image = axis.imshow(residual.T.numpy(), norm=norm, cmap=_HEATCOLOURS, **place)
        axis.set_xlim(0.5, (longest if common else count) + 0.5)
        axis.set_xlabel("iteration" if common else "iteration (each map its own range)")
        axis.locator_params(integer=True, min_n_ticks=1)
    return image
