"""A contact sheet: one picture of each of several stored tiles, with a line of text below it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from maestro_scale.datasets.spec import DatasetSpec
from maestro_scale.escaping import plot_text
from maestro_scale.shards.format.codec import Sample
from maestro_scale.tracking.pictures import BACKGROUND, FOREGROUND
from maestro_scale.tracking.tile_picture import panels

_COLUMNS = 4
_INCHES = 2.6


def contact_sheet(path: Path, tiles: Sequence[tuple[Sample, str]], spec: DatasetSpec) -> Path:
    """Draw the first image of each tile, in order, with its key and text, to a PNG file; returns ``path``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num_rows = max(-(-len(tiles) // _COLUMNS), 1)
    figure = Figure(figsize=(_COLUMNS * _INCHES, num_rows * (_INCHES + 0.45)), facecolor=BACKGROUND)
    FigureCanvasAgg(figure)
    for number, (sample, text) in enumerate(tiles, 1):
        axes = figure.add_subplot(num_rows, _COLUMNS, number)
        axes.imshow(panels(sample, spec)[0][0].image, interpolation="nearest")
        axes.set_axis_off()
        axes.set_title(f"{plot_text(sample.key, 30)}\n{plot_text(text)}", fontsize=7.5, color=FOREGROUND)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, format="png", dpi=110, facecolor=BACKGROUND)
    os.replace(temporary, path)
    return path
