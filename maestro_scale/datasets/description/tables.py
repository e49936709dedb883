"""Tables with a row per tile or image: CSV, Parquet and the attributes of a GeoPackage."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maestro_scale.datasets import raw
from maestro_scale.datasets.sources import remote, webdataset_tars
from maestro_scale.datasets.sources.local_file import LocalFile
from maestro_scale.datasets.spec import DatasetError
from maestro_scale.errors import did_you_mean, shorten
from maestro_scale.untrusted.limits import Limits

_VECTOR = (".gpkg", ".geojson", ".shp")
_TABLE = Limits(bytes=512 * 2**20, entries=0)  # of CSV and text: a million rows of 20 columns take less
_SUFFIX = re.compile(r"\.[A-Za-z][A-Za-z0-9]{1,7}$")


@dataclass(frozen=True)
class Table:
    """Columns of a file by name, each as texts; an empty text is a missing value."""

    address: str
    columns: Mapping[str, Sequence[str]]

    @classmethod
    def read(cls, address: str, wanted: Sequence[str] | None = None) -> Table:
        """Read a table; DatasetError if it cannot be read, or lacks one of the ``wanted`` columns."""
        if address.endswith(".parquet"):
            columns = _parquet(address, wanted)
        elif address.endswith(_VECTOR):
            columns = _attributes(address)
        else:
            header, rows = raw.parse_csv(remote.read_document(address, _TABLE), address)
            columns = {name: [row[i].strip() for row in rows] for name, i in header.items()}
        table = cls(address, columns)
        for name in wanted or ():
            table.column(name)
        return table

    @classmethod
    def read_below(cls, src: str, file: str, key: str | None, columns: Sequence[str]) -> Table:
        """As :meth:`read`, of these columns of a file below ``src``, and of its keys (None: the first column).

        Also of tars in the layout of WebDataset: their samples are rows, with keys in the first column.
        """
        address = remote.join(src, file)
        if file.endswith(".tar"):
            others = [name for name in ([] if key is None else [key]) if name != webdataset_tars.KEY]
            return cls(address, webdataset_tars.read_table(file, src, [*others, *columns]))
        table = cls.read(address, None if key is None else [key, *columns])
        for name in columns:
            table.column(name)
        return table

    @property
    def first(self) -> str:
        """The name of the first column."""
        if not self.columns:
            raise DatasetError(f"{self.address}: has no columns; it needs a first line with their names")
        return next(iter(self.columns))

    def column(self, name: str | None) -> Sequence[str]:
        """A column; None: the first. DatasetError if there is none of this name."""
        name = self.first if name is None else name
        if name not in self.columns:
            raise DatasetError(f"{self.address}: has no column {name!r}{did_you_mean(name, self.columns)}")
        return self.columns[name]

    def rows_by_key(self, key: str | None) -> dict[str, list[int]]:
        """Indices of the rows of each key, in order."""
        rows: dict[str, list[int]] = {}
        for i, text in enumerate(self.column(key)):
            rows.setdefault(text, []).append(i)
        return rows


class KeyedRows:
    """The rows of a table by tile key, where a row may name a file of the tile instead: ``tiles/a_3.tif`` is a_3."""

    def __init__(self, table: Table, key: str | None, wanted: Sequence[str]) -> None:
        """``wanted``: the keys that are looked up. DatasetError if the table has none of them."""
        self._table = table
        self._rows = table.rows_by_key(key)
        column = table.first if key is None else key
        if wanted and not any(k in self._rows for k in wanted):
            by_stem = {stem(text): rows for text, rows in self._rows.items()}
            if not any(k in by_stem for k in wanted):
                there = f"it holds {shorten(next(iter(self._rows)))}" if self._rows else "it is empty"
                raise DatasetError(
                    f"{table.address}: column {column!r} has none of the {len(wanted)} tiles, first "
                    f"{shorten(wanted[0])}; {there}; name the column with the keys, or fix the pattern of the files"
                )
            self._rows = by_stem

    def rows(self, key: str) -> list[int]:
        """Indices of the rows of ``key``, in order; empty if there are none."""
        return self._rows.get(key, [])


def stem(text: str) -> str:
    """The name of a file without folders and suffixes; other text as it is."""
    name = text.rstrip("/").rpartition("/")[2]
    while (shorter := _SUFFIX.sub("", name)) and shorter != name:
        name = shorter
    return name


def read_lines(address: str) -> list[str]:
    """The lines of a text file that are not empty; DatasetError if it cannot be read."""
    try:
        text = remote.read_document(address, _TABLE).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{address}: is not text ({error}); fetch it again") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def is_there(address: str) -> bool:
    """Whether a file of a table is there."""
    if not remote.is_remote(address):
        return os.path.isfile(remote.local_path(address))
    try:
        remote.open_binary(address).close()
    except DatasetError:
        return False
    return True


def _parquet(address: str, wanted: Sequence[str] | None) -> dict[str, list[str]]:
    import pyarrow.parquet as parquet
    from pyarrow import ArrowException

    try:
        with remote.open_binary(address) as opened:
            file = parquet.ParquetFile(opened)
            every = file.schema_arrow.names
            columns = file.read(
                columns=[n for n in every if wanted is None or n in wanted] or every
            ).to_pydict()
    except (OSError, ArrowException, ValueError) as error:
        raise DatasetError(f"{address}: cannot be read ({error}); fetch the file again") from error
    return {name: [_text(v) for v in values] for name, values in columns.items()}


def _attributes(address: str) -> dict[str, list[str]]:
    import pyogrio

    from maestro_scale.datasets.description.vectors import driver_of

    file = LocalFile(address)
    driver_of(file)  # of a format that names no other files
    try:
        meta, _, _, values = pyogrio.raw.read(file.path, read_geometry=False)
    except (RuntimeError, ValueError, OSError) as error:  # pyogrio's errors are RuntimeErrors
        raise raw.read_error(Path(address), error) from error
    return {
        str(name): [_text(v) for v in column.tolist()]
        for name, column in zip(meta["fields"], values, strict=True)
    }


def _text(value: Any) -> str:
    if value is None or value != value:  # NaN stands for a missing value
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # columns of integers with missing values are floats
    return str(value)
