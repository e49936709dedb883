"""Dates of images that are not in their names: from a table, a text file or the description itself."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from maestro_scale import untrusted
from maestro_scale.datasets.description.patterns import Date, parse_date_text
from maestro_scale.datasets.description.sections.images import Dates, ImageFiles
from maestro_scale.datasets.description.tables import Table, read_lines, stem
from maestro_scale.datasets.sources import remote
from maestro_scale.datasets.spec import DatasetError

_SEPARATORS = re.compile(r"[\s,;]+")


@dataclass(frozen=True)
class ListedDates:
    """Dates by tile or by image, in stored order. ``by_key``: of a tile or, without folders and suffix, of a file."""

    dates: Dates | None = None
    src: str = ""
    by_key: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    constant: Date | None = None

    @classmethod
    def load(cls, section: ImageFiles, src: str) -> ListedDates:
        """What ``section.dates`` says without opening an image; DatasetError (one line) if that cannot be read."""
        dates = section.dates
        if dates is None:
            return cls()
        constant = None
        if dates.date is not None:
            constant = parse_date_text(dates.date, dates.format, dates.part, "dates.date")
        by_key = _read_table(dates, src) if dates.from_ == "csv" else {}
        return cls(dates, src, by_key, constant)

    def of(self, key: str, addresses: Sequence[str], num: int) -> list[Date | None]:
        """The dates of the ``num`` images of a tile, which are in these files; None where they are not listed here.

        DatasetError if the list has none for this tile, or another number of them.
        """
        if self.dates is None or self.dates.from_ not in ("csv", "text", "constant"):
            return [None] * num
        if self.dates.from_ == "constant":
            return [self.constant] * num
        where = str(self.dates.file)
        if self.dates.from_ == "text":
            where = remote.join(self.src, where.replace("{key}", key))
            texts = read_lines(where)
        else:
            texts = [t for cell in self._cells(key, addresses) for t in _texts(cell, f"{where}: {key}")]
        listed = [parse_date_text(t, self.dates.format, self.dates.part, f"{where}: {key}") for t in texts]
        if not listed:
            raise DatasetError(f"{where}: has no date for {key}; add it, or remove the tile", "no dates")
        if len(listed) == 1 and num > 1 and len(set(addresses)) == 1:
            raise DatasetError(
                f"{addresses[0]}: has {num} dates, {where} lists 1; fetch both again", "dates do not fit"
            )
        if len(listed) != num:
            raise DatasetError(
                f"{addresses[0]}: tile {key} has {num} images, {where} lists {len(listed)} dates; fetch both again",
                "dates do not fit",
            )
        return list(listed)

    def _cells(self, key: str, addresses: Sequence[str]) -> list[str]:
        if key in self.by_key:
            return list(self.by_key[key])
        # A row per file rather than per tile.
        return [d for address in dict.fromkeys(addresses) for d in self.by_key.get(file_key(address), ())]


def file_key(address: str) -> str:
    """What a row of a table may call a file: its name without folders and suffix."""
    return stem(os.path.basename(address.rstrip("/")))


def _read_table(dates: Dates, src: str) -> dict[str, tuple[str, ...]]:
    table = Table.read(remote.join(src, str(dates.file)))
    column = table.column(dates.column or "date")
    # Parsed for each tile when it is read, so that a wrong date concerns one tile only.
    by_key = {key: tuple(column[row] for row in rows) for key, rows in table.rows_by_key(dates.key).items()}
    return {stem(key): cells for key, cells in by_key.items()} | by_key


def _texts(cell: str, where: str) -> list[str]:
    """The dates in one cell."""
    cell = cell.strip()
    if cell[:1] not in "[{" or not cell:
        return [cell] if not _SEPARATORS.search(cell) or _is_one(cell) else _SEPARATORS.split(cell)
    try:
        value = untrusted.load_json(cell)
    except untrusted.InputError as error:
        raise DatasetError(f"{where}: is not a list of dates ({error})", "a date cannot be read") from error
    if isinstance(value, dict):  # {"1": 20190103, "2": …}: by number
        by_number = all(name.isdecimal() for name in value)
        value = [value[name] for name in (sorted(value, key=int) if by_number else value)]
    return [str(item) for item in value]


def _is_one(cell: str) -> bool:
    """Whether a text with a blank is a date with a time: ``2020-01-31 10:20:00``."""
    return bool(re.fullmatch(r"\S+ \d{2}:\d{2}(:\d{2})?\S*", cell))
