"""Checks of stored values: pixels, masks, dates and class shares. The same for every writer and for ``verify``.

Each function returns the reason why an array is invalid, or None. In floating-point rasters NaN means "not measured":
it is stored, and filled in from other dates when it is read. Shapes and dtypes are checked before.
"""

from __future__ import annotations

import numpy as np

LARGEST = 1e20
"""Numbers from this on are fill values: GDAL writes 3.4e38, netCDF 9.97e36, climate models 1e20. No measurement is this
large."""

_YEARS = (1900, 2100)  # other years are written by programs that have no date (1, 1601, 1858, 9999)
_MAX_SHARE = 1.001  # shares are rounded in files, so that a sum of 1 may be stored as slightly more


class InvalidNote(str):
    """A note on values that nothing declares as nodata, of which a fault is more likely than a gap: strict writers stop
    at the first. ``example``: a value, and where it is."""

    example: str = ""


def chronological(dates: np.ndarray) -> np.ndarray | None:
    """(T,) indices that sort dates (T, 3) in time, equal ones in their order; None if they are sorted.

    The selection of dates cuts a series into bins of consecutive dates, which are periods only in this order.
    """
    order = np.lexsort(dates.T[::-1])
    return order if (np.diff(order) != 1).any() else None


def sorted_note(name: str) -> str:
    """The note on a series that was sorted."""
    return f"{name} is not in the order of time: sorted"


def extremes(array: np.ndarray) -> tuple[float, float]:
    """The lowest and the highest value; at least one of them is NaN if any value is NaN. Not for empty arrays.

    float16 has no vector instructions in numpy, so its bits are compared as integers: the order of positive numbers is
    that of their bits, NaN last, and the order of negative numbers is reversed.
    """
    if array.dtype != np.float16:
        return float(array.min()), float(array.max())
    signed, unsigned = array.view(np.int16), array.view(np.uint16)
    any_positive, any_negative = signed.max() >= 0, signed.min() < 0
    lowest = unsigned.max() if any_negative else unsigned.min()
    highest = signed.max() if any_positive else signed.min()
    return float(lowest.view(np.float16)), float(highest.view(np.float16))


def is_zero(array: np.ndarray) -> np.ndarray:
    """Where an array is 0; for float16 by its bits without the sign, see :func:`extremes`."""
    return (array.view(np.uint16) & 0x7FFF) == 0 if array.dtype == np.float16 else array == 0


def finite_extremes(array: np.ndarray) -> tuple[float, float]:
    """The lowest and the highest value of those that are not NaN; NaN if there are none."""
    lowest, highest = extremes(array)
    if array.dtype.kind == "f" and (np.isnan(lowest) or np.isnan(highest)):
        return float(np.fmin.reduce(array, axis=None)), float(np.fmax.reduce(array, axis=None))
    return lowest, highest


def array_problem(array: np.ndarray) -> str | None:
    """Why a stored raster is invalid: infinite values or fill values from :data:`LARGEST` on, or nothing but NaN."""
    if array.dtype.kind != "f" or not array.size:
        return None
    lowest, highest = extremes(array)
    if lowest > -LARGEST and highest < LARGEST:
        return None
    if np.isnan(array).all():
        return "is NaN in every pixel; leave the tile out"
    return numbers_problem(array)


def numbers_problem(array: np.ndarray) -> str | None:
    """Why floating-point values are not measurements: some are infinite or :data:`LARGEST`. NaN is "missing"."""
    bad = np.isinf(array) if array.dtype == np.float16 else np.abs(array) >= LARGEST
    if not bad.any():
        return None
    return (
        f"has {int(bad.sum())} values that are infinite or too large for a measurement, the first "
        f"{_first(array, bad)}; store NaN where nothing was measured"
    )


def is_nodata(marks: np.ndarray) -> np.ndarray:
    """Which pixels a mask band ``nodata`` marks; see ``spec.NODATA`` for others than 0 and 100."""
    found: np.ndarray = marks == 100
    return found


def has_percentages(marks: np.ndarray) -> bool:
    """Whether a mask band called ``nodata`` has values that are neither 0 nor 100."""
    return bool(((marks != 0) & (marks != 100)).any())


def marks_problem(marks: np.ndarray, array: np.ndarray) -> str | None:
    """Why the mask band ``nodata`` (T, H, W) of a raster (T, C, H, W) is invalid."""
    bad = (marks != 0) & (marks != 100)
    if bad.any():
        return f"has {int(bad.sum())} values in band nodata that are neither 0 nor 100, the first {_first(marks, bad)}"
    if marks.all():
        return "marks every pixel as nodata; leave the tile out"
    if array.dtype.kind == "f":
        unmarked = np.isnan(array).any(axis=1) & (marks == 0)
        if unmarked.any():
            where = ", ".join(map(str, np.argwhere(unmarked)[0].tolist()))
            return (
                f"does not mark {int(unmarked.sum())} pixels that are NaN as nodata, the first at ({where})"
            )
    return None


def mask_problem(mask: np.ndarray) -> str | None:
    """Why a mask (T, M, H, W) uint8 is not in percent."""
    if not mask.size or int(mask.max()) <= 100:
        return None
    return percent_problem(mask, mask > 100)


def percent_problem(mask: np.ndarray, bad: np.ndarray) -> str:
    """The reason why a mask is invalid at ``bad``."""
    what = "above 100 percent" if (mask[bad] > 100).all() else "outside of 0 to 100 percent"
    return f"has {int(bad.sum())} values {what}, the first {_first(mask, bad)}; use 0 to 100"


def dates_problem(dates: np.ndarray) -> str | None:
    """Why dates (T, 3) of (year, day of year, hour) are invalid or not in chronological order."""
    years, days, hours = dates.astype(np.int64).T
    leap = (years % 4 == 0) & ((years % 100 != 0) | (years % 400 == 0))
    bad = (years < 1) | (years > 9999) | (days < 1) | (days > 365 + leap) | (hours < 0) | (hours > 23)
    if bad.any():
        first = tuple(dates[int(bad.argmax())].tolist())
        return (
            f"has {int(bad.sum())} invalid dates, the first {first}; a date is year, day of year from 1, hour"
        )
    if chronological(dates) is not None:
        return "are not in the order of time; sort the images with their dates and masks"
    return None


def dates_note(dates: np.ndarray, name: str) -> str | None:
    """The note on dates (T, 3) of years in which there were no images, nor will be soon."""
    first, last = _YEARS
    odd = (dates[:, 0] < first) | (dates[:, 0] > last)
    if not odd.any():
        return None
    return f"{name} has dates before {first} or after {last}: stored as they are; check how missing dates are written"


def shares_problem(shares: np.ndarray) -> str | None:
    """Why the class shares (classes,) of a tile are not numbers from 0 to 1."""
    bad = ~((shares >= 0) & (shares <= _MAX_SHARE))
    if not bad.any():
        return None
    return f"has {int(bad.sum())} shares outside 0 to 1, the first {_first(shares, bad)}; give area shares"


def numpy_mask(array: object) -> np.ndarray | None:
    """Where a numpy masked array, or a list of them, is masked: bool of its shape; None where it is nowhere."""
    if isinstance(array, (list, tuple)):
        parts = [numpy_mask(a) for a in array]
        if all(p is None for p in parts):
            return None
        return np.stack(
            [np.zeros(np.shape(a), bool) if p is None else p for a, p in zip(array, parts, strict=True)]
        )
    if not isinstance(array, np.ma.MaskedArray) or not np.ma.is_masked(array):
        return None
    return np.ma.getmaskarray(array)


def masked_problem(array: object) -> str | None:
    """Why a numpy masked array cannot be stored where there is no place for its mask: nodata would become data."""
    bad = numpy_mask(array)
    if bad is None:
        return None
    first = ", ".join(str(int(i)) for i in np.argwhere(bad)[0])
    count = f"is a masked array with {int(bad.sum())} masked values, the first at ({first})"
    if np.asarray(array).dtype.kind == "f":
        return f"{count}; fill them with NaN: .filled(np.nan)"
    return f"{count}; fill them: .filled(value)"


def _first(array: np.ndarray, bad: np.ndarray) -> str:
    """The first invalid value and its index: ``inf at (0, 1, 2, 3)``."""
    index = tuple(np.argwhere(bad)[0].tolist())
    return f"{array[index].item():g} at ({', '.join(map(str, index))})"
