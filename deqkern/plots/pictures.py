"""Grids of samples, as pictures in which no pixel is resampled."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .style import COLOURS, new_figure, plain, shortened, wrapped

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy import ndarray

_DPI = 100
_MARGIN = 16  # pixels
_TITLE, _TITLE_LINE, _TITLE_CHARACTER = 28, 18, 12  # the heights of one line and of another, the width of a letter
_SMALLEST_SAMPLE = 96  # a sample is enlarged by a whole number to at least this many pixels
_SMALLEST_PANEL = 220  # has room for its name
_CURVES = 300  # the height of curves under a picture
_NAMED = 8  # this many curves are told apart
_DOTTED = 60  # about this many points are marked


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
    panelled(panels, title, smallest, columns).savefig(path, dpi=_DPI)


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
    figure = panelled(panels, title, _SMALLEST_PANEL, room=_CURVES)
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
            color=COLOURS[0 if many else i % len(COLOURS)],
            alpha=0.5 if many else 1,
            label="_" if many else plain(shortened(name, 24)),
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


def panelled(
    panels: Mapping[str, Tensor], title: str, smallest: int, columns: int | None = None, room: int = 0
) -> Figure:
    """A figure of named grids, with `room` pixels under them."""
    sheets = {name: grid(images, columns=columns) for name, images in panels.items()}
    tallest = max(sheet.shape[0] for sheet in sheets.values())
    widths = [max(sheet.shape[1], smallest) for sheet in sheets.values()]
    width = sum(widths) + _MARGIN * (len(widths) + 1)
    title = wrapped(shortened(title, 300), (width - 2 * _MARGIN) // _TITLE_CHARACTER)
    heading = _TITLE + _TITLE_LINE * title.count("\n") if title else 0
    height = tallest + _TITLE + heading + 2 * _MARGIN + room
    figure = new_figure(width / _DPI, height / _DPI)
    left, bottom = _MARGIN, _MARGIN + room
    for (name, sheet), panel in zip(sheets.items(), widths, strict=True):
        figure.figimage(sheet, left + (panel - sheet.shape[1]) // 2, bottom + tallest - sheet.shape[0], origin="upper")
        above = (bottom + tallest + 8) / height
        figure.text((left + panel / 2) / width, above, plain(name), ha="center", va="bottom", fontsize=10)
        left += panel + _MARGIN
    if title:
        figure.text(0.5, 1 - _MARGIN / height, plain(title), ha="center", va="top", fontsize=11, weight="bold")
    return figure
