"""The figure of a study: the difference of each question with its interval, as SVG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from maestro_scale.escaping import plot_text

_INK, _PAPER, _GREY = "#26241f", "#fbfaf8", "#cbc9c4"
_COLOURS = {
    "holds": "#2d6a2f",
    "matches": "#2d6a2f",
    "opposite": "#a03a21",
    "smaller": "#a03a21",
    "differs": "#a03a21",
}
_OPEN = "#6b675e"


@dataclass(frozen=True)
class Bar:
    """A difference with its interval, in percentage points or units. ``borders``: what the claim compares it with."""

    label: str
    word: str
    value: float
    low: float
    high: float
    borders: Sequence[float]


def effects(bars: Sequence[Bar]) -> bytes:
    """One row per question, the first on top; equal bars give equal bytes."""
    figure = Figure(figsize=(7.5, 1.1 + 0.36 * max(len(bars), 1)), facecolor=_PAPER)
    axes = figure.add_subplot(facecolor=_PAPER)
    axes.axvline(0, color=_INK, lw=0.8)
    for row, bar in enumerate(bars):
        colour = _COLOURS.get(bar.word, _OPEN)
        axes.plot([bar.low, bar.high], [row, row], color=colour, lw=2, solid_capstyle="butt")
        axes.plot([bar.value], [row], "o", color=colour, ms=5)
        for border in bar.borders:
            axes.plot([border, border], [row - 0.35, row + 0.35], color=_INK, lw=0.8, ls=":")
        words = axes.text(1.01, row, bar.word, transform=axes.get_yaxis_transform(), va="center")
        words.set(color=colour, fontsize=8)
    axes.set_yticks(range(len(bars)), [plot_text(bar.label) for bar in bars])
    axes.set_ylim(max(len(bars), 1) - 0.4, -0.6)
    axes.set_xlabel("difference with 95 % interval over seeds and tiles")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=8, colors=_INK)
    axes.grid(axis="x", color=_GREY, lw=0.4)
    axes.set_axisbelow(True)
    FigureCanvasSVG(figure)
    buffer = io.BytesIO()
    # Ids in the file are hashes of the content and this salt; by default of a random number.
    with matplotlib.rc_context({"svg.hashsalt": "study"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
