"""Reconstruction pictures: input, visible part, reconstruction, error and embedding of each sensor, as one PNG.

Uses matplotlib's object interface, not pyplot: pyplot is not thread-safe and would change the figures of a notebook.
Shapes: D dates, C bands, H×W pixels; a strip is K dates side by side, (H, W', 3).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from maestro_scale.escaping import plot_text
from maestro_scale.training.observer import SensorView

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar
    from matplotlib.colors import Colormap
    from matplotlib.image import AxesImage
    from numpy.typing import ArrayLike

MAX_DATES = 4

_COLUMNS = (
    "input",
    "visible (masked in grey)",
    "reconstruction",
    "error of masked pixels",
    "embedding of the unmasked input",
)
_MASK_COLOUR = np.array([0.80, 0.79, 0.77])
BACKGROUND, FOREGROUND = (0.985, 0.98, 0.972), "#26241f"
_GAP = 0.06  # between dates, as a fraction of the width of one
_MAX_IQRS = 3.0  # limit of the stretch, in interquartile ranges from the median
_MAX_ERROR = 0.5  # end of the error's colour scale, as a fraction of the stretch
_PANEL_INCHES = 2.9

# Bands to show as red, green, blue: the first triple that the sensor has.
_TRIPLES = (
    ("R", "G", "B"),
    ("RED", "GREEN", "BLUE"),
    ("B4", "B3", "B2"),
    ("B04", "B03", "B02"),
    ("NIR", "R", "G"),
    ("B8", "B4", "B3"),
)


@dataclass(frozen=True)
class Composite:
    """Which bands are shown: indices of three (RGB), of two (radar: VV, VH and their ratio) or of one (grey)."""

    bands: tuple[int, ...]
    label: str

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """(D, C, H, W) → (D, H, W, 3) float32, unstretched."""
        selected = pixels[:, list(self.bands)].astype(np.float32)
        if len(self.bands) == 2:
            # Network inputs are logarithms (or dB), so the ratio of bands is their difference.
            selected = np.concatenate([selected, selected[:, :1] - selected[:, 1:]], axis=1)
        elif len(self.bands) == 1:
            selected = np.repeat(selected, 3, axis=1)
        return np.moveaxis(selected, 1, -1)


def choose_composite(bands: Sequence[str]) -> Composite:
    """True colour if possible, else false colour with near infrared, else radar, else the first three bands or one."""
    index = {name.upper(): i for i, name in reversed(list(enumerate(bands)))}
    for triple in _TRIPLES:
        if all(name in index for name in triple):
            return Composite(tuple(index[n] for n in triple), " ".join(bands[index[n]] for n in triple))
    if "VV" in index and "VH" in index:
        return Composite((index["VV"], index["VH"]), "VV VH VV/VH")
    if len(bands) >= 3 and "VV" not in index:
        return Composite((0, 1, 2), " ".join(bands[:3]))
    return Composite((0,), bands[0])


def reconstruction_picture(path: Path, views: Sequence[SensorView], title: str) -> Path:
    """Draw every sensor's input, what was visible, the reconstruction and its error; returns ``path``.

    One row per sensor, with up to four dates as a strip. The images of a row share one stretch, computed from the
    input (see ``stretch_limits``), so that brightness can be compared. The error is the mean absolute difference over
    the colour channels, as a fraction of the stretch. Visible pixels of the reconstruction are copied from the input.
    The embedding's first three principal components are red, green and blue. Raises ValueError without views.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not views:
        raise ValueError("a reconstruction picture needs at least one sensor's view")
    dates_of = [select_dates(len(v.pixels)) for v in views]
    heights = [_strip_height(v, d) for v, d in zip(views, dates_of, strict=True)]
    width, height = (
        len(_COLUMNS) * _PANEL_INCHES + 0.9,
        _PANEL_INCHES * sum(heights) + 0.34 * len(views) + 1.1,
    )
    figure = Figure(figsize=(width, height), facecolor=BACKGROUND)
    FigureCanvasAgg(figure)  # savefig uses this canvas, whatever the default backend is
    grid = figure.add_gridspec(
        len(views),
        len(_COLUMNS),
        height_ratios=[h * _PANEL_INCHES + 0.34 for h in heights],
        left=0.02,
        right=0.98,
        top=1 - 0.62 / height,
        bottom=0.58 / height,
        wspace=0.04,
        hspace=0.0,
    )
    figure.text(
        0.02,
        1 - 0.20 / height,
        plot_text(title, 200),
        fontsize=12,
        color=FOREGROUND,
        weight="bold",
        va="center",
    )
    for row, (view, dates) in enumerate(zip(views, dates_of, strict=True)):
        axes = [figure.add_subplot(grid[row, column]) for column in range(len(_COLUMNS))]
        image = _draw_sensor(axes, view, dates)
        if row == 0:
            for a, name in zip(axes, _COLUMNS, strict=True):
                a.set_title(name, fontsize=10, color=FOREGROUND, pad=5)
    error_column = grid[0, 3].get_position(figure)
    bar = figure.colorbar(
        image,
        cax=figure.add_axes((error_column.x0, 0.40 / height, error_column.width, 0.09 / height)),
        orientation="horizontal",
    )
    _format_colorbar(bar)
    temporary = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(temporary, format="png", dpi=110, facecolor=BACKGROUND)
    os.replace(temporary, path)
    return path


def picture_path(run_dir: Path, step: int) -> Path:
    """The file of the picture of a step."""
    return run_dir / "pictures" / f"step_{step:08d}.png"


def picture_step(path: Path) -> int:
    """The step of a file of ``picture_path``. ValueError for another file."""
    return int(path.stem.removeprefix("step_"))


def select_dates(num_dates: int) -> np.ndarray:
    """Indices of up to four dates, evenly spaced from the first to the last."""
    return np.unique(np.linspace(0, num_dates - 1, min(num_dates, MAX_DATES)).round().astype(int))


def stretch_limits(colours: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values shown as black and as white in each channel of (…, 3): two arrays (3,).

    The 2nd and 98th percentile, limited to three interquartile ranges from the median: without the limit one cloudy
    date would leave the others black. NaN pixels are ignored; a channel of only NaN gets (0, 1).
    """
    limits: list[tuple[float, float]] = []
    for channel in colours.reshape(-1, colours.shape[-1]).T:
        values = channel[np.isfinite(channel)]
        if not values.size:
            limits.append((0.0, 1.0))
            continue
        low, quarter, median, three_quarters, high = np.percentile(values, (2, 25, 50, 75, 98))
        max_distance = _MAX_IQRS * (three_quarters - quarter) or np.inf
        limits.append((max(low, median - max_distance), min(high, median + max_distance)))
    low, high = np.array(limits).T
    return low, np.maximum(high, low + 1e-6)


def apply_stretch(colours: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Colours (…, 3) from the limits' values to [0, 1]; NaN becomes black."""
    return np.clip(np.nan_to_num((colours - low) / (high - low), nan=0.0), 0.0, 1.0)


def pca_colours(embedding: np.ndarray) -> np.ndarray:
    """(G, G, E) → (G, G, 3) in [0, 1]: projections on the first three principal axes, each with its own stretch.

    The sign of an axis is arbitrary; it is chosen so that its largest weight is positive, which makes pictures of
    successive steps comparable. A missing axis (fewer than three channels, or equal tokens) is mid-grey.
    """
    flat = embedding.reshape(-1, embedding.shape[-1]).astype(np.float64)
    _, singular, axes = np.linalg.svd(flat - flat.mean(axis=0), full_matrices=False)
    colours = np.full((len(flat), 3), 0.5)
    for i, axis in enumerate(axes[:3]):
        if singular[i] > 1e-6 * np.linalg.norm(flat):
            axis = axis * np.sign(axis[np.abs(axis).argmax()])
            colours[:, i : i + 1] = apply_stretch(
                (flat @ axis)[:, None], *stretch_limits((flat @ axis)[:, None])
            )
    return colours.reshape(*embedding.shape[:2], 3)


def _draw_sensor(axes: Sequence[Axes], view: SensorView, dates: np.ndarray) -> AxesImage:
    """Draw the panels of one sensor; returns the image of the error, for its colour bar."""
    bands = choose_composite(view.bands)
    pixels, hidden = view.pixels[dates], view.hidden[dates]
    # The loss ignores the output at visible pixels, so it says nothing about the model.
    restored = np.where(hidden[:, None], view.reconstruction[dates], pixels)
    low, high = stretch_limits(bands.apply(view.pixels))
    original = apply_stretch(bands.apply(pixels), low, high)
    reconstruction = apply_stretch(bands.apply(restored), low, high)
    error = np.where(hidden, np.abs(reconstruction - original).mean(-1), np.nan)
    for a, colours in zip(
        axes, (original, np.where(hidden[..., None], _MASK_COLOUR, original), reconstruction), strict=False
    ):
        a.imshow(_strip(colours, BACKGROUND), interpolation="nearest")
    image = axes[3].imshow(
        _strip(error, np.nan),
        cmap=_error_colormap(),
        vmin=0,
        vmax=_MAX_ERROR,
        interpolation="nearest",
    )
    axes[4].imshow(_pad_to_strip(pca_colours(view.embedding), _strip_height(view, dates)))
    for a in axes:
        a.set_axis_off()
        a.set_anchor("N")
    axes[0].annotate(
        _caption(view, bands, dates),
        (0, 0),
        (0, -4),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=8.5,
        color=FOREGROUND,
        va="top",
    )
    return image


def _caption(view: SensorView, bands: Composite, dates: np.ndarray) -> str:
    which = f"dates {', '.join(str(d + 1) for d in dates)} of {len(view.pixels)}"
    parts = [plot_text(view.name), plot_text(bands.label), *([which] if len(view.pixels) > 1 else [])]
    return "   ".join([*parts, f"{100 * view.hidden.mean():.0f} % masked"])


def _strip(images: np.ndarray, blank: ArrayLike) -> np.ndarray:
    """(K, H, W, …) → one image (H', W', …): the dates side by side, separated by gaps of the colour ``blank``."""
    # A Sentinel tile is six pixels wide: pixels are repeated so that a gap can be narrower than one of them.
    factor = int(np.ceil(64 / images.shape[2]))
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    width = round(_GAP * images.shape[2])
    gap = np.broadcast_to(blank, (images.shape[1], width, *images.shape[3:]))
    parts = [images[0]]
    for image in images[1:]:
        parts += [gap, image]
    return np.concatenate(parts, axis=1)


def _pad_to_strip(image: np.ndarray, height: float) -> np.ndarray:
    """A square image (G, G, 3), padded on the right to the aspect ratio of a strip, so that their heights match."""
    factor = int(np.ceil(128 / len(image)))
    image = image.repeat(factor, axis=0).repeat(factor, axis=1)
    width = max(round(len(image) / height), image.shape[1])
    blank = np.broadcast_to(BACKGROUND, (len(image), width - image.shape[1], 3))
    return np.concatenate([image, blank], axis=1)


def _strip_height(view: SensorView, dates: np.ndarray) -> float:
    """Height of a sensor's strip, as a fraction of its width."""
    num, (rows, columns) = len(dates), view.pixels.shape[-2:]
    return rows / columns / (num + _GAP * (num - 1))


def _error_colormap() -> Colormap:
    from matplotlib import colormaps

    return colormaps["magma"].with_extremes(bad=(0, 0, 0, 0))


def _format_colorbar(bar: Colorbar) -> None:
    ticks = (0, _MAX_ERROR / 2, _MAX_ERROR)
    bar.set_ticks(ticks, labels=[f"{100 * t:.0f} %" for t in ticks[:-1]] + [f"≥ {100 * _MAX_ERROR:.0f} %"])
    bar.ax.tick_params(labelsize=8, length=0, colors=FOREGROUND)
    first, *_, last = bar.ax.get_xticklabels()
    first.set_horizontalalignment("left")
    last.set_horizontalalignment("right")
    bar.outline.set_visible(False)
    bar.ax.set_title("of the input's range", fontsize=8, color=FOREGROUND, pad=3)
