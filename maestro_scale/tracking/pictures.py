"""What the model sees, what was hidden from it, what it made of that, and what it thinks of the tile, as one picture.

Drawn off screen with matplotlib's object interface, so that threads and other figures are left alone.
Shapes: D dates, C bands, H×W pixels; a strip is K dates side by side, (H, W', 3).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from maestro_scale.training.observer import SensorView

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_DATES = 4

_COLUMNS = (
    "input",
    "seen (hidden in grey)",
    "reconstruction",
    "error where hidden",
    "embedding, nothing hidden",
)
_GREY = np.array([0.80, 0.79, 0.77])
BACKGROUND, FOREGROUND = np.array([0.985, 0.98, 0.972]), "#26241f"
_GAP = 0.06  # between dates, as a share of one
_REACH = 3.0  # interquartile ranges from the median that the stretch may span
_WORST = 0.5  # the error, in units of the stretch, at the end of its colour scale
_PANEL_INCHES = 2.9

# Band names in the order red, green, blue; the first triple that a sensor has is shown.
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
    """How a sensor's bands become colours: three band indices, or two of a radar, or one."""

    bands: tuple[int, ...]
    label: str

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """(D, C, H, W) → (D, H, W, 3) float32, unstretched."""
        chosen = pixels[:, list(self.bands)].astype(np.float32)
        if len(self.bands) == 2:
            # Network inputs are logarithms (or dB) already, where a ratio is a difference.
            chosen = np.concatenate([chosen, chosen[:, :1] - chosen[:, 1:]], axis=1)
        elif len(self.bands) == 1:
            chosen = np.repeat(chosen, 3, axis=1)
        return np.moveaxis(chosen, 1, -1)


def choose_composite(bands: Sequence[str]) -> Composite:
    """True colour where the bands allow it, else near infrared, else radar VV, VH, VV/VH, else grey."""
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

    A row per sensor, up to four of its dates as a strip. The images of a row share one stretch, taken from
    the input (see ``stretch_limits``); the error is the mean difference of the colours, as a share of it.
    Visible pixels of the reconstruction are the input's. The embedding shows its three principal components over the
    tile as red, green and blue. ValueError if there is no view.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not views:
        raise ValueError("a reconstruction picture needs at least one sensor's view")
    shown = [select_dates(len(v.pixels)) for v in views]
    heights = [_strip_height(v, d) for v, d in zip(views, shown, strict=True)]
    width, height = (
        len(_COLUMNS) * _PANEL_INCHES + 0.9,
        _PANEL_INCHES * sum(heights) + 0.34 * len(views) + 1.1,
    )
    figure = Figure(figsize=(width, height), facecolor=BACKGROUND)
    FigureCanvasAgg(figure)  # savefig draws with it, whatever backend the process has chosen
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
    figure.text(0.02, 1 - 0.20 / height, title, fontsize=12, color=FOREGROUND, weight="bold", va="center")
    for row, (view, dates) in enumerate(zip(views, shown, strict=True)):
        axes = [figure.add_subplot(grid[row, column]) for column in range(len(_COLUMNS))]
        image = _draw_sensor(axes, view, dates)
        if row == 0:
            for a, name in zip(axes, _COLUMNS, strict=True):
                a.set_title(name, fontsize=10, color=FOREGROUND, pad=5)
    place = grid[0, 3].get_position(figure)
    bar = figure.colorbar(
        image,
        cax=figure.add_axes((place.x0, 0.40 / height, place.width, 0.09 / height)),
        orientation="horizontal",
    )
    _dress_bar(bar)
    fresh = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(fresh, format="png", dpi=110, facecolor=BACKGROUND)
    os.replace(fresh, path)
    return path


def select_dates(num_dates: int) -> np.ndarray:
    """Indices of up to four dates, spread evenly from the first to the last."""
    return np.unique(np.linspace(0, num_dates - 1, min(num_dates, MAX_DATES)).round().astype(int))


def stretch_limits(colours: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per channel of (…, 3): the values shown as black and white, (3,) each.

    The 2nd and 98th percentile, but within three interquartile ranges of the median: a cloudy date must not
    leave the others black. NaN pixels count nowhere; a channel of nothing else gets (0, 1).
    """
    limits = []
    for channel in colours.reshape(-1, colours.shape[-1]).T:
        values = channel[np.isfinite(channel)]
        if not values.size:
            limits.append((0.0, 1.0))
            continue
        low, quarter, median, three_quarters, high = np.percentile(values, (2, 25, 50, 75, 98))
        reach = _REACH * (three_quarters - quarter) or np.inf
        limits.append((max(low, median - reach), min(high, median + reach)))
    low, high = np.array(limits).T
    return low, np.maximum(high, low + 1e-6)


def apply_stretch(colours: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Colours (…, 3) from the limits' values to [0, 1]; NaN becomes black."""
    return np.clip(np.nan_to_num((colours - low) / (high - low), nan=0.0), 0.0, 1.0)


def pca_colours(embedding: np.ndarray) -> np.ndarray:
    """(G, G, E) → (G, G, 3) in [0, 1]: projections on the first three principal axes, each stretched on its own.

    An axis points where its largest weight is positive, so that pictures of successive steps can be compared. Axes that
    there are not (fewer than three channels, or all tokens alike) are mid-grey.
    """
    flat = embedding.reshape(-1, embedding.shape[-1]).astype(np.float64)
    _, spread, axes = np.linalg.svd(flat - flat.mean(axis=0), full_matrices=False)
    colours = np.full((len(flat), 3), 0.5)
    for i, axis in enumerate(axes[:3]):
        if spread[i] > 1e-6 * np.linalg.norm(flat):
            axis = axis * np.sign(axis[np.abs(axis).argmax()])
            colours[:, i : i + 1] = apply_stretch(
                (flat @ axis)[:, None], *stretch_limits((flat @ axis)[:, None])
            )
    return colours.reshape(*embedding.shape[:2], 3)


def _draw_sensor(axes: Sequence[Axes], view: SensorView, dates: np.ndarray):
    """The panels of one sensor; returns the error's image, for the colour scale."""
    mix = choose_composite(view.bands)
    pixels, hidden = view.pixels[dates], view.hidden[dates]
    # What was visible is not the model's work.
    guess = np.where(hidden[:, None], view.reconstruction[dates], pixels)
    low, high = stretch_limits(mix.apply(view.pixels))
    seen, made = apply_stretch(mix.apply(pixels), low, high), apply_stretch(mix.apply(guess), low, high)
    error = np.where(hidden, np.abs(made - seen).mean(-1), np.nan)
    for a, colours in zip(axes, (seen, np.where(hidden[..., None], _GREY, seen), made), strict=False):
        a.imshow(_strip(colours, BACKGROUND), interpolation="nearest")
    image = axes[3].imshow(
        _strip(error, np.array(np.nan)), cmap=_error_colours(), vmin=0, vmax=_WORST, interpolation="nearest"
    )
    axes[4].imshow(_beside_a_strip(pca_colours(view.embedding), _strip_height(view, dates)))
    for a in axes:
        a.set_axis_off()
        a.set_anchor("N")
    axes[0].annotate(
        _caption(view, mix, dates),
        (0, 0),
        (0, -4),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=8.5,
        color=FOREGROUND,
        va="top",
    )
    return image


def _caption(view: SensorView, mix: Composite, dates: np.ndarray) -> str:
    which = f"dates {', '.join(str(d + 1) for d in dates)} of {len(view.pixels)}"
    parts = [view.name, mix.label, *([which] if len(view.pixels) > 1 else [])]
    return "   ".join([*parts, f"{100 * view.hidden.mean():.0f} % hidden"])


def _strip(images: np.ndarray, blank: np.ndarray) -> np.ndarray:
    """(K, H, W, …) → one image (H', W', …) of the dates side by side, with gaps of ``blank`` between them."""
    # Repeating pixels makes room for a gap narrower than one: a Sentinel tile has six.
    fine = int(np.ceil(64 / images.shape[2]))
    images = images.repeat(fine, axis=1).repeat(fine, axis=2)
    width = round(_GAP * images.shape[2])
    gap = np.broadcast_to(blank, (images.shape[1], width, *images.shape[3:]))
    parts = [images[0]]
    for image in images[1:]:
        parts += [gap, image]
    return np.concatenate(parts, axis=1)


def _beside_a_strip(image: np.ndarray, height: float) -> np.ndarray:
    """A square image (G, G, 3) at the left of a panel of a strip's proportions, so that it gets the strip's height."""
    fine = int(np.ceil(128 / len(image)))
    image = image.repeat(fine, axis=0).repeat(fine, axis=1)
    width = max(round(len(image) / height), image.shape[1])
    blank = np.broadcast_to(BACKGROUND, (len(image), width - image.shape[1], 3))
    return np.concatenate([image, blank], axis=1)


def _strip_height(view: SensorView, dates: np.ndarray) -> float:
    """Height of a sensor's strip, as a share of its width."""
    num, (rows, columns) = len(dates), view.pixels.shape[-2:]
    return rows / columns / (num + _GAP * (num - 1))


def _error_colours():
    from matplotlib import colormaps

    return colormaps["magma"].with_extremes(bad=(0, 0, 0, 0))


def _dress_bar(bar) -> None:
    ticks = (0, _WORST / 2, _WORST)
    bar.set_ticks(ticks, labels=[f"{100 * t:.0f} %" for t in ticks[:-1]] + [f"≥ {100 * _WORST:.0f} %"])
    bar.ax.tick_params(labelsize=8, length=0, colors=FOREGROUND)
    first, *_, last = bar.ax.get_xticklabels()
    first.set_horizontalalignment("left")
    last.set_horizontalalignment("right")
    bar.outline.set_visible(False)
    bar.ax.set_title("of the input's range", fontsize=8, color=FOREGROUND, pad=3)
