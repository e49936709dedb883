"""Metadata of FLAIR-HUB: reads its GeoPackages in bulk, without geometry, and lists the patches of a split."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maestro_scale.datasets import raw
from maestro_scale.datasets.spec import DatasetError

FOLDER = "GLOBAL_ALL_MTD"
SPLITS = "GLOBAL_ALL_MTD_SPLIT.gpkg"
_PHASES = {"train": "train", "val": "valid", "valid": "valid", "test": "test"}
_IN_TABLE = re.compile(r"(?:(?P<column>split_[A-Za-z0-9]+)_)?(?P<phase>train|val|valid|test)")
_BATCH_ROWS = 8192  # of 2 KB each where they hold dates


@dataclass(frozen=True)
class Listing:
    """The patches of a split, sorted, and the file that lists them."""

    keys: list[str]
    path: Path
    notes: tuple[str, ...] = ()


def list_split(src: Path, split: str, lists: Sequence[str], column: str, assumed: str = "") -> Listing:
    """The patches of ``split``, from the first CSV of ``lists`` that exists, or from the table of splits.

    ``lists``: file names. In the table, ``train``, ``val`` and ``test`` are those of ``column``, and
    ``split_2_train`` (of split_1 … split_5, split_flairchallenge) names another. ``assumed``: a note on
    the tiles of a split that is read from ``column`` without being named. DatasetError if there is no such split, or
    if it is empty.
    """
    import pyarrow.compute as pc

    for name in lists:
        if (src / name).is_file():
            return _checked(_from_csv(src / name), src / name)
    path = find(src, SPLITS)
    columns = columns_of(path) if path is not None else ()
    found = _IN_TABLE.fullmatch(split)
    wanted = (found["column"] or column) if found else ""
    if path is not None and found and wanted in columns:
        phase = _PHASES[found["phase"]]
        keys: list[str] = []
        with readable(path):
            for batch in batches(path, wanted):
                keys += map(str, batch["patch_id"].filter(pc.equal(batch[wanted], phase)).to_pylist())
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


def find(src: Path, name: str) -> Path | None:
    """A metadata file in its folder, or loose in ``src``."""
    return next((p for p in (src / FOLDER / name, src / name) if p.is_file()), None)


def columns_of(path: Path) -> tuple[str, ...]:
    """Names of a GeoPackage's columns."""
    import pyogrio

    with readable(path):
        return tuple(pyogrio.read_info(path)["fields"])


def batches(path: Path, column: str) -> Iterator[Any]:
    """Arrow batches of ``patch_id`` and ``column``; DatasetError if it cannot be read."""
    import pyogrio

    if "patch_id" not in columns_of(path):
        raise DatasetError(f"{path}: has no column 'patch_id'; fetch the file again")
    with readable(path):
        options = {"columns": ["patch_id", column], "read_geometry": False, "batch_size": _BATCH_ROWS}
        with pyogrio.open_arrow(path, use_pyarrow=True, **options) as (_, reader):
            yield from reader


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """DatasetError for what pyogrio and Arrow raise in the block: an unreadable file, or columns of another type."""
    import pyarrow as pa

    try:
        yield
    except (RuntimeError, OSError, pa.ArrowException) as error:  # pyogrio's errors are RuntimeErrors
        cause = " ".join(str(error).split())
        raise DatasetError(f"{path}: cannot be read ({cause}); fetch the file again") from error
