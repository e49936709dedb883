"""Selection of dates from a time series: one from each of ``num_dates`` consecutive bins of equal size.

Shapes: T dates stored, D dates selected, n = floor(T / D) dates per bin, C bands, H×W pixels.

A date is *marked* if the mask (snow, cloud) exceeds the threshold in any pixel. Training draws from
each bin an unmarked date without NaN; if there is none, a date without NaN; if there is none, any date, unmarked if
possible. Nodata, where a raster stores it, weighs more than the mask: a date with it is drawn after all others of its
bin, and a date without any valid pixel is left out of the series (see :func:`with_data`).

The T mod D dates that fit into no bin are left out at the beginning, at the end, or partly at both: training draws
where the bins begin, evaluation begins at the first date.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np

from maestro_scale.stream.rng import CounterRNG

FirstDate = Literal["any", "ends"]


def spread_evenly(stored: int, num_dates: int) -> np.ndarray:
    """(D,) indices that repeat T <= D stored dates evenly, in order; T = D uses each once."""
    return np.arange(num_dates) * stored // num_dates


def bins(stored: int, num_dates: int, skip: int = 0) -> np.ndarray:
    """(D, n) indices of the dates of each bin, starting after the first ``skip`` dates."""
    size = stored // num_dates
    return skip + np.arange(num_dates * size).reshape(num_dates, size)


def with_data(nodata: np.ndarray) -> np.ndarray | None:
    """(S,) indices of the dates with a valid pixel, from nodata (T, H, W) bool; None for all of them: if each has one,
    or none has."""
    empty = nodata.reshape(len(nodata), -1).all(axis=1)
    return None if empty.all() or not empty.any() else np.flatnonzero(~empty)


def rank(marked: np.ndarray | None, nodata: np.ndarray) -> np.ndarray:
    """(T,) uint8: 0 for complete, unmarked dates, 1 for marked ones, 2 for those with nodata (T, H, W), drawn last."""
    ranks = np.zeros(len(nodata), np.uint8) if marked is None else marked.astype(np.uint8)
    ranks[nodata.reshape(len(nodata), -1).any(axis=1)] = 2
    return ranks


def is_marked(mask: np.ndarray, threshold: float) -> np.ndarray:
    """(T,) bool from a mask (T, M, H, W) in percent: whether any pixel of a date exceeds ``threshold``."""
    return np.maximum.reduce(mask.reshape(len(mask), -1), axis=1) > threshold


def draw(
    stored: int,
    num_dates: int,
    marked: np.ndarray | None,
    read: Callable[[np.ndarray], np.ndarray],
    rng: CounterRNG,
    first_date: FirstDate = "any",
) -> tuple[np.ndarray, np.ndarray]:
    """Training: (D,) indices drawn at random from T > D stored dates, and their pixels (D, C, H, W).

    ``marked``: (T,) bool, or uint8 of :func:`rank`, or None. ``read``: indices → pixels. Only the drawn dates are read,
    and further candidates of a bin only where a drawn one has NaN, so that a long series is not decoded. Within a bin
    every eligible date is equally likely. ``first_date``: of the bins, any of 0 … T mod D as in the reference, or one
    of the two ends of this range.
    """
    words = rng.words(stored + 1)
    # The same number of words in both cases, so that no other draw depends on the choice. With a rest of 1 the first
    # date is the same too: the highest bit of the last word.
    rest = stored % num_dates
    where = int(words[-1])
    skip = where * (rest + 1) >> 64 if first_date == "any" else rest * (where >> 63)
    size = stored // num_dates
    binned = slice(skip, skip + num_dates * size)  # consecutive dates, so that bins are views
    # The smallest of n random words is equally likely to be any of them. The highest bit is freed for the mark, so that
    # every unmarked date comes before every marked one.
    priority = words[binned].reshape(num_dates, size) >> np.uint64(1)
    if marked is not None:
        marks = marked[binned].reshape(num_dates, size).astype(np.uint64)
        if marked.dtype == bool:
            priority |= marks << np.uint64(63)
        else:
            priority = priority >> np.uint64(1) | marks << np.uint64(62)
    chosen = priority.argmin(axis=1)
    chosen += np.arange(skip, binned.stop, size)
    pixels = read(chosen)
    if _may_have_nan(pixels) and (with_nan := _has_nan(pixels)).any():
        pixels, bin_dates = np.array(pixels), bins(stored, num_dates, skip)
        for i in np.flatnonzero(with_nan):
            chosen[i], pixels[i] = _without_nan(bin_dates[i][priority[i].argsort(kind="stable")], read)
    return chosen, pixels


def nearest_to_median(
    pixels: np.ndarray,
    mask: np.ndarray | None,
    num_dates: int,
    threshold: float,
    nodata: np.ndarray | None = None,
) -> np.ndarray:
    """Evaluation: (D,) indices for T > D dates, of each bin the date nearest to the bin's median image.

    ``pixels``: (T, C, H, W) raw. ``mask``: (T, M, H, W) or None. ``nodata``: (T, H, W) bool or None: pixels that are
    treated as NaN. The distance is the mean absolute difference to
    the per-pixel median over the bin's dates without NaN and marked pixels; dates with such a pixel are not selected.
    If every date of a bin has one, its marks are ignored; if all have NaN, the distance is the mean over the finite
    pixels. Of equal distances the first date is selected.
    """
    bin_dates = bins(len(pixels), num_dates)
    values = pixels[bin_dates].astype(np.float32)  # (D, n, C, H, W)
    if nodata is not None:
        values = np.where(nodata[bin_dates][:, :, None], np.float32(np.nan), values)
    if mask is not None:
        marked: np.ndarray = np.asarray((mask > threshold).any(axis=1))[bin_dates][
            :, :, None
        ]  # (D, n, 1, H, W)
        no_clear_date = (marked | np.isnan(values)).any(axis=(2, 3, 4)).all(axis=1)
        marked &= ~no_clear_date[:, None, None, None, None]
        values = np.where(marked, np.float32(np.nan), values)
    difference = np.abs(values - _nan_median(values)[:, None])
    distance = difference.mean(axis=(2, 3, 4))  # NaN where a date has one
    for i in np.flatnonzero(np.isnan(distance).all(axis=1)):
        finite = np.isfinite(difference[i])
        total = np.where(finite, difference[i], 0).sum(axis=(1, 2, 3))
        distance[i] = total / np.maximum(finite.sum(axis=(1, 2, 3)), 1)
        distance[i][~finite.any(axis=(1, 2, 3))] = np.inf
    distance = np.where(np.isnan(distance), np.inf, distance)
    return bin_dates[np.arange(num_dates), distance.argmin(axis=1)]


def fill_nan(
    pixels: np.ndarray,
    chosen: np.ndarray,
    whole: Callable[[], np.ndarray],
    nodata: np.ndarray | None = None,
) -> tuple[np.ndarray, int]:
    """Pixels (D, C, H, W) of dates ``chosen`` with NaN imputed, and how many dates had NaN.

    A NaN becomes the value of the nearest date in the series (the earlier of two) that is not NaN in this pixel; else
    the mean of its band over the series; else 0. ``whole``: returns the series (T, C, H, W), called only if needed.
    ``nodata``: of the series, (T, H, W) bool or None: pixels that are treated as NaN, also in integers.
    """
    if nodata is None and not _may_have_nan(pixels):
        return pixels, 0
    missing = _missing(pixels, None if nodata is None else nodata[chosen])
    if missing is None:
        return pixels, 0
    rows = np.flatnonzero(missing.reshape(len(missing), -1).any(axis=1))
    if not len(rows):
        return pixels, 0
    pixels, series = np.array(pixels), whole()
    absent = _missing(series, nodata)
    assert absent is not None  # of the same dtype as the pixels
    finite = ~absent
    # In double: a float32 sum over a whole series loses digits, and its value would depend on numpy's summation order.
    sums = np.where(finite, series, 0).sum(axis=(0, 2, 3), dtype=np.float64)
    means = sums / np.maximum(finite.sum(axis=(0, 2, 3)), 1)
    means = (means if pixels.dtype.kind == "f" else np.rint(means)).astype(pixels.dtype)
    for i in rows:
        order = np.abs(np.arange(len(series)) - chosen[i]).argsort(kind="stable")
        first = finite[order].argmax(axis=0)
        nearest = np.take_along_axis(series[order], first[None], axis=0)[0]
        known = np.take_along_axis(finite[order], first[None], axis=0)[0]
        nearest = np.where(known, nearest, means[:, None, None])
        pixels[i] = np.where(missing[i], nearest, pixels[i])
    return pixels, len(rows)


def _missing(pixels: np.ndarray, nodata: np.ndarray | None) -> np.ndarray | None:
    """Where values (T, C, H, W) are NaN or ``nodata`` (T, H, W); None where neither can be."""
    if pixels.dtype.kind != "f":
        return None if nodata is None else np.broadcast_to(nodata[:, None], pixels.shape)
    return np.isnan(pixels) if nodata is None else np.isnan(pixels) | nodata[:, None]


def _may_have_nan(pixels: np.ndarray) -> bool:
    """Whether any value is NaN, in one pass over the pixels and without an array of flags; nearly always none is."""
    return pixels.dtype.kind == "f" and math.isnan(np.minimum.reduce(pixels, axis=None))


def _has_nan(pixels: np.ndarray) -> np.ndarray:
    return np.isnan(pixels).reshape(len(pixels), -1).any(axis=1)


def _without_nan(candidates: np.ndarray, read: Callable[[np.ndarray], np.ndarray]) -> tuple[int, np.ndarray]:
    """The first candidate without NaN, and its pixels; the very first if all have some."""
    pixels = read(candidates)
    best = int(_has_nan(pixels).argmin())
    return int(candidates[best]), pixels[best]


def _nan_median(values: np.ndarray) -> np.ndarray:
    """Median over axis 1 without NaN, NaN where all are NaN. As np.nanmedian, which is several times slower."""
    ordered = np.sort(values, axis=1)  # NaN last
    count = (~np.isnan(ordered)).sum(axis=1, keepdims=True)
    low = np.take_along_axis(ordered, np.maximum(count - 1, 0) // 2, axis=1)
    high = np.take_along_axis(ordered, count // 2, axis=1)
    return ((low + high) / 2)[:, 0]
