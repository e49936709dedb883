"""FLAIR-HUB's metadata: which patches a split has, and when each was acquired, read once and in bulk."""

from __future__ import annotations

import bisect
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maestro_scale.datasets import raw
from maestro_scale.datasets.spec import DatasetError

FOLDER = "GLOBAL_ALL_MTD"
SPLITS = "GLOBAL_ALL_MTD_SPLIT.gpkg"
_PHASES = {"train": "train", "val": "valid", "valid": "valid", "test": "test"}
_IN_TABLE = re.compile(r"(?:(?P<column>split_[A-Za-z0-9]+)_)?(?P<phase>train|val|valid|test)")
_ORDERED = [str(i) for i in range(1, 1001)]


@dataclass(frozen=True)
class Listing:
    """The patches of a split, sorted, and the file that lists them."""

    keys: list[str]
    path: Path
    notes: tuple[str, ...] = ()


def list_split(src: Path, split: str, lists: Sequence[str], column: str, assumed: str = "") -> Listing:
    """The patches of ``split``: of the first CSV of ``lists`` that is there, or of the table of splits.

    ``lists``: file names. In the table, ``train``, ``val`` and ``test`` are those of ``column``, and
    ``split_2_train`` (of split_1 … split_5, split_flairchallenge) names another. ``assumed``: a note on the
    tiles of a split that is taken from ``column`` unnamed. DatasetError if there is none, or it is empty.
    """
    import pyarrow.compute as pc

    for name in lists:
        if (src / name).is_file():
            return _checked(_from_csv(src / name), src / name)
    path = _find(src, SPLITS)
    columns = _columns(path) if path is not None else ()
    found = _IN_TABLE.fullmatch(split)
    wanted = (found["column"] or column) if found else ""
    if path is not None and found and wanted in columns:
        table = _read(path, wanted)
        phase = _PHASES[found["phase"]]
        keys = table["patch_id"].filter(pc.equal(table[wanted], phase)).to_pylist()
        return _checked(keys, path, () if found["column"] or not assumed else (assumed,))
    there = sorted(p.stem for p in src.glob("*.csv"))
    there += [
        f"{name}_{phase}"
        for name in columns
        if name.startswith("split_")
        for phase in ("train", "val", "test")
    ]
    raise DatasetError(
        f"{src}: has no split {split!r} ({lists[0]}, or in {FOLDER}/{SPLITS}); "
        f"splits found: {', '.join(there) or 'none'}"
    )


def _from_csv(path: Path) -> list[str]:
    columns, rows = raw.read_csv(path)
    if "patch_id" not in columns:
        raise DatasetError(f"{path}: has no column 'patch_id' but {', '.join(columns)}; fetch the file again")
    return [row[columns["patch_id"]].strip() for row in rows]


def _checked(keys: list[str], path: Path, notes: tuple[str, ...] = ()) -> Listing:
    if not keys:
        raise DatasetError(f"{path}: the split is empty; fetch the file again or choose another split")
    if len(set(keys)) < len(keys):
        raise DatasetError(f"{path}: names {len(keys) - len(set(keys))} tiles twice; remove the repeats")
    return Listing(sorted(keys), path, notes)


def _find(src: Path, name: str) -> Path | None:
    """A metadata file in its folder, or loose in ``src``."""
    return next((p for p in (src / FOLDER / name, src / name) if p.is_file()), None)


def _columns(path: Path) -> tuple[str, ...]:
    """Names of a GeoPackage's columns."""
    import pyogrio

    with _readable(path):
        return tuple(pyogrio.read_info(path)["fields"])


def _read(path: Path, column: str) -> Any:
    """An Arrow table of ``patch_id`` and ``column``; geometry is not read."""
    import pyogrio

    with _readable(path):
        _, table = pyogrio.read_arrow(path, columns=["patch_id", column], read_geometry=False)
    if "patch_id" not in table.column_names:
        raise DatasetError(f"{path}: has no column 'patch_id'; fetch the file again")
    return table


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    from pyogrio.errors import DataLayerError, DataSourceError

    try:
        yield
    except (DataSourceError, DataLayerError, RuntimeError, OSError) as error:
        cause = " ".join(str(error).split())
        raise DatasetError(f"{path}: cannot be read ({cause}); fetch the file again") from error


class Dates:
    """When the patches ``keys`` (sorted) were acquired by one sensor.

    Neighbours mostly share their dates, so each series is kept once, two bytes a date: writer processes are
    sent this.
    """

    def __init__(self, path: Path, keys: list[str], series: _Series, series_of: np.ndarray) -> None:
        self._path, self._keys, self._series, self._series_of = path, keys, series, series_of

    @classmethod
    def load(cls, src: Path, sensor: str, keys: list[str]) -> Dates:
        """From ``GLOBAL_{sensor}_MTD_DATES.gpkg``; DatasetError if it is missing or malformed."""
        name = f"GLOBAL_{sensor}_MTD_DATES.gpkg"
        path = _find(src, name)
        if path is None:
            raise DatasetError(f"{src / FOLDER / name}: is missing; fetch it, dates are nowhere else")
        columns = _columns(path)
        for column in ("acquisition_dates", "date"):
            if column in columns:
                return cls(path, keys, *_load(path, column, keys))
        raise DatasetError(
            f"{path}: has neither column 'acquisition_dates' nor 'date' but {', '.join(columns)}; "
            "fetch the file again"
        )

    def of(self, key: str, notes: list[str]) -> np.ndarray:
        """(T, 3) int16 of patch ``key``, in the order of the file; appends what was assumed to ``notes``.

        DatasetError if it has none, KeyError if the split has no such patch.
        """
        row = bisect.bisect_left(self._keys, key)
        if row == len(self._keys) or self._keys[row] != key:
            raise KeyError(key)
        number = int(self._series_of[row])
        if number < 0:
            raise DatasetError(
                f"{self._path}: has no dates for {key}; fetch the file again, or leave the tile out",
                "no dates",
            )
        problem = self._series.problems.get(number)
        if problem:
            raise DatasetError(f"{self._path}: {key} has {problem}; mend the file", "dates do not fit")
        dates = self._series.dates(number)
        if len(dates) == 0:
            raise DatasetError(f"{self._path}: lists no date for {key}; leave the tile out", "no dates")
        if number in self._series.years:
            notes.append(f"{self._path.stem} has a year alone: the first of July is taken")
        return dates


@dataclass(frozen=True)
class _Series:
    """Different series of dates: number i is ``calendar[days[starts[i]:starts[i + 1]]]``."""

    calendar: np.ndarray  # (U, 3) int16, every day that occurs
    days: np.ndarray  # uint16 index into it
    starts: np.ndarray
    problems: dict[int, str]
    years: frozenset[int]

    def dates(self, number: int) -> np.ndarray:
        """(T, 3) int16."""
        return self.calendar[self.days[self.starts[number] : self.starts[number + 1]]]


def _load(path: Path, column: str, keys: list[str]) -> tuple[_Series, np.ndarray]:
    import pyarrow as pa
    import pyarrow.compute as pc

    table = _read(path, column)
    rows = pc.index_in(pa.array(keys, table["patch_id"].type), value_set=table["patch_id"].combine_chunks())
    texts = pc.cast(table[column].combine_chunks().take(rows), pa.large_string())
    coded = texts.dictionary_encode()
    series_of = np.asarray(pc.fill_null(coded.indices, -1), np.int32)
    return _parse(coded.dictionary), series_of


def _parse(texts: Any) -> _Series:
    """``texts``: an Arrow array of different dates, each a JSON object, a JSON list or one date."""
    days: list[np.ndarray] = []
    counts, problems, years = [], {}, set()
    for number, text in enumerate(texts):
        try:
            found, is_year = _days(text.as_py())
        except (ValueError, TypeError, AttributeError):
            problems[number] = f"{text.as_py()[:40]!r} where dates are expected"
            found, is_year = [], False
        if is_year:
            years.add(number)
        days.append(np.array(found, np.int32))
        counts.append(len(found))
    starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    every, index = np.unique(np.concatenate([np.empty(0, np.int32), *days]), return_inverse=True)
    calendar = np.zeros((len(every), 3), np.int16)
    for i, day in enumerate(every):
        try:
            calendar[i] = raw.calendar_dates([str(day)], "")[0]
        except DatasetError:
            for position in np.flatnonzero(index == i):
                number = int(np.searchsorted(starts, position, side="right")) - 1
                problems[number] = f"the date {day}, which is not in the calendar"
    return _Series(calendar, index.astype(np.uint16), starts, problems, frozenset(years))


def _days(text: str) -> tuple[list[int], bool]:
    """The dates YYYYMMDD of ``{"1": 20190103, …}`` (by number), ``[…]`` or a single date; and is it a year?"""
    if text.startswith("{"):
        entries = json.loads(text)
        values = list(entries.values())
        if list(entries) != _ORDERED[: len(entries)]:
            values = [entries[name] for name in sorted(entries, key=int)]
        return list(map(int, values)), False
    if text.startswith("["):
        return list(map(int, json.loads(text))), False
    digits = text.replace("-", "").removesuffix(".0")[:8]
    if len(digits) == 4:
        return [int(digits) * 10_000 + 701], True
    return [int(digits)], False
