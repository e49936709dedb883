"""Splits and acquisition dates of PASTIS-HD, from ``metadata.geojson`` and CSV files.

Split names: ``fold_1`` … ``fold_5``; ``train``, ``val``, ``test``, which are folds 1–3, 4 and 5 unless there is a CSV
of that name; ``train_rotation_K``, ``val_rotation_K``, ``test_rotation_K`` for K in 1–5, in which each fold is the test
split once: rotation 1 is as above; in rotation 2 folds 2–4 train, 5 validates and 1 tests.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from maestro_scale import untrusted
from maestro_scale.datasets import raw
from maestro_scale.datasets.spec import DatasetError

METADATA = "metadata.geojson"
NUM_FOLDS = 5
DATE_COLUMNS = ("dates-S2", "dates-S1A", "dates-S1D")
_ROLES = {"train": (0, 1, 2), "val": (3,), "test": (4,)}  # folds in rotation 1, from 0
_SPLIT = re.compile(r"fold_(?P<fold>[1-5])|(?P<role>train|val|test)(_rotation_(?P<rotation>[1-5]))?")


@dataclass(frozen=True)
class Entry:
    """A tile's row in the metadata. ``dates``: column → JSON object, index in the series → YYYYMMDD."""

    fold: int | None
    dates: Mapping[str, str]


Entries = dict[str, Entry]


def folds_of(split: str) -> tuple[int, ...] | None:
    """The folds (from 1) of a split; None if the split is not made of folds."""
    match = _SPLIT.fullmatch(split)
    if match is None:
        return None
    if match["fold"]:
        return (int(match["fold"]),)
    shift = int(match["rotation"] or 1) - 1
    return tuple((fold + shift) % NUM_FOLDS + 1 for fold in _ROLES[match["role"]])


def read_metadata(src: Path, date_columns: Sequence[str] = DATE_COLUMNS) -> Entries:
    """{tile id: entry}, read in one pass; DatasetError if the file cannot be read or lacks one of ``date_columns``."""
    import pyogrio

    path = src / METADATA
    if METADATA not in raw.list_folder(src):
        raise DatasetError(f"{path}: is missing, and with it folds and dates; fetch it, or check the path")
    try:
        meta, _, _, values = pyogrio.raw.read(path, read_geometry=False)
    except (RuntimeError, ValueError, OSError) as error:  # pyogrio's errors are RuntimeErrors
        raise DatasetError(
            f"{path}: cannot be read ({' '.join(str(error).split())}); fetch it again"
        ) from error
    columns = dict(zip(meta["fields"], values, strict=True))
    # ID_PATCH first: files that were written again by other tools have row numbers in "id".
    key = "ID_PATCH" if "ID_PATCH" in columns else "id"
    missing = [name for name in (key, *date_columns) if name not in columns]
    if missing:
        raise DatasetError(
            f"{path}: has no column {missing[0]!r} but {', '.join(columns)}; fetch the file again"
        )
    folds = columns.get("Fold", [None] * len(columns[key]))
    entries: Entries = {}
    for i, (name, fold) in enumerate(zip(columns[key], folds, strict=True)):
        tile = _tile_id(name)
        if tile in entries:
            raise DatasetError(f"{path}: has two rows with {key} {tile!r}; fetch the file again")
        entries[tile] = Entry(_fold(fold), {column: columns[column][i] for column in date_columns})
    return entries


def names(src: Path, split: str, entries: Entries) -> tuple[Path, list[str]]:
    """The file that lists a split, and its tile ids; DatasetError if there is no such split, or it is empty."""
    top = raw.list_folder(src)
    if f"{split}.csv" in top:
        listing, found = src / f"{split}.csv", _from_csv(src / f"{split}.csv")
    else:
        listing, folds = src / METADATA, folds_of(split)
        if folds is None:
            csvs = [n[:-4] for n in sorted(top) if n.endswith(".csv")]
            known = ["train", "val", "test", "fold_1 … fold_5", "train_rotation_1 …", *csvs]
            raise DatasetError(f"{src}: has no split {split!r}; splits: {', '.join(dict.fromkeys(known))}")
        found = [name for name, entry in entries.items() if entry.fold in folds]
    if not found:
        raise DatasetError(f"{listing}: split {split} is empty; fetch the file again or choose another split")
    if len(set(found)) < len(found):
        raise DatasetError(f"{listing}: names {len(found) - len(set(found))} tiles twice; remove the repeats")
    return listing, found


def dates(src: Path, entries: Entries, key: str, column: str) -> np.ndarray:
    """(T, 3) int16 dates of a tile's series, in the order of the file; DatasetError where there are none."""
    path = src / METADATA
    if key not in entries:
        raise DatasetError(f"{path}: has no tile {key}; fetch the file again", "no metadata")
    where = f"{path}: tile {key}, {column}"
    try:
        listed = untrusted.load_json(entries[key].dates[column] or "{}")
        if not isinstance(listed, dict):
            raise ValueError(f"but {type(listed).__name__}")
        days = [str(listed[i]) for i in sorted(listed, key=int)]
    except (ValueError, TypeError) as error:
        raise DatasetError(
            f"{where}: is not an object of dates ({error}); fetch the file again", "no dates"
        ) from error
    if not days:
        raise DatasetError(f"{where}: is empty, so the tile has no dates; fetch the file again", "no dates")
    return raw.calendar_dates(days, where)


def _tile_id(value: object) -> str:
    # A column of integers with missing values is read as floats: 10000.0.
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _fold(value: object) -> int | None:
    try:
        return int(value)  # type: ignore[call-overload]
    except (TypeError, ValueError, OverflowError):  # null, or NaN in a column of floats
        return None


def _from_csv(path: Path) -> list[str]:
    columns, rows = raw.read_csv(path)
    if "image" not in columns:
        raise DatasetError(f"{path}: has no column 'image' but {', '.join(columns)}; fetch the file again")
    return [row[columns["image"]].strip() for row in rows]
