"""Acquisition dates of FLAIR-HUB: gigabytes of JSON in GeoPackages, parsed in batches and kept as two bytes a date."""

from __future__ import annotations

import bisect
import hashlib
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maestro_scale import untrusted
from maestro_scale.datasets import raw
from maestro_scale.datasets.flair_hub.metadata import FOLDER, batches, columns_of, find, readable
from maestro_scale.datasets.spec import DatasetError

_EPOCH = np.datetime64("1900-01-01", "D")  # two bytes count days from here to 2079
_FIRST_STAMP, _NO_DAY = 19_000_101, 65_535
_POWERS = 10 ** np.arange(7, -1, -1, dtype=np.int32)
_ZERO, _DATE = ord("0"), ord("#")


class Dates:
    """Acquisition dates of one sensor for the patches ``keys`` (sorted).

    Neighbouring patches mostly share their dates, so each distinct series is stored once: the object is pickled to
    every writer process.
    """

    def __init__(self, path: Path, keys: list[str], series: _SeriesTable) -> None:
        self._path, self._keys, self._series = path, keys, series

    @classmethod
    def load(cls, src: Path, sensor: str, keys: list[str]) -> Dates:
        """From ``GLOBAL_{sensor}_MTD_DATES.gpkg``; DatasetError if it is missing or malformed."""
        name = f"GLOBAL_{sensor}_MTD_DATES.gpkg"
        path = find(src, name)
        if path is None:
            raise DatasetError(f"{src / FOLDER / name}: is missing; fetch it, only this file has the dates")
        columns = columns_of(path)
        column = next((c for c in ("acquisition_dates", "date") if c in columns), None)
        if column is None:
            raise DatasetError(
                f"{path}: has neither column 'acquisition_dates' nor 'date' but {', '.join(columns)}; "
                "fetch the file again"
            )
        with readable(path):
            return cls(path, keys, _load(path, column, keys))

    def of(self, key: str, notes: list[str]) -> np.ndarray:
        """(T, 3) int16 of patch ``key``, in the order of the file; appends assumptions to ``notes``.

        DatasetError if it has none, KeyError if the split has no such patch.
        """
        row = bisect.bisect_left(self._keys, key)
        if row == len(self._keys) or self._keys[row] != key:
            raise KeyError(key)
        number = int(self._series.series_of_patch[row])
        if number < 0:
            raise DatasetError(
                f"{self._path}: has no dates for {key}; fetch the file again, or leave the tile out",
                "no dates",
            )
        if number in self._series.problems:
            problem = self._series.problems[number]
            raise DatasetError(f"{self._path}: {key} has {problem}; fix the file", "dates do not fit")
        start, stop = self._series.starts[number : number + 2]
        if start == stop:
            raise DatasetError(f"{self._path}: lists no date for {key}; leave the tile out", "no dates")
        if number in self._series.years:
            notes.append(f"{self._path.stem} has a year alone: the first of July is taken")
        return raw.day_dates(_EPOCH + self._series.days[start:stop].astype(np.int64))


class _SeriesTable(NamedTuple):
    """Distinct series of dates; series i is ``days[starts[i]:starts[i + 1]]``."""

    series_of_patch: np.ndarray  # (patches,) int32 number of the series; -1: the patch has none
    days: np.ndarray  # uint16 days since _EPOCH
    starts: np.ndarray  # (series + 1,) int64
    problems: dict[int, str]
    years: frozenset[int]  # series of which only a year was given


def _load(path: Path, column: str, keys: list[str]) -> _SeriesTable:
    import pyarrow as pa
    import pyarrow.compute as pc

    row_of = {key: row for row, key in enumerate(keys)}
    series_of_patch = np.full(len(keys), -1, np.int32)
    numbers: dict[bytes, int] = {}
    days, counts = [np.empty(0, np.uint16)], [np.zeros(1, np.int64)]
    problems: dict[int, str] = {}
    years: set[int] = set()
    for batch in batches(path, column):
        rows = pa.array([row_of.get(key) for key in batch["patch_id"].to_pylist()], pa.int64())
        texts = pc.cast(batch[column], pa.large_string())
        used = pc.and_(pc.is_valid(rows), pc.is_valid(texts))
        rows, coded = rows.filter(used), texts.filter(used).dictionary_encode()
        digests = [_digest(text) for text in coded.dictionary]
        new = [i for i, digest in enumerate(digests) if digest not in numbers]
        first = len(numbers)
        numbers |= {digests[i]: first + n for n, i in enumerate(new)}
        parsed = _parse(coded.dictionary.take(pa.array(new, pa.int64())), first)
        days.append(parsed.days)
        counts.append(parsed.counts)
        problems |= parsed.problems
        years |= parsed.years
        number_of = np.array([numbers[digest] for digest in digests], np.int32)
        series_of_patch[np.asarray(rows)] = number_of[np.asarray(coded.indices)]
    starts = np.cumsum(np.concatenate(counts))
    return _SeriesTable(series_of_patch, np.concatenate(days), starts, problems, frozenset(years))


def _digest(text: Any) -> bytes:
    return hashlib.blake2b(text.as_buffer(), digest_size=16).digest()


class _Parsed(NamedTuple):
    """Series of one batch; ``problems`` and ``years`` by the number of the series."""

    days: np.ndarray
    counts: np.ndarray
    problems: dict[int, str]
    years: set[int]


def _parse(texts: Any, first: int) -> _Parsed:
    """``texts``: a large-string array of JSON objects, JSON lists or single dates, numbered from ``first``."""
    series: list[np.ndarray] = []
    problems: dict[int, str] = {}
    years: set[int] = set()
    for i, stamps_of_one in enumerate(_parse_usual(texts)):
        if stamps_of_one is None:
            text = texts[i].as_py()
            try:
                stamps_of_one, is_year = _parse_any(text)
                years |= {first + i} if is_year else set()
            except (ValueError, TypeError, AttributeError, OverflowError):
                stamps_of_one = np.empty(0, np.int32)
                problems[first + i] = f"{text[:40]!r} where dates are expected"
        series.append(stamps_of_one)
    counts = np.array([len(s) for s in series], np.int64)
    stamps = np.concatenate([np.empty(0, np.int32), *series])
    days, valid = _days_since_epoch(stamps)
    for position in np.flatnonzero(~valid):
        number = first + int(np.searchsorted(np.cumsum(counts), position, side="right"))
        problems.setdefault(number, f"the date {stamps[position]}, which is not in the calendar")
    return _Parsed(days, counts, problems, years)


def _parse_usual(texts: Any) -> list[np.ndarray | None]:
    """YYYYMMDD of every text like ``{"1": 20190103, "2": …}``; None for texts of another form.

    All texts of this form with equal length have their digits at equal positions, so numpy parses them together;
    a JSON parser would take minutes for the hundreds of thousands of texts of a file.
    """
    _, offsets, data = texts.buffers()
    ends = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    buffer = np.frombuffer(data or b"", np.uint8)
    series: list[np.ndarray | None] = [None] * len(texts)
    lengths = np.diff(ends)
    for length in np.unique(lengths):
        template = _template(int(length))
        if template is None:
            continue
        alike = np.flatnonzero(lengths == length)
        rows = np.stack([buffer[start : start + length] for start in ends[alike]])
        unlike = rows != template
        places = np.flatnonzero(template == _DATE)
        digits = rows[:, places] - np.uint8(_ZERO)
        unlike[:, places] = digits > 9
        values = digits.reshape(len(rows), -1, 8).astype(np.int32) @ _POWERS
        for i in np.flatnonzero(~unlike.any(axis=1)):
            series[alike[i]] = values[i]
    return series


@cache
def _template(length: int) -> np.ndarray | None:
    """``{"1": ########, "2": …}`` of this length as bytes, with # for the digits; None if no such text has it."""
    for num_dates in range(1, length // len('"1": ########') + 1):
        entries = (f'"{i}": ########' for i in range(1, num_dates + 1))
        text = "{" + ", ".join(entries) + "}"
        if len(text) == length:
            return np.frombuffer(text.encode(), np.uint8)
    return None


def _parse_any(text: str) -> tuple[np.ndarray, bool]:
    """YYYYMMDD of ``{"2": …, "1": …}`` (by number), ``[…]`` or a single date; and whether it is only a year."""
    if text.startswith("{"):
        entries = untrusted.load_json(text)
        return np.array([int(entries[name]) for name in sorted(entries, key=int)], np.int32), False
    if text.startswith("["):
        return np.array([int(day) for day in untrusted.load_json(text)], np.int32), False
    digits = text.replace("-", "").removesuffix(".0")[:8]
    if len(digits) == 4:
        return np.array([int(digits) * 10_000 + 701], np.int32), True
    return np.array([int(digits)], np.int32), False


def _days_since_epoch(stamps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint16 days of YYYYMMDD, and whether each is in the calendar (from 1900 to 2078)."""
    table = _calendar()
    index = np.clip(
        stamps - _FIRST_STAMP, -1, len(table) - 1
    )  # the last entry of the table is not a day either
    days = table[index]
    return days, days != _NO_DAY


@cache
def _calendar() -> np.ndarray:
    """uint16 days since _EPOCH by YYYYMMDD - _FIRST_STAMP, _NO_DAY between the days."""
    days = np.arange(_EPOCH, np.datetime64("2079-01-01", "D"))
    stamps = np.char.replace(days.astype("U10"), "-", "").astype(np.int64)
    table = np.full(stamps[-1] - _FIRST_STAMP + 2, _NO_DAY, np.uint16)
    table[stamps - _FIRST_STAMP] = np.arange(len(days))
    return table
