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
from numpy.typing import ArrayLike

from maestro_scale.datasets.bands import RADAR, group_of, is_radar, wavelength_nm
from maestro_scale.datasets.spec import DatasetSpec, Modality

WINDOW = 6
RESIDUAL_PATCH = 3  # pixels per side, of residuals and deviations: the patches of the recorded Landsat values
TARGET_PATCH = 2  # pixels per side, of reconstruction targets: that of the presets for 10 m
TARGET_EPS = 1e-6  # added to the variance of a target, as in the model
_MAX_DATES, _MAX_WINDOWS = 160, 64  # evenly spaced; bounds time and memory on large tiles
_MIN_DATES = 4  # clear dates of a window or a tile, for a statistic over dates
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
            values |= {key: _mean([part[key] for part in each]) for key in each[0]}
        if isinstance(image, Modality):
            values |= _image(image, arrays[image.name])
    for key in UNITS:
        modality, reason = parts[_part(key)]
        if modality is None:
            missing[key] = reason
        elif key not in values:
            missing[key] = "no bands of short-wave infrared"
        elif not np.isfinite(values[key]):
            missing[key] = "too few clear dates, or constant values"
    return TileStatistics({k: values[k] for k in UNITS if k not in missing}, missing)


def autocorrelation(windows: np.ndarray) -> np.ndarray:
    """(T, C) spatial autocorrelation at lag 1 of windows (T, C, N, S, S).

    The Pearson correlation of the values of neighbouring pixels of a window, over its S·(S−1) pairs; the mean of
    horizontal and vertical neighbours, then of the windows.
    """
    flat = (*windows.shape[:-2], -1)
    right = _correlation(windows[..., 1:].reshape(flat), windows[..., :-1].reshape(flat))
    below = _correlation(windows[..., 1:, :].reshape(flat), windows[..., :-1, :].reshape(flat))
    return np.nanmean((right + below) / 2, axis=2)


def residual_correlation(windows: np.ndarray) -> np.ndarray:
    """(C, C) correlation between bands of the residuals within patches of 3 × 3 pixels, of windows (T, C, N, S, S).

    A residual is a value minus the mean of its patch, date and band, in the units of the data. One Pearson correlation
    over all pixels of all patches and dates, so bright dates weigh more.
    """
    patches = _patches(windows, RESIDUAL_PATCH)
    residuals = patches - patches.mean(axis=-1, keepdims=True)
    flat = residuals.swapaxes(0, 1).reshape(windows.shape[1], -1)
    flat = flat[:, np.isfinite(flat).all(axis=0)]
    if not flat.size:
        return np.full((len(flat), len(flat)), np.nan)
    products = flat @ flat.T  # the mean of residuals is zero
    norms = np.sqrt(np.diag(products))
    return products / np.outer(norms, norms)


def relative_deviation(windows: np.ndarray) -> np.ndarray:
    """(T, C, patches) standard deviation divided by mean within patches of 3 × 3 pixels, of windows (T, C, N, S, S)."""
    patches = _patches(windows, RESIDUAL_PATCH)
    return patches.std(axis=-1) / patches.mean(axis=-1)


def normalised_targets(windows: np.ndarray) -> np.ndarray:
    """(T, C, tokens, 4) reconstruction targets of tokens of 2 × 2 pixels, of windows (T, C, N, S, S).

    Per token and date (x − mean) / sqrt(variance + 1e-6) over the pixels and all C bands, with the unbiased variance
    (MAESTRO, arXiv 2508.10894, and its code): the targets of one band group. ``windows`` are scaled as in the model.
    """
    patches = _patches(windows, TARGET_PATCH)
    mean = patches.mean(axis=(1, 3), keepdims=True)
    variance = patches.var(axis=(1, 3), ddof=1, keepdims=True)
    return (patches - mean) / np.sqrt(variance + TARGET_EPS)


def movement(targets: np.ndarray) -> float:
    """How much the band means of targets (T, C, tokens, pixels) move: their standard deviation over the dates.

    The mean over the pixels of a token, then the standard deviation over the dates (at least 4), then the mean over
    tokens and bands. What is constant over dates or common to the bands of a target's group does not count.
    """
    means = targets.mean(axis=-1)
    enough = np.isfinite(means).sum(axis=0) >= _MIN_DATES
    return _mean(np.nanstd(means, axis=0)[enough])


def pattern_kept(windows: np.ndarray) -> np.ndarray:
    """(C,) how much of the spatial pattern in a window is kept from one date to the next, of windows (T, C, N, S, S).

    The Pearson correlation over the pixels of a window on two dates that follow each other among those measured in
    that window; mean over pairs of dates and windows. ``windows`` must not hold a date twice.
    """
    kept = []
    for n in range(windows.shape[2]):
        window = windows[:, :, n].reshape(*windows.shape[:2], -1)
        window = window[np.isfinite(window).all(axis=(1, 2))]
        kept.append(_correlation(window[1:], window[:-1]))
    return np.nanmean(np.concatenate(kept), axis=0)


def cut_windows(values: np.ndarray, side: int = WINDOW) -> np.ndarray:
    """(T, C, N, side, side) windows of rasters (T, C, H, W) beside each other, at most 64, evenly spaced.

    ``side`` becomes the size of the raster if that is smaller; pixels beyond the last full window are left out.
    """
    side = min(side, *values.shape[-2:])
    rows, cols = (n // side for n in values.shape[-2:])
    cut = values[..., : rows * side, : cols * side].reshape(*values.shape[:2], rows, side, cols, side)
    cut = cut.swapaxes(3, 4).reshape(*values.shape[:2], rows * cols, side, side)
    return cut[:, :, _evenly(rows * cols, _MAX_WINDOWS)]


def _optical(
    modality: Modality, array: np.ndarray, dates: np.ndarray, mask: np.ndarray | None
) -> dict[str, float]:
    groups = [group_of(band) for band in modality.bands]
    visible, nir, swir = (
        np.flatnonzero([group == name for group in groups]) for name in ("visible", "nir", "swir")
    )
    known = np.concatenate([visible, nir, swir])
    which = _distinct(dates)
    values = array[which][:, known].astype(np.float64)
    visible, nir, swir = np.split(np.arange(len(known)), np.cumsum([len(visible), len(nir)]))
    bad = np.logical_not((values > 0).all(axis=1, keepdims=True))
    if mask is not None:
        bad = bad | (mask[which] > 0).any(axis=1, keepdims=True)
    windows, marked = cut_windows(values), cut_windows(bad)
    clear = np.logical_not(marked.any(axis=(1, 3, 4)))
    if mask is None:
        brightness = np.where(clear, windows[:, visible].mean(axis=(1, 3, 4)), np.nan)
        clear &= brightness <= _BRIGHT * np.nanquantile(brightness, 0.25, axis=0)
    windows = np.where(clear[:, None, :, None, None], windows, np.nan)
    found: dict[str, float] = {}
    found["optical_autocorrelation"] = _mean(autocorrelation(windows))
    correlation = residual_correlation(windows)
    found["residual_visible_nir"] = float(correlation[np.ix_(visible, nir)].mean())
    if len(swir):
        found["residual_swir_nir"] = float(correlation[np.ix_(swir, nir)].mean())
        found["residual_visible_swir"] = float(correlation[np.ix_(visible, swir)].mean())
    found["residual_within_groups"] = _mean(
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
    found["optical_kept"] = _mean(pattern_kept(windows))
    means = np.nanmean(windows, axis=(2, 3, 4))
    red = _nearest(modality, known[visible], _RED_NM)
    infrared = _nearest(modality, known[nir], _NIR_NM)
    r, n = (means[:, np.flatnonzero(known == band)[0]] for band in (red, infrared))
    ndvi = (n - r) / (n + r)
    ndvi = ndvi[np.isfinite(ndvi)]
    enough = len(ndvi) >= _MIN_DATES
    low, high = np.quantile(ndvi, (0.1, 0.9)) if enough else (np.nan, np.nan)
    return found | {"season_ndvi": float(high - low), "lowest_ndvi": float(low)}


def _radar(modality: Modality, array: np.ndarray, dates: np.ndarray) -> dict[str, float]:
    polarisations = [i for i, band in enumerate(modality.bands) if band.strip().upper() in RADAR]
    values = array[_distinct(dates)][:, polarisations].astype(np.float64)
    if (values < 0).any():  # decibels, where 0 is nodata; linear power is never negative
        values = np.where(values != 0, values, np.nan)
    else:
        values = 10 * np.log10(np.where(values > 0, values, np.nan))
    windows = cut_windows(values)
    clear = np.isfinite(windows).all(axis=(1, 3, 4))
    windows = np.where(clear[:, None, :, None, None], windows, np.nan)
    means = np.nanmean(windows, axis=(2, 3, 4))
    enough = np.isfinite(means).sum() >= _MIN_DATES * means.shape[1]
    return {
        "radar_autocorrelation": _mean(autocorrelation(windows)),
        "radar_kept": _mean(pattern_kept(windows)),
        "radar_deviation": _mean(windows.std(axis=(3, 4))),
        "radar_movement": _mean(np.nanstd(means, axis=0)) if enough else np.nan,
    }


def _image(modality: Modality, array: np.ndarray) -> dict[str, float]:
    factor = max(round(_IMAGE_M / modality.resolution_m), 1)
    rows, cols = (n // factor for n in array.shape[-2:])
    fine = array[:1, :, : rows * factor, : cols * factor].astype(np.float64)
    fine[:, :, ~np.isfinite(fine[0]).all(axis=0)] = np.nan
    values = fine.reshape(1, -1, rows, factor, cols, factor).mean(axis=(3, 5))
    windows = cut_windows(values, _IMAGE_WINDOW)
    return {
        "image_autocorrelation": _mean(autocorrelation(windows)),
        "image_deviation": 100 * _mean(windows.std(axis=(3, 4)) / windows.mean(axis=(3, 4))),
    }


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
    return first[_evenly(len(first), _MAX_DATES)]


def _evenly(count: int, most: int) -> np.ndarray:
    return np.arange(count) if count <= most else np.linspace(0, count - 1, most).round().astype(int)


def _patches(windows: np.ndarray, side: int) -> np.ndarray:
    """(T, C, patches, side²) of windows (T, C, N, S, S); pixels beyond the last full patch are left out."""
    num = windows.shape[-1] // side
    cut = windows[..., : num * side, : num * side]
    cut = cut.reshape(*windows.shape[:3], num, side, num, side).swapaxes(4, 5)
    return cut.reshape(*windows.shape[:2], -1, side * side)


def _correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson correlation over the last axis; NaN where one side is constant."""
    a, b = (x - x.mean(axis=-1, keepdims=True) for x in (a, b))
    norm = np.sqrt((a * a).sum(axis=-1) * (b * b).sum(axis=-1))
    return np.divide((a * b).sum(axis=-1), norm, out=np.full(norm.shape, np.nan), where=norm > 0)


def _mean(values: ArrayLike) -> float:
    array = np.asarray(values, float)
    return float(np.nanmean(array)) if array.size else np.nan
