"""One stored tile as a picture: every modality, some dates of a series, and its labels.

Panels of one size, four to a row: what has one date first, with maps of classes; then a row per series.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

import numpy as np

from maestro_scale.datasets.spec import DatasetSpec, Modality, Scale, Target
from maestro_scale.errors import MaestroError
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

_PANEL_INCHES = 2.6
_TEXT_INCHES = 0.42  # below a panel
_MOST_NAMED = 6  # classes that a caption names


class PictureError(MaestroError):
    """A picture cannot be drawn where it was asked for; the message says why."""


@dataclass(frozen=True)
class Panel:
    """An image (H, W, 3) in [0, 1], and the lines below it."""

    image: np.ndarray
    title: str
    caption: str


def check_picture(path: Path) -> None:
    """PictureError unless a picture may be called so."""
    if path.is_dir():
        raise PictureError(f"{path} is a folder: name a file, such as {path / 'tile.png'}")
    if path.suffix.lower() != ".png":
        raise PictureError(f"{path}: pictures are PNG, name it {path.with_suffix('.png')}")


def tile_picture(path: Path, sample: Sample, spec: DatasetSpec) -> Path:
    """Draw every modality and target of a sample; returns ``path``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = panels(sample, spec)
    height = len(rows) * (_PANEL_INCHES + _TEXT_INCHES) + 0.7
    figure = Figure(figsize=(MAX_DATES * (_PANEL_INCHES + 0.1) + 0.3, height), facecolor=BACKGROUND)
    FigureCanvasAgg(figure)
    figure.text(
        0.015,
        1 - 0.2 / height,
        f"{spec.title}   {sample.key}",
        fontsize=12,
        color=FOREGROUND,
        weight="bold",
        va="center",
    )
    figure.text(0.015, 1 - 0.45 / height, _facts(sample, spec), fontsize=8.5, color=FOREGROUND, va="center")
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
    fresh = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(fresh, format="png", dpi=110, facecolor=BACKGROUND)
    os.replace(fresh, path)
    return path


def panels(sample: Sample, spec: DatasetSpec) -> list[list[Panel]]:
    """Rows of up to four panels. Dates of a series share one stretch."""
    single: list[Panel] = []
    series: list[list[Panel]] = []
    for modality in spec.modalities:
        if modality.series:
            series.append(_dates_of(sample, modality, spec))
        else:
            single += _dates_of(sample, modality, spec)
    single += [_classes_of(sample, t) for t in spec.targets if _is_map(t)]
    return [single[i : i + MAX_DATES] for i in range(0, len(single), MAX_DATES)] + series


def _dates_of(sample: Sample, modality: Modality, spec: DatasetSpec) -> list[Panel]:
    num_dates = sample.shape(modality.name)[0]
    shown = _clearest(sample, modality) if modality.mask_bands else select_dates(num_dates)
    mix = choose_composite(modality.bands)
    scale = next((s.scale for s in spec.sensors if s.source == modality.name), Scale())
    colours = mix.apply(_scaled(sample.rows(modality.name, shown), scale))
    image = apply_stretch(colours, *stretch_limits(colours))
    taken = sample.array(dates_field(modality.name))[shown]
    return [
        Panel(
            image[i],
            f"{modality.name}   {mix.label}",
            _day(taken[i]) + (f"   date {shown[i] + 1} of {num_dates}" if modality.series else ""),
        )
        for i in range(len(shown))
    ]


def _clearest(sample: Sample, modality: Modality) -> np.ndarray:
    """Indices of up to four dates, each the least marked by the mask of a quarter of the series."""
    mask = sample.array(mask_field(modality.name))
    marked = mask.reshape(len(mask), -1).mean(axis=1)
    quarters = np.array_split(np.arange(len(mask)), min(len(mask), MAX_DATES))
    return np.array([quarter[marked[quarter].argmin()] for quarter in quarters])


def _classes_of(sample: Sample, target: Target) -> Panel:
    """A map of classes: a colour each, ignored ones in paper; the caption names the most frequent."""
    from matplotlib import colormaps

    labels = sample.array(target_field(target.name))
    colours = np.tile(BACKGROUND, (256, 1))
    wheel = np.concatenate([np.array(colormaps[n].colors) for n in ("tab20", "tab20b", "tab20c")])
    for i in range(min(len(target.classes), 256)):
        if i not in target.ignored:
            colours[i] = wheel[i % len(wheel)]
    counts = np.bincount(labels.reshape(-1), minlength=256)
    named = [i for i in np.argsort(-counts, kind="stable") if counts[i] and i < len(target.classes)]
    shares = {target.classes[i]: counts[i] / labels.size for i in named if i not in target.ignored}
    return Panel(colours[labels], target.name, _listed(shares, 2))


def _facts(sample: Sample, spec: DatasetSpec) -> str:
    """The reference date, and the labels that are no maps."""
    parts = [f"reference date {_day(sample.array('ref_date'))}"]
    for target in spec.targets:
        if _is_map(target):
            continue
        shares = sample.array(target_field(target.name))
        order = [i for i in np.argsort(-shares, kind="stable") if shares[i] > target.threshold]
        listed = _listed({target.classes[i]: float(shares[i]) for i in order}, _MOST_NAMED)
        parts.append(f"{target.name}: {listed}")
    return "   ·   ".join(parts)


def _is_map(target: Target) -> bool:
    return target.kind == "segmentation"


def _listed(shares: dict[str, float], most: int) -> str:
    named = [f"{name} {100 * share:.0f} %" for name, share in list(shares.items())[:most]]
    return ", ".join(named) + (f" and {len(shares) - most} more" if len(shares) > most else "") or "none"


def _scaled(pixels: np.ndarray, scale: Scale) -> np.ndarray:
    """As the model scales them: radar in linear power shows nothing until its logarithm is taken."""
    values = pixels.astype(np.float32)
    return np.log(np.maximum(values, 1e-10)) if scale.kind == "log" else values


def _day(stored: Sequence[int]) -> str:
    """ISO date of a stored (year, day of year, hour)."""
    year, day = int(stored[0]), int(stored[1])
    return (date(max(year, 1), 1, 1) + timedelta(days=max(day, 1) - 1)).isoformat()


def _write_below(axes, text: str, offset: float, weight: str) -> None:
    place = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "top"}
    axes.annotate(text, (0, 0), (0, offset), fontsize=8, color=FOREGROUND, weight=weight, **place)
