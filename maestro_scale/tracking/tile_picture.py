"""A picture of one stored tile: every modality, up to four dates of a time series, and its labels.

Panels have one size, four per row: first modalities with one date and class maps, then one row per time series.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from maestro_scale.datasets.spec import DatasetSpec, Modality, Scale, Target
from maestro_scale.errors import MaestroError
from maestro_scale.escaping import plot_text
from maestro_scale.shards.format.codec import Sample
from maestro_scale.shards.format.fields import dates_field, mask_field, target_field
from maestro_scale.tracking.pictures import (
    BACKGROUND,
    FOREGROUND,
    MAX_DATES,
    apply_stretch,
    choose_composite,
    select_dates,
    stretch_limits,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PANEL_INCHES = 2.6
_TEXT_INCHES = 0.42  # below a panel
_MAX_LABELS = 6  # classes that the subtitle names


class PictureError(MaestroError):
    """The picture cannot be written to this path; the message says why."""


@dataclass(frozen=True)
class Panel:
    """An image (H, W, 3) in [0, 1], and two lines of text below it."""

    image: np.ndarray
    title: str
    caption: str


def check_picture(path: Path) -> None:
    """Raise PictureError if ``path`` is a folder or does not end in .png."""
    if path.is_dir():
        raise PictureError(f"{path} is a folder: give a file name, such as {path / 'tile.png'}")
    if path.suffix.lower() != ".png":
        raise PictureError(f"{path}: pictures are PNG files, use {path.with_suffix('.png')}")


def tile_picture(path: Path, sample: Sample, spec: DatasetSpec) -> Path:
    """Draw every modality and target of a sample to a PNG file; returns ``path``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = panels(sample, spec)
    height = len(rows) * (_PANEL_INCHES + _TEXT_INCHES) + 0.7
    figure = Figure(figsize=(MAX_DATES * (_PANEL_INCHES + 0.1) + 0.3, height), facecolor=BACKGROUND)
    FigureCanvasAgg(figure)
    figure.text(
        0.015,
        1 - 0.2 / height,
        f"{plot_text(spec.title)}   {plot_text(sample.key)}",
        fontsize=12,
        color=FOREGROUND,
        weight="bold",
        va="center",
    )
    figure.text(
        0.015, 1 - 0.45 / height, _subtitle(sample, spec), fontsize=8.5, color=FOREGROUND, va="center"
    )
    grid = figure.add_gridspec(
        len(rows),
        MAX_DATES,
        left=0.015,
        right=0.985,
        top=1 - 0.62 / height,
        bottom=_TEXT_INCHES / height,
        wspace=0.04,
        hspace=_TEXT_INCHES / _PANEL_INCHES,
    )
    for i, row in enumerate(rows):
        for j, panel in enumerate(row):
            axes = figure.add_subplot(grid[i, j])
            axes.imshow(panel.image, interpolation="nearest")
            axes.set_axis_off()
            axes.set_anchor("NW")
            _write_below(axes, panel.title, -4, "bold")
            _write_below(axes, panel.caption, -15, "normal")
    temporary = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(temporary, format="png", dpi=110, facecolor=BACKGROUND)
    os.replace(temporary, path)
    return path


def panels(sample: Sample, spec: DatasetSpec) -> list[list[Panel]]:
    """Rows of up to four panels. The dates of a time series share one stretch."""
    single: list[Panel] = []
    series: list[list[Panel]] = []
    for modality in spec.modalities:
        if modality.name not in sample.names:  # the tile lacks it
            continue
        if modality.series:
            series.append(_date_panels(sample, modality, spec))
        else:
            single += _date_panels(sample, modality, spec)
    for target in spec.targets:
        if target.is_map:
            single.append((_value_panel if target.kind == "regression" else _class_panel)(sample, target))
    return [single[i : i + MAX_DATES] for i in range(0, len(single), MAX_DATES)] + series


def _date_panels(sample: Sample, modality: Modality, spec: DatasetSpec) -> list[Panel]:
    num_dates = sample.shape(modality.name)[0]
    shown = _least_masked_dates(sample, modality) if modality.mask_bands else select_dates(num_dates)
    bands = choose_composite(modality.bands)
    scale = next((s.scale for s in spec.sensors if s.source == modality.name), Scale())
    colours = bands.apply(_scaled(sample.rows(modality.name, shown), scale))
    image = apply_stretch(colours, *stretch_limits(colours))
    acquired = sample.array(dates_field(modality.name))[shown]
    return [
        Panel(
            image[i],
            f"{modality.name}   {plot_text(bands.label)}",
            _iso_date(acquired[i]) + (f"   date {shown[i] + 1} of {num_dates}" if modality.series else ""),
        )
        for i in range(len(shown))
    ]


def _least_masked_dates(sample: Sample, modality: Modality) -> np.ndarray:
    """Indices of up to four dates: in each quarter of the series, the one with the lowest mean of the mask (clouds)."""
    mask = sample.array(mask_field(modality.name))
    mean_mask = mask.reshape(len(mask), -1).mean(axis=1)
    quarters = np.array_split(np.arange(len(mask)), min(len(mask), MAX_DATES))
    return np.array([quarter[mean_mask[quarter].argmin()] for quarter in quarters])


def _class_panel(sample: Sample, target: Target) -> Panel:
    """A class map. Ignored classes have the background colour; the caption names the two largest classes."""
    from matplotlib import colormaps

    labels = sample.array(target_field(target.name))
    colours = np.tile(BACKGROUND, (256, 1))
    palette = np.concatenate([colormaps[name](range(20)) for name in ("tab20", "tab20b", "tab20c")])[:, :3]
    for i in range(min(len(target.classes), 256)):
        if i not in target.ignored:
            colours[i] = palette[i % len(palette)]
    counts = np.bincount(labels.reshape(-1), minlength=256)
    present = [i for i in np.argsort(-counts, kind="stable") if counts[i] and i < len(target.classes)]
    shares = {target.classes[i]: counts[i] / labels.size for i in present if i not in target.ignored}
    return Panel(colours[labels], target.name, _format_shares(shares, 2))


def _value_panel(sample: Sample, target: Target) -> Panel:
    """A map of numbers from its lowest (dark) to its highest value; missing ones have the background colour."""
    from matplotlib import colormaps

    values = sample.array(target_field(target.name))
    missing = np.isnan(values)
    if missing.all():
        return Panel(np.broadcast_to(np.asarray(BACKGROUND), (*values.shape, 3)), target.name, "missing")
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    colours = colormaps["viridis"]((values - low) / ((high - low) or 1.0))[..., :3]
    colours[missing] = BACKGROUND
    return Panel(colours, target.name, plot_text(f"{low:.4g} to {high:.4g} {target.units}".rstrip(), 60))


def _subtitle(sample: Sample, spec: DatasetSpec) -> str:
    """The reference date, and the labels that are not maps."""
    parts = [f"reference date {_iso_date(sample.array('ref_date'))}"]
    for target in spec.targets:
        if target.is_map:
            continue
        shares = sample.array(target_field(target.name))
        if target.kind in ("classification", "regression"):
            parts.append(f"{target.name}: {_tile_label(shares[0], target)}")
            continue
        order = [i for i in np.argsort(-shares, kind="stable") if shares[i] > target.threshold]
        labels = _format_shares({target.classes[i]: float(shares[i]) for i in order}, _MAX_LABELS)
        parts.append(f"{target.name}: {labels}")
    return "   ·   ".join(parts)


def _tile_label(value: np.generic, target: Target) -> str:
    """The class or the number of a whole tile."""
    if target.kind == "regression":
        return "missing" if np.isnan(value) else plot_text(f"{value:.4g} {target.units}".rstrip(), 60)
    index = int(value)
    return plot_text(target.classes[index], 40) if 0 <= index < len(target.classes) else "missing"


def _format_shares(shares: dict[str, float], most: int) -> str:
    parts = [f"{plot_text(name, 40)} {100 * share:.0f} %" for name, share in list(shares.items())[:most]]
    return ", ".join(parts) + (f" and {len(shares) - most} more" if len(shares) > most else "") or "none"


def _scaled(pixels: np.ndarray, scale: Scale) -> np.ndarray:
    """As the model scales them: radar in linear power is almost black without the logarithm."""
    values = pixels.astype(np.float32)
    return np.log(np.maximum(values, 1e-10)) if scale.kind == "log" else values


def _iso_date(stored: np.ndarray) -> str:
    """ISO date of a stored (year, day of year, hour)."""
    year, day = int(stored[0]), int(stored[1])
    return (date(max(year, 1), 1, 1) + timedelta(days=max(day, 1) - 1)).isoformat()


def _write_below(axes: Axes, text: str, offset: float, weight: str) -> None:
    axes.annotate(
        text,
        (0, 0),
        (0, offset),
        xycoords="axes fraction",
        textcoords="offset points",
        va="top",
        fontsize=8,
        color=FOREGROUND,
        weight=weight,
    )
