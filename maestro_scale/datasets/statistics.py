"""Statistics of optical and radar series that self-supervised learning exploits, of real and of synthetic tiles alike.

:func:`tile_statistics` computes them for one tile, :class:`DatasetStatistics` averages them over tiles; the values of
real tiles are recorded in :mod:`maestro_scale.datasets.real_ranges`.

All spatial statistics are computed in windows of 6 × 6 pixels (60 m at 10 m), whatever the size of the tile, because
correlations depend on the extent over which means are taken. Excluded are, per window and date: any nodata in a band
(NaN; in integers and reflectance, 0 or less), any pixel with a mask value above 0 (snow, cloud), and for optical series
without a mask, dates on which the visible bands are brighter than twice their lower quartile over the dates.

Shapes: T dates, C bands, H×W pixels, N windows, S = 6 pixels per side of a window. All functions take and return
float64 arrays with NaN where nothing was measured. Correlations and movements have no unit.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from maestro_scale.datasets.bands import RADAR, group_of, is_radar, wavelength_nm
from maestro_scale.datasets.patterns import (
    MIN_DATES,
    WINDOW,
    autocorrelation,
    cut_windows,
    evenly,
    mean_of,
    movement,
    normalised_targets,
    pattern_kept,
    relative_deviation,
    residual_correlation,
    window_places,
)
from maestro_scale.datasets.spec import DatasetSpec, Modality

_MAX_DATES = 160  # evenly spaced; bounds time and memory
_BRIGHT = 2.0  # times the lower quartile of the visible bands: cloud or snow, if no mask is stored
_IMAGE_M, _IMAGE_WINDOW = 1.0, 30  # metres per pixel to which images are averaged, and pixels of a window
_MAX_IMAGE_M = 1.5
_RED_NM, _NIR_NM = 665, 842  # of NDVI
_DIGITAL = 10_000  # digital number of a reflectance of 1

UNITS: Mapping[str, str] = {
    "optical_autocorrelation": "",
    "residual_visible_nir": "",
    "residual_swir_nir": "",
    "residual_visible_swir": "",
    "residual_within_groups": "",
    "deviation_visible": "%",
    "deviation_nir": "%",
    "deviation_swir": "%",
    "movement_patch": "",
    "movement_patch_group": "",
    "optical_kept": "",
    "season_ndvi": "",
    "lowest_ndvi": "",
    "radar_autocorrelation": "",
    "radar_kept": "",
    "radar_deviation": "dB",
    "radar_movement": "dB",
    "image_autocorrelation": "",
    "image_deviation": "%",
}
"""All statistics and their units, in the order of tables. :func:`tile_statistics` defines them."""
_OF_TILES = ("season_ndvi", "lowest_ndvi", "radar_movement")  # of means over the tile: no window is needed


@dataclass(frozen=True)
class TileStatistics:
    """``values[name]``: a statistic of one tile. ``reasons[name]``: why one could not be computed."""

    values: Mapping[str, float]
    reasons: Mapping[str, str]


def tile_statistics(
    spec: DatasetSpec,
    arrays: Mapping[str, np.ndarray],
    dates: Mapping[str, np.ndarray],
    masks: Mapping[str, np.ndarray],
) -> TileStatistics:
    """The statistics of one tile, given as in :class:`~maestro_scale.datasets.spec.Tile`.

    Optical series (the first one with visible and near-infrared bands, at its own resolution):

    - ``optical_autocorrelation``: :func:`autocorrelation`, mean over bands.
    - ``residual_A_B``: :func:`residual_correlation`, mean over the pairs of a band of A and a band of B;
      ``residual_within_groups``: mean over the groups of the mean over the pairs of bands within the group.
    - ``deviation_A``: median over bands of A, dates and patches of 3 × 3 pixels of 100 · standard deviation / mean.
    - ``movement_patch``, ``movement_patch_group``: :func:`movement` of the near-infrared bands in the targets that are
      normalised over all bands, and over the near-infrared bands.
    - ``optical_kept``: :func:`pattern_kept`, mean over bands.
    - ``season_ndvi``: 90 % minus 10 % quantile over dates of the mean NDVI of the tile; ``lowest_ndvi``: the 10 %.

    Radar series (all modalities with VV, VH, HH or HV, as decibels; each statistic is the mean over them and their
    bands): ``radar_autocorrelation``, ``radar_kept`` as above; ``radar_deviation``: mean over dates and windows of the
    standard deviation in a window; ``radar_movement``: standard deviation over dates of the mean of the tile.

    Images (one date; the one of highest resolution, averaged to pixels of about one metre in windows of 30 pixels):
    ``image_autocorrelation``; ``image_deviation``: mean of 100 · standard deviation / mean in a window.
    """
    values: dict[str, float] = {}
    missing: dict[str, str] = {}
    parts = {
        "optical": (
            _optical_modality(spec),
            "no series with bands of known visible and near-infrared wavelengths",
        ),
        "radar": (_radar_modalities(spec) or None, "no series with VV, VH, HH or HV"),
        "image": (_image_modality(spec), "no image of one date with 1.5 m per pixel or less"),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # means of no clear pixel: they are NaN, and reported
        optical, radar, image = (parts[kind][0] for kind in ("optical", "radar", "image"))
        if isinstance(optical, Modality):
            name = optical.name
            values |= _optical(optical, arrays[name], dates[name], masks.get(name))
        if isinstance(radar, list):
            each = [_radar(m, arrays[m.name], dates[m.name]) for m in radar]
            values |= {key: mean_of([part[key] for part in each]) for key in each[0]}
        if isinstance(image, Modality):
            values |= _image(image, arrays[image.name])
    for key in UNITS:
        modality, reason = parts[_part(key)]
        if modality is None:
            missing[key] = reason
        elif key not in values:
            missing[key] = "no bands of short-wave infrared"
        elif key not in _OF_TILES and (size := _window_problem(modality)):
            missing[key] = size
        elif not np.isfinite(values[key]):
            missing[key] = "too few clear dates, or constant values"
    return TileStatistics({k: values[k] for k in UNITS if k not in missing}, missing)


def _optical(
    modality: Modality, array: np.ndarray, dates: np.ndarray, mask: np.ndarray | None
) -> dict[str, float]:
    groups = [group_of(band) for band in modality.bands]
    visible, nir, swir = (
        np.flatnonzero([group == name for group in groups]) for name in ("visible", "nir", "swir")
    )
    known = np.concatenate([visible, nir, swir])
    which = _distinct(dates)
    windows = cut_windows(array, which)[:, known].astype(np.float64)
    visible, nir, swir = np.split(np.arange(len(known)), np.cumsum([len(visible), len(nir)]))
    clear: np.ndarray = np.all(windows > 0, axis=(1, 3, 4))
    if mask is not None:
        clear &= np.all(cut_windows(mask, which) == 0, axis=(1, 3, 4))
    elif clear.any():
        brightness = np.where(clear, windows[:, visible].mean(axis=(1, 3, 4)), np.nan)
        clear &= brightness <= _BRIGHT * np.nanquantile(brightness, 0.25, axis=0)
    windows = np.where(clear[:, None, :, None, None], windows, np.nan)
    found: dict[str, float] = {}
    found["optical_autocorrelation"] = mean_of(autocorrelation(windows))
    correlation = residual_correlation(windows)
    found["residual_visible_nir"] = float(correlation[np.ix_(visible, nir)].mean())
    if len(swir):
        found["residual_swir_nir"] = float(correlation[np.ix_(swir, nir)].mean())
        found["residual_visible_swir"] = float(correlation[np.ix_(visible, swir)].mean())
    found["residual_within_groups"] = mean_of(
        [
            correlation[np.ix_(g, g)][np.triu_indices(len(g), 1)].mean()
            for g in (visible, nir, swir)
            if len(g) > 1
        ]
    )
    deviation = relative_deviation(windows)
    for name, group in (("visible", visible), ("nir", nir), ("swir", swir)):
        if len(group):
            found[f"deviation_{name}"] = 100 * float(np.nanmedian(deviation[:, group]))
    # As in the preset, which divides digital numbers by 5,000; only the small constant of the variance depends on it.
    scaled = windows / (0.5 * (_DIGITAL if np.nanmax(windows, initial=0) > _DIGITAL / 1000 else 1))
    found["movement_patch"] = movement(normalised_targets(scaled)[:, nir])
    found["movement_patch_group"] = movement(normalised_targets(scaled[:, nir]))
    found["optical_kept"] = mean_of(pattern_kept(windows))
    means = np.nanmean(windows, axis=(2, 3, 4))
    red = _nearest(modality, known[visible], _RED_NM)
    infrared = _nearest(modality, known[nir], _NIR_NM)
    r, n = (means[:, np.flatnonzero(known == band)[0]] for band in (red, infrared))
    ndvi = (n - r) / (n + r)
    ndvi = ndvi[np.isfinite(ndvi)]
    enough = len(ndvi) >= MIN_DATES
    low, high = np.quantile(ndvi, (0.1, 0.9)) if enough else (np.nan, np.nan)
    return found | {"season_ndvi": float(high - low), "lowest_ndvi": float(low)}


def _radar(modality: Modality, array: np.ndarray, dates: np.ndarray) -> dict[str, float]:
    polarisations = [i for i, band in enumerate(modality.bands) if band.strip().upper() in RADAR]
    windows = cut_windows(array, _distinct(dates))[:, polarisations].astype(np.float64)
    if (windows < 0).any():  # decibels, where 0 is nodata; linear power is never negative
        windows = np.where(windows != 0, windows, np.nan)
    else:
        windows = 10 * np.log10(np.where(windows > 0, windows, np.nan))
    clear: np.ndarray = np.all(np.isfinite(windows), axis=(1, 3, 4))
    windows = np.where(clear[:, None, :, None, None], windows, np.nan)
    means = np.nanmean(windows, axis=(2, 3, 4))
    enough = np.isfinite(means).sum() >= MIN_DATES * means.shape[1]
    return {
        "radar_autocorrelation": mean_of(autocorrelation(windows)),
        "radar_kept": mean_of(pattern_kept(windows)),
        "radar_deviation": mean_of(windows.std(axis=(3, 4))),
        "radar_movement": mean_of(np.nanstd(means, axis=0)) if enough else np.nan,
    }


def _image(modality: Modality, array: np.ndarray) -> dict[str, float]:
    factor = max(round(_IMAGE_M / modality.resolution_m), 1)
    rows, cols = (n // factor for n in array.shape[-2:])
    side = min(_IMAGE_WINDOW, rows, cols)
    # Window by window, because an image may have a hundred million pixels.
    places = zip(*window_places(rows, cols, side), strict=True)
    windows = np.stack([_averaged_window(array[:1], r, c, side, factor) for r, c in places], axis=2)
    return {
        "image_autocorrelation": mean_of(autocorrelation(windows)),
        "image_deviation": 100 * mean_of(windows.std(axis=(3, 4)) / windows.mean(axis=(3, 4))),
    }


def _averaged_window(array: np.ndarray, row: int, col: int, side: int, factor: int) -> np.ndarray:
    """(1, C, side, side) of images (1, C, H, W), averaged over factor² pixels; NaN where one of them is in any band."""
    rows, cols = (slice(i * side * factor, (i + 1) * side * factor) for i in (row, col))
    pixels = array[:, :, rows, cols].reshape(1, -1, side, factor, side, factor)
    means = pixels.mean(axis=(3, 5), dtype=np.float64)
    means[:, :, ~np.isfinite(means[0]).all(axis=0)] = np.nan
    return means


def _window_problem(modality: Modality | list[Modality]) -> str:
    """Why spatial statistics of a modality are not comparable: it is smaller than the windows. Empty if it is not."""
    first = modality[0] if isinstance(modality, list) else modality
    side = WINDOW if first.series else _IMAGE_WINDOW
    pixels = first.size if first.series else first.size // max(round(_IMAGE_M / first.resolution_m), 1)
    if pixels >= side:
        return ""
    return f"{first.name} has fewer than {side} pixels per side, which a window of these statistics has"


def _part(name: str) -> str:
    prefix = name.partition("_")[0]
    return prefix if prefix in ("radar", "image") else "optical"


def _optical_modality(spec: DatasetSpec) -> Modality | None:
    for modality in spec.modalities:
        if modality.series and {"visible", "nir"} <= {group_of(band) for band in modality.bands}:
            return modality
    return None


def _radar_modalities(spec: DatasetSpec) -> list[Modality]:
    return [m for m in spec.modalities if m.series and is_radar(m.bands)]


def _image_modality(spec: DatasetSpec) -> Modality | None:
    images = [
        m
        for m in spec.modalities
        if not m.series and m.resolution_m <= _MAX_IMAGE_M and all(group_of(band) for band in m.bands)
    ]
    return min(images, key=lambda m: m.resolution_m, default=None)


def _nearest(modality: Modality, bands: np.ndarray, nm: int) -> int:
    return int(min(bands, key=lambda b: abs((wavelength_nm(modality.bands[b]) or 0) - nm)))


def _distinct(dates: np.ndarray) -> np.ndarray:
    """Indices of the first entry of every date, in time, at most 160: TreeSatAI-TS repeats dates of Sentinel-1."""
    first = np.unique(dates, axis=0, return_index=True)[1]
    return first[evenly(len(first), _MAX_DATES)]


@dataclass(frozen=True)
class Measured:
    """A statistic over tiles: their mean and its standard error (0 of one tile), the 10 % and the 90 % quantile, and
    how many tiles had it."""

    mean: float
    error: float
    low: float
    high: float
    num_tiles: int


class DatasetStatistics:
    """Collects the statistics of tiles."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {name: [] for name in UNITS}
        self._reasons: dict[str, str] = {}
        self.num_tiles = 0

    def add(self, tile: TileStatistics) -> None:
        """Add one tile."""
        self.num_tiles += 1
        for name, value in tile.values.items():
            self._values[name].append(value)
        self._reasons |= tile.reasons

    def measured(self) -> dict[str, Measured]:
        """The statistics that at least one tile had, in the order of :data:`UNITS`."""
        found = {}
        for name, values in self._values.items():
            if values:
                low, high = np.quantile(values, (0.1, 0.9))
                error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
                found[name] = Measured(
                    float(np.mean(values)), float(error), float(low), float(high), len(values)
                )
        return found

    def reasons(self) -> dict[str, str]:
        """Why the others are missing."""
        return {
            name: self._reasons[name] for name in UNITS if not self._values[name] and name in self._reasons
        }
