"""Dates from the coordinates of a file."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from maestro_scale.datasets.description.patterns import parse_date_text
from maestro_scale.datasets.sources.protocol import Date
from maestro_scale.datasets.spec import DatasetError
from maestro_scale.errors import shorten

NO_DATE = "a date cannot be read"
"""Kind of the DatasetError for a date that cannot be read."""

_SINCE = re.compile(r"\w+ since ")


def read_dates(
    values: np.ndarray,
    attribute: Callable[[str], Any],
    format: str | None,
    part: int | None,
    where: str,
) -> list[Date]:
    """Dates of a coordinate: times of numpy, numbers with CF's ``units``, YYYYMMDD, or texts (also product names).

    DatasetError with the number of those that cannot be read, and the first.
    """
    units = attribute("units")
    if values.dtype.kind in "iuf" and isinstance(units, str) and _SINCE.match(units):
        values = _since(values, units, attribute("calendar"), where)
    if values.dtype.kind == "M":
        return _from_stamps(values, where)
    if values.dtype.kind in "iuf":
        if not np.all(np.isfinite(values)) or np.any(values % 1):
            raise DatasetError(f"{where}: has numbers without units, which are no dates", NO_DATE)
        texts = [str(int(v)) for v in values.tolist()]
    else:
        texts = [text_of(v) for v in values.tolist()]
    dates: list[Date] = []
    first: DatasetError | None = None
    for text in texts:
        try:
            dates.append(parse_date_text(text, format, part, where))
        except DatasetError as error:
            first = first or error
    if first is not None:
        count = len(texts) - len(dates)
        more = f" ({count} of {len(texts)} dates)" if len(texts) > 1 else ""
        raise DatasetError(f"{first}{more}", NO_DATE)
    return dates


def _since(values: np.ndarray, units: str, calendar: Any, where: str) -> np.ndarray:
    import xarray

    attributes = {"units": units, **({"calendar": str(calendar)} if calendar else {})}
    try:
        coded = xarray.Dataset({"t": (("n",), values, attributes)})
        times = xarray.decode_cf(coded)["t"].to_numpy()
    except (ValueError, OverflowError, TypeError, ImportError, KeyError) as error:
        cause = " ".join(str(error).split())
        raise DatasetError(
            f"{where}: times in {shorten(units)} cannot be read ({shorten(cause, 200)})", NO_DATE
        ) from error
    if times.dtype.kind != "M":
        raise DatasetError(
            f"{where}: times are in the calendar {shorten(calendar)}, which has other days", NO_DATE
        )
    return times


def _from_stamps(values: np.ndarray, where: str) -> list[Date]:
    hours = values.astype("datetime64[h]")
    if bad := int(np.isnat(hours).sum()):
        first = int(np.isnat(hours).argmax())
        raise DatasetError(f"{where}: has {bad} missing dates, the first at index {first}", NO_DATE)
    days, years = hours.astype("datetime64[D]"), hours.astype("datetime64[Y]")
    number = years.astype(np.int64) + 1970
    if len(number) and (number.min() < 1 or number.max() > 9999):
        raise DatasetError(f"{where}: has dates outside of the years 1 to 9999", NO_DATE)
    day = (days - years.astype("datetime64[D]")).astype(np.int64) + 1
    hour = (hours - days).astype(np.int64)
    return list(zip(number.tolist(), day.tolist(), hour.tolist(), strict=True))


def text_of(value: Any) -> str:
    """A text, or a number as text."""
    return value.decode("utf-8", "replace").rstrip("\0") if isinstance(value, bytes) else str(value)
