"""Statistics of spatial patterns in windows of a series: correlations, deviations, reconstruction targets.

Shapes: T dates, C bands, H×W pixels, N windows, S pixels per side of a window (6 by default). A window that was not
measured on a date is NaN in all its bands. Correlations have no unit. The mean of no value is NaN, without a warning.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

WINDOW = 6
RESIDUAL_PATCH = 3  # pixels per side, of residuals and deviations: the patches of the recorded Landsat values
TARGET_PATCH = 2  # pixels per side, of reconstruction targets: that of the presets for 10 m
TARGET_EPS = 1e-6  # added to the variance of a target, as in the model
MAX_WINDOWS = 64  # bounds time and memory on large tiles
MIN_DATES = 4  # for a statistic over dates


def autocorrelation(windows: np.ndarray) -> np.ndarray:
    """(T, C) spatial autocorrelation at lag 1 of windows (T, C, N, S, S).

    The Pearson correlation of the values of neighbouring pixels of a window, over its S·(S−1) pairs; the mean of
    horizontal and vertical neighbours, then of the windows.
    """
    flat = (*windows.shape[:-2], -1)
    right = _correlation(windows[..., 1:].reshape(flat), windows[..., :-1].reshape(flat))
    below = _correlation(windows[..., 1:, :].reshape(flat), windows[..., :-1, :].reshape(flat))
    return _mean_over((right + below) / 2, axis=2)


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
    norms = np.sqrt(np.outer(np.diag(products), np.diag(products)))
    return np.divide(products, norms, out=np.full(norms.shape, np.nan), where=norms > 0)


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
    enough = np.isfinite(means).sum(axis=0) >= MIN_DATES
    return mean_of(np.nanstd(means[:, enough], axis=0)) if enough.any() else np.nan


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
    return _mean_over(np.concatenate(kept), axis=0)


def cut_windows(values: np.ndarray, dates: ArrayLike | None = None) -> np.ndarray:
    """(T, C, N, side, side) windows of 6 × 6 pixels of rasters (T, C, H, W) beside each other, at most 64, evenly
    spaced. Copies nothing else of ``values``, which may be large. ``dates``: indices; None: all.

    ``side`` is that of the raster if it is smaller; pixels beyond the last full window are left out.
    """
    side = min(WINDOW, *values.shape[-2:])
    rows, cols = window_places(values.shape[-2], values.shape[-1], side)
    height, width = (n // side * side for n in values.shape[-2:])
    cut = values[..., :height, :width].reshape(*values.shape[:2], height // side, side, width // side, side)
    at = np.arange(len(values)) if dates is None else np.asarray(dates)
    return np.ascontiguousarray(cut[at[:, None], :, rows, :, cols].swapaxes(1, 2))


def window_places(height: int, width: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """(N,) rows and (N,) columns, in windows, of at most 64 windows beside each other, evenly spaced."""
    rows, cols = height // side, width // side
    return np.divmod(evenly(rows * cols, MAX_WINDOWS), cols)


def evenly(count: int, most: int) -> np.ndarray:
    """All indices below ``count``, or ``most`` of them, evenly spaced."""
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


def mean_of(values: ArrayLike) -> float:
    """The mean of the values that are not NaN; NaN if there are none."""
    array = np.asarray(values, float)
    return float(array[np.isfinite(array)].mean()) if np.isfinite(array).any() else np.nan


def _mean_over(values: np.ndarray, axis: int) -> np.ndarray:
    """The mean of the values that are not NaN along an axis; NaN where there are none."""
    measured = np.isfinite(values)
    count = measured.sum(axis=axis)
    total = np.where(measured, values, 0).sum(axis=axis)
    return np.divide(total, count, out=np.full(np.shape(total), np.nan), where=count > 0)
