"""Charts of a report as PNG bytes: scores per class, confusion matrices, scores over labels, label and predicted maps.

Drawn with matplotlib's object interface: ``pyplot`` has global state and is not thread-safe.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from maestro_scale.escaping import plot_text
from maestro_scale.evaluation.metric_kinds import MetricKind
from maestro_scale.evaluation.probes.dense import IGNORED

_INK, _PAPER, _GREY = "#26241f", "#fbfaf8", "#cbc9c4"
_SERIES = ("#2c6e8f", "#c8702a", "#5a8a3c", "#8a4f7d", "#b3a125", "#7a6a58")
_DPI = 110
MAX_CLASSES = 256  # with thousands drawing takes minutes, and exceeds matplotlib's 2^16 pixels a side
_MAX_CLASSES_WITH_NUMBERS = 20


@dataclass(frozen=True)
class Curve:
    """Scores of one encoder over fractions of the labels, with intervals; all of one length, not in percent."""

    name: str
    fractions: Sequence[float]
    values: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def class_bars(scores: Mapping[str, Mapping[str, float | None]], metric: str) -> bytes:
    """{encoder: {class: score}} as horizontal bars, classes in the order of the first encoder's scores."""
    first = next(iter(scores.values()))
    classes = sorted(first, key=lambda name: -1.0 if (score := first[name]) is None else score)
    which = f", the {MAX_CLASSES} best of {len(classes)} classes" if len(classes) > MAX_CLASSES else ""
    classes = classes[-MAX_CLASSES:]
    figure = Figure(figsize=(7.5, 0.6 + len(classes) * (0.12 + 0.14 * len(scores))), facecolor=_PAPER)
    axes = figure.add_subplot(facecolor=_PAPER)
    height = 0.8 / len(scores)
    for i, (name, values) in enumerate(scores.items()):
        at = np.arange(len(classes)) + 0.4 - (i + 0.5) * height
        lengths = [100 * (values.get(c) or 0.0) for c in classes]
        axes.barh(at, lengths, height=0.92 * height, color=_SERIES[i % len(_SERIES)], label=plot_text(name))
    axes.set_yticks(np.arange(len(classes)), map(plot_text, classes))
    axes.set_xlim(0, 100)
    axes.set_xlabel(f"{metric} (%){which}")
    _style(axes)
    if len(scores) > 1:
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return _png(figure)


def confusion_matrix(
    counts: Sequence[Sequence[int]], classes: Sequence[str], what: Literal["pixels", "tiles"] = "pixels"
) -> bytes:
    """Pixels or tiles by (target, predicted) class, (C, C), as shares of each target class."""
    pixels = np.asarray(counts, np.float64)
    shares = 100 * pixels / np.maximum(pixels.sum(1, keepdims=True), 1)
    side = 1.8 + 0.36 * len(classes)
    figure = Figure(figsize=(side + 0.6, side), facecolor=_PAPER)
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="YlGnBu", vmin=0, vmax=100)
    names = [plot_text(c) for c in classes]
    axes.set_xticks(range(len(classes)), names, rotation=90, fontsize=8)
    axes.set_yticks(range(len(classes)), names, fontsize=8)
    axes.set_xlabel("predicted")
    axes.set_ylabel(f"label (share of its {what}, %)")
    if len(classes) <= _MAX_CLASSES_WITH_NUMBERS:
        for row, column in np.ndindex(shares.shape):
            if shares[row, column] >= 0.5:
                colour = "white" if shares[row, column] > 55 else _INK
                axes.text(
                    column,
                    row,
                    f"{shares[row, column]:.0f}",
                    ha="center",
                    va="center",
                    color=colour,
                    fontsize=7,
                )
    return _png(figure)


def label_curves(curves: Sequence[Curve], kind: MetricKind, units: str = "") -> bytes:
    """Score over the fraction of labels, with intervals."""
    figure = Figure(figsize=(6.5, 4), facecolor=_PAPER)
    axes = figure.add_subplot(facecolor=_PAPER)
    for i, curve in enumerate(curves):
        scale = 100 if kind.is_fraction else 1
        shares, values = 100 * np.asarray(curve.fractions), scale * np.asarray(curve.values)
        spread = np.abs(scale * np.array([curve.low, curve.high]) - values)
        axes.errorbar(
            shares,
            values,
            yerr=spread,
            marker="o",
            ms=4,
            capsize=3,
            color=_SERIES[i % len(_SERIES)],
            label=plot_text(curve.name),
        )
    axes.set_xscale("log")
    ticks = sorted({100 * f for curve in curves for f in curve.fractions})
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.set_xlabel("labels used (%)")
    axes.set_ylabel(plot_text(f"{kind.title} ({kind.unit(units)})" if kind.unit(units) else kind.title))
    _style(axes)
    axes.legend(frameon=False, fontsize=8)
    return _png(figure)


def maps(truth: np.ndarray, predicted: np.ndarray, classes: Sequence[str]) -> bytes:
    """Labels (n, H, W) above predictions (n, H, W), classes by colour, ``dense.IGNORED`` in grey."""
    num = len(truth)
    figure = Figure(figsize=(2.4 * num + 2.2, 5), facecolor=_PAPER)
    grid = figure.subplots(2, num, squeeze=False)
    colours = ListedColormap([*_palette(len(classes)), to_rgb(_GREY)])
    for row, (name, images) in enumerate((("label", truth), ("predicted", predicted))):
        for axes, image in zip(grid[row], images, strict=True):
            shown = np.where(image == IGNORED, len(classes), image)
            axes.imshow(shown, cmap=colours, vmin=0, vmax=len(classes), interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
        grid[row][0].set_ylabel(name)
    present = [c for c in np.union1d(truth, predicted) if c != IGNORED]
    handles = [Patch(color=colours(int(c)), label=plot_text(classes[c])) for c in present]
    if (truth == IGNORED).any():
        handles.append(Patch(color=_GREY, label="ignored"))
    left = 1 - 1.9 / (2.4 * num + 2.2)
    figure.legend(handles=handles, frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(left, 0.5))
    figure.subplots_adjust(
        left=0.05, right=1 - 2.0 / (2.4 * num + 2.2), top=0.98, bottom=0.02, wspace=0.05, hspace=0.05
    )
    return _png(figure, tight=False)


def value_maps(truth: np.ndarray, predicted: np.ndarray, units: str) -> bytes:
    """Numbers (n, H, W) of labels above those of predictions, on the scale of the labels; missing ones in grey."""
    num = len(truth)
    figure = Figure(figsize=(2.4 * num + 1.4, 5), facecolor=_PAPER)
    grid = figure.subplots(2, num, squeeze=False)
    known = truth[~np.isnan(truth)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    for row, (name, images) in enumerate((("label", truth), ("predicted", predicted))):
        for axes, image in zip(grid[row], images, strict=True):
            axes.set_facecolor(_GREY)
            shown = axes.imshow(image, cmap="viridis", vmin=low, vmax=high, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
        grid[row][0].set_ylabel(name)
    figure.colorbar(shown, ax=grid.ravel().tolist(), label=plot_text(units))
    return _png(figure)


def _palette(count: int) -> list[tuple[float, ...]]:
    tab20 = matplotlib.colormaps["tab20"]
    # Its 20 colours are 10 pairs of dark and light: all dark ones come first.
    return [tab20((2 * i) % 20 + (2 * i) // 20 % 2)[:3] for i in range(count)]


def _style(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=8, colors=_INK)
    axes.grid(axis="x", color=_GREY, lw=0.4)
    axes.set_axisbelow(True)


def _png(figure: Figure, tight: bool = True) -> bytes:
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, bbox_inches="tight" if tight else None)
    return buffer.getvalue()
