"""Pictures for people: grids of samples and convergence curves. matplotlib is imported when the first one is made."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .runs import StoredRun

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.lines import Line2D
    from numpy import ndarray

_DPI = 100
_MARGIN = 16  # pixels
_TITLE, _TITLE_LINE, _TITLE_CHARACTER = 28, 18, 12  # the heights of one line and of another, the width of a letter
_SMALLEST_SAMPLE = 96  # a sample is enlarged by a whole number to at least so many pixels
_SMALLEST_PANEL = 220  # has room for its name
_CURVES = 300  # the height of curves under a picture
_NAMED = 8  # so many curves are told apart
_DOTTED = 60  # about so many points are marked
_COLOURS = ("#0072B2", "#009E73", "#D55E00", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
_MARKERS = "osv^D*P"  # of the first seven runs, of the next ..
_RUNS_DPI = 100
_RUNS_WIDTH, _LINES_HEIGHT, _HEAT_HEIGHT = 12.0, 4.2, 3.2  # inches
_LINE = 0.18  # inches of a line of text
_SQUEEZED = 5  # heat maps share a range of iterations up to this ratio of them
_ESTIMATE = "as the solver estimates it"
_HEAT_COLOURS = "magma"


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


def grid(images: Tensor, scale: int | None = None, columns: int | None = None) -> ndarray[Any, Any]:
    """Arrange samples in one picture, near-square unless `columns` says otherwise, on white.

    Args:
        images: (N, C, H, W) in [-1, 1]. Fewer than three channels show the first in grey, more than three show the
            first three.
        scale: Every pixel becomes `scale` x `scale` pixels (nearest neighbour). None: a sample is at least 96 wide.
        columns: Samples side by side.

    Returns:
        (height, width, 3) uint8.

    Raises:
        ValueError: `images` has another shape, or is empty.

    Example:
        >>> deqkern.plots.grid(torch.zeros(4, 1, 16, 16), scale=2).shape
        (66, 66, 3)

    """
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"images must have shape (N, C, H, W) and not be empty, got {tuple(images.shape)}")
    count, channels, height, width = images.shape
    scale = scale or math.ceil(_SMALLEST_SAMPLE / max(height, width))
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    pixels = (images if channels >= 3 else images[:, :1].expand(-1, 3, -1, -1))[:, :3]
    pixels = ((pixels.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    pixels = pixels.repeat_interleave(scale, 2).repeat_interleave(scale, 3)  # (N, 3, H scale, W scale)
    gap = max(2, scale // 2)
    cell = torch.full((rows * columns, 3, height * scale + gap, width * scale + gap), 255, dtype=torch.uint8)
    cell[:count, :, :-gap, :-gap] = pixels
    sheet = cell.view(rows, columns, *cell.shape[1:]).permute(0, 3, 1, 4, 2)  # (rows, h, columns, w, 3)
    return sheet.reshape(rows * cell.shape[2], columns * cell.shape[3], 3)[:-gap, :-gap].contiguous().numpy()


def amplified(difference: Tensor) -> tuple[Tensor, float]:
    """Amplify a difference by the largest of 1, 2, 5, 10, .. that leaves it within [-1, 1].

    Args:
        difference: Of any shape.

    Returns:
        The amplified difference, and the factor.

    Example:
        >>> deqkern.plots.amplified(torch.tensor([0.015625, -0.0625]))
        (tensor([ 0.1562, -0.6250]), 10.0)

    """
    largest = float(difference.abs().max())
    if not 0 < largest <= 1:
        return difference, 1.0
    power = 10.0 ** math.floor(-math.log10(largest))
    factor = max(step * power for step in (1, 2, 5) if step == 1 or step * power * largest <= 1)
    return difference * factor, factor


def save_comparison(
    path: str | PathLike[str],
    panels: Mapping[str, Tensor],
    title: str = "",
    *,
    smallest: int = _SMALLEST_PANEL,
    columns: int | None = None,
) -> None:
    """Draw grids of samples side by side, each under its name. No pixel is resampled.

    Args:
        path: The picture, `.png`, `.jpg`, `.pdf` or `.svg`.
        panels: Name -> samples (N, C, H, W) in [-1, 1].
        title: Of the picture.
        smallest: A panel is at least this many pixels wide.
        columns: Of each panel; near-square if None.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: A panel has another shape, or is empty.

    Example:
        >>> panels = {"parallel": torch.zeros(4, 1, 16, 16), "sequential": torch.zeros(4, 1, 16, 16)}
        >>> deqkern.plots.save_comparison("comparison.png", panels, "digits")

    """
    _panelled(panels, title, smallest, columns).savefig(path, dpi=_DPI)


def save_inversion(
    path: str | PathLike[str],
    panels: Mapping[str, Tensor],
    curves: Mapping[str, Sequence[float]],
    *,
    label: str,
    along: str = "iterations",
    rtol: float | None = None,
    title: str = "",
) -> None:
    """Draw the grids of `save_comparison`, and below them a curve per image.

    Without a curve that has a finite value there are no axes.

    Args:
        path: The picture, as in `save_comparison`.
        panels: As in `save_comparison`.
        curves: Name -> one value per iteration.
        label: What the curves show.
        along: What they show it against.
        rtol: A dotted line; None for none.
        title: Of the picture.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: A panel has another shape, or is empty.

    Example:
        >>> panels, curves = {"source": torch.zeros(1, 1, 16, 16)}, {"a.png": [0.5, 0.02, 0.004]}
        >>> deqkern.plots.save_inversion("inversion.png", panels, curves, label="error estimate", rtol=1e-2)

    """
    if not any(math.isfinite(value) for values in curves.values() for value in values):
        save_comparison(path, panels, title)
        return
    figure = _panelled(panels, title, _SMALLEST_PANEL, room=_CURVES)
    width, height = (figure.get_size_inches() * _DPI).tolist()
    left, below, right, above = 80, 50, _MARGIN, _MARGIN
    box = (left / width, below / height, (width - left - right) / width, (_CURVES - below - above) / height)
    axis = figure.add_axes(box)
    many, longest = len(curves) > _NAMED, max(map(len, curves.values()))
    for i, (name, values) in enumerate(curves.items()):
        axis.semilogy(
            range(1, len(values) + 1),
            values,
            "-" if longest > _DOTTED else "o-",
            color=_COLOURS[0 if many else i % len(_COLOURS)],
            alpha=0.5 if many else 1,
            label="_" if many else _plain(_shortened(name, 24)),
            markersize=3.5,
            linewidth=1.5,
        )
    if rtol:
        axis.axhline(rtol, color="0.4", linestyle=":", linewidth=1.2, label=f"rtol {rtol:g}")
    axis.set(xlabel=along, ylabel=label, xlim=(1 - 0.02 * longest, 1.02 * longest + 0.2))
    axis.locator_params(axis="x", integer=True, min_n_ticks=1)
    axis.grid(alpha=0.25)
    if rtol or not many:
        axis.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=_DPI)


def _panelled(
    panels: Mapping[str, Tensor], title: str, smallest: int, columns: int | None = None, room: int = 0
) -> Figure:
    """A figure of named grids, with so many pixels of room under them."""
    sheets = {name: grid(images, columns=columns) for name, images in panels.items()}
    tallest = max(sheet.shape[0] for sheet in sheets.values())
    widths = [max(sheet.shape[1], smallest) for sheet in sheets.values()]
    width = sum(widths) + _MARGIN * (len(widths) + 1)
    title = _wrapped(_shortened(title, 300), (width - 2 * _MARGIN) // _TITLE_CHARACTER)
    heading = _TITLE + _TITLE_LINE * title.count("\n") if title else 0
    height = tallest + _TITLE + heading + 2 * _MARGIN + room
    figure = _figure(width / _DPI, height / _DPI)
    left, bottom = _MARGIN, _MARGIN + room
    for (name, sheet), panel in zip(sheets.items(), widths, strict=True):
        figure.figimage(sheet, left + (panel - sheet.shape[1]) // 2, bottom + tallest - sheet.shape[0], origin="upper")
        above = (bottom + tallest + 8) / height
        figure.text((left + panel / 2) / width, above, _plain(name), ha="center", va="bottom", fontsize=10)
        left += panel + _MARGIN
    if title:
        figure.text(0.5, 1 - _MARGIN / height, _plain(title), ha="center", va="top", fontsize=11, weight="bold")
    return figure


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
    figure = _figure(6.0 * len(panels), 4.6, layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    solvers = list(dict.fromkeys(curve.solver for curves in panels.values() for curve in curves))
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(solvers)}
    for axis, (name, curves) in zip(axes, panels.items(), strict=True):
        for curve in curves:
            colour = colours[curve.solver]
            for values, style, label in (
                (curve.true_error, "o-", _plain(curve.solver)),
                (curve.error_estimate, "--", "_"),
            ):
                iterations = range(1, len(values) + 1)
                axis.semilogy(iterations, values, style, color=colour, label=label, markersize=3.5, linewidth=1.5)
        if rtol:
            axis.axhline(rtol, color="0.4", linestyle=":", linewidth=1.2, label=f"rtol {rtol:g}")
        axis.plot([], [], "--", color="0.4", label=_ESTIMATE)
        axis.set(title=_plain(name), xlabel="iterations (one batched model call each)")
        axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("relative error, largest of the samples")
    axes[-1].legend(fontsize=8, frameon=False)
    if title:
        figure.suptitle(_plain(title), weight="bold")
    figure.savefig(path, dpi=150)


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
    title = _wrapped(_shortened(title, 300), 100)
    entries = [_shortened(str(name), 120) for name in runs]
    side_by_side = max(1, int(_RUNS_WIDTH / (0.6 + 0.075 * max(map(len, [*entries, _ESTIMATE])))))  # inches
    legend = math.ceil((len(entries) + 1) / side_by_side)
    taller = max(text.count("\n") for text in titles)
    heights = (_LINES_HEIGHT + _LINE * legend, (_HEAT_HEIGHT + _LINE * taller) * rows)
    figure = _figure(_RUNS_WIDTH, sum(heights) + (_LINE * (title.count("\n") + 2) if title else 0), "constrained")
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)[:, 0]
    handles = _draw_errors(above.subplots(1, 2, sharey=True), list(runs.values()))
    above.legend(
        handles,
        [*map(_plain, entries), _ESTIMATE],
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
        axis.set_title(_plain(text), fontsize=10)
    for axis in axes[:, 0]:
        axis.set_ylabel("step, from noise up to sample")
    bar = below.colorbar(image, ax=heat, aspect=30, pad=0.01)
    bar.set_label("one-step residual / state\n(grey: converged, not evaluated)")
    if title:
        figure.suptitle(_plain(title), weight="bold")
    return figure


def _heat_title(name: str, run: StoredRun, columns: int) -> str:
    """On lines that fit over one of so many heat maps."""
    width = int((_RUNS_WIDTH - 1.5) / columns / 0.09)  # characters of 10 pt
    nfe = float(run.nfe_history[-1].double().mean())
    return _wrapped(f"{_shortened(name, 3 * width)}: {len(run.history)} iterations, nfe {nfe:.0f}", width)


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width, break_on_hyphens=False))


def _shortened(text: str, most: int) -> str:
    """Both ends of what is longer than `most` characters."""
    return text if len(text) <= most else f"{text[: most // 2 - 1]}..{text[1 - most // 2 :]}"


def _plain(text: str) -> str:
    """What matplotlib shows as `text`, reading no formula in it."""
    return text.replace("$", r"\$")


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
        again, colour = divmod(i, len(_COLOURS))
        for j, (values, style) in enumerate(errors):
            worst = values.amax(1)
            known = worst.isfinite() & (worst > 0)
            for axis, along in zip(axes, (iterations, nfe), strict=True):
                (line,) = axis.semilogy(
                    along,
                    worst.where(known, torch.nan).tolist(),
                    style,
                    color=_COLOURS[colour],
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
        image = axis.imshow(residual.T.numpy(), norm=norm, cmap=_HEAT_COLOURS, **place)
        axis.set_xlim(0.5, (longest if common else count) + 0.5)
        axis.set_xlabel("iteration" if common else "iteration (each map its own range)")
        axis.locator_params(integer=True, min_n_ticks=1)
    return image


def _figure(width: float, height: float, layout: Any = None) -> Figure:
    """An empty figure, in inches, that no window system knows of."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'deqkern[demo]'") from error
    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure
