"""A picture of the losses of a run."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from maestro_scale.escaping import plot_text

_MAX_POINTS = 2000
_MAX_DATASETS = 6


def loss_picture(lines: Sequence[Mapping[str, Any]]) -> bytes | None:
    """A PNG of the loss over steps, a line per dataset, from the lines of metrics.jsonl; None with less than two."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    by_dataset: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        if isinstance(line.get("loss"), float):
            by_dataset.setdefault(str(line.get("dataset", "")), []).append((line["step"], line["loss"]))
    if max((len(points) for points in by_dataset.values()), default=0) < 2:
        return None
    figure = Figure(figsize=(7, 3.2))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, points in list(by_dataset.items())[:_MAX_DATASETS]:
        shown = points[:: -(-len(points) // _MAX_POINTS)]
        axes.plot(*zip(*shown, strict=True), lw=1.2, label=plot_text(name, 40))
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(lw=0.4)
    if len(by_dataset) > 1:
        axes.legend(frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    return buffer.getvalue()
