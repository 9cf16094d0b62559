"""What all pictures share: colours, text that fits, and a figure that no window system knows of."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#009E73", "#D55E00", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
ESTIMATE = "as the solver estimates it"


def wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width, break_on_hyphens=False))


def shortened(text: str, most: int) -> str:
    """Both ends of what is longer than `most` characters."""
    return text if len(text) <= most else f"{text[: most // 2 - 1]}..{text[1 - most // 2 :]}"


def plain(text: str) -> str:
    """What matplotlib shows as `text`, reading no formula in it."""
    return text.replace("$", r"\$")


def new_figure(width: float, height: float, layout: Any = None) -> Figure:
    """An empty figure, in inches, that no window system knows of."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'deqkern[demo]'") from error
    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure
