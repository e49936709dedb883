"""Parquet: a tile per row, its images as the bytes of GeoTIFF, PNG or JPEG 2000 files, as in Major TOM.

``variable`` is the column with the bytes; with ``{band}`` in it each band has a column of its own. A column of structs
``{bytes, path}``, as the datasets library writes images, is read as its bytes. ``keys`` and ``dates`` name columns.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from maestro_scale.datasets import raw
from maestro_scale.datasets.description.sections.images import ImageFiles
from maestro_scale.datasets.sources import remote
from maestro_scale.datasets.sources.listing import list_files, some_names
from maestro_scale.datasets.sources.protocol import Date, ImageRef
from maestro_scale.datasets.sources.raster_images import JoinedImage, RasterParts
from maestro_scale.datasets.sources.times import NO_DATE, read_dates, text_of
from maestro_scale.datasets.spec import DatasetError
from maestro_scale.errors import did_you_mean, shorten

_DATE_COLUMNS = ("timestamp", "datetime", "date", "time")
_MAX_GROUP_BYTES = 256 * 1024 * 1024  # of the columns of a row group that are read at once


def list_images(section: ImageFiles, src: str) -> Iterator[ImageRef]:
    """As :meth:`.protocol.Source.list_images`: an image per row. Reads the columns with keys and dates."""
    for ref in list_files(section, src):
        with open_file(ref.address, section) as table, _reported(ref.address):
            yield from table.rows(ref)


@contextmanager
def open_file(address: str, section: ImageFiles) -> Iterator[ParquetTable]:
    """As :meth:`.protocol.Source.open_file`."""
    from pyarrow import parquet

    parts = RasterParts(section)
    with remote.open_binary(address) as file:
        try:
            with _reported(address):
                table = ParquetTable(parquet.ParquetFile(file, pre_buffer=False), address, section, parts)
            yield table
        finally:
            parts.close()


@contextmanager
def _reported(address: str) -> Iterator[None]:
    """Errors of the library in the block become a DatasetError that names the file."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        cause = " ".join(str(error).split())
        raise DatasetError(
            f"{address}: cannot be read ({shorten(cause, 200)}); fetch the file again"
        ) from error


class ParquetTable:
    """An open file (a :class:`.protocol.OpenFile`). ``part`` of a reference: row group, and row in it."""

    def __init__(self, file: Any, address: str, section: ImageFiles, parts: RasterParts) -> None:
        self._file, self._address, self._section, self._parts = file, address, section, parts
        self._columns = {field.name: field.type for field in file.schema_arrow}
        self._last: tuple[int, tuple[str, ...], Any] | None = None

    def rows(self, ref: ImageRef) -> Iterator[ImageRef]:
        """One image per row of the file that ``ref`` stands for."""
        first = 0
        keys, dates = self._section.keys, self._date_column()
        wanted = [self._known(name) for name in (keys, dates) if name is not None]
        for group in range(self._file.num_row_groups):
            count = self._file.metadata.row_group(group).num_rows
            table: Any = self._file.read_row_group(group, columns=wanted) if wanted else None
            names: Sequence[str]
            if keys is None:
                names = [
                    str(first + i) if ref.key is None else f"{ref.key}_{first + i}" for i in range(count)
                ]
            else:
                values = table[keys].to_pylist()
                if empty := sum(v is None or v == "" for v in values):
                    raise self._error(
                        f"column {keys} has {empty} empty keys in row group {group}", "wrong keys"
                    )
                names = [sys.intern(text_of(v)) for v in values]
            when = self._read_dates(table[dates], dates) if dates is not None else [ref.date] * count
            for row in range(count):
                yield replace(ref, key=names[row], date=when[row], part=(group, row))
            first += count

    def images(self, ref: ImageRef) -> Sequence[ImageRef]:
        """``ref``: an image per row."""
        return [ref]

    def image(self, ref: ImageRef) -> JoinedImage:
        """The image of a row."""
        group, row = (int(i) for i in ref.part)
        columns, each = self._image_columns(ref)
        with _reported(self._address):
            contents = self._cells(group, row, columns)
        files = []
        for column, content in zip(columns, contents, strict=True):
            where = f"{self._address}: {column} of {ref.key or f'row {row} of row group {group}'}"
            if isinstance(content, dict):
                content = content.get("bytes")
            if not content or not isinstance(content, bytes):
                raise DatasetError(f"{where} is empty; leave the tile out", "an image is missing")
            files.append((where, _opener(content, where)))
        return self._parts.image(ref, files, each)

    def _image_columns(self, ref: ImageRef) -> tuple[list[str], bool]:
        """Columns with the bytes of an image, and whether each band has its own."""
        wanted = [self._section.band_sources[i] for i in ref.bands]
        variable = self._section.variable
        if variable is not None:
            names = (
                [variable.replace("{band}", str(w)) for w in wanted] if "{band}" in variable else [variable]
            )
            return [self._known(n) for n in names], "{band}" in variable
        if all(isinstance(w, str) and w in self._columns for w in wanted):
            return [str(w) for w in wanted], True
        found = [name for name, kind in self._columns.items() if _holds_bytes(kind)]
        if len(found) != 1:
            there = f"there are {some_names(found)}" if found else "no column holds bytes"
            raise self._error(f"which column has the images is not said: set variable ({there})", "variable")
        return found, False

    def _known(self, name: str) -> str:
        if name not in self._columns:
            hint = did_you_mean(name, self._columns)
            raise self._error(f"has no column {shorten(name)}{hint}", "a variable is missing")
        return name

    def _date_column(self) -> str | None:
        dates = self._section.dates
        if dates is not None and dates.from_ != "coordinate":
            return None
        if dates is not None and dates.coordinate is not None:
            return dates.coordinate
        found = next((name for name in _DATE_COLUMNS if name in self._columns), None)
        if found is None and dates is not None:
            raise self._error(
                f"has no column {' or '.join(_DATE_COLUMNS)}; set dates.coordinate to the one with the dates",
                "no date",
            )
        return found

    def _read_dates(self, column: Any, name: str) -> list[Date]:
        dates = self._section.dates
        if column.null_count:
            raise self._error(f"column {name} has {column.null_count} rows without a date", NO_DATE)
        values = column.combine_chunks().to_numpy(zero_copy_only=False)
        if values.dtype == object and len(values) and hasattr(values[0], "isoformat"):
            values = np.array([v.isoformat() for v in values], object)
        format, part = (dates.format, dates.part) if dates else (None, None)
        return read_dates(values, lambda _: None, format, part, f"{self._address}: column {name}")

    def _cells(self, group: int, row: int, columns: Sequence[str]) -> list[Any]:
        names = tuple(dict.fromkeys(columns))
        if self._last is None or self._last[:2] != (group, names):
            if self._group_bytes(group, names) > _MAX_GROUP_BYTES:
                return self._streamed(group, row, columns)
            self._last = (group, names, self._file.read_row_group(group, columns=list(names)))
        table = self._last[2]
        if row >= table.num_rows:
            raise self._error(f"row group {group} has {table.num_rows} rows, and no row {row}")
        return [table[name][row].as_py() for name in columns]

    def _streamed(self, group: int, row: int, columns: Sequence[str]) -> list[Any]:
        """Cells of a large row group, of which a few rows are in memory at a time."""
        first = 0
        names = list(dict.fromkeys(columns))
        for batch in self._file.iter_batches(batch_size=8, row_groups=[group], columns=names):
            if row < first + batch.num_rows:
                return [batch.column(names.index(name))[row - first].as_py() for name in columns]
            first += batch.num_rows
        raise self._error(f"row group {group} has {first} rows, and no row {row}")

    def _group_bytes(self, group: int, names: Sequence[str]) -> int:
        metadata = self._file.metadata.row_group(group)
        chunks = [metadata.column(i) for i in range(metadata.num_columns)]
        return sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] in names)

    def _error(self, problem: str, kind: str = "cannot be read") -> DatasetError:
        return DatasetError(f"{self._address}: {problem}", kind)


def _opener(content: bytes, where: str) -> Any:
    return lambda: raw.open_raster_file(io.BytesIO(content), where)


def _holds_bytes(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        names = [kind.field(i).name for i in range(kind.num_fields)]
        return "bytes" in names
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
