"""Checks of stored values: pixels, masks, dates and class shares. The same for every writer and for ``verify``.

Each function returns the reason why an array is invalid, or None. In floating-point rasters NaN means "not measured":
it is stored, and filled in from other dates when it is read. Shapes and dtypes are checked before.
"""

from __future__ import annotations

import numpy as np

LARGEST = 1e30
"""Numbers beyond this are fill values: GDAL writes 3.4e38, netCDF 9.97e36. No measured quantity is this large."""

_MAX_SHARE = 1.001  # shares are rounded in files, so that a sum of 1 may be stored as slightly more


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


def array_problem(array: np.ndarray) -> str | None:
    """Why a stored raster is invalid: infinite values or fill values beyond :data:`LARGEST`, or nothing but NaN."""
    if array.dtype.kind != "f" or not array.size:
        return None
    lowest, highest = extremes(array)
    if lowest > -LARGEST and highest < LARGEST:
        return None
    if np.isnan(array).all():
        return "is NaN in every pixel; leave the tile out"
    return numbers_problem(array)


def numbers_problem(array: np.ndarray) -> str | None:
    """Why floating-point values are not measurements: some are infinite or beyond :data:`LARGEST`. NaN is "missing"."""
    bad = np.isinf(array) if array.dtype == np.float16 else np.abs(array) >= LARGEST
    if not bad.any():
        return None
    return (
        f"has {int(bad.sum())} values that are infinite or too large for a measurement, the first "
        f"{_first(array, bad)}; store NaN where nothing was measured"
    )


def mask_problem(mask: np.ndarray) -> str | None:
    """Why a mask (T, M, H, W) uint8 is not in percent."""
    if not mask.size or int(mask.max()) <= 100:
        return None
    bad = mask > 100
    return f"has {int(bad.sum())} values above 100 percent, the first {_first(mask, bad)}; use 0 to 100"


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


def shares_problem(shares: np.ndarray) -> str | None:
    """Why the class shares (classes,) of a tile are not numbers from 0 to 1."""
    bad = ~((shares >= 0) & (shares <= _MAX_SHARE))
    if not bad.any():
        return None
    return f"has {int(bad.sum())} shares outside 0 to 1, the first {_first(shares, bad)}; give area shares"


def masked_problem(array: object) -> str | None:
    """Why a numpy masked array cannot be stored: the format has no place for its mask, so nodata would become data."""
    if isinstance(array, (list, tuple)):
        return next((p for p in map(masked_problem, array) if p is not None), None)
    if not isinstance(array, np.ma.MaskedArray) or not np.ma.is_masked(array):
        return None
    bad = np.ma.getmaskarray(array)
    first = ", ".join(str(int(i)) for i in np.argwhere(bad)[0])
    cure = "fill them with NaN: .filled(np.nan)" if array.dtype.kind == "f" else "fill them: .filled(value)"
    return f"is a masked array with {int(bad.sum())} masked values, the first at ({first}); {cure}"


def _first(array: np.ndarray, bad: np.ndarray) -> str:
    """The first invalid value and its index: ``inf at (0, 1, 2, 3)``."""
    index = tuple(np.argwhere(bad)[0].tolist())
    return f"{array[index].item():g} at ({', '.join(map(str, index))})"
